"""What is peculiar to the recurrent ops: splitting, lengths and resets, the tails, combinations of options, errors."""

import functools
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import (
    BACKEND,
    agree,
    draw,
    errors,
    exports,
    holds,
    hypothesis,
    needs_kernels,
    one_graph,
    tensors,
    threads,
    values_and_gradients,
    with_gradients,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import pykernels as pk
from pykernels.core.backends import CPU
from pykernels.core.declaration import OPS
from pykernels.ops.rnn import GRU
from pykernels.tools.check import compare

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def state(name, B, H, dtype=torch.float64):
    h = draw(B, H, dtype=dtype)
    return (h, draw(B, H, dtype=dtype)) if name == "lstm" else h


def layer(name, I, H, dtype=torch.float64):
    """weight_ih, weight_hh, bias_ih, bias_hh, of a size that keeps the gates in their middle."""
    return [draw(GATES[name] * H, n, dtype=dtype) / (n or 1) ** 0.5 for n in (I, H)] + [
        draw(GATES[name] * H, dtype=dtype) for _ in range(2)
    ]


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


@settings(hypothesis, max_examples=40)
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
    agree(values_and_gradients(split, *wanted), values_and_gradients(lambda: part(hx, 0, T), *wanted))


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

    want = values_and_gradients(lambda: getattr(pk, name)(input, hx, *weights), input, *weights)
    agree(values_and_gradients(steps, input, *weights), want)


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
    got = values_and_gradients(lambda: function(input, hx, *weights, lengths=lengths, reverse=reverse), *wanted)
    agree(got, values_and_gradients(by_packing, *wanted))
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
    got = values_and_gradients(lambda: getattr(pk, name)(input, hx, *weights), input, *weights)
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
@settings(hypothesis, max_examples=40)
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
    holds(compare(OPS[name], inputs, BACKEND, slack=4))


# ------------------------------------------------------------------------------------------------ compiled


SIZES_5 = ((7, 3), (9, 8), (2, 6), (11, 3), (8, 9))  # T, B
CALLS = [(name, hx) for name in GATES for hx in (False, True)] + [(f"{name}_step", True) for name in GATES]


class Call(torch.nn.Module):
    """A public function, of T steps and B sequences or of a step."""

    def __init__(self, name, with_state):
        super().__init__()
        self.name, self.cell, self.with_state = name, name.removesuffix("_step"), with_state
        self.step = name != self.cell
        self.weights = torch.nn.ParameterList(layer(self.cell, 4, 5))

    def forward(self, input, hx):
        return getattr(pk, self.name)(input, hx, *self.weights)

    def arguments(self, T, B):
        hx = state(self.cell, B, 5) if self.with_state else None
        return draw(*(() if self.step else (T,)), B, 4), hx

    def dimensions(self, T, B):
        hx = {0: B} if self.cell != "lstm" else ({0: B}, {0: B})
        return {0: B} if self.step else {0: T, 1: B}, hx if self.with_state else None


@needs_kernels
@pytest.mark.parametrize(("name", "with_state"), CALLS)
@pytest.mark.filterwarnings("ignore")
def test_one_graph_serves_every_length_and_batch(name, with_state):
    """Of inference and of training."""
    call = Call(name, with_state)
    with torch.no_grad():
        one_graph(call, [call.arguments(*sizes) for sizes in SIZES_5])
    calls = [with_gradients(call.arguments(*sizes)) for sizes in SIZES_5[:3]]
    one_graph(call, calls, lambda given: [*given, call])


@needs_kernels
@pytest.mark.parametrize(("name", "with_state"), CALLS)
@pytest.mark.filterwarnings("ignore")
def test_export_with_dynamic_length_and_batch(name, with_state):
    call = Call(name, with_state)
    dynamic = call.dimensions(torch.export.Dim("T", min=2, max=512), torch.export.Dim("B", min=2, max=64))
    exports(call, call.arguments(6, 3), dynamic, [call.arguments(*sizes) for sizes in SIZES_5[:2]])


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_packed_input_compiles_whole_with_state_and_without():
    weights = layer("lstm", 4, 6)

    def call(input, hx, batch_sizes):
        return pk.lstm(input, hx, *weights, batch_sizes=batch_sizes)

    sizes = ([3, 2], [5, 4, 1], [2, 2])
    for hx in (lambda B: None, lambda B: state("lstm", B, 6)):
        one_graph(call, [(draw(sum(each), 4), hx(each[0]), torch.tensor(each)) for each in sizes])


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
        agree(last, hx, rtol=0, atol=0)
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
            return values_and_gradients(lambda: pk.lstm(input, None, *weights), input, *weights)

        work.append((call, call()))
    failures = []

    def worker(call, want):
        try:
            for _ in range(15):
                agree(call(), want, rtol=1e-9, atol=1e-9)
        except BaseException as error:
            failures.append(error)

    for count in (1, 2):
        with threads(count):
            workers = [threading.Thread(target=worker, args=item) for item in work]
            for one in workers:
                one.start()
            for one in workers:
                one.join(60)
            assert not any(one.is_alive() for one in workers)
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
]

test_errors_name_argument_expectation_and_value = errors(ERRORS)


@needs_kernels
def test_a_call_that_kept_nothing_for_backward_refuses_a_gradient():
    weights, input = layer("gru", 4, 6), draw(5, 3, 4).requires_grad_()
    arguments = (input, None, draw(3, 6), None, *weights, None, None, None, GRU, False)
    output, *_ = torch.ops.pykernels.rnn(*arguments, False, CPU)
    with pytest.raises(RuntimeError, match="training=False"):
        output.sum().backward()


@needs_kernels
def test_products_are_cut_for_any_number_of_threads():
    """The search for a block's size ends: with sixteen threads it did not."""
    script = (
        "import torch, pykernels as pk; torch.set_num_threads(16); x = torch.randn(128, 64, 40);"
        "pk.lstm(x, None, torch.randn(64, 40).requires_grad_(), torch.randn(64, 16))[0].sum().backward()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
