"""The linear recurrence on torch tensors: results and gradients, uninitialised, and the GPU's launches.

Ops: ops/linear_recurrence.py.
"""

from __future__ import annotations

import torch

from ..core import native
from ..core.backends import INTERPRET
from ..core.dtypes import FLOATS
from ..core.layout import dense, rows

SAVED = 32  # steps from one saved state to the next


def outputs(r, w, v, training):
    (B, T, H, K), V = r.shape, v.size(3)
    saved = -(-T // SAVED) if training else 0
    # The saved states are flat: torch asks of every size whether it is 1, and of `saved` that would fix T's range.
    return r.new_empty(v.shape), w.new_empty(B, H, K, V), w.new_empty(saved * B * H * K * V)


def gradients(r, w, k, v, u, a, b, state):
    return tuple(w.new_empty(0) if t is None else t.new_empty(t.shape) for t in (r, w, k, v, u, a, b, state))


# ------------------------------------------------------------------------------------------------ Triton


def triton(r, w, k, v, u, a, b, state, scale, training):
    from ..kernels import linear_recurrence as kernels

    r, w, k, v, u, a, b, state = dense(r, w, k, v, u, a, b, state)
    y, final, checkpoints = outputs(r, w, v, training)
    kernels.forward(r, w, k, v, u, a, b, state, scale, y, final, checkpoints)
    return y, final, checkpoints


def triton_backward(grad_y, grad_final, r, w, k, v, u, a, b, state, checkpoints, scale):
    from ..kernels import linear_recurrence_backward as kernels

    tensors = [*dense(grad_y, grad_final, r, w, k, v, u, a, b, state, checkpoints)]
    grads = gradients(*tensors[2:10])
    # The interpreter has no bf16 tensors: fp16 ones meet the rounding there that bf16 ones meet on a GPU.
    kernels.backward(*tensors, scale, *grads, bf16=r.dtype == (torch.float16 if INTERPRET else torch.bfloat16))
    return grads


# ------------------------------------------------------------------------------------------------ CUDA

LARGEST_K = 128
CORRECTED_SHARED = 104608  # bytes of shared memory that the gradients of a and b need where K > 64
GRADIENT_BLOCKS = 512  # that share the work of the gradients, each with scratch of its own
TILE_NUMBERS = 2048  # of S that a block of the gradients has at once, in rows of 64 or 128
SCRATCH_ROWS, SCRATCH_COLUMNS = 16, 128  # of a block's scratch

# Columns of all states from which on a lane takes 4 of them, reading a step's rows for a quarter as many warps; with
# fewer columns, lanes of one make enough warps for the GPU. By counts of instructions, not by time.
WIDE_COLUMNS = 1 << 12


def cuda_declines(r, w, k, v, u, a, *_) -> str | None:
    if r.dtype not in FLOATS:
        return "it takes fp32, bf16 and fp16"
    if r.size(3) > LARGEST_K:
        return f"it takes K of at most {LARGEST_K}, got {r.size(3)}"
    if r.is_cuda and a is not None and r.size(3) > 64:
        there = torch.cuda.get_device_properties(r.device).shared_memory_per_block_optin
        if there < CORRECTED_SHARED:
            return f"RWKV-7 with K of more than 64 needs {CORRECTED_SHARED} bytes of shared memory, the GPU has {there}"
    return None


def is_wide(r, v) -> bool:
    return r.size(0) * v.size(2) * v.size(3) >= WIDE_COLUMNS


def cuda(r, w, k, v, u, a, b, state, scale, training):
    y, final, checkpoints = outputs(r, w, v, training)
    saved = checkpoints.view(-(-r.size(1) // SAVED) if training else 0, *final.shape)
    wide = is_wide(r, v)
    r, w, k, v, a, b = rows(r, w, k, v, a, b)
    u, state = dense(u, state)
    native.cuda("linear_recurrence", r, w, k, v, u, a, b, state, y, final, saved, scale, wide)
    return y, final, checkpoints


def cuda_backward(grad_y, grad_final, r, w, k, v, u, a, b, state, checkpoints, scale):
    (B, T, H, K), V = r.shape, v.size(3)
    grad_r, grad_k, grad_a, grad_b = (None if t is None else r.new_empty(B, T, H, K) for t in (r, k, a, b))
    grad_w, grad_v = w.new_empty(B, T, H, K), v.new_empty(B, T, H, V)
    grad_u = sums = grad_initial = None
    grad_y, r, w, k, v, a, b = rows(grad_y, r, w, k, v, a, b)
    u, grad_final = dense(u, grad_final)
    saved = checkpoints.view(-(-T // SAVED), B, H, K, V)
    if u is not None:
        sums = w.new_empty(saved.size(0), B, H, K)
    if state is not None:
        grad_initial = w.new_empty(B, H, K, V)
    ends = torch.empty_like(saved)
    columns = TILE_NUMBERS // (64 if K <= 64 else 128)
    blocks = min(GRADIENT_BLOCKS, saved.size(0) * B * H)
    scratch = w.new_empty(blocks, 3, -(-V // columns), SCRATCH_ROWS, SCRATCH_COLUMNS)
    native.cuda("linear_recurrence_ends", grad_y, grad_final, r, w, k, v, u, a, b, ends, grad_initial, scale)
    grads = (grad_r, grad_w, grad_k, grad_v, sums, grad_a, grad_b)
    native.cuda("linear_recurrence_gradients", grad_y, r, w, k, v, u, a, b, saved, ends, *grads, scratch, scale)
    if sums is not None:
        grad_u = sums.sum((0, 1))
    results = (grad_r, grad_w, grad_k, grad_v, grad_u, grad_a, grad_b, grad_initial)
    return tuple(w.new_empty(0) if t is None else t for t in results)
