"""LSTM, GRU and Elman RNN, one step and whole sequences, as torch.nn's.

    LSTM  i, f, o = σ(·), g = tanh(·) of W_ih x + b_ih + W_hh h + b_hh;  c' = f∘c + i∘g;  h' = [W_hr] (o ∘ tanh c')
    GRU   r, z = σ(·);  n = tanh(W_in x + b_in + r∘(W_hn h + b_hn));  h' = (1 − z)∘n + z∘h
    RNN   h' = tanh or relu of W_ih x + b_ih + W_hh h + b_hh

(Hochreiter & Schmidhuber 1997; Cho et al., 1406.1078; Elman 1990.) Backward through time, for the LSTM:

    do = dh'∘tanh c';  dc = dc' + dh'∘o∘(1 − tanh² c');  di = dc∘g;  dg = dc∘i;  df = dc∘c;  then σ' = s(1 − s),
    tanh' = 1 − g²;  dh = W_hhᵀ dgates;  dc = dc∘f;  the weights' gradients are one product each after the loop

One torch op serves the six public functions: padded [T, B, I], packed [total, I] with batch_sizes, a step [B, I].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..core.expect import (
    can_read,
    expect,
    expect_alike,
    expect_device,
    expect_lengths,
    expect_shape,
    expect_tensor,
    expect_type,
)
from ..core.registry import (
    FLOATS,
    INTERPRET,
    Sample,
    Workload,
    autocast,
    register,
    second_order,
    torch_op,
    triton_declines,
    wants_gradient,
)
from ..launch import rnn as rnn_gpu
from ..launch.rnn import GATES, GRU, LSTM, RNN_RELU, RNN_TANH

_DTYPES = (torch.float64, *FLOATS)
STRIDED = torch.strided
_OPTIONAL = (None, "bias_ih", "bias_hh", "weight_hr")  # None: c, of cells that have none
_INT64, _BOOL = (torch.int64,), (torch.bool,)
_WEIGHT_HH = ("[4·H, P]", "[3·H, H]", "[H, H]", "[H, H]")  # of each cell


# ------------------------------------------------------------------------------------------------ reference


def reference(
    input: Tensor,  # [T, B, I]; packed [total, I]; one step [B, I]
    batch_sizes: Tensor | None,  # [T] on the CPU, of packed input
    h0: Tensor,  # [B, P]
    c0: Tensor | None,  # [B, H], of the LSTM
    weight_ih: Tensor,  # [G·H, I]
    weight_hh: Tensor,  # [G·H, P]
    bias_ih: Tensor | None,  # [G·H]
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,  # [P, H]
    lengths: Tensor | None,  # [B]
    resets: Tensor | None,  # [T, B] bool
    cell: int,
    reverse: bool,
    training: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(output, h_n [B, P], c_n [B, H] or None) by the equations above, a step at a time."""
    step, packed, B = input.dim() == 2 and batch_sizes is None, batch_sizes is not None, h0.size(0)
    active = None  # [T, B]
    if step:
        input = input[None]
    elif packed:
        active = torch.arange(B, device=input.device) < batch_sizes.to(input.device)[:, None]
        where = active.nonzero(as_tuple=True)
        input = input.new_zeros(*active.shape, input.size(1)).index_put(where, input)
    elif lengths is not None:
        active = torch.arange(len(input), device=input.device)[:, None] < lengths
        input = torch.where(active[..., None], input, 0)  # padding may hold anything
    from_input = torch.nn.functional.linear(input, weight_ih, bias_ih)
    h, c = (s if s is None else s.clone() for s in (h0, c0))  # of no steps too, the results are no argument's memory
    outputs = [input.new_zeros(0)] * len(input)
    for t in range(len(input))[:: -1 if reverse else 1]:
        before = h, c
        if resets is not None:
            h, c = (s if s is None else torch.where(resets[t, :, None], 0, s) for s in (h, c))
        h, c = _step(cell, from_input[t], h, c, weight_hh, bias_hh, weight_hr)
        outputs[t] = h
        if active is not None:
            outputs[t] = torch.where(active[t, :, None], h, 0)
            h, c = (s if s is None else torch.where(active[t, :, None], s, old) for s, old in zip((h, c), before))
    output = torch.stack(outputs) if outputs else h[None][:0]
    return output[0] if step else output[where] if packed else output, h, c


def _step(cell, from_input, h, c, weight_hh, bias_hh, weight_hr):
    from_state = torch.nn.functional.linear(h, weight_hh, bias_hh)
    if cell == GRU:
        (r, z, n), (hr, hz, hn) = from_input.chunk(3, -1), from_state.chunk(3, -1)
        r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
        n = (n + r * hn).tanh()
        return (1 - z) * n + z * h, None
    gates = from_input + from_state
    if cell != LSTM:
        return gates.tanh() if cell == RNN_TANH else gates.relu(), None
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return h if weight_hr is None else torch.nn.functional.linear(h, weight_hr), c


# ------------------------------------------------------------------------------------------------ torch ops

# The places of the differentiable arguments among the op's; results of the backward op in this order.
_PRIMALS = (0, 2, 3, 4, 5, 6, 7, 8)


def _gradients(grad_output, grad_h_n, grad_c_n, *rest):
    wanted, primals = rest[-2], [rest[i] for i in _PRIMALS]
    return tuple(primals[0].new_empty(p.shape if wanted >> i & 1 else 0) for i, p in enumerate(primals))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11], output[0], *output[3:])
    ctx.step = inputs[0].dim() == 2 and inputs[1] is None
    ctx.mark_non_differentiable(*output[3:])
    ctx.cell, ctx.reverse, ctx.training, ctx.backend = inputs[11:]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_h_n, grad_c_n, *_):
    if not ctx.training:
        raise RuntimeError("pykernels::rnn: a gradient was asked of a call with training=False")
    # Tracing makes up gradients of results that are empty.
    grad_h_n, grad_c_n = None if ctx.step else grad_h_n, grad_c_n if ctx.cell == LSTM else None
    wanted = [ctx.needs_input_grad[place] for place in _PRIMALS]
    bits = sum(bit << i for i, bit in enumerate(wanted))
    saved, scalars = ctx.saved_tensors, (ctx.cell, ctx.reverse, bits, ctx.backend)
    grads = _rnn_backward_op(grad_output, grad_h_n, grad_c_n, *saved, *scalars)
    results = [None] * 15
    for place, want, grad in zip(_PRIMALS, wanted, grads):
        results[place] = grad if want else None
    return tuple(results)


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:14])
    ctx.cell, ctx.reverse = inputs[17:19]
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing refuses to compute it again
    grads, arguments = saved[:3], [*saved[3:]]

    def forward(*primals):
        for place, primal in zip(_PRIMALS, primals):
            arguments[place] = primal
        return reference(*arguments, ctx.cell, ctx.reverse)

    primals = [arguments[place] for place in _PRIMALS]
    second = second_order(forward, primals, grads, cotangents)
    results = [*second[:3], *[None] * 18]
    for place, value in zip(_PRIMALS, second[3:]):
        results[3 + place] = value
    return tuple(results)


# ------------------------------------------------------------------------------------------------ definitions

_TENSORS = (
    "Tensor input, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
    "Tensor? bias_hh, Tensor? weight_hr, Tensor? lengths, Tensor? resets"
)

_rnn_backward_op = torch_op(
    f"rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, {_TENSORS}, Tensor output, Tensor gates, "
    "Tensor cells, int cell, bool reverse, int wanted, int backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gradients,
    implementations={"triton": rnn_gpu.triton_backward, "cuda": rnn_gpu.cuda_backward},
    setup_context=_save_backward,
    backward=_double_backward,
)

_rnn_op = torch_op(
    f"rnn({_TENSORS}, int cell, bool reverse, bool training, int backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=rnn_gpu.outputs,
    implementations={"triton": rnn_gpu.triton, "cuda": rnn_gpu.cuda},
    setup_context=_save,
    backward=_backward,
)


# ------------------------------------------------------------------------------------------------ public functions


def _lstm(
    run,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    weight_hr: Tensor | None = None,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One layer of a long short-term memory over a sequence, in one direction.

    Args:
        input: [T, B, I], any strides; fp32, bf16, fp16 (and fp64 on the CPU). Packed with batch_sizes: [total, I].
        hx: (h [B, P], c [B, H]), the state before the first step; None is zeros.
        weight_ih: [4·H, I], rows in torch's order i, f, g, o.
        weight_hh: [4·H, P]; P is H without a projection.
        bias_ih, bias_hh: [4·H], both or neither.
        weight_hr: [P, H]: h' = weight_hr (o ∘ tanh c') (torch's proj_size).
        reverse: run from the last step to the first; output t still belongs to input t.
        lengths: [B] int32 or int64: valid steps of each sequence, 0 to T. Output is 0 beyond; the final state is the
            one after the last valid step (reverse: begins there).
        resets: [T, B] bool: the state is zeroed before that step (an episode begins).
        batch_sizes: [T] int64 on the CPU, not ascending: input is the data of a torch PackedSequence, whose step t has
            the first batch_sizes[t] sequences. Not together with lengths or resets. Without hx, torch.compile breaks
            its graph to read batch_sizes[0], unless fullgraph=True.

    Returns:
        output [T, B, P] (packed: [total, P]) and the final state (h_n [B, P], c_n [B, H]), all in the input's dtype;
        within, c and the sums are fp32 (fp64 for fp64). Differentiable, twice too, in every floating argument.
        A call equals any split of it in time, to the rounding of the states.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value other than the above, before anything is computed.

    Source: Hochreiter & Schmidhuber 1997 with the forget gate, as in torch.nn.LSTM; projection: Sak et al., 1402.1128.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    output, h, c = _sequence(run, LSTM, input, hx, weights, reverse, lengths, resets, batch_sizes)
    return output, (h, c)


def _lstm_step(
    run,
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a long short-term memory: torch.lstm_cell.

    Args:
        input: [B, I].
        hx: (h [B, P], c [B, H]), the state before the step.
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr: as in `lstm`.

    Returns:
        (h' [B, P], c' [B, H]) in the input's dtype. Differentiable, twice too.

    Raises:
        ValueError, TypeError: as `lstm`.
    """
    return _one_step(run, LSTM, input, hx, (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr))


def _gru(
    run,
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of a gated recurrent unit over a sequence, in one direction.

    Args:
        input: [T, B, I], or with batch_sizes [total, I].
        hx: [B, H], the state before the first step; None is zeros.
        weight_ih, weight_hh: [3·H, I] and [3·H, H], rows in torch's order r, z, n.
        bias_ih, bias_hh: [3·H], both or neither.
        reverse, lengths, resets, batch_sizes: as in `lstm`.

    Returns:
        output [T, B, H] (packed: [total, H]) and h_n [B, H], in the input's dtype. Differentiable, twice too.

    Raises:
        ValueError, TypeError: as `lstm`.

    Source: Cho et al., 1406.1078, with the reset gate after the product, as in torch.nn.GRU.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, None)
    return _sequence(run, GRU, input, hx, weights, reverse, lengths, resets, batch_sizes)[:2]


def _gru_step(
    run,
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor:
    """One step of a gated recurrent unit: torch.gru_cell.

    Args:
        input: [B, I].
        hx: [B, H], the state before the step.
        weight_ih, weight_hh, bias_ih, bias_hh: as in `gru`.

    Returns:
        h' [B, H] in the input's dtype. Differentiable, twice too.

    Raises:
        ValueError, TypeError: as `lstm`.
    """
    return _one_step(run, GRU, input, hx, (weight_ih, weight_hh, bias_ih, bias_hh, None))[0]


def _rnn(
    run,
    input: Tensor,
    hx: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reverse: bool = False,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One layer of an Elman RNN over a sequence, in one direction.

    Args:
        input: [T, B, I], or with batch_sizes [total, I].
        hx: [B, H], the state before the first step; None is zeros.
        weight_ih, weight_hh: [H, I] and [H, H].
        bias_ih, bias_hh: [H], both or neither.
        nonlinearity: "tanh" or "relu".
        reverse, lengths, resets, batch_sizes: as in `lstm`.

    Returns:
        output [T, B, H] (packed: [total, H]) and h_n [B, H], in the input's dtype. Differentiable, twice too.

    Raises:
        ValueError, TypeError: as `lstm`; another nonlinearity.

    Source: Elman 1990, as in torch.nn.RNN.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, None)
    cell = _check_nonlinearity(nonlinearity)
    return _sequence(run, cell, input, hx, weights, reverse, lengths, resets, batch_sizes)[:2]


def _rnn_step(
    run,
    input: Tensor,
    hx: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an Elman RNN: torch.rnn_tanh_cell, torch.rnn_relu_cell.

    Args:
        input: [B, I].
        hx: [B, H], the state before the step.
        weight_ih, weight_hh, bias_ih, bias_hh, nonlinearity: as in `rnn`.

    Returns:
        h' [B, H] in the input's dtype. Differentiable, twice too.

    Raises:
        ValueError, TypeError: as `rnn`.
    """
    cell = _check_nonlinearity(nonlinearity)
    return _one_step(run, cell, input, hx, (weight_ih, weight_hh, bias_ih, bias_hh, None))[0]


def _one_step(run, cell, input, hx, weights) -> tuple[Tensor, Tensor]:
    """(h', c') of one step."""
    h, c = _split_state(cell, hx)
    input, h, c, *weights = autocast(input, h, c, *weights)
    _check_sizes(cell, input, "[B, I]", h, c, weights)
    training = wants_gradient(input, h, c, *weights)
    output, _, c, *_ = run(input, None, h, c, *weights, None, None, cell, False, training)
    return output, c


def _sequence(run, cell, input, hx, weights, reverse, lengths, resets, batch_sizes) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of all steps."""
    packed = batch_sizes is not None
    layout = "[total, I]" if packed else "[T, B, I]"
    h, c = _split_state(cell, hx)
    input, h, c, *weights = autocast(input, h, c, *weights)
    if packed:
        _check_packing(batch_sizes, lengths, resets)
    if hx is None:
        expect_tensor(input, "input", layout, _DTYPES)
        H = _check_weight_hh(cell, weights)
        B = _first_batch_size(batch_sizes) if packed else input.size(1)
        h = input.new_zeros(B, weights[1].size(1))
        c = input.new_zeros(B, H) if cell == LSTM else None
    _check_sizes(cell, input, layout, h, c, weights)
    B = h.size(0)
    if packed:
        _check_batch_sizes(batch_sizes, input, B)
    if lengths is not None:
        expect_lengths(lengths, "lengths", "[B]", input, "input")
        sizes, T = (B,), input.size(0)
        expect_shape(lengths, "lengths", sizes, "input's batch")
        if can_read(lengths) and ((lengths < 0) | (lengths > T)).any():
            values = lengths.tolist()
            expect(False, "lengths", "lengths from 0 to {T}", values, T=T)
        lengths = lengths.long()
    if resets is not None:
        expect_tensor(resets, "resets", "[T, B]", _BOOL)
        expect_device(resets, "resets", input, "input")
        sizes = input.shape[:2]
        expect_shape(resets, "resets", sizes, "input")
    training = wants_gradient(input, h, c, *weights)
    results = run(input, batch_sizes, h, c, *weights, lengths, resets, cell, bool(reverse), training)
    return results[:3]


# ------------------------------------------------------------------------------------------------ checks


def _check_nonlinearity(nonlinearity: str) -> int:
    expect(nonlinearity in ("tanh", "relu"), "nonlinearity", "'tanh' or 'relu'", nonlinearity)
    return RNN_TANH if nonlinearity == "tanh" else RNN_RELU


def _split_state(cell: int, hx) -> tuple[Tensor | None, Tensor | None]:
    """(h, c); GRU and RNN have no c."""
    if cell != LSTM or hx is None:
        return hx, None
    expect_type(isinstance(hx, tuple | list), "hx", "a tuple (h, c)", hx)
    if len(hx) != 2:
        count = len(hx)
        expect(False, "hx", "two tensors (h, c)", count)
    return hx


def _check_weight_hh(cell, weights) -> int:
    """H, which its rows tell."""
    _, weight_hh, _, _, weight_hr = weights
    layout, gates = _WEIGHT_HH[cell], GATES[cell]
    expect_tensor(weight_hh, "weight_hh", layout)
    rows, P = weight_hh.shape
    H = rows // gates
    if H == 0 or rows % gates:
        expect(False, "weight_hh", "{layout} with H at least 1", weight_hh, layout=layout)
    if weight_hr is None and P != H:
        why = "P is H without weight_hr" if cell == LSTM else "as many columns as units"
        expect(False, "weight_hh", "[{rows}, {H}]: {why}", weight_hh, rows=rows, H=H, why=why)
    return H


def _check_sizes(cell, input, layout, h, c, weights) -> None:
    """Shapes, dtypes and devices. A call at batch 1 waits for this, so calls are made only where something is wrong."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    expect_tensor(input, "input", layout, _DTYPES)
    H = _check_weight_hh(cell, weights)
    rows, P = weight_hh.shape
    if (bias_ih is None) != (bias_hh is None):
        name = "bias_ih" if bias_ih is None else "bias_hh"
        expect(False, name, "both biases or neither", None)
    hidden, carried = ("hx[0]", "hx[1]") if cell == LSTM else ("hx", None)
    if layout == "[total, I]":
        expect_tensor(h, hidden, "[B, P]")
        B = h.size(0)
    else:
        B = input.size(-2)
    dtype, device = input.dtype, input.device
    for value, name, shape in (
        (h, hidden, (B, P)),
        (c, carried, (B, H)),
        (weight_ih, "weight_ih", (rows, input.size(-1))),
        (weight_hh, "weight_hh", (rows, P)),
        (bias_ih, "bias_ih", (rows,)),
        (bias_hh, "bias_hh", (rows,)),
        (weight_hr, "weight_hr", (P, H)),
    ):
        if value is None and name in _OPTIONAL:
            continue
        try:
            if value.shape == shape and value.dtype is dtype and value.device == device and value.layout is STRIDED:
                continue
        except (AttributeError, RuntimeError):  # no tensor, or a nested one, which has no shape
            pass
        sizes = str(list(shape))
        expect_tensor(value, name, sizes)
        expect_shape(value, name, shape, "input and weight_hh")
        expect_alike(value, name, input, "input")


def _check_packing(batch_sizes, lengths, resets) -> None:
    expect_tensor(batch_sizes, "batch_sizes", "[T]", _INT64)
    expect(lengths is None and resets is None, "batch_sizes", "no lengths and no resets beside it", batch_sizes)


def _first_batch_size(batch_sizes: Tensor) -> int:
    """B, which is data."""
    if batch_sizes.is_meta:
        expect(False, "hx", "the state, because batch_sizes on the meta device tells no batch", None)
    return int(batch_sizes[0]) if len(batch_sizes) else 0


def _check_batch_sizes(batch_sizes, input, B) -> None:
    device = batch_sizes.device.type
    if device != "cpu" and (device, input.device.type) != ("meta", "meta"):
        expect(False, "batch_sizes", "a CPU tensor", device)
    if can_read(batch_sizes):
        sizes, total = batch_sizes.tolist(), input.size(0)
        if not all(a >= b for a, b in zip([B, *sizes], [*sizes, 1])) or sum(sizes) != total:
            expected = "sizes from {B} not ascending to 1, of sum {total}"
            expect(False, "batch_sizes", expected, sizes, B=B, total=total)


# ------------------------------------------------------------------------------------------------ declarations


def _layer(
    gates, T, B, I, H, *, P=None, bias=True, state=True, lengths=None, resets=None, packed=None, order="tbi", size=1.0,
    large=False, step=False, **options,
):  # fmt: skip
    """make(dtype, device) for a sequence. resets: their probability; packed: lengths, descending; size: of input.
    large: gates of ±1e38, and of ±inf where two biases of the dtype's largest numbers meet. (Not by the input: a
    saturated gate's derivative is nothing but a rounding, which that would magnify.)"""

    def make(dtype, device):
        def draw(*shape):
            return (torch.rand(shape, dtype=dtype, device=device) * 2 - 1) * H**-0.5  # as torch initialises

        inputs = dict(
            input=size * torch.randn(T, B, I, dtype=dtype, device=device), hx=None,
            weight_ih=draw(gates * H, I), weight_hh=draw(gates * H, P or H),
        )  # fmt: skip
        if order == "bti":  # batch first, seen through a transpose
            inputs["input"] = size * torch.randn(B, T, I, dtype=dtype, device=device).transpose(0, 1)
        if bias:
            inputs |= dict(bias_ih=draw(gates * H), bias_hh=draw(gates * H))
        if P is not None:
            inputs["weight_hr"] = draw(P, H)
        if state:
            h = torch.randn(B, P or H, dtype=dtype, device=device)
            inputs["hx"] = (h, torch.randn(B, H, dtype=dtype, device=device)) if gates == GATES[LSTM] else h
        if lengths is not None:
            inputs["lengths"] = torch.tensor(lengths, device=device)
        if resets is not None:
            inputs["resets"] = torch.rand(T, B, device=device) < resets
        if packed is not None:
            inputs["batch_sizes"] = (torch.arange(T)[:, None] < torch.tensor(packed)).sum(1)
            inputs["input"] = size * torch.randn(sum(packed), I, dtype=dtype, device=device)
        if large:
            most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
            inputs["bias_ih"] = (torch.rand(gates * H, device=device) * 2 - 1).to(dtype) * most
            for name in ("bias_ih", "bias_hh"):
                inputs[name][::3], inputs[name][1::5] = most, -most
        if step:
            inputs["input"] = inputs["input"][0]
        return inputs | options

    return make


def _flops(inputs) -> float:
    rows, weights = inputs["input"][..., 0].numel(), [inputs.get(f"weight_{w}") for w in ("ih", "hh", "hr")]
    return 2.0 * rows * sum(w.numel() for w in weights if w is not None)


def _traffic(inputs) -> float:
    """Every tensor read once, output and final states written."""
    tensors = torch.utils._pytree.tree_leaves(inputs)
    read = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    rows, width = inputs["input"][..., 0].numel(), inputs["weight_hh"].size(1)
    return float(read + rows * width * inputs["input"].element_size())


def _job(label, make, **more) -> Workload:
    return Workload(label, make, flops=_flops, bytes=_traffic, train_flops=3.0, **more)


_FEW = 4.0  # where a result is one number, eager's error is a matter of luck
_LARGE = 4.0  # an argument of hundreds rounds by so many units of what its exponential is


def _samples(op):
    """Of op(T, B, I, H, …), the maker of a cell's arguments."""
    return [
        Sample("plain", op(5, 3, 7, 8)),
        Sample("odd sizes", op(6, 5, 3, 19)),
        Sample("no state, no bias", op(4, 3, 5, 6, bias=False, state=False)),
        Sample("one", op(1, 1, 1, 1), _FEW),
        Sample("one sequence", op(8 if INTERPRET else 40, 1, 20, 48)),
        Sample("one sequence, wide", op(4 if INTERPRET else 12, 1, 100, 200)),
        Sample("several tiles", op(4 if INTERPRET else 12, 18, 33, 70)),
        Sample("wide, two tiles", op(2, 9, 10, 40 if INTERPRET else 300)),
        Sample("many sequences", op(3, 70, 40, 33)),
        Sample("long", op(20 if INTERPRET else 100, 2, 8, 24)),
        Sample("wide input, few steps", op(2, 2, 130, 10)),
        Sample("reverse", op(7, 4, 5, 20, reverse=True)),
        Sample("lengths", op(7, 5, 6, 18, lengths=(3, 7, 0, 1, 5))),
        Sample("lengths, reverse", op(7, 5, 6, 18, lengths=(3, 7, 0, 1, 5), reverse=True)),
        Sample("resets", op(9, 4, 6, 18, resets=0.3)),
        Sample("resets, lengths, reverse", op(9, 3, 6, 17, resets=0.3, lengths=(9, 4, 6), reverse=True)),
        Sample("packed", op(7, 5, 6, 18, packed=(7, 5, 3, 3, 1))),
        Sample("packed, many", op(6, 30, 20, 40, packed=tuple(range(6, 0, -1)) + (1,) * 24, state=False)),
        Sample("packed, reverse", op(7, 5, 6, 18, packed=(7, 5, 3, 3, 1), reverse=True)),
        Sample("batch first", op(6, 4, 7, 20, order="bti")),
        Sample("saturated", op(6, 4, 7, 20, size=300.0), _LARGE),
        Sample("gates of ±1e38 and ±inf", op(6, 4, 7, 20, large=True)),
        Sample("no steps", op(0, 3, 5, 6)),
        Sample("no sequences", op(4, 0, 5, 6)),
        Sample("no features", op(4, 3, 0, 6)),
    ]


def _projected_samples(op):
    return [
        Sample("projection", op(6, 4, 7, 20, P=9)),
        Sample("projection, one sequence", op(9, 1, 7, 40, P=33, reverse=True)),
        Sample("projection, lengths, resets", op(6, 4, 7, 20, P=5, lengths=(6, 0, 2, 5), resets=0.3)),
        Sample("projection, packed", op(4, 3, 7, 20, P=5, packed=(4, 3, 1), bias=False)),
    ]


def _step_samples(op):
    return [
        Sample("plain", op(3, 7, 8)),
        Sample("one", op(1, 1, 1), _FEW),
        Sample("one sequence", op(1, 40, 50)),
        Sample("one sequence, wide", op(1, 150, 170)),
        Sample("many sequences", op(33, 20, 35)),
        Sample("no bias", op(4, 5, 17, bias=False)),
        Sample("saturated", op(4, 6, 20, size=300.0), _LARGE),
        Sample("gates of ±1e38 and ±inf", op(4, 6, 20, large=True)),
        Sample("no sequences", op(0, 5, 6)),
    ]


_ragged = tuple(sorted((17 * i % 97 + 4 for i in range(32)), reverse=True))  # 32 sequences of 4 to 100 steps
_sizes = [(1, 256, 128), (1, 256, 256), (1, 128, 1024), (4, 128, 512), (16, 128, 512), (64, 64, 256)]


def _workloads(op, sizes):
    for train in (False, True):
        for B, T, H in sizes:
            yield _job(f"B{B} T{T} H{H}", op(T, B, H, H), train=train, quick=True)
    for train in (False, True):
        label, make = f"32 packed of {min(_ragged)}–{max(_ragged)} H256", op(max(_ragged), 32, 256, 256, packed=_ragged)
        yield _job(label, make, train=train, quick=True)


def _step_workloads(op):
    for B, H in ((1, 256), (32, 256), (1, 1024)):
        yield _job(f"B{B} H{H}", op(B, H, H), quick=H == 256)


def _declare(function, cell, samples, workloads, supports=None):
    return register(
        function,
        kernel=_rnn_op,
        reference=reference,
        supports={"cpu": lambda *_: None, "triton": triton_declines} | (supports or {}),
        cuda_first=bool(supports),  # one launch, where Triton has one a step
        samples=samples,
        workloads=workloads,
        differentiable=(
            "input",
            "hx",
            "weight_ih",
            "weight_hh",
            "bias_ih",
            "bias_hh",
            *(["weight_hr"] if cell == LSTM else []),
        ),
    )


_on_cuda = {"cuda": rnn_gpu.cuda_declines}
_lstms, _grus, _rnns = (functools.partial(_layer, GATES[cell]) for cell in (LSTM, GRU, RNN_TANH))
_lstm_steps, _gru_steps, _rnn_steps = (functools.partial(op, 1, step=True) for op in (_lstms, _grus, _rnns))

lstm = _declare(_lstm, LSTM, [*_samples(_lstms), *_projected_samples(_lstms)], _workloads(_lstms, _sizes), _on_cuda)
gru = _declare(_gru, GRU, _samples(_grus), _workloads(_grus, _sizes[1:2] + _sizes[4:5]), _on_cuda)
rnn = _declare(
    _rnn,
    RNN_TANH,
    [
        *_samples(_rnns),
        Sample("relu", _rnns(6, 4, 7, 20, nonlinearity="relu")),
        Sample("relu, resets, lengths", _rnns(6, 3, 7, 20, nonlinearity="relu", resets=0.3, lengths=(6, 0, 4))),
    ],
    [_job("B1 T256 H256", _rnns(256, 1, 256, 256), quick=True)],
)
lstm_step = _declare(
    _lstm_step,
    LSTM,
    [*_step_samples(_lstm_steps), Sample("projection", _lstm_steps(5, 7, 20, P=9))],
    _step_workloads(_lstm_steps),
)
gru_step = _declare(_gru_step, GRU, _step_samples(_gru_steps), _step_workloads(_gru_steps))
rnn_step = _declare(
    _rnn_step,
    RNN_TANH,
    [*_step_samples(_rnn_steps), Sample("relu", _rnn_steps(4, 7, 20, nonlinearity="relu"))],
    _step_workloads(_rnn_steps),
)
