"""RWKV-6's and -7's WKV: samples and workloads."""

from __future__ import annotations

import math

import torch

from ..core.declaration import Sample, Workload, declare
from ..core.dtypes import accumulator_of
from ..ops.wkv import wkv6, wkv7


def _draws(B, T, H, K, V, w, state, scale, constant):
    """The arguments that both functions have. w: (lowest, highest) log decay; to lowest = −inf, the two and −1e38."""

    def make(dtype, device):
        acc = accumulator_of(dtype)
        low, high = torch.tensor(w).clamp(min=-20.0).neg().log().tolist()
        decay = torch.empty(*((H, K) if constant else (B, T, H, K)), dtype=acc, device=device).uniform_(high, low)
        inputs = {
            name: torch.randn(B, T, H, width, dtype=dtype, device=device) for name, width in zip("rkv", (K, K, V))
        }
        inputs |= dict(r=inputs["r"] * K**-0.5, w=-decay.exp(), scale=scale)
        if math.isinf(w[0]):
            inputs["w"].view(-1)[::3], inputs["w"].view(-1)[::4] = -1e38, w[0]
        if state:
            inputs["state"] = torch.randn(B, H, K, V, dtype=acc, device=device)
        return inputs

    return make


def _inputs6(B, T, H, K, V=None, *, w=(-5.0, -1e-2), state=False, scale=1.0, constant=False):
    draws = _draws(B, T, H, K, V or K, w, state, scale, constant)

    def make(dtype, device):
        return draws(dtype, device) | dict(u=torch.randn(H, K, dtype=dtype, device=device))

    return make


def _inputs7(B, T, H, K, V=None, *, w=(-5.0, -1e-2), state=False, scale=1.0):
    """a = −κ̂, b = κ̂∘η with a unit κ̂ and 0 < η < 1, as in the model: the state stays bounded."""
    draws = _draws(B, T, H, K, V or K, w, state, scale, False)

    def make(dtype, device):
        inputs = draws(dtype, device)
        unit = torch.nn.functional.normalize(torch.randn(B, T, H, K, device=device), dim=-1)
        rate = torch.rand(B, T, H, K, device=device)
        return inputs | dict(a=-unit.to(dtype), b=(unit * rate).to(dtype))

    return make


def _flops(inputs) -> float:
    """Of the products with the state that no form avoids: reading it and adding to it, and RWKV-7's aᵀS and b sᵀ."""
    return float((4 if "a" not in inputs else 8) * inputs["k"].numel() * inputs["v"].size(3))


def _traffic(inputs) -> float:
    names = ("r", "k", "v", "w", "a", "b")
    read = sum(inputs[name].numel() * inputs[name].element_size() for name in names if name in inputs)
    return float(read + inputs["v"].numel() * inputs["v"].element_size())


def _workloads(inputs):
    for train in (False, True):
        for B, T, H, K in ((1, 1024, 12, 64), (4, 512, 12, 64), (1, 1, 12, 64)):
            if T > 1 or not train:
                yield Workload(
                    f"B{B} T{T} H{H} K{K}",
                    inputs(B, T, H, K, state=T == 1),
                    flops=_flops,
                    bytes=_traffic,
                    train=train,
                    quick=B == 1,
                    representative=B == 4,
                )


_FEW = 4.0  # where a result is a handful of numbers, eager's error is a matter of luck


def _samples(inputs):
    return [
        Sample("plain", inputs(2, 7, 2, 5)),
        Sample("state", inputs(2, 7, 2, 5, state=True)),
        Sample("one", inputs(1, 1, 1, 1), _FEW),
        Sample("one step, state", inputs(2, 1, 3, 16, state=True)),
        Sample("odd sizes", inputs(1, 21, 2, 19, 23, state=True, scale=0.7)),
        Sample("several chunks", inputs(1, 75, 2, 16, state=True)),
        Sample("narrow value", inputs(1, 20, 1, 40, 3, state=True)),
        Sample("wide value", inputs(1, 20, 1, 6, 70, state=True)),
        Sample("heads of 64", inputs(1, 34, 2, 64, state=True)),
        Sample("many sequences", inputs(5, 5, 3, 8)),
        Sample("slow decay", inputs(1, 70, 1, 17, w=(-1e-5, -1e-6), state=True)),
        Sample("fast decay", inputs(1, 40, 2, 17, w=(-20.0, -10.0), state=True)),
        Sample("every decay", inputs(1, 40, 1, 33, w=(-20.0, -1e-6), state=True)),
        Sample("w of −1e38 and −inf", inputs(1, 40, 1, 17, w=(-math.inf, -1e-2), state=True)),
        Sample("no steps", inputs(2, 0, 2, 5, state=True)),
        Sample("no sequences", inputs(0, 4, 2, 5, state=True)),
    ]


declare(
    wkv6,
    samples=[*_samples(_inputs6), Sample("constant decay", _inputs6(2, 37, 2, 8, state=True, constant=True))],
    workloads=_workloads(_inputs6),
)
declare(wkv7, samples=_samples(_inputs7), workloads=_workloads(_inputs7))
