"""RWKV-4's WKV on torch tensors: results and gradients, uninitialised, and the GPU's launches. Ops: ops/wkv4.py."""

from __future__ import annotations

import torch

from ..core import native
from ..core.layout import dense, rows

SAVED = 32  # steps from one saved state to the next

# CUDA: segments of T run side by side where fewer warps than ENOUGH_WARPS would go through all of it, for 5/3 of the
# traffic: as many as make WANTED_WARPS. From WIDE_LANES lanes of 8 bytes on, these take fewer instructions than lanes
# of one channel.
ENOUGH_WARPS, WANTED_WARPS, WIDE_LANES = 264, 1024, 1 << 15
SHORTEST_SEGMENT = 64  # steps


def outputs(w, k, training):
    B, T, C = k.shape
    saved = -(-T // SAVED) if training else 0
    y, final = torch.empty_like(k, memory_format=torch.contiguous_format), w.new_empty(B, 3, C)
    # The saved states are flat: torch asks of every size whether it is 1, and of `saved` that would fix T's range.
    return y, final, w.new_empty(saved * B * 3 * C)


def gradients(w, u, k, v, state):
    return tuple(w.new_empty(0) if t is None else t.new_empty(t.shape) for t in (w, u, k, v, state))


# ------------------------------------------------------------------------------------------------ Triton


def triton(w, u, k, v, state, training):
    from ..kernels import wkv4 as kernels

    w, u, k, v, state = dense(w, u, k, v, state)
    y, final, checkpoints = outputs(w, k, training)
    kernels.forward(w, u, k, v, state, y, final, checkpoints)
    return y, final, checkpoints


def triton_backward(grad_y, grad_final, w, u, k, v, state, checkpoints):
    from ..kernels import wkv4 as kernels

    tensors = [*dense(grad_y, grad_final, w, u, k, v, state, checkpoints)]
    grad_w, grad_u, grad_k, grad_v, grad_initial = grads = gradients(*tensors[2:7])
    kernels.backward(*tensors, grad_k, grad_v, None if state is None else grad_initial, grad_w, grad_u)
    return grads


# ------------------------------------------------------------------------------------------------ CUDA


def schedule(B: int, T: int, C: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Steps of a segment, a multiple of SAVED, and whether a lane takes 8 bytes of a row."""
    steps, warps = max(T, 1), B * -(-C // 32)
    if warps < ENOUGH_WARPS and T >= 2 * SHORTEST_SEGMENT:
        steps = max(SHORTEST_SEGMENT, -(-T * warps // WANTED_WARPS))
    return -(-steps // SAVED) * SAVED, B * C * dtype.itemsize >= 8 * WIDE_LANES


def cuda(w, u, k, v, state, training):
    k, v = rows(k, v)
    w, u, state = dense(w, u, state)
    y, final, checkpoints = outputs(w, k, training)
    B, T, C = k.shape
    steps, wide = schedule(B, T, C, k.dtype)
    found = w.new_empty(max(-(-T // steps), 1) - 1, B, 3, C)
    saved = checkpoints.view(-(-T // SAVED) if training else 0, B, 3, C)
    native.cuda("wkv4", w, u, k, v, state, y, final, saved, found, steps, wide)
    return y, final, checkpoints


def cuda_backward(grad_y, grad_final, w, u, k, v, state, checkpoints):
    grad_y, k, v = rows(grad_y, k, v)
    grad_final, w, u, state, checkpoints = dense(grad_final, w, u, state, checkpoints)
    B, T, C = k.shape
    grad_w, grad_u = torch.empty_like(w), torch.empty_like(u)
    grad_k, grad_v = k.new_empty(B, T, C), k.new_empty(B, T, C)
    grad_initial = w.new_empty(0 if state is None else (B, 3, C))
    saved = checkpoints.view(-(-T // SAVED), B, 3, C)
    steps, _ = schedule(B, T, C, k.dtype)
    segments = max(-(-T // steps), 1)
    local, sums = w.new_empty(segments - 1, B, 4, C), w.new_empty(segments, B, 2, C)
    grads = (grad_w, grad_u, grad_k, grad_v, None if state is None else grad_initial)
    native.cuda("wkv4_backward", grad_y, grad_final, w, u, k, v, state, saved, *grads, local, sums, steps)
    return grad_w, grad_u, grad_k, grad_v, grad_initial
