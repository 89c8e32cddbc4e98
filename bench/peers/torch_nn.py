"""torch's own recurrent layers and cells: the functions behind torch.nn.LSTM and the others, called with care.

oneDNN runs the LSTM on CPUs where it can, cuDNN every one of them on GPUs. Sequences of unequal length are packed, and
that is part of the call; packed ones arrive packed.
"""

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

NAME = "torch.nn"


def missing() -> str | None:
    return None


def lstm(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *, weight_hr=None, **options):
    return _layer(torch.lstm, True, input, hx, (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), **options)


def gru(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, **options):
    return _layer(torch.gru, False, input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), **options)


def rnn(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, *, nonlinearity="tanh", **options):
    function = torch.rnn_tanh if nonlinearity == "tanh" else torch.rnn_relu
    return _layer(function, False, input, hx, (weight_ih, weight_hh, bias_ih, bias_hh), **options)


def lstm_step(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, weight_hr=None):
    if weight_hr is not None:
        raise NotImplementedError("torch.lstm_cell has no projection")
    return torch.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def gru_step(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None):
    return torch.gru_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def rnn_step(input, hx, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity="tanh"):
    cell = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
    return cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)


def _layer(function, pair, input, hx, weights, *, reverse=False, lengths=None, resets=None, batch_sizes=None):
    if reverse:
        raise NotImplementedError("torch.nn runs backwards only beside a forward direction")
    if resets is not None:
        raise NotImplementedError("torch.nn has no resets")
    if input.size(0) == 0 or (lengths is not None and int(lengths.min()) < 1):
        raise NotImplementedError("torch's sequences have at least one step")
    flat = [w for w in weights if w is not None]
    biased, packed = weights[2] is not None, None
    if lengths is not None:
        T = input.size(0)
        packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
        input, batch_sizes = packed.data, packed.batch_sizes
    if hx is None:
        B = int(batch_sizes[0]) if batch_sizes is not None else input.size(1)
        rows, width = weights[1].shape
        hx = (input.new_zeros(B, width), input.new_zeros(B, rows // 4)) if pair else input.new_zeros(B, width)
    states = [s[None] for s in (hx if pair else (hx,))]
    if packed is not None:
        states = [s.index_select(1, packed.sorted_indices) for s in states]
    state = states if pair else states[0]
    if batch_sizes is None:
        output, *final = function(input, state, flat, biased, 1, 0.0, torch.is_grad_enabled(), False, False)
    else:
        output, *final = function(input, batch_sizes, state, flat, biased, 1, 0.0, torch.is_grad_enabled(), False)
    if packed is not None:
        output, _ = pad_packed_sequence(PackedSequence(output, *packed[1:]), total_length=T)
        final = [s.index_select(1, packed.unsorted_indices) for s in final]
    final = [s[0] for s in final]
    return output, tuple(final) if pair else final[0]
