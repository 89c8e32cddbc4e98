"""What is peculiar to RWKV: agreement with the paper and with transformers, splitting, extremes, the layers, errors."""

import copy
import functools
import inspect
import io
import itertools
import math
import pickle
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import pykernels as pk
from pykernels.core.backends import CPU, unavailable
from pykernels.launch.wkv4 import SAVED
from pykernels.nn import RWKV4ChannelMix, RWKV4TimeMix
from pykernels.ops.wkv4 import EMPTY
from pykernels.tools.check import differentiate

needs_kernels = pytest.mark.skipif(unavailable(CPU, "cpu") is not None, reason=f"cpu: {unavailable(CPU, 'cpu')}")
hypothesis = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)

ALL = ("wkv4", "wkv6", "wkv7")
TIMED = {"wkv4": "kv", "wkv6": "rkvw", "wkv7": "rwkvab"}  # arguments with a time dimension
EXACT = {torch.float64: torch.float64}  # of every other dtype it is fp32


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def arguments(name, B=2, T=5, dtype=torch.float64, state=True, low=-5.0, high=-1e-3):
    """Of an op, by name, in the order of its signature; log decays evenly between low and high."""
    exact = EXACT.get(dtype, torch.float32)
    if name == "wkv4":
        C = 6
        shapes = dict(w=(C,), u=(C,), k=(B, T, C), v=(B, T, C), state=(B, 3, C))
    else:
        H, K, V = 2, 5, 3
        shapes = {letter: (B, T, H, V if letter == "v" else K) for letter in TIMED[name]}
        shapes |= (dict(u=(H, K)) if name == "wkv6" else {}) | dict(state=(B, H, K, V))
    inputs = {key: draw(*shape, dtype=exact if key in ("w", "u", "state") else dtype) for key, shape in shapes.items()}
    inputs["w"] = torch.empty_like(inputs["w"]).uniform_(low, high)
    if name == "wkv7":  # of unit length and half of it, as in the model: the state stays bounded
        inputs["a"] = F.normalize(inputs["a"], dim=-1)
        inputs["b"] = -inputs["a"] / 2
    if not state:
        inputs["state"] = None
    elif name == "wkv4":
        inputs["state"][:, 1].abs_()
    return inputs


def leaves(inputs):
    return [t.requires_grad_() for t in inputs.values() if t is not None]


def values_and_gradients(call, wanted):
    """What call() returns, flat, and the gradients of a random function of all of it."""
    outputs = list(call())
    return [out.detach() for out in outputs] + differentiate(outputs, list(wanted))


def agree(got, want, **tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance)


def naive(w, u, k, v, num=0.0, den=0.0):
    """The paper's sums as they stand, after sums `num` and `den` over what came before: (y, num, den)."""
    T = k.size(1)
    outputs = []
    for t in range(T + 1):
        age = torch.arange(t - 1, -1, -1, dtype=w.dtype)[:, None]
        weight = (age * w + k[:, :t]).exp()
        past = (t * w).exp()
        above, below = past * num + (weight * v[:, :t]).sum(1), past * den + weight.sum(1)
        if t == T:
            return torch.stack(outputs, 1), above, below
        present = (u + k[:, t]).exp()
        outputs.append((above + present * v[:, t]) / (below + present))


# ------------------------------------------------------------------------------------------------ the layers


class Model(torch.nn.Module):
    """An RWKV-4 language model from our layers, with the parameters' names of the published checkpoints."""

    def __init__(self, vocabulary, C, n_layer=2, dim_att=None, dim_ffn=None):
        super().__init__()
        self.emb = torch.nn.Embedding(vocabulary, C)
        self.blocks = torch.nn.ModuleList()
        for i in range(n_layer):
            block = torch.nn.ModuleDict({f"ln{n}": torch.nn.LayerNorm(C) for n in range(int(i > 0), 3)})
            block["att"] = RWKV4TimeMix(C, n_layer, i, dim_att=dim_att)
            block["ffn"] = RWKV4ChannelMix(C, n_layer, i, dim_ffn=dim_ffn)
            self.blocks.append(block)
        self.ln_out = torch.nn.LayerNorm(C)
        self.head = torch.nn.Linear(C, vocabulary, bias=False)

    def forward(self, tokens, state=None):
        x, after = self.emb(tokens), []
        for block, (att, ffn) in zip(self.blocks, state or [(None, None)] * len(self.blocks)):
            if "ln0" in block:
                x = block["ln0"](x)
            mixed, att = block["att"](block["ln1"](x), att)
            x = x + mixed
            mixed, ffn = block["ffn"](block["ln2"](x), ffn)
            x = x + mixed
            after.append((att, ffn))
        return self.head(self.ln_out(x)), after


def randomise(module):
    """Every parameter of a size at which it matters."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "time_mix" in name:
                p.uniform_()
            elif p.dim() == 2:
                p.normal_(std=1.5 * p.size(1) ** -0.5)
            elif name.endswith("time_decay"):
                p.uniform_(-6, 2)
            else:
                p.add_(torch.randn_like(p) / 2)
    return module


def paper(p, tokens, n_layer):
    """The logits, by the equations of the paper, from parameters by name."""

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]

    def project(x, name, mix):
        before = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
        mu = p[f"{name.rpartition('.')[0]}.time_mix_{mix}"]
        return (mu * x + (1 - mu) * before) @ p[name + ".weight"].T

    x = norm(p["emb.weight"][tokens], "blocks.0.ln0")
    for i in range(n_layer):
        att, ffn = f"blocks.{i}.att", f"blocks.{i}.ffn"
        a = norm(x, f"blocks.{i}.ln1")
        r, k, v = (project(a, f"{att}.{n}", n[0]) for n in ("receptance", "key", "value"))
        y, _, _ = naive(-torch.exp(p[att + ".time_decay"]), p[att + ".time_first"], k, v)
        x = x + (1 / (1 + (-r).exp()) * y) @ p[att + ".output.weight"].T
        b = norm(x, f"blocks.{i}.ln2")
        r, k = (project(b, f"{ffn}.{n}", n[0]) for n in ("receptance", "key"))
        x = x + 1 / (1 + (-r).exp()) * (k.clamp(min=0) ** 2 @ p[ffn + ".value.weight"].T)
    return norm(x, "ln_out") @ p["head.weight"].T


def in_pieces(model, tokens, sizes):
    outputs, state = [], None
    for piece in tokens.split(sizes, 1):
        out, state = model(piece, state)
        outputs.append(out)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("sizes", [[41], [1] * 41, [0, 1, 32, 0, 7, 1], [8, 33, 0]], ids=str)
def test_model_is_the_papers(sizes):
    """In one call, token by token, and in pieces: logits and the gradient of every parameter."""
    model = randomise(Model(11, 6, dim_att=10, dim_ffn=9).double())
    tokens = torch.randint(11, (2, 41))
    p = dict(model.named_parameters())
    want = values_and_gradients(lambda: [paper(p, tokens, 2)], p.values())
    agree(values_and_gradients(lambda: [in_pieces(model, tokens, sizes)], p.values()), want, rtol=1e-9, atol=1e-9)
    assert all(gradient.count_nonzero() for gradient in want)


def layer(kind, C=6, width=10, **options):
    wide = dict(dim_att=width) if kind is RWKV4TimeMix else dict(dim_ffn=width)
    return kind(C, 3, 1, **wide, **options)


def flat(result):
    """(out, state) of either layer as a list of tensors."""
    out, state = result
    return [out, *(state if isinstance(state, tuple) else (state,))]


def layer_state(kind, B=2, C=6, width=10, dtype=torch.float64):
    shift, exact = draw(B, C, dtype=dtype), EXACT.get(dtype, torch.float32)
    if kind is RWKV4ChannelMix:
        return shift
    return shift, arguments("wkv4", B, dtype=exact)["state"][..., :1] + torch.rand(B, 3, width, dtype=exact)


LAYERS = pytest.mark.parametrize("kind", [RWKV4TimeMix, RWKV4ChannelMix])


@LAYERS
@hypothesis
@given(sizes=st.lists(st.sampled_from([0, 1, 1, 2, 5, 40]), max_size=6), with_state=st.booleans(), data=st.data())
def test_a_layer_equals_any_split(kind, sizes, with_state, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    module = randomise(layer(kind, dtype=torch.float64))
    x, state = draw(2, sum(sizes), 6).requires_grad_(), layer_state(kind) if with_state else None
    parts = [] if state is None else [t.requires_grad_() for t in (state if isinstance(state, tuple) else (state,))]

    def split():
        outputs, last = [x[:, :0]], state
        for piece in x.split(sizes, 1) if sizes else ():
            out, last = module(piece, last)
            outputs.append(out)
        return flat((torch.cat(outputs, 1), last)) if sizes else flat(module(x, state))

    wanted = [x, *parts, *module.parameters()]
    agree(values_and_gradients(split, wanted), values_and_gradients(lambda: flat(module(x, state)), wanted))


@LAYERS
def test_no_token_returns_the_state(kind):
    module, state = randomise(layer(kind, dtype=torch.float64)), layer_state(kind)
    out, *after = flat(module(draw(2, 0, 6), state))
    assert out.shape == (2, 0, 6)
    agree(after, flat((out, state))[1:], rtol=0, atol=0)
    out, *after = flat(module(draw(2, 0, 6)))
    assert after[0].count_nonzero() == 0
    x = draw(2, 3, 6)
    agree(flat(module(x, tuple(after) if kind is RWKV4TimeMix else after[0])), flat(module(x)), rtol=0, atol=0)


@LAYERS
def test_the_state_is_small(kind):
    """And nothing of a long input is kept alive by it."""
    module = layer(kind)
    for T in (1, 50):
        _, *state = flat(module(draw(2, T, 6, dtype=torch.float32)))
        assert [t.untyped_storage().nbytes() for t in state] == [2 * 6 * 4, 2 * 3 * 10 * 4][: len(state)]


def test_parameters_have_the_published_names_and_shapes():
    def shapes(module):
        return {name: tuple(p.shape) for name, p in module.named_parameters()}

    assert shapes(RWKV4TimeMix(6, dim_att=10)) == dict(
        time_decay=(10,), time_first=(10,), time_mix_k=(1, 1, 6), time_mix_v=(1, 1, 6), time_mix_r=(1, 1, 6)
    ) | {"key.weight": (10, 6), "value.weight": (10, 6), "receptance.weight": (10, 6), "output.weight": (6, 10)}
    assert shapes(RWKV4ChannelMix(6)) == dict(time_mix_k=(1, 1, 6), time_mix_r=(1, 1, 6)) | {
        "key.weight": (24, 6), "receptance.weight": (6, 6), "value.weight": (6, 24)
    }  # fmt: skip
    assert shapes(RWKV4TimeMix(6))["time_decay"] == (6,)
    assert shapes(RWKV4ChannelMix(6, dim_ffn=7))["key.weight"] == (7, 6)


def test_parameters_begin_as_published():
    """The numbers of the authors' formulas for C = 4 in layers 0 to 2 of 3."""
    decays = [[-5 + 8 * (h / 3) ** power for h in range(4)] for power in (0.7, 1.35, 2.0)]
    first = [math.log(0.3) + z for z in (0.0, 0.5, -0.5, 0.0)]
    for i, (decay, power, more) in enumerate(zip(decays, (1, 2 / 3, 1 / 3), (0, 0.15, 0.3))):
        att, ffn = RWKV4TimeMix(4, 3, i), RWKV4ChannelMix(4, 3, i)
        agree([att.time_decay, att.time_first], [torch.tensor(decay), torch.tensor(first)])
        mix = torch.tensor([0, 0.25, 0.5, 0.75]) ** power
        for got, want in (
            (att.time_mix_k, mix), (att.time_mix_v, mix + more), (att.time_mix_r, mix.sqrt()),
            (ffn.time_mix_k, mix), (ffn.time_mix_r, mix),
        ):  # fmt: skip
            agree([got], [want.view(1, 1, 4)])
        for zero in (att.key, att.receptance, att.output, ffn.receptance, ffn.value):
            assert zero.weight.count_nonzero() == 0
        for matrix, gain in ((att.value.weight, 1), (ffn.key.weight, 4)):
            agree([matrix.T @ matrix], [gain * torch.eye(4)], rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):  # one layer, one channel: nothing is divided by zero
        for module in (RWKV4TimeMix(1, dtype=dtype), RWKV4ChannelMix(1, dtype=dtype)):
            assert all(p.isfinite().all() and p.dtype == dtype for p in module.parameters())


@LAYERS
def test_both_spellings_load(kind):
    """Inside a model too; and what is missing or too much is still found."""
    spelt = {"time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance"}
    module, other = (torch.nn.ModuleDict({"att": randomise(layer(kind))}) for _ in range(2))
    ours = module.state_dict()
    theirs = {"att." + spelt.get(name[4:], name[4:]): p for name, p in ours.items()}
    assert len(theirs.keys() - ours.keys()) >= 2
    for published in (theirs, ours):
        randomise(other)
        assert other.load_state_dict(published) == torch.nn.modules.module._IncompatibleKeys([], [])
        agree([*other.state_dict().values()], [*ours.values()], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "att.time_mix_key"'):
        other.load_state_dict(ours | theirs)
    del theirs["att.time_mix_key"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "att.time_mix_k"'):
        other.load_state_dict(theirs)


@LAYERS
def test_copies_pickles_and_moves(kind):
    module, x = randomise(layer(kind)), draw(2, 5, 6, dtype=torch.float32)
    want = flat(module(x))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    others = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)
    for other in others:
        agree(flat(other(x)), want, rtol=0, atol=0)
        other.load_state_dict({n.replace("mix_k", "mix_key"): torch.zeros_like(p) for n, p in other.named_parameters()})
        agree(flat(module(x)), want, rtol=0, atol=0)  # nothing is shared
    assert {t.dtype for t in flat(module.double()(x.double()))} == {torch.float64}


@LAYERS
def test_parameters_replaced_by_other_tensors_are_used(kind):
    module, other = randomise(layer(kind)), randomise(layer(kind))
    x = draw(2, 5, 6, dtype=torch.float32)
    agree(flat(torch.func.functional_call(module, other.state_dict(), x)), flat(other(x)), rtol=0, atol=0)


@LAYERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    """The sums stay in fp32, and the result is that of fp32 with the same weights, to a few units."""
    module = randomise(layer(kind, dtype=dtype))
    exact = copy.deepcopy(module).float()
    x = draw(2, 40, 6, dtype=dtype).requires_grad_()
    state = layer_state(kind, dtype=dtype)
    single = (state[0].float(), state[1]) if kind is RWKV4TimeMix else state.float()
    got, want = flat(module(x, state)), flat(exact(x.float(), single))
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32][: len(got)]
    agree([t.float() for t in got], want, rtol=0.1, atol=0.1)
    sum(t.float().sum() for t in got).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in [x, *module.parameters()])


def test_the_decay_is_taken_in_fp32():
    """With keys of 0 the denominator is a geometric series, which a decay rounded to bf16 gives wrong by percents."""
    module = RWKV4TimeMix(6, dtype=torch.bfloat16)  # whose key.weight is 0
    with torch.no_grad():
        module.time_decay.uniform_(-4, -3)
    _, (_, wkv) = module(draw(2, 60, 6, dtype=torch.bfloat16))
    ratio = module.time_decay.double().exp().neg().exp()
    series = (1 - ratio**60) / (1 - ratio)
    agree([wkv[:, 1].double() * wkv[:, 2].double().exp()], [series.expand(2, 6)], rtol=1e-5, atol=0)


@LAYERS
def test_layer_under_autocast(kind):
    module, x = randomise(layer(kind)), draw(2, 5, 6, dtype=torch.float32)
    want = flat(module(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = module(x)
        got = flat((out, state))
        assert [t.dtype for t in got] == [torch.bfloat16, torch.float32, torch.float32][: len(got)]
        agree([t.float() for t in got], want, rtol=0.1, atol=0.1)
        module(x, state)
        assert module(x.bfloat16())[0].dtype == torch.bfloat16
        for wrong in (x.double(), x.half(), x.long()):
            with pytest.raises(TypeError, match=f"x: expected torch.float32 or torch.bfloat16, got {wrong.dtype}"):
                module(wrong)
        assert layer(kind).double()(x.double())[0].dtype == torch.float64
    got[0].float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


def leaves_of(function, *args):
    return pytree.tree_leaves(function(*args))


def lengths_of_one_graph(function, call, wanted):
    """Compiled whole, function gives what it gives otherwise for every length, from one graph.

    call(T, B): its arguments, drawn. wanted(arguments): what to differentiate by; nothing is no training. The lengths
    lie on both sides of SAVED; no batch is another size, for torch would take the two for one.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((7, 4), (37, 12), (64, 8), (100, 9), (9, 11)):
        given = call(T, B)
        by = wanted(given)
        agree(*(values_and_gradients(functools.partial(leaves_of, f, *given), by) for f in (compiled, function)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


TRAINING = pytest.mark.parametrize("training", [False, True], ids=("inference", "training"))
STATE = pytest.mark.parametrize("state", [False, True], ids=("no state", "state"))


@needs_kernels
@LAYERS
@STATE
@TRAINING
@pytest.mark.filterwarnings("ignore")
def test_layer_compiles_whole_once_for_every_length(kind, state, training):
    module = randomise(layer(kind, dtype=torch.float64)).requires_grad_(training)

    def call(T, B):
        return draw(B, T, 6).requires_grad_(training), layer_state(kind, B) if state else None

    lengths_of_one_graph(module, call, lambda given: [given[0], *module.parameters()] if training else [])


@needs_kernels
@pytest.mark.parametrize("name", ALL)
@STATE
@TRAINING
@pytest.mark.filterwarnings("ignore")
def test_op_compiles_whole_once_for_every_length(name, state, training):
    def call(T, B):
        inputs = [t for t in arguments(name, B, T, state=state).values() if t is not None]
        return [t.requires_grad_(training) for t in inputs]

    lengths_of_one_graph(lambda *args: getattr(pk, name)(*args), call, lambda given: given if training else [])


class Scaled(torch.nn.Module):
    def forward(self, *args):
        return pk.wkv6(*args, scale=self.scale)


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_scale_may_be_an_attribute_of_a_compiled_module():
    torch._dynamo.reset()
    module = Scaled()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    inputs = arguments("wkv6", 3, 9).values()
    for module.scale in (0.7, 2):
        agree(compiled(*inputs), module(*inputs), rtol=0, atol=0)


class Called(torch.nn.Module):
    """An op of what has a time dimension; its other arguments are parameters."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.rest = torch.nn.ParameterDict({k: t for k, t in arguments(name, 3).items() if k not in TIMED[name]})

    def forward(self, timed):
        return getattr(pk, self.name)(**timed, **self.rest)


def exports_with_dynamic_length(module, draw_inputs):
    """Also for training: for lengths on both sides of SAVED the exported program has the module's gradients."""
    dynamic = {1: torch.export.Dim("T", min=2, max=512)}
    example = draw_inputs(6)
    shapes = pytree.tree_map(lambda _: dynamic, (example,))
    program = torch.export.export(module, (example,), dynamic_shapes=shapes).module()
    for T in (11, 80):
        inputs = draw_inputs(T)
        results = []
        for m in (program, module):
            wanted = [p for _, p in sorted(m.named_parameters()) if p.requires_grad]
            results.append(values_and_gradients(functools.partial(leaves_of, m, inputs), wanted))
        agree(*results)


@needs_kernels
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore")
def test_op_exports_with_dynamic_length(name):
    def draw_inputs(T):
        return {key: t for key, t in arguments(name, 3, T).items() if key in TIMED[name]}

    exports_with_dynamic_length(Called(name), draw_inputs)


@needs_kernels
@LAYERS
@TRAINING
@pytest.mark.filterwarnings("ignore")
def test_layer_exports_with_dynamic_length(kind, training):
    module = randomise(layer(kind, dtype=torch.float64)).requires_grad_(training)
    exports_with_dynamic_length(module, lambda T: draw(3, T, 6))


@LAYERS
def test_layer_on_meta_and_under_another_default_device(kind):
    """What is made on a device is initialised there, whatever the default; shapes need no data."""
    x = draw(2, 40, 6, dtype=torch.float32)
    module = layer(kind, device="meta")
    got, want = flat(module(x.to("meta"))), flat(layer(kind)(x))
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
    assert {t.device.type for t in got} == {"meta"}
    with torch.device("meta"):
        assert {p.device.type for p in layer(kind).parameters()} == {"meta"}
        made = layer(kind, device="cpu")
        assert {t.device.type for t in flat(made(x))} == {"cpu"}
    module.to_empty(device="cpu").reset_parameters()
    for other in (made, module):
        for name, p in other.named_parameters():
            if p.dim() != 2:
                agree([p], [layer(kind).get_parameter(name)], rtol=0, atol=0)


@LAYERS
def test_layer_under_torch_func(kind):
    """grad by its parameters, vmap over sequences, both, and jacrev, of the kernels against the reference."""
    module = randomise(layer(kind, dtype=torch.float64))
    parameters, x = dict(module.named_parameters()), draw(3, 1, 7, 6)

    def loss(parameters, x):
        return sum(t.sin().sum() for t in flat(torch.func.functional_call(module, parameters, (x,))))

    def results():
        yield torch.func.grad(loss)(parameters, x[0])
        yield torch.func.vmap(module)(x)
        yield torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        yield torch.func.jacrev(module)(x[0])

    got = pytree.tree_leaves([*results()])
    with pk.use_backend("reference"):
        agree(got, pytree.tree_leaves([*results()]))
        agree(pytree.tree_leaves(torch.func.jacfwd(module)(x[0])), pytree.tree_leaves(torch.func.jacrev(module)(x[0])))


X, S, Z = torch.zeros(2, 5, 6), torch.zeros(2, 6), torch.zeros(2, 3, 10)
ERRORS = [
    (lambda: RWKV4TimeMix(0), ValueError, "n_embd: expected at least 1, got 0"),
    (lambda: RWKV4TimeMix(6.0), TypeError, "n_embd: expected an integer, got float"),
    (lambda: RWKV4ChannelMix(6, 2, True), TypeError, "layer_id: expected an integer, got bool"),
    (lambda: RWKV4TimeMix(6, 0), ValueError, "n_layer: expected at least 1, got 0"),
    (lambda: RWKV4ChannelMix(6, 2, 2), ValueError, "layer_id: expected 0 to 1, got 2"),
    (lambda: RWKV4TimeMix(6, dim_att=0), ValueError, "dim_att: expected at least 1, got 0"),
    (lambda: RWKV4ChannelMix(6, dim_ffn=0), ValueError, "dim_ffn: expected at least 1, got 0"),
    (lambda: layer(RWKV4TimeMix)([1]), TypeError, r"x: expected a tensor \[B, T, C\], got list"),
    (lambda: layer(RWKV4TimeMix)(X[0]), ValueError, r"x: expected rank 3 \[B, T, C\], got \[5, 6\]"),
    (lambda: layer(RWKV4ChannelMix)(X[..., 1:]), ValueError, r"x: expected \[B, T, 6\], got \[2, 5, 5\]"),
    (
        lambda: layer(RWKV4ChannelMix)(X.double()),
        TypeError,
        "x: expected the weights' torch.float32, got torch.float64",
    ),
    (lambda: layer(RWKV4ChannelMix)(X.to("meta")), ValueError, "x: expected the module's device cpu, got meta"),
    (lambda: layer(RWKV4TimeMix)(X, S), TypeError, r"state: expected a tuple \(shift, wkv\), got torch.float32"),
    (lambda: layer(RWKV4TimeMix)(X, (S, S, S)), ValueError, r"state: expected two tensors \(shift, wkv\), got 3"),
    (lambda: layer(RWKV4TimeMix)(X, (S[:1], Z)), ValueError, r"state\[0\]: expected \[2, 6\] to match x, got \[1, 6\]"),
    (
        lambda: layer(RWKV4TimeMix)(X, (S, Z[..., 1:])),
        ValueError,
        r"state\[1\]: expected \[2, 3, 10\] .*got \[2, 3, 9\]",
    ),
    (
        lambda: layer(RWKV4TimeMix)(X, (S, Z.half())),
        TypeError,
        r"state\[1\]: expected torch.float32, got torch.float16",
    ),
    (lambda: layer(RWKV4TimeMix)(X, (S, Z.to("meta"))), ValueError, r"state\[1\]: expected x's device cpu, got meta"),
    (lambda: layer(RWKV4ChannelMix)(X, (S, Z)), TypeError, r"state: expected a tensor \[B, C\], got tuple"),
    (
        lambda: layer(RWKV4ChannelMix)(X, S.half()),
        TypeError,
        "state: expected x's dtype torch.float32, got torch.float16",
    ),
    (lambda: layer(RWKV4ChannelMix)(X, S.to("meta")), ValueError, "state: expected x's device cpu, got meta"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_layers_name_argument_expectation_and_value(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


# ------------------------------------------------------------------------------------------------ transformers


@pytest.fixture
def theirs():
    pytest.importorskip("transformers")
    from transformers.models.rwkv import modeling_rwkv

    return modeling_rwkv


@pytest.mark.parametrize("with_state", [False, True])
def test_op_agrees_with_transformers_loop(theirs, with_state):
    """Output, state and the gradients of every argument, the raw decay's through log_decay."""
    inputs = arguments("wkv4", 2, 40, torch.float32, state=with_state)
    inputs["w"] = draw(6, dtype=torch.float32)
    wanted = leaves(inputs)
    state = inputs.pop("state")

    def ours():
        return pk.wkv4(pk.log_decay(inputs["w"], "exp"), *list(inputs.values())[1:], state)

    def loop():
        given = None if state is None else state.unbind(1)
        y, last = theirs.rwkv_linear_attention_cpu(*inputs.values(), given, return_state=True)
        return y, torch.stack(last, 1)

    agree(values_and_gradients(ours, wanted), values_and_gradients(loop, wanted), rtol=1e-4, atol=1e-4)


@pytest.fixture
def their_model(theirs):
    sizes = dict(vocab_size=11, hidden_size=6, num_hidden_layers=2, attention_hidden_size=10, intermediate_size=9)
    config = theirs.RwkvConfig(context_length=64, **sizes)
    return randomise(theirs.RwkvForCausalLM(config)).eval()


def test_layers_take_transformers_weights(their_model):
    """Attention and feed-forward, from the first token and from a state: of one sequence, for of several theirs gives
    B × B outputs to one token."""
    for i, block in enumerate(their_model.rwkv.blocks):
        att, ffn = RWKV4TimeMix(6, 2, i, dim_att=10), RWKV4ChannelMix(6, 2, i, dim_ffn=9)
        att.load_state_dict(block.attention.state_dict())
        ffn.load_state_dict(block.feed_forward.state_dict())
        state = [torch.zeros(1, 6 if n < 2 else 10, 2) for n in range(5)]
        state[4] += EMPTY
        attended = fed = None
        with torch.no_grad():
            for T in (7, 1, 40):
                x = draw(1, T, 6, dtype=torch.float32)
                want, state = block.attention(x, state=state, use_cache=True)
                got, attended = att(x, attended)
                agree([got, attended[0]], [want, state[1][..., i]], rtol=1e-4, atol=1e-5)
                agree([*attended[1].unbind(1)], [s[..., i] for s in state[2:]], rtol=1e-4, atol=1e-5)
                want, state = block.feed_forward(x, state=state)
                got, fed = ffn(x, fed)
                agree([got, fed], [want, state[0][..., i]], rtol=1e-4, atol=1e-5)


def test_model_takes_transformers_weights(their_model):
    names = (
        ("rwkv.", ""), ("embeddings", "emb"), ("pre_ln", "ln0"), ("attention", "att"), ("feed_forward", "ffn"),
    )  # fmt: skip
    weights = {}
    for name, p in their_model.state_dict().items():
        for old, new in names:
            name = name.replace(old, new)
        weights[name] = p
    model = Model(11, 6, dim_att=10, dim_ffn=9)
    model.load_state_dict(weights)
    tokens = torch.randint(11, (2, 30))
    with torch.no_grad():
        agree([in_pieces(model, tokens, [21, 9])], [their_model(tokens, use_cache=False).logits], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------ learning


def corpus():
    """The docstrings of some modules of the standard library, some tens of thousands of characters."""
    import argparse
    import collections
    import logging
    import pathlib
    import random
    import statistics

    text = []
    for module in (argparse, collections, logging, pathlib, random, statistics):
        members = [member for _, member in sorted(vars(module).items()) if inspect.isclass(member)]
        for member in [module, *members, *(f for m in members for _, f in sorted(vars(m).items()))]:
            text.append(inspect.getdoc(member) or "")
    return "\n".join(dict.fromkeys(text)).encode("ascii", "ignore")


def test_a_model_learns_text_and_speaks_alike_in_both_forms():
    """Greedily, token by token with a state that stays as it is, and from the whole prefix again and again."""
    text = torch.frombuffer(bytearray(corpus()), dtype=torch.uint8).long()
    letters, text = text.unique(return_inverse=True)
    assert len(text) > 20_000
    model = Model(len(letters), 64)
    torch.nn.init.uniform_(model.emb.weight, -1e-4, 1e-4)  # as published
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(40):
        start = torch.randint(len(text) - 128, (8, 1))
        batch = text[start + torch.arange(129)]
        logits, _ = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(losses)
    assert abs(losses[0] - math.log(len(letters))) < 0.5
    assert sum(losses[-5:]) / 5 < 2.8  # 2.2 to 2.4 in eight runs; the letters' frequencies alone give 3.24

    model.double()  # where no two logits tie
    with torch.no_grad():
        said = text[None, 1000:1040]
        logits, state = model(said)
        size = None
        for _ in range(40):
            again, _ = model(said)
            agree([logits[:, -1]], [again[:, -1]])
            assert torch.equal(logits[:, -1].argmax(-1), again[:, -1].argmax(-1))
            token = logits[:, -1:].argmax(-1)
            said = torch.cat((said, token), 1)
            logits, state = model(token, state)
            sizes = [t.untyped_storage().nbytes() for (shift, wkv), seen in state for t in (shift, wkv, seen)]
            assert size in (None, sum(sizes))
            size = sum(sizes)
    assert size == 2 * 64 * 5 * 8


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", ALL)
@settings(hypothesis, max_examples=12)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 1, 3, SAVED - 1, SAVED, SAVED + 1]), min_size=1, max_size=5),
    B=st.integers(1, 3),
    state=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(sizes=[7, 0, 1, SAVED], B=2, state=True, seed=0)
def test_one_call_equals_any_split(name, dtype, sizes, B, state, seed):
    """Calls that hand on the state give the whole call's output, state and gradients.

    To fp64's accuracy, and to fp32's whatever the inputs' dtype: between calls nothing is rounded to half precision.
    """
    torch.manual_seed(seed)
    inputs = arguments(name, B, sum(sizes), dtype, state)
    wanted, function = leaves(inputs), getattr(pk, name)
    timed = {key: inputs[key].split(sizes, 1) for key in TIMED[name]}

    def split():
        outputs, last = [], inputs["state"]
        for n in range(len(sizes)):
            out, last = function(**inputs | {key: pieces[n] for key, pieces in timed.items()} | dict(state=last))
            outputs.append(out)
        return torch.cat(outputs, 1), last

    got, want = (values_and_gradients(call, wanted) for call in (split, lambda: function(**inputs)))
    for g, w in zip(got, want, strict=True):
        unit = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1.6e-2}[g.dtype]
        torch.testing.assert_close(g, w, rtol=unit, atol=unit * max(1.0, w.abs().max().item() if w.numel() else 0.0))


@pytest.mark.parametrize("name", ALL)
def test_no_step_returns_the_state(name):
    """And its gradient."""
    inputs = arguments(name, T=0)
    state = inputs["state"].requires_grad_()
    y, last = getattr(pk, name)(**inputs)
    assert y.shape == inputs["v"].shape
    agree([last], [state], rtol=0, atol=0)
    given = torch.randn_like(last)
    agree(torch.autograd.grad(last, state, given), [given], rtol=0, atol=0)


@pytest.mark.parametrize("T", [1, 5, 70])
def test_wkv4_is_the_papers_sum(T):
    """The public function against the paper's sums as they stand, state and all gradients included."""
    inputs = arguments("wkv4", T=T)
    wanted = leaves(inputs)
    w, u, k, v, state = inputs.values()

    def ours():
        y, (aa, bb, pp) = (lambda y, s: (y, s.unbind(1)))(*pk.wkv4(w, u, k, v, state))
        return y, aa * pp.exp(), bb * pp.exp()

    def sums():
        aa, bb, pp = state.unbind(1)
        return naive(w, u, k, v, aa * pp.exp(), bb * pp.exp())

    agree(values_and_gradients(ours, wanted), values_and_gradients(sums, wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [1, 7, 80])
def test_wkv4_largest_exponent_has_its_gradient(T):
    """pp' is the largest of pp + T·w and k_i + (T − 1 − i)·w: its gradient goes to that one, and to w as often."""
    inputs = arguments("wkv4", 3, T, low=-0.3, high=-1e-3)
    w, _, k, _, state = leaves(inputs)
    pp = pk.wkv4(**inputs)[1][:, 2]
    candidates = torch.cat((state[:, 2:], k), 1)  # [B, 1 + T, C]
    age = torch.arange(T, -1, -1, dtype=torch.float64)
    age[1:] = torch.arange(T - 1, -1, -1, dtype=torch.float64)
    value, place = (candidates + age[:, None] * w).detach().max(1)
    agree([pp], [value])
    given = torch.randn_like(pp)
    gw, gk, gstate = torch.autograd.grad(pp, (w, k, state), given)
    want = torch.zeros_like(candidates).scatter_(1, place[:, None], given[:, None])
    agree([gk, gstate[:, 2], gw], [want[:, 1:], want[:, 0], (given * age[place]).sum(0)], rtol=1e-9, atol=1e-9)
    assert gstate[:, :2].count_nonzero() == 0


def test_rwkv5_is_a_decay_that_stays():
    """w [H, K] is the same [H, K] at every sequence and step, and its gradient is the sum of theirs."""
    inputs = arguments("wkv6", 2, 40)
    inputs["w"] = inputs["w"][0, 0].clone()
    wanted = leaves(inputs)
    got = values_and_gradients(lambda: pk.wkv6(**inputs), wanted)
    expanded = inputs | dict(w=inputs["w"].expand(2, 40, 2, 5))
    agree(got, values_and_gradients(lambda: pk.wkv6(**expanded), wanted), rtol=1e-10, atol=1e-10)
    y, S = [], inputs["state"]
    for r, k, v in zip(*(inputs[key].unbind(1) for key in "rkv")):
        kv = k[..., None] * v[..., None, :]
        y.append((r[..., None] * (S + inputs["u"][..., None] * kv)).sum(-2))
        S = inputs["w"].exp()[..., None] * S + kv
    agree(got[:2], [torch.stack(y, 1), S], rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ extremes


@pytest.mark.parametrize("decay", [-1e-6, -1e-2, -1.0, -20.0])
def test_wkv4_with_keys_of_60(decay):
    """fp32, where e^60 squared overflows and e^−60 squared vanishes, against the plain sum in fp64."""
    inputs = arguments("wkv4", 2, 70, torch.float32, state=False, low=decay, high=decay)
    inputs["k"] = torch.where(torch.rand_like(inputs["k"]) < 0.5, -60.0, 60.0) + inputs["k"]
    inputs.pop("state")
    exact = {key: t.double() for key, t in inputs.items()}
    got = values_and_gradients(lambda: pk.wkv4(**inputs)[:1], leaves(inputs))
    want = values_and_gradients(lambda: naive(**exact)[:1], leaves(exact))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4 * max(1.0, w.abs().max().item()))


def test_wkv4_ignores_keys_of_minus_infinity():
    """Weight 0, at the present and after; the state decays on. In the first place it would be 0/0, as for anyone."""
    inputs = arguments("wkv4", 2, 70, state=False)
    inputs.pop("state")
    inputs["k"][:, 1::3] = -math.inf
    inputs["k"][:, 40:60] = -math.inf
    got, want = (values_and_gradients(lambda f=f: f(**inputs)[:1], leaves(inputs)) for f in (pk.wkv4, naive))
    agree(got, want, rtol=1e-9, atol=1e-9)
    assert pk.wkv4(**inputs)[1].isfinite().all()


@pytest.mark.parametrize("pp", [0.0, 1e4, EMPTY])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_wkv4_state_of_zeros_has_seen_nothing(dtype, pp):
    """Whatever its pp says, and however small the keys: no 0/0."""
    inputs = arguments("wkv4", 2, 40, dtype, state=False)
    inputs["k"] -= 200
    state = torch.zeros(2, 3, 6, dtype=dtype)
    state[:, 2] = pp
    wanted = [t for t in leaves(inputs) if t is not None]
    want = values_and_gradients(lambda: pk.wkv4(**inputs), wanted)
    got = values_and_gradients(lambda: pk.wkv4(**inputs | dict(state=state)), wanted)
    assert all(t.isfinite().all() for t in got)
    agree(got, want)
    inputs["state"] = state.requires_grad_()
    y, last = pk.wkv4(**inputs)
    assert torch.autograd.grad(y.sum() + last[:, :2].sum(), state)[0].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("threads", [2, 7])
@pytest.mark.parametrize("T", [129, 1000])
def test_wkv4_segments_of_time_side_by_side_give_what_one_pass_gives(T, threads):
    """Few channels and many threads: the sequence is cut. Gradients too, the final exponent's among them."""
    inputs = arguments("wkv4", 1, T, low=-0.1, high=-1e-6)
    inputs["k"] *= 5
    wanted = leaves(inputs)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = values_and_gradients(lambda: pk.wkv4(**inputs), wanted)
        torch.set_num_threads(threads)
        got = values_and_gradients(lambda: pk.wkv4(**inputs), wanted)
    finally:
        torch.set_num_threads(before)
    assert any(not torch.equal(g, w) for g, w in zip(got, want)), "the sequence was not cut"
    agree(got, want)


@pytest.mark.parametrize("name", ALL)
def test_long_sequences_stay_finite(name):
    """5000 steps, decays from e^−20 to next to none; an RWKV-4 output lies among the values it is a mean of."""
    inputs = arguments(name, 1, 5000, torch.float32, state=False)
    inputs["w"] = -torch.empty_like(inputs["w"]).uniform_(math.log(1e-6), math.log(20)).exp()
    if name == "wkv4":
        inputs["k"] *= 20
    with torch.no_grad():
        y, last = getattr(pk, name)(**inputs)
    assert y.isfinite().all()
    assert last.isfinite().all()
    if name == "wkv4":
        v = inputs["v"]
        assert (y <= v.cummax(1)[0] + 1e-4).all()
        assert (y >= v.cummin(1)[0] - 1e-4).all()


# ------------------------------------------------------------------------------------------------ decay, dtypes, memory


def test_log_decay_of_each_convention():
    """Against the factor of a step, d = e^w, as public code writes it."""
    x = draw(50) * 3
    agree([pk.log_decay(x, "exp").exp()], [torch.exp(-torch.exp(x))])
    agree([pk.log_decay(x, "sigmoid").exp()], [torch.exp(-0.606531 / (1 + torch.exp(-x)))], rtol=1e-6, atol=0)
    assert pk.log_decay(-x.abs(), "log").equal(-x.abs())
    for convention in ("exp", "sigmoid"):
        assert (pk.log_decay(1e3 * x.float(), convention) <= 0).all()
    for convention in ("exp", "sigmoid", "log"):
        function, w = functools.partial(pk.log_decay, convention=convention), -x.abs()
        agree([torch.func.vmap(function)(w)], [function(w)])
        value, tangent = torch.func.jvp(function, (w,), (torch.ones_like(w),))
        agree([value, tangent], [function(w), torch.func.jacrev(function)(w).diag()])
    with pytest.raises(ValueError, match="convention: expected 'log', 'exp' or 'sigmoid', got 'ln'"):
        pk.log_decay(x, "ln")
    with pytest.raises(ValueError, match="decay: expected log decays ≤ 0"):
        pk.log_decay(x.abs(), "log")
    for value in ([1.0], torch.ones(2, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"decay: expected a floating tensor, got (list|torch\.int64)"):
            pk.log_decay(value, "exp")


@pytest.mark.parametrize("name", ALL)
def test_op_under_autocast(name):
    inputs = arguments(name, 2, 40, torch.float32)
    wanted = leaves(inputs)
    want = values_and_gradients(lambda: getattr(pk, name)(**inputs), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values_and_gradients(lambda: getattr(pk, name)(**inputs), wanted)
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * (1 + len(wanted))]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.float(), w, rtol=0.05, atol=0.05 * max(1.0, w.abs().max().item()))


class Kept:
    """What a hook puts in a saved tensor's place."""

    def __init__(self, tensor):
        self.tensor = tensor


@needs_kernels
@pytest.mark.parametrize("name", [*ALL, "wkv5"])
def test_backward_keeps_inputs_and_checkpoints_alone(name):
    """No state per step: as many bytes as the inputs have, and a state every SAVED steps."""
    T = 20 * SAVED
    inputs = arguments(name.replace("5", "6"), 2, T, torch.float32)
    if name == "wkv5":
        inputs["w"] = inputs["w"][0, 0].clone()
    leaves(inputs)
    alive = weakref.WeakSet()

    def keep(tensor):
        kept = Kept(tensor.detach())  # else an output that its own node saved would keep itself alive
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        y, last = getattr(pk, name.replace("5", "6"))(**inputs)
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    given = sum(t.nbytes for t in inputs.values())
    assert given / 2 < sum(storages.values()) <= given + last.nbytes * T // SAVED
    assert y.requires_grad


# ------------------------------------------------------------------------------------------------ what is refused


class Subclass(torch.Tensor):
    """A tensor that is none to `type`."""


@pytest.mark.parametrize("name", ALL)
def test_positive_log_decay_is_refused(name):
    inputs = arguments(name)
    inputs["w"][..., -1] = 0
    getattr(pk, name)(**inputs)
    inputs["w"].view(-1)[-1] = 0.25
    w = inputs["w"]
    for kind in (lambda t: t, torch.nn.Parameter, lambda t: t.as_subclass(Subclass)):
        with pytest.raises(ValueError, match=r"w: expected log decays ≤ 0 .*got 0.25"):
            getattr(pk, name)(**inputs | dict(w=kind(w)))
        with pytest.raises(ValueError, match=r"decay: expected log decays ≤ 0 .*got 0.25"):
            pk.log_decay(kind(w), "log")


def wrong(name, key):
    """(what to make of the argument, the error) for each thing that can be wrong with it."""
    yield lambda t: [1], TypeError, f"{key}: expected a tensor .*got list"
    yield lambda t: t.to("meta"), ValueError, rf"{key}: expected \w's device cpu, got meta"
    if not (name != "wkv4" and key == "v"):  # whose width is free
        yield lambda t: t[..., 1:], ValueError, rf"{key}: expected \[.*\] to match \w, got \["
    yield lambda t: t[None], ValueError, rf"{key}: expected (rank|\[).*got \[1, "
    if not (name == "wkv6" and key == "w"):  # which has a second form
        yield lambda t: t[0], ValueError, rf"{key}: expected (rank|\[).*got \["
    for dtype in (torch.int64, torch.float16):  # beside fp32; half precision is right where all of it is
        yield lambda t, d=dtype: t.to(d), TypeError, rf"{key}: expected .*torch.float32.*got {dtype}"
    if key in TIMED[name]:
        yield lambda t: t[:, 1:], ValueError, rf"{key}: expected \[.*\] to match \w, got \["


CASES = [
    (name, key, n)
    for name in ALL
    for key in arguments(name)
    if key != {"wkv4": "k", "wkv6": "r", "wkv7": "r"}[name]  # the one that the others are held against
    for n in range(len(list(wrong(name, key))))
]


@pytest.mark.parametrize(("name", "key", "n"), CASES)
def test_ops_name_argument_expectation_and_value(name, key, n):
    inputs = arguments(name, dtype=torch.float32)
    change, kind, message = next(itertools.islice(wrong(name, key), n, None))
    getattr(pk, name)(**inputs)
    with pytest.raises(kind, match=message):
        getattr(pk, name)(**inputs | {key: change(inputs[key])})


@pytest.mark.parametrize("name", ALL)
def test_the_first_argument_is_held_against_the_ranks_and_dtypes_there_are(name):
    first = {"wkv4": "k", "wkv6": "r", "wkv7": "r"}[name]
    inputs = arguments(name, dtype=torch.float32)
    for value, kind, message in (
        ([1], TypeError, f"{first}: expected a tensor .*got list"),
        (inputs[first][0], ValueError, f"{first}: expected rank"),
        (inputs[first].long(), TypeError, f"{first}: expected torch.float64 or .*got torch.int64"),
    ):
        with pytest.raises(kind, match=message):
            getattr(pk, name)(**inputs | {first: value})


@pytest.mark.parametrize("name", ["wkv6", "wkv7"])
def test_scale_is_a_number_of_any_kind(name):
    inputs = arguments(name)
    want = getattr(pk, name)(**inputs, scale=0.5)
    for scale in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        agree(getattr(pk, name)(**inputs, scale=scale), want, rtol=0, atol=0)
    for scale, kind, message in (
        (torch.tensor(0.5), TypeError, "scale: expected a number.*got a tensor"),
        (torch.nn.Parameter(torch.tensor(0.5)), TypeError, "scale: expected a number.*got a tensor"),
        ("0.5", TypeError, "scale: expected a number, got str"),
        (math.nan, ValueError, "scale: expected a finite number, got nan"),
    ):
        with pytest.raises(kind, match=message):
            getattr(pk, name)(**inputs, scale=scale)
