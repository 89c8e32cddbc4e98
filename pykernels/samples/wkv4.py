"""RWKV-4's WKV: samples and workloads."""

from __future__ import annotations

import torch

from ..core.declaration import Sample, Workload, declare
from ..core.dtypes import accumulator_of
from ..ops.wkv4 import wkv4


def _inputs(B, T, C, *, w=(-5.0, -1e-2), state=False, size=1.0, order="btc", extreme=None):
    """make(dtype, device). w: (lowest, highest) log decay; size: of the keys. extreme: of "w" every third number is
    −1e38 and every fourth −inf, of "k" and "u" all are as large as the dtype holds, "padding" is keys of −inf."""

    def make(dtype, device):
        def draw(*shape):
            return torch.randn(shape, dtype=dtype, device=device)

        acc = accumulator_of(dtype)
        k, v = size * draw(B, T, C), draw(B, T, C)
        if order == "tbc":  # time first, seen through a transpose
            k, v = (draw(T, B, C).transpose(0, 1) for _ in range(2))
        low, high = w or (-5.0, -1e-2)
        decay = -torch.exp(
            torch.empty(C, dtype=acc, device=device).uniform_(*torch.tensor([-high, -low]).log().tolist())
        )
        inputs = dict(w=decay, u=draw(C), k=k, v=v)
        if state:
            aa, bb, pp = torch.randn(3, B, C, dtype=acc, device=device).unbind()
            inputs["state"] = torch.stack((aa, bb.abs() + 0.5, 0.9 * large(pp) if extreme in ("k", "u") else pp), 1)
        if extreme == "w":
            decay[::3], decay[::4] = -1e38, -torch.inf
        elif extreme == "padding":
            k[:, : T // 3] = k[:, T // 2] = -torch.inf
        elif extreme:
            inputs |= {name: large(inputs[name]) for name in {"k", extreme}}
        return inputs

    def large(t):  # every sum of two may overflow
        most = min(torch.finfo(t.dtype).max, torch.finfo(torch.float32).max)
        return (t.double() * most).clamp(-most, most).to(t.dtype)

    return make


def _traffic(inputs) -> float:
    k = inputs["k"]
    return float(3 * k.numel() * k.element_size())


def _workloads():
    for train in (False, True):
        for B, T, C in ((1, 1024, 768), (8, 256, 768), (1, 8192, 2048), (1, 1, 2048)):
            yield Workload(
                f"B{B} T{T} C{C}",
                _inputs(B, T, C, state=T == 1),
                bytes=_traffic,
                train=train,
                quick=T <= 1024,
                representative=(T, C) == (1024, 768),
            )


# An exponent of 100 rounds by as many units, and again at every step that it decays.
_LARGE = 4.0
# Over many steps of slow decay each rounding of pp + w is the same, and w's gradient is as far off as that is, in eager
# and here alike: of a few channels one draw of luck against another. "slow decay" has enough of them.
_FORGETTING = (-5.0, -0.5)
_FEW = 4.0  # where a result is a handful of numbers, eager's error is a matter of luck

declare(
    wkv4,
    samples=[
        Sample("plain", _inputs(2, 9, 5), _FEW),
        Sample("state", _inputs(2, 9, 5, state=True), _FEW),
        Sample("one", _inputs(1, 1, 1), _FEW),
        Sample("one step, state", _inputs(3, 1, 20, state=True)),
        Sample("odd sizes", _inputs(3, 37, 19, state=True)),
        Sample("several chunks", _inputs(2, 100, 33, w=_FORGETTING, state=True)),
        Sample("several chunks, few channels", _inputs(1, 150, 3, w=_FORGETTING, state=True)),
        Sample("long, one channel", _inputs(1, 170, 1), _FEW),
        Sample("many channels", _inputs(1, 40, 300)),
        Sample("many sequences", _inputs(9, 35, 16, state=True)),
        Sample("time first", _inputs(2, 12, 40, order="tbc")),
        Sample("slow decay", _inputs(1, 70, 33, w=(-1e-5, -1e-6), state=True)),
        Sample("fast decay", _inputs(2, 70, 33, w=(-20.0, -10.0), state=True)),
        Sample("keys of ±60", _inputs(2, 70, 33, size=30.0, state=True), _LARGE),
        Sample("keys of ±60, slow decay", _inputs(1, 130, 3, size=30.0, w=(-1e-5, -1e-6)), _LARGE),
        Sample("keys of ±1e38", _inputs(2, 40, 19, extreme="k"), _LARGE),
        Sample("keys, u and state of ±1e38", _inputs(1, 150, 19, w=_FORGETTING, state=True, extreme="u"), _LARGE),
        Sample("w of −1e38 and −inf", _inputs(1, 150, 19, state=True, extreme="w")),
        Sample("keys of −inf", _inputs(1, 150, 19, w=_FORGETTING, extreme="padding")),
        Sample("no steps", _inputs(2, 0, 5, state=True)),
        Sample("no sequences", _inputs(0, 4, 5, state=True)),
    ],
    workloads=_workloads(),
)
