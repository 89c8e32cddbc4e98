"""LSTM, GRU and Elman RNN: samples and workloads."""

from __future__ import annotations

import functools

import torch

from ..core.backends import INTERPRET
from ..core.declaration import Sample, Workload, declare
from ..launch.rnn import GATES, GRU, LSTM, RNN_TANH
from ..ops.rnn import gru, gru_step, lstm, lstm_step, rnn, rnn_step


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
    read = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
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
            representative = (B, T, H) in (_sizes[1], _sizes[-1])
            yield _job(f"B{B} T{T} H{H}", op(T, B, H, H), train=train, quick=True, representative=representative)
    for train in (False, True):
        label, make = f"32 packed of {min(_ragged)}–{max(_ragged)} H256", op(max(_ragged), 32, 256, 256, packed=_ragged)
        yield _job(label, make, train=train, quick=True)


def _step_workloads(op):
    for B, H in ((1, 256), (32, 256), (1, 1024)):
        yield _job(f"B{B} H{H}", op(B, H, H), quick=H == 256)


_lstms, _grus, _rnns = (functools.partial(_layer, GATES[cell]) for cell in (LSTM, GRU, RNN_TANH))
_lstm_steps, _gru_steps, _rnn_steps = (functools.partial(op, 1, step=True) for op in (_lstms, _grus, _rnns))

declare(lstm, samples=[*_samples(_lstms), *_projected_samples(_lstms)], workloads=_workloads(_lstms, _sizes))
declare(gru, samples=_samples(_grus), workloads=_workloads(_grus, _sizes[1:2] + _sizes[4:5]))
declare(
    rnn,
    samples=[
        *_samples(_rnns),
        Sample("relu", _rnns(6, 4, 7, 20, nonlinearity="relu")),
        Sample("relu, resets, lengths", _rnns(6, 3, 7, 20, nonlinearity="relu", resets=0.3, lengths=(6, 0, 4))),
    ],
    workloads=[_job("B1 T256 H256", _rnns(256, 1, 256, 256), quick=True)],
)
declare(
    lstm_step,
    samples=[*_step_samples(_lstm_steps), Sample("projection", _lstm_steps(5, 7, 20, P=9))],
    workloads=_step_workloads(_lstm_steps),
)
declare(gru_step, samples=_step_samples(_gru_steps), workloads=_step_workloads(_gru_steps))
declare(
    rnn_step,
    samples=[*_step_samples(_rnn_steps), Sample("relu", _rnn_steps(4, 7, 20, nonlinearity="relu"))],
    workloads=_step_workloads(_rnn_steps),
)
