"""Every module: errors, splits in time, copies, parameters, graphs, dtypes, transforms, devices. A module is a line."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import (
    accumulated,
    agree,
    draw,
    equal,
    exports,
    hypothesis,
    needs_kernels,
    one_graph,
    tensors,
    values_and_gradients,
    with_gradients,
)

import pykernels as pk
from pykernels import nn


@dataclass(frozen=True)
class Module:
    """How to make a module, what it is given, and what of the state that it returns last and takes last."""

    make: Callable[..., torch.nn.Module]  # of dtype and device
    input: Callable[..., torch.Tensor]  # of (T, B, dtype): T steps or tokens of B sequences
    state: Callable[..., Any] | None = None  # of (B, dtype); None: it has none
    time: int | None = 1  # the dimension of T in the input; None: it takes one step
    splits: bool = True  # whether a call equals any split of it in time
    wide: bool = False  # whether the state stays in the dtype of sums in half precision

    @property
    def batch(self):
        return 0 if self.time is None else 1 - self.time


def of_steps(T, B, dtype):
    return draw(T, B, 4, dtype=dtype)


def of_one_step(T, B, dtype):
    return draw(B, 4, dtype=dtype)


def of_tokens(T, B, dtype):
    return draw(B, T, 6, dtype=dtype)


def h(*rows):
    return lambda B, dtype: draw(*rows, B, 5, dtype=dtype)


def h_and_c(*rows):
    return lambda B, dtype: (draw(*rows, B, 5, dtype=dtype), draw(*rows, B, 5, dtype=dtype))


def last_token(B, dtype):
    return draw(B, 6, dtype=dtype)


def last_token_and_sums(B, dtype):
    sums = accumulated(B, 3, 10, dtype=dtype)
    sums[:, 1] = sums[:, 1].abs() + 0.1
    return draw(B, 6, dtype=dtype), sums


def slots(B, dtype):
    return draw(B, 4, 6, dtype=dtype)


part = functools.partial
MODULES = {
    "LSTM": Module(part(nn.LSTM, 4, 5, num_layers=2), of_steps, h_and_c(2), time=0),
    "LSTM, both ways": Module(part(nn.LSTM, 4, 5, bidirectional=True), of_steps, h_and_c(2), time=0, splits=False),
    "GRU": Module(part(nn.GRU, 4, 5, num_layers=2), of_steps, h(2), time=0),
    "RNN": Module(part(nn.RNN, 4, 5, num_layers=2), of_steps, h(2), time=0),
    "LSTMCell": Module(part(nn.LSTMCell, 4, 5), of_one_step, h_and_c(), time=None),
    "GRUCell": Module(part(nn.GRUCell, 4, 5), of_one_step, h(), time=None),
    "RNNCell": Module(part(nn.RNNCell, 4, 5), of_one_step, h(), time=None),
    "RWKV4TimeMix": Module(part(nn.RWKV4TimeMix, 6, 3, 1, dim_att=10), of_tokens, last_token_and_sums, wide=True),
    "RWKV4ChannelMix": Module(part(nn.RWKV4ChannelMix, 6, 3, 1, dim_ffn=9), of_tokens, last_token),
    "MemoryLayer": Module(part(nn.MemoryLayer, 6, 7, 3, 2), of_tokens),
    "MemoryLayer, no norm": Module(part(nn.MemoryLayer, 6, 7, 3, 2, query_norm=None), of_tokens),
    "LM2Memory": Module(part(nn.LM2Memory, 6, 4, 2), of_tokens, slots, splits=False),
    "LM2Memory, topk": Module(part(nn.LM2Memory, 6, 4, 2, topk=2), of_tokens, slots, splits=False),
}

ALL = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
STATEFUL = {name: module for name, module in MODULES.items() if module.state}
SPLIT = {name: module for name, module in STATEFUL.items() if module.time is not None and module.splits}


def test_every_module_has_a_line():
    modules = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)}
    assert modules == {name.partition(",")[0] for name in MODULES}


def randomised(module, dtype=torch.float64, **options):
    """A new one, every parameter of a size at which it matters."""
    made = module.make(dtype=dtype, **options)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name == "time_decay":
                p.uniform_(-6, 2)
            elif "time_mix" in name:
                p.uniform_()
            else:
                p.normal_(std=p.size(-1) ** -0.5 if p.dim() > 1 else 0.7)
    return made


def arguments(module, T=5, B=3, dtype=torch.float64, with_state=True):
    """(input,) or (input, state)."""
    given = (module.input(T, B, dtype),)
    return (*given, module.state(B, dtype)) if module.state and with_state else given


WITH_STATE = pytest.mark.parametrize("with_state", [False, True], ids=("no state", "state"))

# ------------------------------------------------------------------------------------------------ errors


def in_place_of(module, argument):
    """Wrong values of an argument, and whether torch's own words are allowed, which name the module's part instead."""
    yield [1.0]
    yield torch.eye(3).to_sparse()
    right = arguments(module, dtype=torch.float32)[argument == "state"]
    if isinstance(right, tuple):
        yield right[:1]
        yield (right[0], right[1][..., 1:])
        yield (right[0].double(), right[1])
        yield (right[0], right[1].to("meta"))
    else:
        yield right[..., 1:]
        yield right.double()
        yield right.to("meta")
        yield right.long()


@ALL
@pytest.mark.parametrize("argument", ["input", "state"])
def test_errors_name_the_argument(module, argument):
    """The modules of torch.nn have torch's words where torch has some; those name it within the sentence."""
    if argument == "state" and not module.state:
        pytest.skip("it has no state")
    m, right = randomised(module, torch.float32), arguments(module, dtype=torch.float32)
    names = "input|x" if argument == "input" else r"hx|hidden|state|memory"
    m(*right)
    for wrong in in_place_of(module, argument):
        given = (wrong, *right[1:]) if argument == "input" else (right[0], wrong)
        with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"(?i)\b({names})\b"):
            m(*given)


# ------------------------------------------------------------------------------------------------ time


@pytest.mark.parametrize("module", SPLIT.values(), ids=SPLIT)
@settings(hypothesis, max_examples=12)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 1, 2, 5, 40]), min_size=1, max_size=6),
    with_state=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_call_equals_any_split(module, sizes, with_state, seed):
    """Outputs, state, and the gradients of input, state and parameters."""
    torch.manual_seed(seed)
    m, given = randomised(module), with_gradients(arguments(module, sum(sizes), 2, with_state=with_state))

    def split():
        outputs, state = [], given[1:]
        for piece in given[0].split(sizes, module.time):
            output, last = m(piece, *state)
            outputs.append(output)
            state = (last,)
        return torch.cat(outputs, module.time), *state

    agree(values_and_gradients(split, given, m), values_and_gradients(lambda: m(*given), given, m))


@pytest.mark.parametrize("module", SPLIT.values(), ids=SPLIT)
def test_no_step_returns_the_state(module):
    m, given = randomised(module), arguments(module, T=0)
    output, state = m(*given)
    assert output.shape[module.time] == 0
    equal(state, given[1])
    _, empty = m(given[0])
    some = module.input(3, 3, torch.float64)
    equal(m(some, empty), m(some))


@pytest.mark.parametrize("module", STATEFUL.values(), ids=STATEFUL)
def test_gradients_flow_through_the_state(module):
    given = with_gradients(arguments(module))
    _, *gradients = values_and_gradients(lambda: tensors(randomised(module)(*given))[:1], given[1])
    assert all(gradient.count_nonzero() for gradient in gradients[:1])


# ------------------------------------------------------------------------------------------------ copies, parameters


@ALL
def test_copies_and_pickles(module):
    """They give the same and share nothing."""
    m, given = randomised(module), arguments(module)
    want = m(*given)
    file = io.BytesIO()
    torch.save(m, file)
    file.seek(0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(file, weights_only=False)):
        assert type(other) is type(m)
        assert repr(other) == repr(m)
        equal(other(*given), want)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        equal(m(*given), want)
    assert {t.dtype for t in tensors(m.float()(*arguments(module, dtype=torch.float32)))} == {torch.float32}


@ALL
def test_parameters_are_loaded_and_replaced(module):
    """By load_state_dict, assigned or copied, and by functional_call: no copy is kept aside."""
    m, given = randomised(module), arguments(module)
    want = m(*given)
    for assign in (False, True):
        other = randomised(module)
        assert any(not torch.equal(g, w) for g, w in zip(tensors(other(*given)), tensors(want)))
        other.load_state_dict(copy.deepcopy(m.state_dict()), assign=assign)
        agree(other(*given), want, rtol=1e-12, atol=1e-12)  # torch's products depend on where memory lies
    got = torch.func.functional_call(randomised(module), m.state_dict(), given)
    agree(got, want, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ compiled


# T, B. No batch of the first call is another size, for torch would take the two for one.
SIZES_5 = ((17, 13), (9, 8), (37, 2), (11, 3), (8, 9))


def dimensions(module, T, B, with_state):
    """Of the dynamic sizes of arguments()."""
    input = {module.batch: B} | ({} if module.time is None else {module.time: T})
    if not with_state:
        return (input,)
    state = module.state(13, torch.float64)
    of = lambda t: {t.shape.index(13): B}
    return input, tuple(map(of, state)) if isinstance(state, tuple) else of(state)


@needs_kernels
@ALL
@WITH_STATE
@pytest.mark.parametrize("training", [False, True], ids=("inference", "training"))
@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_every_length_and_batch(module, with_state, training):
    if with_state and not module.state:
        pytest.skip("it has no state")
    m = randomised(module).requires_grad_(training)
    calls = [arguments(module, T, B, with_state=with_state) for T, B in SIZES_5]
    one_graph(m, calls, (lambda given: with_gradients([*given, m])) if training else lambda given: ())


@needs_kernels
@ALL
@WITH_STATE
@pytest.mark.filterwarnings("ignore")
def test_export_with_dynamic_length_and_batch(module, with_state):
    """For training too."""
    if with_state and not module.state:
        pytest.skip("it has no state")
    m = randomised(module)
    dynamic = dimensions(
        module, torch.export.Dim("T", min=2, max=512), torch.export.Dim("B", min=2, max=64), with_state
    )
    others = [arguments(module, T, B, with_state=with_state) for T, B in SIZES_5[:3]]
    wanted = lambda program: [p for _, p in sorted(program.named_parameters())]
    exports(m, arguments(module, 6, 5, with_state=with_state), dynamic, others, wanted=wanted)


# ------------------------------------------------------------------------------------------------ dtypes


def off(got, want):
    """The relative error of the middle row: for some, rounding chooses other rows, of nearly the same scores."""
    got, want = got.double(), want.double()
    return ((got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)).median()  # a row may be 0: relu's


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(module, dtype):
    """Of the same weights, nearly what fp32 gives."""
    m, given = randomised(module, dtype), arguments(module, 40, 5, dtype)
    exact = copy.deepcopy(m).float()
    got, want = tensors(m(*given)), tensors(exact(*_float(given)))
    wide = [torch.float32] if module.wide else []
    assert [t.dtype for t in got] == [dtype] * (len(got) - len(wide)) + wide
    assert all(off(g, w) < 0.05 for g, w in zip(got, want, strict=True))
    sum(t.float().sum() for t in got).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in m.parameters())


def _float(tree):
    return tuple(_float(part) for part in tree) if isinstance(tree, tuple) else tree.float()


@ALL
def test_autocast(module):
    """Weights stay as they are, the output is of autocast's dtype or fp32, and a state can be handed on."""
    m, given = randomised(module, torch.float32), arguments(module, 40, 5, torch.float32)
    want = tensors(m(*given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = m(*given)
        if module.state and module.time is not None:
            m(given[0], result[1])
    got = tensors(result)
    assert all(off(g, w) < 0.05 for g, w in zip(got, want, strict=True))
    sum(t.float().sum() for t in got).backward()
    assert all(p.grad.dtype == torch.float32 for p in m.parameters())


# ------------------------------------------------------------------------------------------------ derivatives


def function_of(module, T=3, B=2):
    """(function of all its numbers, those numbers): input, state and parameters."""
    m, given = randomised(module), arguments(module, T, B)
    names = [name for name, _ in m.named_parameters()]
    count = len(tensors(given))

    def function(*values):
        head, values = values[:count], dict(zip(names, values[count:]))
        state = head[1:] if len(head) > 2 else head[1] if len(head) == 2 else None
        return tuple(tensors(torch.func.functional_call(m, values, (head[0],) if state is None else (head[0], state))))

    return function, tuple(t.detach().requires_grad_() for t in [*tensors(given), *m.parameters()])


@ALL
def test_gradients_of_second_order(module):
    function, values = function_of(module)
    assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@ALL
def test_forward_mode_is_refused_or_right(module):
    """A zero tangent would be silence."""
    function, values = function_of(module)
    given = tuple(torch.randn_like(value) for value in values)
    expected = torch.autograd.functional.jvp(function, values, given)[1]

    def got():
        try:
            return torch.func.jvp(function, tuple(v.detach() for v in values), given)[1]
        except NotImplementedError as error:
            return str(error)

    refusal = got()
    with pk.use_backend("reference"):
        agree(got(), expected)
    if isinstance(refusal, str):
        assert "forward-mode differentiation is not supported" in refusal
    else:
        agree(refusal, expected)


@ALL
def test_transforms_of_torch_func(module):
    """grad by parameters, vmap over inputs, both, and jacrev, of the kernels against the reference."""
    m, x = randomised(module), torch.stack([module.input(4, 2, torch.float64) for _ in range(3)])
    parameters = dict(m.named_parameters())

    def loss(parameters, x):
        return sum(t.sin().sum() for t in tensors(torch.func.functional_call(m, parameters, (x,))))

    def outputs(x):
        return tuple(tensors(m(x)))

    def results():
        yield torch.func.grad(loss)(parameters, x[0])
        yield torch.func.vmap(outputs)(x)
        yield torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        yield torch.func.jacrev(outputs)(x[0])

    got = [*results()]
    with pk.use_backend("reference"):
        agree(got, [*results()])


# ------------------------------------------------------------------------------------------------ devices


@ALL
def test_meta_device(module):
    """Shapes and dtypes without data; a default device of theirs does not harm what is on the CPU."""
    given = arguments(module, dtype=torch.float32)
    want = tensors(randomised(module, torch.float32)(*given))
    on_meta = _to_meta(given)
    with torch.device("meta"):
        by_default, real = module.make(), module.make(device="cpu")
        assert all(t.device.type == "cpu" for t in [*tensors(real(*given)), *real.parameters()])
    for m in (by_default, module.make(device="meta")):
        got = tensors(m(*on_meta))
        assert all(t.is_meta for t in got)
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]


def _to_meta(tree):
    return tuple(_to_meta(part) for part in tree) if isinstance(tree, tuple) else tree.to("meta")
