"""RWKV-5's, -6's and -7's WKV: linear_recurrence.py with u (RWKV-5 and -6), or with a and b (RWKV-7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.expect import expect_device, expect_number, expect_shape, expect_tensor
from ..core.registry import FLOATS, Sample, Workload, autocast, register, triton_declines, wants_gradient
from .linear_recurrence import cuda_declines, linear_recurrence, reference
from .wkv4 import check_decay, exact_of, in_exact

_DTYPES = (torch.float64, *FLOATS)


# ------------------------------------------------------------------------------------------------ public functions


def _wkv6(
    run,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """RWKV-6's (and -5's) WKV: linear attention whose state decays per channel and step, with a bonus for the present.

    Args:
        r: [B, T, H, K], receptance; any T, any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        k, v: [B, T, H, K] and [B, T, H, V], in r's dtype.
        w: [B, T, H, K], the log decay, ≤ 0 (`log_decay` converts from the forms in public code), or [H, K], the same
            at every step (RWKV-5). In r's dtype or fp32.
        u: [H, K], the bonus ("time_faaaa"), in r's dtype or fp32.
        state: [B, H, K, V] after the steps before, in fp32 (fp64 for fp64); None is zeros.
        scale: multiplies y; a number, which has no gradient.

    Returns:
        y [B, T, H, V] in r's dtype and the state after the last step [B, H, K, V]. All sums are fp32 (fp64).
        Differentiable, twice too, in every tensor, through y and the state. A call equals any split of it in time.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value other than the above, before anything is computed.

    Source: Peng et al., 2404.05892. The public kernels keep the state as [V, K].
    """
    r, k, v = autocast(r, k, v)
    exact = _check(r, k, v, state)
    dtypes, shape = (r.dtype, exact), r.shape
    _, _, H, K = shape
    _check_one(u, "u", "[H, K]", (H, K), dtypes, r)
    constant = isinstance(w, Tensor) and w.dim() == 2
    layout, sizes = ("[H, K]", (H, K)) if constant else ("[B, T, H, K]", shape)
    _check_one(w, "w", layout, sizes, dtypes, r)
    check_decay(w, "w")
    scale = expect_number(scale, "scale")
    w = in_exact(w, exact)
    if constant:
        w = w.expand(shape)
    return _run(run, scale, r, w, k, v, in_exact(u, exact), None, None, state)


def _wkv7(
    run,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """RWKV-7's WKV: linear attention whose state decays per channel and takes a rank-one correction at every step.

    Args:
        r, k: [B, T, H, K]; any T, any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        w: [B, T, H, K], the log decay, ≤ 0 (`log_decay` converts from the forms in public code), in r's dtype or fp32.
        v: [B, T, H, V].
        a, b: [B, T, H, K]: S takes b (aᵀ S); RWKV-7 passes −κ̂ and κ̂∘(learning rate).
        state: [B, H, K, V] after the steps before, in fp32 (fp64 for fp64); None is zeros.
        scale: multiplies y; a number, which has no gradient.

    Returns:
        y [B, T, H, V] in r's dtype and the state after the last step [B, H, K, V]. All sums are fp32 (fp64).
        Differentiable, twice too, in every tensor, through y and the state. A call equals any split of it in time.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value other than the above, before anything is computed.

    Source: Peng et al., 2503.14456. The public kernels keep the state as [V, K].
    """
    r, k, v, a, b = autocast(r, k, v, a, b)
    exact = _check(r, k, v, state)
    dtype, shape = r.dtype, r.shape
    _check_one(w, "w", "[B, T, H, K]", shape, (dtype, exact), r)
    _check_one(a, "a", "[B, T, H, K]", shape, (dtype,), r)
    _check_one(b, "b", "[B, T, H, K]", shape, (dtype,), r)
    check_decay(w, "w")
    scale = expect_number(scale, "scale")
    return _run(run, scale, r, in_exact(w, exact), k, v, None, a, b, state)


def _run(run, scale: float, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
    return run(*tensors, scale, wants_gradient(*tensors))[:2]


def _check(r: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> torch.dtype:
    """What both functions have; returns the dtype of states and sums."""
    expect_tensor(r, "r", "[B, T, H, K]", _DTYPES)
    shape, dtype, exact = r.shape, r.dtype, exact_of(r.dtype)
    B, T, H, K = shape
    _check_one(k, "k", "[B, T, H, K]", shape, (dtype,), r)
    expect_tensor(v, "v", "[B, T, H, V]")
    V = v.size(3)
    _check_one(v, "v", "[B, T, H, V]", (B, T, H, V), (dtype,), r)
    if state is not None:
        _check_one(state, "state", "[B, H, K, V]", (B, H, K, V), (exact,), r)
    return exact


def _check_one(value: Tensor, name: str, layout: str, shape: tuple, dtypes: tuple[torch.dtype, ...], r: Tensor) -> None:
    """That layout and shape, one of the dtypes, r's device."""
    expect_tensor(value, name, layout, dtypes)
    expect_shape(value, name, shape, "r")
    expect_device(value, name, r, "r")


# ------------------------------------------------------------------------------------------------ declarations


def _draws(B, T, H, K, V, w, state, scale, constant):
    """The arguments that both functions have. w: (lowest, highest) log decay; to lowest = −inf, the two and −1e38."""

    def make(dtype, device):
        exact = exact_of(dtype)
        low, high = torch.tensor(w).clamp(min=-20.0).neg().log().tolist()
        decay = torch.empty(*((H, K) if constant else (B, T, H, K)), dtype=exact, device=device).uniform_(high, low)
        inputs = {
            name: torch.randn(B, T, H, width, dtype=dtype, device=device) for name, width in zip("rkv", (K, K, V))
        }
        inputs |= dict(r=inputs["r"] * K**-0.5, w=-decay.exp(), scale=scale)
        if math.isinf(w[0]):
            inputs["w"].view(-1)[::3], inputs["w"].view(-1)[::4] = -1e38, w[0]
        if state:
            inputs["state"] = torch.randn(B, H, K, V, dtype=exact, device=device)
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
                )


_FEW = 4.0  # where a result is a handful of numbers, eager's error is a matter of luck
_common = dict(
    kernel=linear_recurrence,
    reference=reference,
    supports={"cpu": lambda *_: None, "triton": triton_declines, "cuda": cuda_declines},
)


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


wkv6 = register(
    _wkv6,
    **_common,
    samples=[*_samples(_inputs6), Sample("constant decay", _inputs6(2, 37, 2, 8, state=True, constant=True))],
    workloads=_workloads(_inputs6),
    differentiable=("r", "k", "v", "w", "u", "state"),
)
wkv7 = register(
    _wkv7,
    **_common,
    samples=_samples(_inputs7),
    workloads=_workloads(_inputs7),
    differentiable=("r", "w", "k", "v", "a", "b", "state"),
)
