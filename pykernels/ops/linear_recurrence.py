"""The linear recurrence: a matrix per head whose rows decay, each at its own rate. RWKV-5, -6 and -7 are made of it.

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

import torch
from torch import Tensor

from ..core import native
from ..core.registry import (
    FLOATS,
    second_order,
    torch_op,
)
from .wkv4 import exact_of

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
        raise RuntimeError("pykernels::linear_recurrence: a gradient was asked of a call with training=False")
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
    from ..kernels import linear_recurrence as kernels

    tensors = [t if t is None else t.contiguous() for t in (r, w, k, v, u, a, b, state)]
    results = _outputs(*tensors, scale, training, backend)
    kernels.forward(*tensors, scale, *results)
    return results


def _triton_backward(grad_y, grad_state, r, w, k, v, u, a, b, state, checkpoints, scale, backend):
    from ..kernels import linear_recurrence_backward as kernels

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
    native.cuda("linear_recurrence", r, w, k, v, *_dense(u), a, b, *_dense(state), y, final, checkpoints, scale, wide)
    return results


WIDEST = 128  # K
SHARED = 104608  # bytes that RWKV-7's gradients need where K > 64


def cuda_declines(r, w, k, v, u, a, *_):
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
    native.cuda("linear_recurrence_ends", grad_y, grad_state, r, w, k, v, u, a, b, ends, grad_initial, scale)
    grads = (grad_r, grad_w, grad_k, grad_v, sums, grad_a, grad_b)
    native.cuda("linear_recurrence_gradients", grad_y, r, w, k, v, u, a, b, checkpoints, ends, *grads, scratch, scale)
    if sums is not None:
        grad_u = sums.sum((0, 1))
    results = (grad_r, grad_w, grad_k, grad_v, grad_u, grad_a, grad_b, grad_initial)
    return tuple(w.new_empty(0) if t is None else t for t in results)


_backward_op = torch_op(
    "linear_recurrence_backward(Tensor? grad_y, Tensor? grad_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, "
    "Tensor? a, Tensor? b, Tensor? state, Tensor checkpoints, float scale, int backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gradients,
    implementations={"triton": _triton_backward, "cuda": _cuda_backward},
    setup_context=_save_backward,
    backward=_double_backward,
)

linear_recurrence = torch_op(
    "linear_recurrence(Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, Tensor? a, Tensor? b, Tensor? state, "
    "float scale, bool training, int backend) -> (Tensor, Tensor, Tensor)",
    fake=_outputs,
    implementations={"triton": _triton, "cuda": _cuda},
    setup_context=_save,
    backward=_backward,
)
