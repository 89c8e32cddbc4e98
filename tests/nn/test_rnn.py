"""The recurrent modules against torch.nn's, in all of their forms."""

import functools
import itertools

import pytest
import torch
import torch.utils.checkpoint
from kit import agree, draw, errors, tensors, values_and_gradients
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import pykernels as pk

MODULES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


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
            values_and_gradients(functools.partial(module, input, hx), *leaves, *module.parameters())
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
    want = values_and_gradients(lambda: theirs(input, hx), *used, *theirs.parameters())
    agree(values_and_gradients(lambda: ours(input, hx), *used, *ours.parameters()), want)
    agree(ours(input), theirs(input))


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
    agree(ours.eval()(input), theirs.eval()(input))


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


@pytest.mark.parametrize("name", MODULES)
def test_parametrised_weights_are_used(name):
    """A copy of the weights kept aside would miss it."""
    theirs, ours = (torch.nn.utils.parametrizations.weight_norm(m, "weight_hh_l0") for m in pair(name, 4, 5))
    input = draw(5, 3, 4)
    agree(ours(input), theirs(input))


@pytest.mark.parametrize("name", MODULES)
def test_a_checkpointed_gradient_differentiates(name):
    """Without re-entering, a saved tensor can be asked for once."""
    module, input = getattr(pk.nn, MODULES[name])(2, 3, dtype=torch.float64), draw(3, 2, 2).requires_grad_()

    def gradient(input):
        return torch.autograd.grad(module(input)[0].square().sum(), input, create_graph=True)[0]

    def twice(call):
        return torch.autograd.grad(call(input).square().sum(), [input, *module.parameters()])

    agree(twice(lambda x: torch.utils.checkpoint.checkpoint(gradient, x, use_reentrant=False)), twice(gradient))


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


# ------------------------------------------------------------------------------------------------ what is refused


X, S = torch.zeros(5, 3, 4), torch.zeros(3, 6)
HX = (S, S)

NESTED = torch.nested.nested_tensor([torch.zeros(2, 6), torch.zeros(3, 6)], layout=torch.jagged)

ERRORS = [
    (lambda: pk.nn.RNN(4, 6, nonlinearity="elu"), ValueError, "nonlinearity: expected 'tanh' or 'relu', got 'elu'"),
    (lambda: pk.nn.LSTM(4, 6)([1]), TypeError, "input: expected a tensor or a PackedSequence, got list"),
    (lambda: pk.nn.LSTM(4, 6)(X, S), TypeError, r"hx: expected a tuple \(h, c\)"),
    (lambda: pk.nn.LSTM(4, 6)(NESTED), TypeError, "input: expected a dense tensor, got a nested one"),
    (lambda: pk.nn.LSTM(4, 6)(X, (S, NESTED)), TypeError, r"hx\[1\]: expected a dense tensor, got a nested one"),
    (lambda: pk.nn.GRUCell(4, 6)(NESTED), TypeError, "input: expected a dense tensor, got a nested one"),
    (lambda: pk.nn.LSTMCell(4, 6)(X[0], S), TypeError, r"hx: expected a tuple \(h, c\)"),
    (lambda: pk.nn.GRU(4, 6)(X, HX), TypeError, "hx: expected a tensor, got tuple"),
]

test_errors_name_argument_expectation_and_value = errors(ERRORS)

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
