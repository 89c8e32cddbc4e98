"""What the WKVs of RWKV-4, -5, -6 and -7 have in common: splitting, long sequences, one graph, what is kept, errors."""

import functools
import itertools
import math
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit import (
    agree,
    draw,
    exports,
    hypothesis,
    needs_kernels,
    one_graph,
    tensors,
    values_and_gradients,
    with_gradients,
)
from rwkv import ALL, TIMED, arguments

import pykernels as pk
from pykernels.launch.wkv4 import SAVED

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
    wanted, function = with_gradients(inputs), getattr(pk, name)
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


def test_rwkv5_is_a_decay_that_stays():
    """w [H, K] is the same [H, K] at every sequence and step, and its gradient is the sum of theirs."""
    inputs = arguments("wkv6", 2, 40)
    inputs["w"] = inputs["w"][0, 0].clone()
    wanted = with_gradients(inputs)
    got = values_and_gradients(lambda: pk.wkv6(**inputs), wanted)
    expanded = inputs | dict(w=inputs["w"].expand(2, 40, 2, 5))
    agree(got, values_and_gradients(lambda: pk.wkv6(**expanded), wanted), rtol=1e-10, atol=1e-10)
    y, S = [], inputs["state"]
    for r, k, v in zip(*(inputs[key].unbind(1) for key in "rkv")):
        kv = k[..., None] * v[..., None, :]
        y.append((r[..., None] * (S + inputs["u"][..., None] * kv)).sum(-2))
        S = inputs["w"].exp()[..., None] * S + kv
    agree(got[:2], [torch.stack(y, 1), S], rtol=1e-10, atol=1e-10)


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


# ------------------------------------------------------------------------------------------------ compiled


STATE = pytest.mark.parametrize("state", [False, True], ids=("no state", "state"))
TRAINING = pytest.mark.parametrize("training", [False, True], ids=("inference", "training"))


@needs_kernels
@pytest.mark.parametrize("name", ALL)
@STATE
@TRAINING
@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_every_length_and_batch(name, state, training):
    """Lengths on both sides of SAVED."""
    calls = [tensors(arguments(name, B, T, state=state)) for T, B in ((7, 4), (37, 12), (64, 8), (100, 9), (9, 11))]
    wanted = with_gradients if training else lambda given: ()
    one_graph(lambda *args: getattr(pk, name)(*args), calls, wanted)


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


@needs_kernels
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore")
def test_export_with_dynamic_length(name):
    """Also for training, for lengths on both sides of SAVED."""

    def timed(T):
        return ({key: t for key, t in arguments(name, 3, T).items() if key in TIMED[name]},)

    example = timed(6)
    dynamic = ({key: {1: torch.export.Dim("T", min=2, max=512)} for key in example[0]},)
    wanted = lambda module: [p for _, p in sorted(module.named_parameters())]
    exports(Called(name), example, dynamic, [timed(T) for T in (11, 80)], wanted=wanted)


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
    with_gradients(inputs)
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
