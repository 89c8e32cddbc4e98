"""RWKV-5's, -6's and -7's WKV: linear_recurrence.py with u (RWKV-5 and -6), or with a and b (RWKV-7)."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..core.backends import triton_declines
from ..core.declaration import public
from ..core.dtypes import DTYPES, accumulator_of, autocast, cast
from ..core.expect import can_read, expect, expect_device, expect_number, expect_shape, expect_tensor, expect_type
from ..core.torch_op import wants_gradient
from ..launch.linear_recurrence import cuda_declines
from .linear_recurrence import linear_recurrence, reference

# ------------------------------------------------------------------------------------------------ checks


def check_decay(w: Tensor, name: str) -> None:
    if can_read(w) and w.numel():
        largest = (w.detach() if w.requires_grad else w).max().item()
        expect(not largest > 0, name, "log decays ≤ 0 (log_decay converts other forms)", largest)


def _check(r: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> torch.dtype:
    """What both functions have; returns the dtype of states and sums."""
    expect_tensor(r, "r", "[B, T, H, K]", DTYPES)
    shape, dtype, acc = r.shape, r.dtype, accumulator_of(r.dtype)
    B, T, H, K = shape
    _check_one(k, "k", "[B, T, H, K]", shape, (dtype,), r)
    expect_tensor(v, "v", "[B, T, H, V]")
    V = v.size(3)
    _check_one(v, "v", "[B, T, H, V]", (B, T, H, V), (dtype,), r)
    if state is not None:
        _check_one(state, "state", "[B, H, K, V]", (B, H, K, V), (acc,), r)
    return acc


def _check_one(value: Tensor, name: str, layout: str, shape: tuple, dtypes: tuple[torch.dtype, ...], r: Tensor) -> None:
    """That layout and shape, one of the dtypes, r's device."""
    expect_tensor(value, name, layout, dtypes)
    expect_shape(value, name, shape, "r")
    expect_device(value, name, r, "r")


# ------------------------------------------------------------------------------------------------ public functions


_made_of = functools.partial(
    public,
    kernel=linear_recurrence,
    reference=reference,
    supports={"cpu": lambda *_: None, "triton": triton_declines, "cuda": cuda_declines},
)


@_made_of(differentiable=("r", "k", "v", "w", "u", "state"))
def wkv6(
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
    acc = _check(r, k, v, state)
    dtypes, shape = (r.dtype, acc), r.shape
    _, _, H, K = shape
    _check_one(u, "u", "[H, K]", (H, K), dtypes, r)
    constant = isinstance(w, Tensor) and w.dim() == 2
    layout, sizes = ("[H, K]", (H, K)) if constant else ("[B, T, H, K]", shape)
    _check_one(w, "w", layout, sizes, dtypes, r)
    check_decay(w, "w")
    scale = expect_number(scale, "scale")
    w, u = cast(w, acc), cast(u, acc)
    if constant:
        w = w.expand(shape)
    y, final, *_ = run(r, w, k, v, u=u, state=state, scale=scale, training=wants_gradient(r, w, k, v, u, state))
    return y, final


@_made_of(differentiable=("r", "w", "k", "v", "a", "b", "state"))
def wkv7(
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
    acc = _check(r, k, v, state)
    dtype, shape = r.dtype, r.shape
    _check_one(w, "w", "[B, T, H, K]", shape, (dtype, acc), r)
    _check_one(a, "a", "[B, T, H, K]", shape, (dtype,), r)
    _check_one(b, "b", "[B, T, H, K]", shape, (dtype,), r)
    check_decay(w, "w")
    scale = expect_number(scale, "scale")
    w = cast(w, acc)
    training = wants_gradient(r, w, k, v, a, b, state)
    y, final, *_ = run(r, w, k, v, a=a, b=b, state=state, scale=scale, training=training)
    return y, final


def log_decay(decay: Tensor, convention: str) -> Tensor:
    """The log decay (≤ 0, what `wkv4`, `wkv6` and `wkv7` take as w) from what public code calls w or time_decay.

    Args:
        decay: any shape, any floating dtype.
        convention: "log": it is the log decay; "exp": a step multiplies by e^{−e^decay} (time_decay of RWKV-4 to -6, w
            of RWKV-7's kernels); "sigmoid": by e^{−e^{−½}·σ(decay)}, which is e^{−0.60653·σ(decay)} (RWKV-7's paper).

    Raises:
        ValueError, TypeError: another convention, dtype; a positive log decay.
    """
    expect_type(isinstance(decay, Tensor) and decay.is_floating_point(), "decay", "a floating tensor", decay)
    if convention == "exp":
        return -decay.exp()
    if convention == "sigmoid":
        return -(math.exp(-0.5) * decay.sigmoid())
    expect(convention == "log", "convention", "'log', 'exp' or 'sigmoid'", convention)
    check_decay(decay, "decay")
    return decay
