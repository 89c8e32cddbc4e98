"""LSTM, GRU and Elman RNN on torch tensors: results and gradients, uninitialised, and the GPU's launches.

The products with all rows at once, before the loop over the steps and after it, are a library's. Ops: ops/rnn.py.
"""

from __future__ import annotations

import functools

import torch

from ..core import native
from ..core.backends import constant
from ..core.dtypes import FLOATS, accumulator_of
from ..core.layout import dense

LSTM, GRU, RNN_TANH, RNN_RELU = range(4)
GATES = (4, 3, 1, 1)  # rows of the weights, in units of H
SAVED_GATES = (4, 4, 0, 0)  # what backward reads of a step, in units of H: i f g o; r z n and W_hn h + b_hn; nothing
TILE_ROWS = 8  # sequences of a tile of the CUDA kernels
WEIGHT_COLUMNS = 512  # of which the CUDA kernels' rows of weights have a multiple


def outputs(input, batch_sizes, h0, weight_hh, cell, training):
    lead, B, H = input.shape[:-1], h0.size(0), weight_hh.size(0) // GATES[cell]
    step = input.dim() == 2 and batch_sizes is None
    acc = accumulator_of(input.dtype)

    def saved(width):
        return input.new_empty(*lead, width * H, dtype=acc) if training and width else input.new_empty(0, dtype=acc)

    return (
        input.new_empty(*lead, h0.size(1)),
        input.new_empty(0) if step else input.new_empty(h0.shape),
        input.new_empty(B, H) if cell == LSTM else input.new_empty(0),
        saved(SAVED_GATES[cell]),
        saved(1 if cell == LSTM else 0),
    )


def gradients(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, wanted):
    primals = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    return tuple(input.new_empty(p.shape if wanted >> i & 1 else 0) for i, p in enumerate(primals))


# ------------------------------------------------------------------------------------------------ both


def _from_input(rows, weight_ih, acc):
    """W_ih x of all rows, not rounded to the input's dtype."""
    if rows.is_cuda and acc != rows.dtype and torch.version.hip is None:
        return torch.mm(rows, weight_ih.t(), out_dtype=acc)
    return rows.to(acc) @ weight_ih.t().to(acc)


def _prepare_backward(input, h0, weight_hh, weight_hr, grad_h_n, grad_c_n, gates, cell, wanted):
    """(dh, dc) of the final state, to become the initial one's; what the loop is to write: dgates, h before, dh."""
    acc, rows, (B, P) = gates.dtype, input.shape[:-1].numel(), h0.shape
    H = weight_hh.size(0) // GATES[cell]

    def state(grad, width):
        return input.new_zeros(B, width, dtype=acc) if grad is None else grad.to(acc, copy=True)

    grad_h, grad_c = state(grad_h_n, P), state(grad_c_n, H) if cell == LSTM else None
    grad_gates = input.new_empty(rows, max(SAVED_GATES[cell], 1) * H)
    previous = input.new_empty(rows, P) if wanted >> 4 & 1 else None
    grad_hidden = None if weight_hr is None else input.new_empty(rows, P)
    return grad_h, grad_c, grad_gates, previous, grad_hidden


def _finish_backward(
    input, weight_ih, weight_hh, lengths, gates, cells, grad_h, grad_c, grad_gates, previous, grad_hidden, cell, wanted
):
    """All gradients, from what the loop left: one product each."""
    acc = gates.dtype
    H = weight_hh.size(0) // GATES[cell]
    rows, from_input, from_hidden = input.flatten(0, -2), grad_gates, grad_gates
    if lengths is not None:  # padding may hold anything, and 0 · NaN is NaN
        valid = torch.arange(len(input), device=input.device)[:, None] < lengths
        rows = rows.masked_fill(~valid.flatten()[:, None], 0)
    if cell == GRU:  # of n, r, z and W_hn h + b_hn
        from_input, from_hidden = grad_gates[:, : 3 * H], grad_gates[:, H:]
        weight_ih = weight_ih.roll(H, 0)

    def in_order(grad):
        return grad.roll(-H, 0) if cell == GRU else grad

    formulas = (
        lambda: (from_input @ weight_ih).view_as(input),
        lambda: grad_h.to(input.dtype),
        lambda: grad_c.to(input.dtype),
        lambda: in_order(from_input.mT @ rows),
        lambda: from_hidden.mT @ previous,
        lambda: in_order(from_input.sum(0, dtype=acc)).to(input.dtype),
        lambda: from_hidden.sum(0, dtype=acc).to(input.dtype),
        lambda: grad_hidden.mT @ (gates.flatten(0, -2)[:, 3 * H :] * cells.flatten(0, -2).tanh()).to(input.dtype),
    )
    return tuple(formula() if wanted >> i & 1 else input.new_empty(0) for i, formula in enumerate(formulas))


# ------------------------------------------------------------------------------------------------ Triton


def triton(
    input, batch_sizes, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, resets, cell, reverse,
    training,
):  # fmt: skip
    from ..kernels import rnn as kernels

    input, batch_sizes, h0, c0, lengths, resets = dense(input, batch_sizes, h0, c0, lengths, resets)
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = dense(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)
    output, h_n, c_n, gates, cells = outputs(input, batch_sizes, h0, weight_hh, cell, training)
    step = input.dim() == 2 and batch_sizes is None
    initial = c0 if cell == LSTM else h0 if cell == GRU else None
    if step:
        pre, T, h, state, new_state = None, 1, h0, initial, c_n if cell == LSTM else None
    else:
        rows = input.flatten(0, -2)
        pre = _from_input(rows, weight_ih, gates.dtype)
        T = len(input) if batch_sizes is None else len(batch_sizes)
        state = new_state = None if initial is None else initial.to(gates.dtype, copy=True)
        h_n.copy_(h0)
        h = h0.new_empty(len(rows) + len(h0), h0.size(1))  # output and, below it, h0: the kernel reads either
        h[len(rows) :] = h0
        output = h[: len(rows)].view_as(output)
    kernels.forward(
        x=input, pre=pre, T=T, batch_sizes=batch_sizes, h=h, row_0=len(h) - len(h0),
        w_ih=weight_ih, w_hh=weight_hh, b_ih=bias_ih, b_hh=bias_hh, w_hr=weight_hr, lengths=lengths, resets=resets,
        cell=cell, reverse=reverse, output=output, h_n=None if step else h_n, state=state, new_state=new_state,
        hidden=None if weight_hr is None else output.new_empty(c_n.shape),
        gates=gates if gates.numel() else None, cells=cells if cells.numel() else None,
    )  # fmt: skip
    if cell == LSTM and not step:
        c_n.copy_(state)
    return output, h_n, c_n, gates, cells


def triton_backward(
    grad_output, grad_h_n, grad_c_n, input, batch_sizes, h0, c0, weight_ih, weight_hh, weight_hr, lengths, resets,
    output, gates, cells, cell, reverse, wanted,
):  # fmt: skip
    from ..kernels import rnn as kernels

    grad_output, grad_h_n, grad_c_n, input, batch_sizes = dense(grad_output, grad_h_n, grad_c_n, input, batch_sizes)
    h0, c0, weight_ih, weight_hh, weight_hr = dense(h0, c0, weight_ih, weight_hh, weight_hr)
    lengths, resets, output, gates, cells = dense(lengths, resets, output, gates, cells)
    work = _prepare_backward(input, h0, weight_hh, weight_hr, grad_h_n, grad_c_n, gates, cell, wanted)
    grad_h, grad_c, grad_gates, previous, grad_hidden = work
    kernels.backward(
        grad_output=grad_output,
        T=1 if input.dim() == 2 and batch_sizes is None else len(input) if batch_sizes is None else len(batch_sizes),
        batch_sizes=batch_sizes, h0=h0, c0=c0, w_hh_t=weight_hh.t().contiguous(),
        w_hr_t=None if weight_hr is None else weight_hr.t().contiguous(), lengths=lengths, resets=resets,
        output=output, gates=gates, cells=cells, cell=cell, reverse=reverse, grad_h=grad_h, grad_c=grad_c,
        grad_gates=grad_gates, grad_hidden=grad_hidden, previous=previous,
    )  # fmt: skip
    return _finish_backward(input, weight_ih, weight_hh, lengths, gates, cells, *work, cell, wanted)


# ------------------------------------------------------------------------------------------------ CUDA

_CLUSTER = 16  # blocks at most that exchange through their shared memories; 0: all exchange through global memory


@constant  # the cache is beneath: tracing would see through it
def _fits(device, dtype, H, cell, backward) -> bool:
    return _measured(device, dtype, H, cell, backward)


@functools.cache
def _measured(device, dtype, H, cell, backward) -> bool:
    return torch.ops.pykernels_cuda.rnn_fits(torch.empty(0, dtype=dtype, device=device), H, cell, backward)


def cuda_declines(
    input, batch_sizes, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, resets, cell, reverse,
    training,
) -> str | None:  # fmt: skip
    H = h0.size(1)
    if input.dtype not in FLOATS:
        return "it takes fp32, bf16 and fp16"
    if cell not in (LSTM, GRU):
        return "it has LSTM and GRU: three of a lane's four gates would be zeros"
    if weight_hr is not None:
        return "it takes no weight_hr"
    if input.dim() == 2 and batch_sizes is None:
        return "it takes sequences: for one step, loading the weights is all there is to do"
    if (len(input) if batch_sizes is None else len(batch_sizes)) >= 1 << 24 or len(h0) >= 1 << 30:
        return "it takes fewer than 2^24 steps and 2^30 sequences"
    if batch_sizes is not None and input.is_cuda and torch.cuda.is_current_stream_capturing():
        return "it copies batch_sizes to the device, which a CUDA graph would not repeat"
    for backward in (False, True)[: 1 + training]:
        if not _fits(input.device, input.dtype, H, cell, backward):
            return (
                f"H = {H}: {'the transposed' if backward else 'the'} weights do not fit on the chip of {input.device}"
            )
    return None


def _sequence_in(input, batch_sizes):
    """(T, the first row of each step and their number, on input's device, if it is packed)."""
    if batch_sizes is None:
        return len(input), None
    return len(batch_sizes), torch.nn.functional.pad(batch_sizes.cumsum(0), (1, 0)).to(input.device)


def _scratch(weights, B):
    """(exchange, counters) for weights [groups, rows, K]."""
    tiles = -(-B // TILE_ROWS)
    counters = torch.zeros(tiles, 32, dtype=torch.int32, device=weights.device)
    return weights.new_zeros(2, TILE_ROWS * tiles, weights.size(2)), counters


# The kernels' layouts of the recurrent weights, made anew at each call: one strided copy (two if 8 does not divide H),
# after a fill with zeros unless it covers all. A copy that is kept would miss an update through .data, which counts no
# version, and the kernels load 16 bytes of a padded row at a time. For an LSTM of H = 1024 in bf16 it is 8 MiB.


def _by_octets(weight_hh, G, H):
    """[octets of units, 4 gates · 8 units, K], K a multiple of 512 from H: forward's."""
    whole, rest = divmod(H, 8)
    shape = whole + bool(rest), 4, 8, -(-H // WEIGHT_COLUMNS) * WEIGHT_COLUMNS
    weights = weight_hh.new_empty(shape) if (G, rest, shape[3]) == (4, 0, H) else weight_hh.new_zeros(shape)
    by_gate, inside = weight_hh.view(G, H, H), weights[:, :G, :, :H]
    if whole:
        inside[:whole] = by_gate[:, : 8 * whole].unflatten(1, (whole, 8)).transpose(0, 1)
    if rest:
        inside[whole, :, :rest] = by_gate[:, 8 * whole :]
    return weights.flatten(1, 2)


def _transposed(weight_hh, G, H):
    """[groups of units, 16 (fp32: 8) units, K], a multiple of 512 from 4 · H, by unit, then gate: backward's."""
    group = 16 if weight_hh.itemsize == 2 else 8
    shape = -(-H // group) * group, -(-4 * H // WEIGHT_COLUMNS) * WEIGHT_COLUMNS
    weights = weight_hh.new_empty(shape) if (G, *shape) == (4, H, 4 * H) else weight_hh.new_zeros(shape)
    weights[:H].unflatten(1, (-1, 4))[:, :H, :G] = weight_hh.view(G, H, H).permute(2, 1, 0)
    return weights.unflatten(0, (-1, group))


def cuda(
    input, batch_sizes, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, resets, cell, reverse,
    training,
):  # fmt: skip
    input, batch_sizes, h0, c0, lengths, resets = dense(input, batch_sizes, h0, c0, lengths, resets)
    weight_ih, weight_hh, bias_ih, bias_hh = dense(weight_ih, weight_hh, bias_ih, bias_hh)
    output, h_n, c_n, gates, cells = outputs(input, batch_sizes, h0, weight_hh, cell, training)
    rows, (B, H), (T, offsets) = input.flatten(0, -2), h0.shape, _sequence_in(input, batch_sizes)
    state = (c0 if cell == LSTM else h0).to(gates.dtype, copy=True)
    h_n.copy_(h0)
    if T and B:
        weights = _by_octets(weight_hh, GATES[cell], H)
        native.cuda(
            "rnn_forward",
            *(_from_input(rows, weight_ih, gates.dtype), weights, bias_ih, bias_hh, h0, lengths, resets, offsets),
            *(output.flatten(0, -2), h_n, state),
            *(t.flatten(0, -2) if t.numel() else None for t in (gates, cells)),
            *(*_scratch(weights, B), T, cell, reverse, _CLUSTER),
        )
    if cell == LSTM:
        c_n.copy_(state)
    return output, h_n, c_n, gates, cells


def cuda_backward(
    grad_output, grad_h_n, grad_c_n, input, batch_sizes, h0, c0, weight_ih, weight_hh, lengths, resets, output, gates,
    cells, cell, reverse, wanted,
):  # fmt: skip
    grad_output, grad_h_n, grad_c_n, input, batch_sizes = dense(grad_output, grad_h_n, grad_c_n, input, batch_sizes)
    h0, c0, weight_ih, weight_hh, lengths, resets = dense(h0, c0, weight_ih, weight_hh, lengths, resets)
    output, gates, cells = dense(output, gates, cells)
    work = _prepare_backward(input, h0, weight_hh, None, grad_h_n, grad_c_n, gates, cell, wanted)
    grad_h, grad_c, grad_gates, previous, _ = work
    (B, H), (T, offsets), lstm = h0.shape, _sequence_in(input, batch_sizes), cell == LSTM
    if T and B:
        weights = _transposed(weight_hh, GATES[cell], H)
        native.cuda(
            "rnn_backward",
            *(None if grad_output is None else grad_output.flatten(0, -2), weights, h0, c0, lengths, resets, offsets),
            *(output.flatten(0, -2), gates.flatten(0, -2), cells.flatten(0, -2) if lstm else None),
            *(grad_h, grad_c, grad_gates, previous, *_scratch(weights, B), T, cell, reverse, _CLUSTER),
        )
    return _finish_backward(input, weight_ih, weight_hh, lengths, gates, cells, *work, cell, wanted)
