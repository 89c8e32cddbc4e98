"""RWKV-5, -6 and -7: recurrences on a matrix per head whose rows decay, each at its own rate.

    RWKV-6  S_t = diag(e^{w_t}) S_{t−1} + k_t v_tᵀ;                       y_t = scale · r_tᵀ(S_{t−1} + diag(u) k_t v_tᵀ)
    RWKV-7  S_t = diag(e^{w_t}) S_{t−1} + b_t (a_tᵀ S_{t−1}) + k_t v_tᵀ;  y_t = scale · r_tᵀ S_t

(2404.05892, 2503.14456.) RWKV-5 is the former with a w that does not depend on t. S: [K, V], w ≤ 0 the log decay.
Backward, t descending, with G the gradient of S_t from the steps after, g = scale · gy_t, d = e^{w_t}:

    RWKV-6  gr = S_{t−1} g + u∘k (v·g);  gk = G v + u∘r (v·g);  gv = Gᵀ k + g (r·(u∘k));  gu += r∘k (v·g)
            gw = d∘rowsum(S_{t−1}∘G);  G ← diag(d) G + r gᵀ
    RWKV-7  G += r gᵀ;  gr = S_t g;  gk = G v;  gv = Gᵀ k;  gb = G s;  c = Gᵀ b;  ga = S_{t−1} c   (s = S_{t−1}ᵀ a)
            gw = d∘rowsum(S_{t−1}∘G);  G ← diag(d) G + a cᵀ

Chunked, with E the running sum of w from the chunk's start and L its last step: what reaches step i from step j < i is
damped by e^{E_{i−1}−E_j}, from the chunk's first state by e^{E_{i−1}}, to its last by e^{E_L−E_j}: never a positive
exponent, whereas e^{E_i}·e^{−E_j} overflows. One torch op serves both: with u it is RWKV-6, with a and b RWKV-7.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import native
from ..checks import expect_device, expect_number, expect_shape, expect_tensor
from ..registry import (
    FLOATS,
    Sample,
    Workload,
    autocast,
    register,
    second_order,
    torch_op,
    triton_declines,
    wants_gradient,
)
from .wkv4 import check_decay, exact_of, in_exact

CHUNK = 32  # steps from one saved state to the next
_DTYPES = (torch.float64, *FLOATS)


def reference(
    r: Tensor,  # [B, T, H, K]
    w: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    u: Tensor | None,  # [H, K]
    a: Tensor | None,  # [B, T, H, K]
    b: Tensor | None,  # [B, T, H, K]
    state: Tensor | None,  # [B, H, K, V]
    scale: float,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, state) by the equations above, a step at a time."""
    exact, dtype = exact_of(r.dtype), r.dtype
    B, T, H, K = r.shape
    r, w, k, v, u, a, b = (t if t is None else t.to(exact) for t in (r, w, k, v, u, a, b))
    S, d = r.new_zeros(B, H, K, v.size(3)) if state is None else state.clone(), w.exp()
    outputs = []
    for t in range(T):
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        before = S
        S = d[:, t, :, :, None] * S + kv
        if u is not None:
            read = before + u[..., None] * kv
        else:
            S = read = S + b[:, t, :, :, None] * (a[:, t, :, None] @ before)
        outputs.append((scale * r[:, t, :, None] @ read)[:, :, 0])
    return torch.stack(outputs, 1).to(dtype) if outputs else v.to(dtype, copy=True), S


# ------------------------------------------------------------------------------------------------ torch ops


def _outputs(r, w, k, v, u, a, b, state, scale, training, backend):
    B, T, H, K = r.shape
    V = v.size(3)
    chunks = -(-T // CHUNK) if training else 0
    # The saved states are flat: torch asks of every size whether it is 1, and of `chunks` that would fix T's range.
    return r.new_empty(v.shape), w.new_empty(B, H, K, V), w.new_empty(chunks * B * H * K * V)


def _gradients(grad_y, grad_state, r, w, k, v, u, a, b, state, checkpoints, scale, backend):
    return tuple(w.new_empty(0) if t is None else t.new_empty(t.shape) for t in (r, w, k, v, u, a, b, state))


def _save(ctx, inputs, output):
    *primals, ctx.scale, ctx.training, ctx.backend = inputs
    ctx.save_for_backward(*primals, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_state, _):
    if not ctx.training:
        raise RuntimeError("pykernels::wkv: a gradient was asked of a call with training=False")
    saved = ctx.saved_tensors  # once: checkpointing gives them no second time
    grads = _backward_op(grad_y, grad_state, *saved, ctx.scale, ctx.backend)
    given = (grad if primal is not None else None for grad, primal in zip(grads, saved))
    return *given, None, None, None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10])
    ctx.scale = inputs[11]
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    saved = ctx.saved_tensors

    def forward(*primals):
        return reference(*primals, ctx.scale)

    return *second_order(forward, saved[2:], saved[:2], cotangents), None, None, None


def _triton(r, w, k, v, u, a, b, state, scale, training, backend):
    from ..kernels import wkv as kernels

    tensors = [t if t is None else t.contiguous() for t in (r, w, k, v, u, a, b, state)]
    results = _outputs(*tensors, scale, training, backend)
    kernels.forward(*tensors, scale, *results)
    return results


def _triton_backward(grad_y, grad_state, r, w, k, v, u, a, b, state, checkpoints, scale, backend):
    from ..kernels import wkv_backward as kernels

    tensors = (grad_y, grad_state, r, w, k, v, u, a, b, state, checkpoints)
    tensors = [t if t is None else t.contiguous() for t in tensors]
    results = _gradients(*tensors, scale, backend)
    kernels.backward(*tensors, scale, *results)
    return results


# Columns of all states from which on a lane takes 4 of them, reading a step's rows for a quarter as many warps; with
# fewer columns, lanes of one make enough warps for the GPU. By counts of instructions, not by time.
MANY = 1 << 12


def _is_wide(r, v):
    return r.size(0) * v.size(2) * v.size(3) >= MANY


def _rows(*tensors):
    """With elements side by side, as the CUDA kernels read them, in whatever strides else."""
    return tuple(t if t is None or t.stride(3) == 1 else t.contiguous() for t in tensors)


def _dense(*tensors):
    return tuple(t if t is None else t.contiguous() for t in tensors)


def _cuda(r, w, k, v, u, a, b, state, scale, training, backend):
    y, final, checkpoints = results = _outputs(r, w, k, v, u, a, b, state, scale, training, backend)
    checkpoints = checkpoints.view(-(-r.size(1) // CHUNK) if training else 0, *final.shape)
    wide = _is_wide(r, v)
    r, w, k, v, a, b = _rows(r, w, k, v, a, b)
    native.cuda("wkv", r, w, k, v, *_dense(u), a, b, *_dense(state), y, final, checkpoints, scale, wide)
    return results


WIDEST = 128  # K
SHARED = 104608  # bytes that RWKV-7's gradients need where K > 64


def _cuda_declines(r, w, k, v, u, a, *_):
    if r.dtype not in FLOATS:
        return "it takes fp32, bf16 and fp16"
    if r.size(3) > WIDEST:
        return f"it takes K of at most {WIDEST}, got {r.size(3)}"
    if r.is_cuda and a is not None and r.size(3) > 64:
        there = torch.cuda.get_device_properties(r.device).shared_memory_per_block_optin
        if there < SHARED:
            return f"RWKV-7 with K of more than 64 needs {SHARED} bytes of shared memory, the GPU has {there}"
    return None


BLOCKS = 512  # that share the work of the gradients, each with scratch of its own


def _cuda_backward(grad_y, grad_state, r, w, k, v, u, a, b, state, checkpoints, scale, backend):
    B, T, H, K = r.shape
    V = v.size(3)
    grad_r, grad_k, grad_a, grad_b = (None if t is None else r.new_empty(B, T, H, K) for t in (r, k, a, b))
    grad_w, grad_v = w.new_empty(B, T, H, K), v.new_empty(B, T, H, V)
    grad_u = sums = grad_initial = None
    grad_y, r, w, k, v, a, b = _rows(grad_y, r, w, k, v, a, b)
    u, grad_state = _dense(u, grad_state)
    checkpoints = checkpoints.view(-(-T // CHUNK), B, H, K, V)
    if u is not None:
        sums = w.new_empty(checkpoints.size(0), B, H, K)
    if state is not None:
        grad_initial = w.new_empty(B, H, K, V)
    ends = torch.empty_like(checkpoints)
    columns = 2048 // (64 if K <= 64 else 128)  # of S that a block has at once
    scratch = w.new_empty(min(BLOCKS, checkpoints.size(0) * B * H), 3, -(-V // columns), 16, 128)
    native.cuda("wkv_ends", grad_y, grad_state, r, w, k, v, u, a, b, ends, grad_initial, scale)
    grads = (grad_r, grad_w, grad_k, grad_v, sums, grad_a, grad_b)
    native.cuda("wkv_gradients", grad_y, r, w, k, v, u, a, b, checkpoints, ends, *grads, scratch, scale)
    if sums is not None:
        grad_u = sums.sum((0, 1))
    results = (grad_r, grad_w, grad_k, grad_v, grad_u, grad_a, grad_b, grad_initial)
    return tuple(w.new_empty(0) if t is None else t for t in results)


_backward_op = torch_op(
    "wkv_backward(Tensor? grad_y, Tensor? grad_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, Tensor? a, "
    "Tensor? b, Tensor? state, Tensor checkpoints, float scale, int backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gradients,
    implementations={"triton": _triton_backward, "cuda": _cuda_backward},
    setup_context=_save_backward,
    backward=_double_backward,
)

_op = torch_op(
    "wkv(Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, Tensor? a, Tensor? b, Tensor? state, float scale, "
    "bool training, int backend) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
    implementations={"triton": _triton, "cuda": _cuda},
    setup_context=_save,
    backward=_backward,
)


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
    kernel=_op,
    reference=reference,
    supports={"cpu": lambda *_: None, "triton": triton_declines, "cuda": _cuda_declines},
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
