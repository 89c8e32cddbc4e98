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

import torch
from torch import Tensor

from ..core.backends import triton_declines
from ..core.declaration import public
from ..core.dtypes import DTYPES, autocast
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
from ..core.torch_op import torch_op, wants_gradient
from ..launch import rnn as launch
from ..launch.rnn import GATES, GRU, LSTM, RNN_RELU, RNN_TANH

STRIDED, _INT64, _BOOL = torch.strided, (torch.int64,), (torch.bool,)
_OPTIONAL = (None, "bias_ih", "bias_hh", "weight_hr")  # None: c, of cells that have none
_WEIGHT_HH = ("[4·H, P]", "[3·H, H]", "[H, H]", "[H, H]")  # of each cell


# ------------------------------------------------------------------------------------------------ reference


def reference(
    input: Tensor,  # [T, B, I]; packed [total, I]; one step [B, I]
    batch_sizes: Tensor | None,  # [T] on the CPU, of packed input
    h0: Tensor,  # [B, P]
    c0: Tensor | None,  # [B, H], of the LSTM
    weight_ih: Tensor,  # [G·H, I]
    weight_hh: Tensor,  # [G·H, P]
    bias_ih: Tensor | None = None,  # [G·H]
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,  # [P, H]
    lengths: Tensor | None = None,  # [B]
    resets: Tensor | None = None,  # [T, B] bool
    cell: int = LSTM,
    reverse: bool = False,
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
    expect_tensor(input, "input", layout, DTYPES)
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


# ------------------------------------------------------------------------------------------------ torch ops

_TENSORS = (
    "Tensor input, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
    "Tensor? bias_hh, Tensor? weight_hr, Tensor? lengths, Tensor? resets"
)

rnn_backward_op = torch_op(
    f"rnn_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, {_TENSORS}, Tensor output, Tensor gates, "
    "Tensor cells, int cell, bool reverse, int wanted, int backend) "
    "-> (Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor grad_weight_ih, Tensor grad_weight_hh, "
    "Tensor grad_bias_ih, Tensor grad_bias_hh, Tensor grad_weight_hr)",
    fake=launch.gradients,
    launchers={"triton": launch.triton_backward, "cuda": launch.cuda_backward},
    reference=reference,
)


def _gradient(grad_output, grad_h_n, grad_c_n, input, batch_sizes, output, gates, cells, cell, training, needs, **more):
    step, primals = input.dim() == 2 and batch_sizes is None, rnn_backward_op.primals
    given = dict(input=input, batch_sizes=batch_sizes, output=output, gates=gates, cells=cells, cell=cell, **more)
    return rnn_backward_op.gradients(
        grad_output=grad_output,
        grad_h_n=None if step else grad_h_n,  # tracing makes up gradients of results that are empty
        grad_c_n=grad_c_n if cell == LSTM else None,
        wanted=sum(1 << i for i, name in enumerate(primals) if name in needs),
        **given,
    )


rnn_op = torch_op(
    f"rnn({_TENSORS}, int cell, bool reverse, bool training, int backend) "
    "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    fake=launch.outputs,
    launchers={"triton": launch.triton, "cuda": launch.cuda},
    gradient=_gradient,
)


def _made_of(*extra: str, cuda: bool = False):
    return public(
        kernel=rnn_op,
        reference=reference,
        supports={"cpu": lambda *_: None, "triton": triton_declines} | ({"cuda": launch.cuda_declines} if cuda else {}),
        cuda_first=cuda,  # one launch, where Triton has one a step
        differentiable=("input", "hx", "weight_ih", "weight_hh", "bias_ih", "bias_hh", *extra),
    )


# ------------------------------------------------------------------------------------------------ public functions


@_made_of("weight_hr", cuda=True)
def lstm(
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


@_made_of("weight_hr")
def lstm_step(
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


@_made_of(cuda=True)
def gru(
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


@_made_of()
def gru_step(
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


@_made_of()
def rnn(
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


@_made_of()
def rnn_step(
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
    output, _, c, *_ = run(input, None, h, c, *weights, cell=cell, training=training)
    return output, c


def _sequence(run, cell, input, hx, weights, reverse, lengths, resets, batch_sizes) -> tuple[Tensor, Tensor, Tensor]:
    """(output, h_n, c_n) of all steps."""
    packed = batch_sizes is not None
    layout = "[total, I]" if packed else "[T, B, I]"
    h, c = _split_state(cell, hx)
    input, h, c, *weights = autocast(input, h, c, *weights)
    if packed:
        expect_tensor(batch_sizes, "batch_sizes", "[T]", _INT64)
        expect(lengths is None and resets is None, "batch_sizes", "no lengths and no resets beside it", batch_sizes)
    if hx is None:
        expect_tensor(input, "input", layout, DTYPES)
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
    options = dict(lengths=lengths, resets=resets, cell=cell, reverse=bool(reverse), training=training)
    output, h, c, *_ = run(input, batch_sizes, h, c, *weights, **options)
    return output, h, c
