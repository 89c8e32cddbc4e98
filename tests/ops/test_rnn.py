"""What is peculiar to the recurrent ops: agreement with torch.nn's, splitting, the tails, the modules, errors."""

import copy
import functools
import itertools
import pickle
import threading

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import pykernels as pk
from pykernels.core.backends import CPU, INTERPRET, TRITON, unavailable
from pykernels.core.declaration import OPS
from pykernels.ops.rnn import GRU
from pykernels.tools.check import compare, differentiate

BACKEND = "triton" if INTERPRET else "cpu"
REASON = unavailable(TRITON if INTERPRET else CPU, "cpu")
needs_kernels = pytest.mark.skipif(REASON is not None, reason=f"{BACKEND}: {REASON}")

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
MODULES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def state(name, B, H, dtype=torch.float64):
    h = draw(B, H, dtype=dtype)
    return (h, draw(B, H, dtype=dtype)) if name == "lstm" else h


def layer(name, I, H, dtype=torch.float64):
    """weight_ih, weight_hh, bias_ih, bias_hh, of a size that keeps the gates in their middle."""
    return [draw(GATES[name] * H, n, dtype=dtype) / (n or 1) ** 0.5 for n in (I, H)] + [
        draw(GATES[name] * H, dtype=dtype) for _ in range(2)
    ]


def tensors(tree):
    """The data of every tensor and PackedSequence in it."""
    leaves = pytree.tree_leaves(tree, is_leaf=lambda t: isinstance(t, PackedSequence))
    return [t.data if isinstance(t, PackedSequence) else t for t in leaves]


def outputs_and_gradients(call, *wanted):
    """What call() returns, and the gradients of a random function of all of it."""
    outputs = tensors(call())
    return [out.detach() for out in outputs] + differentiate(outputs, list(wanted))


def agree(got, want, **tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **tolerance)


# ------------------------------------------------------------------------------------------------ modules


def pair(name, *args, dtype=torch.float64, **options):
    """(torch's module, ours) with the same parameters, by way of the state_dict."""
    theirs, ours = (getattr(nn, MODULES.get(name, name))(*args, dtype=dtype, **options) for nn in (torch.nn, pk.nn))
    assert ours.load_state_dict(theirs.state_dict()) == torch.nn.modules.module._IncompatibleKeys([], [])
    return theirs, ours


def module_input(form, dtype=torch.float64, T=5, B=3, I=4):
    """(input, B or None when there is no batch, the tensor to differentiate)"""
    if form in ("sorted", "unsorted"):
        lengths = (5, 3, 1) if form == "sorted" else (2, 5, 4)
        packed = pack_sequence([draw(n, I, dtype=dtype) for n in lengths], enforce_sorted=form == "sorted")
        return packed, B, [packed.data.requires_grad_()]
    shape = {"padded": (T, B, I), "batch_first": (B, T, I), "unbatched": (T, I), "unbatched_first": (T, I)}[form]
    input = draw(*shape, dtype=dtype).requires_grad_()
    return input, None if form.startswith("unbatched") else B, [input]


FORMS = ("padded", "batch_first", "unbatched", "unbatched_first", "sorted", "unsorted")
KINDS = [("lstm", {}), ("lstm", {"proj_size": 2}), ("gru", {}), ("rnn", {}), ("rnn", {"nonlinearity": "relu"})]
CONFIGURATIONS = [
    (name, dict(num_layers=layers, bidirectional=both, bias=bias) | extra, dtype)
    for name, extra in KINDS
    for layers, both, bias in itertools.product((1, 2), (False, True), (False, True))
    for dtype in (torch.float64, torch.float32)
    if dtype == torch.float64 or (layers == 2 and both and bias)
]


def named(value):
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("name", "options", "dtype"), CONFIGURATIONS, ids=named)
def test_module_agrees_with_torchs(name, options, dtype):
    """Every form of input, with and without hx: output, state, and the gradients of input, state and parameters."""
    for form, with_state in itertools.product(FORMS, (False, True)):
        first = form in ("batch_first", "unbatched_first")
        theirs, ours = pair(name, 4, 5, dtype=dtype, batch_first=first, **options)
        input, B, leaves = module_input(form, dtype)
        hx = None
        if with_state:
            rows = options["num_layers"] * (1 + options["bidirectional"])
            sizes = (options.get("proj_size", 5), 5) if name == "lstm" else (5,)
            hx = tuple(draw(*(s for s in (rows, B, n) if s), dtype=dtype).requires_grad_() for n in sizes)
            leaves = [*leaves, *hx]
            hx = hx if name == "lstm" else hx[0]
        tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else {}
        got, want = (
            outputs_and_gradients(functools.partial(module, input, hx), *leaves, *module.parameters())
            for module in (ours, theirs)
        )
        agree(got, want, **tolerance)
        result, expected = ours(input, hx)[0], theirs(input, hx)[0]
        assert type(result) is type(expected)
        if isinstance(result, PackedSequence):
            agree(pad_packed_sequence(result), pad_packed_sequence(expected), **tolerance)
            assert (result.sorted_indices is None) == (expected.sorted_indices is None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (4,), (0, 4)], ids=str)
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "relu"])
def test_cell_agrees_with_torchs(name, shape, bias):
    theirs, ours = (
        pair(name, 4, 5, bias=bias) if name != "relu" else pair("RNNCell", 4, 5, bias=bias, nonlinearity="relu")
    )
    input, parts = draw(*shape).requires_grad_(), [draw(*shape[:-1], 5).requires_grad_() for _ in range(2)]
    hx = tuple(parts) if name == "LSTMCell" else parts[0]
    used = [input, *(parts if name == "LSTMCell" else parts[:1])]
    want = outputs_and_gradients(lambda: theirs(input, hx), *used, *theirs.parameters())
    agree(outputs_and_gradients(lambda: ours(input, hx), *used, *ours.parameters()), want)
    agree(tensors(ours(input)), tensors(theirs(input)))


@pytest.mark.parametrize("form", ["padded", "batch_first", "unsorted"])
@pytest.mark.parametrize("name", MODULES)
def test_dropout_between_layers(name, form):
    """Torch's own draws, so the same numbers for the same seed; none in eval mode and none after the last layer."""
    theirs, ours = pair(name, 4, 5, num_layers=3, dropout=0.4, bidirectional=True, batch_first=form == "batch_first")
    input = module_input(form)[0]
    torch.manual_seed(7)
    want = tensors(theirs(input))
    torch.manual_seed(7)
    agree(tensors(ours(input)), want)
    assert not torch.equal(tensors(ours(input))[0], want[0])
    assert want[0].count_nonzero() == want[0].numel()
    agree(tensors(ours.eval()(input)), tensors(theirs.eval()(input)))


@pytest.mark.parametrize("name", MODULES)
def test_constructor_initialisation_and_repr_are_torchs(name):
    options = dict(num_layers=2, bias=False, batch_first=True, dropout=0.1, bidirectional=True, dtype=torch.float64)
    made = []
    for nn in (torch.nn, pk.nn):
        torch.manual_seed(3)
        made.append(getattr(nn, MODULES[name])(4, 5, **options))
    theirs, ours = made
    assert repr(ours) == repr(theirs)
    for (a, p), (b, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a == b
        assert torch.equal(p, q)
    in_order = (4, 5, 2, "relu", False, True) if name == "rnn" else (4, 5, 2, False, True)
    assert repr(getattr(pk.nn, MODULES[name])(*in_order)) == repr(getattr(torch.nn, MODULES[name])(*in_order))


@pytest.mark.parametrize("name", [*MODULES, "LSTMCell", "GRUCell", "RNNCell"])
def test_copies_pickles_and_moves(name):
    module = getattr(pk.nn, MODULES.get(name, name))(4, 5)
    input = draw(3, 4, dtype=torch.float32)
    want = tensors(module(input))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        agree(tensors(other(input)), want, rtol=0, atol=0)
        with torch.no_grad():
            next(other.parameters()).zero_()
        agree(tensors(module(input)), want, rtol=0, atol=0)  # nothing is shared
    assert tensors(module.double()(input.double()))[0].dtype == torch.float64


@pytest.mark.parametrize("name", MODULES)
def test_parameters_replaced_by_other_tensors_are_used(name):
    """functional_call and parametrisations do so; a copy kept aside would miss it."""
    theirs, ours = pair(name, 4, 5)
    input = draw(5, 3, 4, dtype=torch.float32)
    replaced = {key: 2 * value.float() for key, value in ours.state_dict().items()}
    got, want = (torch.func.functional_call(m, replaced, input) for m in (ours, theirs))
    agree(tensors(got), tensors(want))
    torch.nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    torch.nn.utils.parametrizations.weight_norm(theirs, "weight_hh_l0")
    agree(tensors(ours(input.double())), tensors(theirs(input.double())))


@pytest.mark.parametrize("name", MODULES)
def test_a_checkpointed_gradient_differentiates(name):
    """Without re-entering, a saved tensor can be asked for once."""
    module, input = getattr(pk.nn, MODULES[name])(2, 3, dtype=torch.float64), draw(3, 2, 2).requires_grad_()

    def gradient(input):
        return torch.autograd.grad(module(input)[0].square().sum(), input, create_graph=True)[0]

    def twice(call):
        return torch.autograd.grad(call(input).square().sum(), [input, *module.parameters()])

    agree(twice(lambda x: torch.utils.checkpoint.checkpoint(gradient, x, use_reentrant=False)), twice(gradient))


@pytest.mark.parametrize("name", MODULES)
def test_module_differentiates_twice(name):
    module = getattr(pk.nn, MODULES[name])(2, 3, num_layers=2, bidirectional=True, dtype=torch.float64)
    values = list(module.parameters())

    def function(input, *values):
        named = dict(zip((n for n, _ in module.named_parameters()), values))
        return tuple(tensors(torch.func.functional_call(module, named, input)))

    assert torch.autograd.gradgradcheck(function, (draw(3, 2, 2).requires_grad_(), *values), fast_mode=True)


@needs_kernels
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_module_compiles_whole_once_for_every_length(name):
    theirs, ours = pair(name, 4, 5, num_layers=2, bidirectional=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in ((6, 3), (7, 3), (23, 8)):
        input = draw(T, B, 4).requires_grad_()
        want = outputs_and_gradients(functools.partial(theirs, input), input, *theirs.parameters())
        agree(outputs_and_gradients(functools.partial(compiled, input), input, *ours.parameters()), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


SIZES_5 = ((7, 3), (9, 8), (2, 6), (11, 3), (8, 9))  # T, B
CELLS = {"LSTMCell": "lstm", "GRUCell": "gru", "RNNCell": "rnn"}
TRACED = [(name, hx) for name in (*GATES, *MODULES.values(), *CELLS) for hx in (False, True)]
TRACED += [(f"{name}_step", True) for name in GATES]


def traced(name, with_state):
    """(function or module, the arguments of T steps and B sequences, each one's dimensions of T and of B)."""
    cell, step = name.removesuffix("_step").removesuffix("Cell").lower(), name.endswith(("_step", "Cell"))
    rows = (1,) if name in MODULES.values() else ()
    weights = layer(cell, 4, 5, torch.float32)
    if name[0].isupper():
        module, weights = getattr(pk.nn, name)(4, 5).eval(), []
    else:
        function = getattr(pk, name)
        module = type("Call", (torch.nn.Module,), {"forward": lambda self, *args: function(*args)})()

    def arguments(T, B):
        input = draw(*(() if step else (T,)), B, 4, dtype=torch.float32)
        parts = [draw(*rows, B, 5, dtype=torch.float32) for _ in range(1 + (cell == "lstm"))]
        return input, (tuple(parts) if cell == "lstm" else parts[0]) if with_state else None, *weights

    def dimensions(T, B):
        input = {0: B} if step else {0: T, 1: B}
        one = {len(rows): B}
        return input, ((one, one) if cell == "lstm" else one) if with_state else None, *[None] * len(weights)

    return module, arguments, dimensions


@needs_kernels
@pytest.mark.parametrize(("name", "with_state"), TRACED)
@pytest.mark.filterwarnings("ignore")
def test_one_graph_serves_every_length_and_batch(name, with_state):
    module, arguments, _ = traced(name, with_state)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for sizes in SIZES_5:
            given = arguments(*sizes)
            agree(tensors(compiled(*given)), tensors(module(*given)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_kernels
@pytest.mark.parametrize(("name", "with_state"), TRACED)
@pytest.mark.filterwarnings("ignore")
def test_export_with_dynamic_length_and_batch(name, with_state):
    module, arguments, dimensions = traced(name, with_state)
    T, B = torch.export.Dim("T", min=2, max=512), torch.export.Dim("B", min=2, max=64)
    given = arguments(6, 3)
    shapes = dimensions(T, B)
    program = torch.export.export(module, given, dynamic_shapes=(shapes,) if "_" in name or name in GATES else shapes)
    for sizes in SIZES_5[:2]:
        given = arguments(*sizes)
        agree(tensors(program.module()(*given)), tensors(module(*given)))


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_packed_input_compiles_whole_with_state_and_without():
    weights = layer("lstm", 4, 6)
    torch._dynamo.reset()
    compiled = torch.compile(pk.lstm, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ([3, 2], [5, 4, 1], [2, 2]):
        input, options = draw(sum(sizes), 4), dict(batch_sizes=torch.tensor(sizes))
        for hx in (None, state("lstm", sizes[0], 6)):
            want = pk.lstm(input, hx, *weights, **options)
            agree(tensors(compiled(input, hx, *weights, **options)), tensors(want))


class Packing(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layer = getattr(pk.nn, MODULES[name])(4, 5)

    def forward(self, input, lengths):
        return self.layer(pack_padded_sequence(input, lengths, enforce_sorted=False))[0].data


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_export_of_a_module_that_packs_says_what_to_do(name):
    with pytest.raises(RuntimeError, match=r"torch.export makes up .* lengths to pykernels.lstm"):
        torch.export.export(Packing(name), (torch.zeros(6, 3, 4), torch.tensor([3, 6, 2])))


@pytest.mark.parametrize("name", [*MODULES.values(), *CELLS])
def test_modules_on_the_meta_device(name):
    input, module = draw(5, 4, dtype=torch.float32), getattr(pk.nn, name)(4, 6)
    want = [t.shape for t in tensors(module(input))]
    with torch.device("meta"):
        agree(tensors(module(input)), tensors(module(input)), rtol=0, atol=0)  # CPU tensors stay there
        default = getattr(pk.nn, name)(4, 6)
    for on_meta in (default, getattr(pk.nn, name)(4, 6, device="meta")):
        got = tensors(on_meta(input.to("meta")))
        assert [t.shape for t in got] == want
        assert all(t.is_meta for t in got)


@pytest.mark.parametrize("name", [*MODULES, "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_takes_input_and_weights_along(name):
    """torch's own LSTM; its GRU and some cells stay in fp32 on the CPU, where ours are as its LSTM."""
    module = getattr(pk.nn, MODULES.get(name, name))(4, 5)
    input = draw(6, 4, dtype=torch.float32)
    want = tensors(module(input))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = tensors(module(input))
    assert {t.dtype for t in got} == {torch.bfloat16}
    agree([t.float() for t in got], want, rtol=0.05, atol=0.05)
    sum(t.float().sum() for t in got).backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


# ------------------------------------------------------------------------------------------------ time


@st.composite
def splits(draw_):
    T = draw_(st.integers(1, 12))
    B = draw_(st.integers(1, 5))
    return dict(
        name=draw_(st.sampled_from(list(GATES))),
        sizes=(T, B, draw_(st.integers(1, 9)), draw_(st.integers(1, 20))),
        at=draw_(st.integers(0, T)),
        lengths=draw_(st.one_of(st.none(), st.lists(st.integers(0, T), min_size=B, max_size=B))),
        resets=draw_(st.booleans()),
        reverse=draw_(st.booleans()),
        seed=draw_(st.integers(0, 2**31)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(splits())
def test_one_call_equals_any_split(case):
    """Two calls that hand on the state give the whole call's outputs and gradients, reversed ones too."""
    torch.manual_seed(case["seed"])
    name, (T, B, I, H), at = case["name"], case["sizes"], case["at"]
    function, weights = getattr(pk, name), [w.requires_grad_() for w in layer(name, I, H)]
    input, hx = draw(T, B, I).requires_grad_(), pytree.tree_map(lambda t: t.requires_grad_(), state(name, B, H))
    lengths = None if case["lengths"] is None else torch.tensor(case["lengths"])
    resets = torch.rand(T, B) < 0.3 if case["resets"] else None

    def part(hx, start, stop):
        options = dict(reverse=case["reverse"])
        if lengths is not None:
            options["lengths"] = (lengths - start).clamp(0, stop - start)
        if resets is not None:
            options["resets"] = resets[start:stop]
        return function(input[start:stop], hx, *weights, **options)

    def split():
        spans = [(0, at), (at, T)]
        pieces, last = {}, hx
        for span in spans[:: -1 if case["reverse"] else 1]:
            pieces[span], last = part(last, *span)
        return torch.cat([pieces[span] for span in spans]), last

    wanted = [input, *tensors(hx), *weights]
    agree(outputs_and_gradients(split, *wanted), outputs_and_gradients(lambda: part(hx, 0, T), *wanted))


@pytest.mark.parametrize("name", GATES)
def test_a_sequence_is_its_steps(name):
    """Of the public step function, forward and backward."""
    weights = [w.requires_grad_() for w in layer(name, 4, 6)]
    input, hx = draw(5, 3, 4).requires_grad_(), state(name, 3, 6)

    def steps():
        outputs, last = [], hx
        for x in input:
            last = getattr(pk, f"{name}_step")(x, last, *weights)
            outputs.append(last[0] if name == "lstm" else last)
        return torch.stack(outputs), last

    want = outputs_and_gradients(lambda: getattr(pk, name)(input, hx, *weights), input, *weights)
    agree(outputs_and_gradients(steps, input, *weights), want)


@pytest.mark.parametrize("name", GATES)
def test_reverse_is_flipping(name):
    weights, input, hx = layer(name, 4, 6), draw(5, 3, 4), state(name, 3, 6)
    output, last = getattr(pk, name)(input, hx, *weights, reverse=True)
    flipped, same = getattr(pk, name)(input.flip(0), hx, *weights)
    agree([output, *tensors(last)], [flipped.flip(0), *tensors(same)])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_lengths_equal_packed(name, reverse):
    """Through torch's packing; what lies in the padding is neither read nor written to, NaN or not."""
    lengths = torch.tensor([7, 5, 5, 1])
    weights = [w.requires_grad_() for w in layer(name, 4, 6)]
    hx = pytree.tree_map(lambda t: t.requires_grad_(), state(name, 4, 6))
    input = draw(7, 4, 4)
    input[torch.arange(7)[:, None] >= lengths] = torch.nan
    input.requires_grad_()
    function = getattr(pk, name)

    def by_packing():
        packed = pack_padded_sequence(input, lengths)
        output, last = function(packed.data, hx, *weights, batch_sizes=packed.batch_sizes, reverse=reverse)
        return pad_packed_sequence(PackedSequence(output, packed.batch_sizes))[0], last

    wanted = [input, *tensors(hx), *weights]
    got = outputs_and_gradients(lambda: function(input, hx, *weights, lengths=lengths, reverse=reverse), *wanted)
    agree(got, outputs_and_gradients(by_packing, *wanted))
    assert got[0][lengths[1] :, 1].count_nonzero() == 0


@pytest.mark.parametrize("name", GATES)
def test_resets_equal_separate_calls(name):
    """An episode that begins at step 3 knows nothing of what came before, gradients included."""
    weights, input = layer(name, 4, 6), draw(8, 2, 4).requires_grad_()
    hx = pytree.tree_map(lambda t: t.requires_grad_(), state(name, 2, 6))
    resets = torch.zeros(8, 2, dtype=torch.bool)
    resets[3] = True
    output, last = getattr(pk, name)(input, hx, *weights, resets=resets)
    head, _ = getattr(pk, name)(input[:3], hx, *weights)
    tail, want = getattr(pk, name)(input[3:], None, *weights)
    agree([output, *tensors(last)], [torch.cat([head, tail]), *tensors(want)])
    grads = torch.autograd.grad(output[3:].sum(), [input, *tensors(hx)], materialize_grads=True)
    assert not any(g.count_nonzero() for g in (grads[0][:3], *grads[1:]))
    assert grads[0][3:].count_nonzero() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("name", GATES)
def test_the_tails_are_finite_and_right(name, dtype):
    """Pre-activations of ±1e6: every gate is 0, 1 or ±1 there, and no gradient comes through it."""
    I, H = 3, 5
    weights = [w.requires_grad_() for w in layer(name, I, H, dtype)]
    sign = torch.where(torch.rand(GATES[name] * H) < 0.5, -1.0, 1.0).to(dtype)
    with torch.no_grad():
        weights[2].copy_(1e6 * sign)
    input, hx = draw(4, 2, I, dtype=dtype).requires_grad_(), state(name, 2, H, dtype)
    got = outputs_and_gradients(lambda: getattr(pk, name)(input, hx, *weights), input, *weights)
    h, c = hx if name == "lstm" else (hx, None)
    outputs, up = [], (sign + 1) / 2
    for _ in range(4):
        if name == "lstm":
            i, f, _, o = up.chunk(4)
            c = f * c + i * sign.chunk(4)[2]
            h = o * c.tanh()
        elif name == "gru":
            _, z, _ = up.chunk(3)
            h = (1 - z) * sign.chunk(3)[2] + z * h
        else:
            h = sign.expand_as(h)
        outputs.append(h)
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else {}
    agree([got[0]], [torch.stack(outputs)], **tolerance)
    assert all(g.isfinite().all() for g in got)
    assert not any(g.count_nonzero() for g in got[-5:])


@needs_kernels
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(data=st.data())
def test_any_combination_of_options(data):
    """Held to the rule of check.py, gradients too."""
    pick = data.draw
    name, dtype = (
        pick(st.sampled_from(list(GATES))),
        pick(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    T, B, I, H = pick(st.integers(0, 20)), pick(st.integers(0, 20)), pick(st.integers(0, 40)), pick(st.integers(1, 70))
    torch.manual_seed(pick(st.integers(0, 2**31)))
    weights = [w / 2 for w in layer(name, I, H, dtype)]
    inputs = dict(input=draw(T, B, I, dtype=dtype), hx=pick(st.sampled_from([None, state(name, B, H, dtype)])))
    inputs |= dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights[: pick(st.sampled_from([2, 4]))]))
    if name == "lstm" and pick(st.booleans()):
        P = pick(st.integers(1, H))
        inputs |= dict(
            weight_hh=draw(4 * H, P, dtype=dtype) / 2 / P**0.5, weight_hr=draw(P, H, dtype=dtype) / 2 / H**0.5
        )
        if inputs["hx"] is not None:
            inputs["hx"] = (draw(B, P, dtype=dtype), inputs["hx"][1])
    if name == "rnn":
        inputs["nonlinearity"] = pick(st.sampled_from(["tanh", "relu"]))
    inputs["reverse"] = pick(st.booleans())
    if B and T and pick(st.booleans()):
        lengths = sorted(pick(st.lists(st.integers(1, T), min_size=B, max_size=B)), reverse=True)
        inputs["batch_sizes"] = (torch.arange(lengths[0])[:, None] < torch.tensor(lengths)).sum(1)
        inputs["input"] = draw(sum(lengths), I, dtype=dtype)
    else:
        if pick(st.booleans()):
            inputs["lengths"] = torch.tensor(
                pick(st.lists(st.integers(0, T), min_size=B, max_size=B)), dtype=torch.int64
            )
        if pick(st.booleans()):
            inputs["resets"] = torch.rand(T, B) < 0.3
    # Hundreds of draws find those where eager is lucky.
    results = compare(OPS[name], inputs, BACKEND, slack=4)
    assert results
    assert all(result.ok for result in results), "\n".join(str(r) for r in results if not r.ok)


# ------------------------------------------------------------------------------------------------ torch.func


OPTIONS = {"lengths": torch.tensor([[4, 0, 2], [1, 2, 3]]), "resets": torch.tensor([True, False, False, True] * 6)}


@needs_kernels
@pytest.mark.parametrize("option", [None, *OPTIONS])
@pytest.mark.parametrize("name", GATES)
def test_vmap_of_anything_is_a_loop(name, option):
    """Over input, state, options, and the weights of an ensemble; of gradients too."""
    batches = [draw(2, 4, 3, 4).requires_grad_()]
    batches += [torch.stack([w, 0.5 * w]) for w in layer(name, 4, 6)]
    batches += tensors(pytree.tree_map(lambda s: torch.stack([s, -s]), state(name, 3, 6)))
    options = [] if option is None else [OPTIONS[option].view(2, *((3,) if option == "lengths" else (4, 3)))]

    def loss(input, *rest):
        hx = tuple(rest[4:6]) if name == "lstm" else rest[4]
        more = {option: rest[-1]} if option else {}
        return sum(t.square().sum() for t in tensors(getattr(pk, name)(input, hx, *rest[:4], **more)))

    for function in (loss, torch.func.grad(loss, (0, 1, 2))):
        got = torch.func.vmap(function)(*batches, *options)
        want = [function(*(t[i] for t in (*batches, *options))) for i in range(2)]
        agree(tensors(got), [torch.stack(pair) for pair in zip(*map(tensors, want))])


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_each_example_of_a_module(name):
    module = getattr(pk.nn, MODULES[name])(4, 5, num_layers=2, bidirectional=True, dtype=torch.float64)
    parameters, inputs = dict(module.named_parameters()), draw(2, 6, 3, 4)

    def loss(parameters, input):
        return sum(t.square().sum() for t in tensors(torch.func.functional_call(module, parameters, input)))

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
    for key, value in got.items():
        want = [torch.autograd.grad(loss(parameters, input), parameters[key])[0] for input in inputs]
        torch.testing.assert_close(value, torch.stack(want))


@pytest.mark.parametrize("name", GATES)
def test_checks_speak_for_themselves_under_transforms(name):
    weights, input = layer(name, 4, 6), draw(5, 3, 4)

    def loss(input, lengths):
        return getattr(pk, name)(input, None, *weights, lengths=lengths)[0].sum()

    for lengths, kind in ((torch.tensor([9, 0, 2]), ValueError), (torch.zeros(3), TypeError)):
        with pytest.raises(kind, match="lengths: expected"):
            torch.func.grad(functools.partial(loss, lengths=lengths))(input)
    with pytest.raises(ValueError, match=r"input: expected rank 3 \[T, B, I\], got \[3, 4\]"):
        torch.func.vmap(lambda x: getattr(pk, name)(x, None, *weights))(input)


# ------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("name", GATES)
def test_nothing_to_do(name):
    """T = 0, B = 0, lengths of 0: the state comes back, and its gradient passes through."""
    weights, hx = layer(name, 4, 6), pytree.tree_map(lambda t: t.requires_grad_(), state(name, 3, 6))
    function = getattr(pk, name)
    for input, options in ((draw(0, 3, 4), {}), (draw(5, 3, 4), dict(lengths=torch.zeros(3, dtype=torch.int32)))):
        output, last = function(input, hx, *weights, **options)
        assert output.shape == (len(input), 3, 6)
        assert output.count_nonzero() == 0
        agree(tensors(last), tensors(hx), rtol=0, atol=0)
        grads = torch.autograd.grad(sum((n * t).sum() for n, t in enumerate(tensors(last), 2)), tensors(hx))
        assert all((g == n).all() for n, g in enumerate(grads, 2))
    output, last = function(draw(5, 0, 4), None, *weights)
    assert output.shape == (5, 0, 6)
    assert {t.shape for t in tensors(last)} == {(0, 6)}


@needs_kernels
def test_calls_from_several_threads_at_once():
    """Each with its own weights and sizes, over and over: nothing of one call is seen by another."""
    work = []
    for n in range(4):
        weights, input = (
            [w.requires_grad_() for w in layer("lstm", 5, 20 + 13 * n)],
            draw(12, 1 + n, 5).requires_grad_(),
        )

        def call(input=input, weights=weights):
            return outputs_and_gradients(lambda: pk.lstm(input, None, *weights), input, *weights)

        work.append((call, call()))
    failures = []

    def worker(call, want):
        try:
            for _ in range(15):
                agree(call(), want, rtol=1e-9, atol=1e-9)
        except BaseException as error:
            failures.append(error)

    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            workers = [threading.Thread(target=worker, args=item) for item in work]
            for one in workers:
                one.start()
            for one in workers:
                one.join(60)
            assert not any(one.is_alive() for one in workers)
    finally:
        torch.set_num_threads(before)
    assert not failures, failures


@pytest.mark.parametrize("name", GATES)
def test_weights_changed_in_place_are_seen(name):
    """Kernels may keep a packed copy; an optimiser's step, data_ptr unchanged, must reach the next call."""
    weights, input = layer(name, 20, 40, torch.float32), draw(6, 1, 20, dtype=torch.float32)
    function = getattr(pk, name)
    first = function(input, None, *weights)[0]
    for change in (lambda w: w.mul_(0.5), lambda w: w.data.mul_(0.5), lambda w: w.numpy().__imul__(0.5)):
        for w in weights:
            change(w)
        got = function(input, None, *weights)[0]
        assert not torch.equal(got, first)
        agree([got], [getattr(pk.reference, name)(input, None, *weights)[0]])
        first = got


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("name", GATES)
def test_forward_mode_is_refused(name):
    weights, input = layer(name, 4, 6), draw(5, 3, 4)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: getattr(pk, name)(x, None, *weights)[0], (input,), (input,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda w: getattr(pk, name)(input, None, weights[0], w)[0], (weights[1],), (weights[1],))


X, S, W, U, V, R = (torch.zeros(s) for s in ((5, 3, 4), (3, 6), (24, 4), (24, 6), (24,), (2, 6)))
HX = (S, S)
SIZES = torch.tensor([3, 2])
NESTED = torch.nested.nested_tensor([torch.zeros(2, 6), torch.zeros(3, 6)], layout=torch.jagged)
ERRORS = [
    (lambda: pk.lstm([1], HX, W, U), TypeError, "input: expected a tensor"),
    (lambda: pk.lstm(X[0], HX, W, U), ValueError, r"input: expected rank 3 \[T, B, I\], got \[3, 4\]"),
    (lambda: pk.lstm(X.long(), HX, W, U), TypeError, "input: expected torch.float64 or .*got torch.int64"),
    (lambda: pk.lstm(X, S, W, U), TypeError, r"hx: expected a tuple \(h, c\), got torch.float32"),
    (lambda: pk.lstm(X, (S,), W, U), ValueError, r"hx: expected two tensors \(h, c\)"),
    (lambda: pk.lstm(X, (None, S), W, U), TypeError, r"hx\[0\]: expected a tensor \[3, 6\], got NoneType"),
    (lambda: pk.lstm(X, (S, NESTED), W, U), TypeError, r"hx\[1\]: expected a dense tensor \[3, 6\], got a nested one"),
    (lambda: pk.lstm(NESTED, None, W, U), TypeError, "input: expected a dense tensor .*got a nested one"),
    (lambda: pk.lstm(X, HX, W.to_sparse(), U), TypeError, "weight_ih: expected a dense tensor .*got a sparse_coo one"),
    (lambda: pk.lstm(X, None, W, U, lengths=NESTED), TypeError, "lengths: expected a dense tensor .*got a nested one"),
    (lambda: pk.lstm(X, (S, S[:2]), W, U), ValueError, r"hx\[1\]: expected \[3, 6\] .*got \[2, 6\]"),
    (lambda: pk.lstm(X, (S[:2], S), W, U), ValueError, r"hx\[0\]: expected \[3, 6\] .*got \[2, 6\]"),
    (lambda: pk.lstm(X, (S.half(), S), W, U), TypeError, r"hx\[0\]: expected input's dtype .*got torch.float16"),
    (lambda: pk.lstm(X, HX, W[:23], U), ValueError, r"weight_ih: expected \[24, 4\] .*got \[23, 4\]"),
    (lambda: pk.lstm(X, HX, W, U[:23]), ValueError, r"weight_hh: expected \[4·H, P\].*got \[23, 6\]"),
    (lambda: pk.lstm(X, HX, W, U[:, :5]), ValueError, r"weight_hh: expected \[24, 6\].*got \[24, 5\]"),
    (lambda: pk.lstm(X, HX, W.double(), U), TypeError, "weight_ih: expected input's dtype .*got torch.float64"),
    (lambda: pk.lstm(X, HX, W.to("meta"), U), ValueError, "weight_ih: expected input's device cpu, got meta"),
    (lambda: pk.lstm(X, HX, W, U, V), ValueError, "bias_hh: expected both biases or neither, got None"),
    (lambda: pk.lstm(X, HX, W, U, V, V[1:]), ValueError, r"bias_hh: expected \[24\] .*got \[23\]"),
    (lambda: pk.lstm(X, HX, W, U, weight_hr=R), ValueError, r"weight_hr: expected \[6, 6\] .*got \[2, 6\]"),
    (
        lambda: pk.lstm(X, None, W, U, lengths=torch.tensor([1, 6, 0])),
        ValueError,
        r"lengths: .*0 to 5, got \[1, 6, 0\]",
    ),
    (lambda: pk.lstm(X, None, W, U, lengths=torch.tensor([1, 2])), ValueError, r"lengths: expected \[3\] .*got \[2\]"),
    (lambda: pk.lstm(X, None, W, U, lengths=torch.zeros(3)), TypeError, "lengths: expected torch.int32 or torch.int64"),
    (lambda: pk.lstm(X, None, W, U, resets=X[..., 0]), TypeError, "resets: expected torch.bool, got torch.float32"),
    (lambda: pk.lstm(X, None, W, U, resets=X[1:, :, 0] > 0), ValueError, r"resets: expected \[5, 3\] .*got \[4, 3\]"),
    (
        lambda: pk.lstm(X, None, W, U, batch_sizes=SIZES),
        ValueError,
        r"input: expected rank 2 \[total, I\], got \[5, 3, 4\]",
    ),
    (lambda: pk.lstm(X[:, 0], None, W, U, batch_sizes=SIZES.int()), TypeError, "batch_sizes: expected torch.int64"),
    (lambda: pk.lstm(X[:, 0], None, W, U, batch_sizes=SIZES.flip(0)), ValueError, r"batch_sizes: .*got \[2, 3\]"),
    (lambda: pk.lstm(X[:4, 0], None, W, U, batch_sizes=SIZES), ValueError, r"batch_sizes: .*sum 4, got \[3, 2\]"),
    (
        lambda: pk.lstm(X[:, 0], None, W, U, batch_sizes=SIZES, lengths=SIZES),
        ValueError,
        "batch_sizes: expected no lengths and no resets",
    ),
    (
        lambda: pk.lstm(X[:, 0].to("meta"), None, W.to("meta"), U.to("meta"), batch_sizes=SIZES.to("meta")),
        ValueError,
        "hx: expected the state",
    ),
    (lambda: pk.lstm_step(X, HX, W, U), ValueError, r"input: expected rank 2 \[B, I\], got \[5, 3, 4\]"),
    (lambda: pk.gru(X, HX, W[:18], U[:18]), TypeError, "hx: expected a tensor .*got tuple"),
    (lambda: pk.gru(X, S, W, U), ValueError, r"weight_hh: expected \[24, 8\].*got \[24, 6\]"),
    (lambda: pk.gru_step(X[0], None, W[:18], U[:18]), TypeError, "hx: expected a tensor"),
    (
        lambda: pk.rnn(X, S, W[:6], U[:6], nonlinearity="elu"),
        ValueError,
        "nonlinearity: expected 'tanh' or 'relu', got 'elu'",
    ),
    (lambda: pk.nn.RNN(4, 6, nonlinearity="elu"), ValueError, "nonlinearity: expected 'tanh' or 'relu', got 'elu'"),
    (lambda: pk.nn.LSTM(4, 6)([1]), TypeError, "input: expected a tensor or a PackedSequence, got list"),
    (lambda: pk.nn.LSTM(4, 6)(X, S), TypeError, r"hx: expected a tuple \(h, c\)"),
    (lambda: pk.nn.LSTM(4, 6)(NESTED), TypeError, "input: expected a dense tensor, got a nested one"),
    (lambda: pk.nn.LSTM(4, 6)(X, (S, NESTED)), TypeError, r"hx\[1\]: expected a dense tensor, got a nested one"),
    (lambda: pk.nn.GRUCell(4, 6)(NESTED), TypeError, "input: expected a dense tensor, got a nested one"),
    (lambda: pk.nn.LSTMCell(4, 6)(X[0], S), TypeError, r"hx: expected a tuple \(h, c\)"),
    (lambda: pk.nn.GRU(4, 6)(X, HX), TypeError, "hx: expected a tensor, got tuple"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_errors_name_argument_expectation_and_value(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


BAD_INPUT = [
    ("lstm", lambda: (X[None],)),
    ("gru", lambda: (X[..., 1:],)),
    ("rnn", lambda: (X.double(),)),
    ("lstm", lambda: (X, (S, S))),
    ("lstm", lambda: (X, (S[None, :2], S[None]))),
    ("lstm", lambda: (X, (S[None], S[None, :, 1:]))),
    ("gru", lambda: (X[:, 0], S[None])),
    ("rnn", lambda: (X, S)),
    ("gru", lambda: (pack_sequence([X[:, 0], X[:2, 1]]), S[None])),
    ("LSTMCell", lambda: (X,)),
    ("GRUCell", lambda: (X[0], S[None])),
]


@pytest.mark.parametrize(("name", "arguments"), BAD_INPUT, ids=lambda value: value if isinstance(value, str) else "")
def test_modules_refuse_what_torchs_refuse(name, arguments):
    """With the same type of error, and, but for its form, the same words."""
    theirs, ours = pair(name, 4, 6, dtype=torch.float32)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs(*arguments())
    with pytest.raises(expected.type) as error:
        ours(*arguments())
    words = set(str(expected.value).split(".")[0].split()) - {
        "hx",
        "and",
        "cx",
        "tensor",
        "tensors",
        "hidden",
        "hidden:",
    }
    assert len(words & set(str(error.value).split())) >= len(words) // 2


@needs_kernels
def test_a_call_that_kept_nothing_for_backward_refuses_a_gradient():
    weights, input = layer("gru", 4, 6), draw(5, 3, 4).requires_grad_()
    arguments = (input, None, draw(3, 6), None, *weights, None, None, None, GRU, False)
    output, *_ = torch.ops.pykernels.rnn(*arguments, False, CPU)
    with pytest.raises(RuntimeError, match="training=False"):
        output.sum().backward()
