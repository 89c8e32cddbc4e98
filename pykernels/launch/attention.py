"""Attention on torch tensors: results and gradients, uninitialised, and Triton's launches. Ops: ops/attention.py."""

from __future__ import annotations

import torch

from ..core.dtypes import accumulator_of


def _empty(like, last):
    """[B, H, N, last], in memory [B, N, H, last] where `like` has its heads inside: no copy after a projection."""
    B, H, N, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, N, H, last).transpose(1, 2)
    return like.new_empty(B, H, N, last)


def outputs(query, value):
    lse = query.new_empty(query.shape[:3], dtype=accumulator_of(query.dtype))
    return _empty(query, value.size(3)), lse


def gradients(query, key, value, lse, bias, alibi_slopes, needs_bias, needs_slopes):
    return (
        *(_empty(t, t.size(3)) for t in (query, key, value)),
        torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if needs_bias else query.new_empty(0),
        lse.new_empty(alibi_slopes.shape if needs_slopes else 0),
    )


def triton(query, key, value, bias, alibi_slopes, cu_seqlens_q, block_table, seed, backend, **others):
    from ..kernels import attention as kernels

    shared = dict(
        query=query, key=key, value=value, bias=bias, alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q,
        block_table=block_table, seed=seed,
    )  # fmt: skip
    out, lse = outputs(query, value)
    kernels.forward(**shared, **others, out=out, lse=lse, scratch=lse.new_empty(kernels.scratch_size(**shared)))
    return out, lse


def triton_backward(query, key, value, lse, bias, alibi_slopes, needs_bias, needs_slopes, backend, **others):
    from ..kernels import attention_backward as kernels

    grads = gradients(query, key, value, lse, bias, alibi_slopes, needs_bias, needs_slopes)
    grad_query, grad_key, grad_value, grad_bias, grad_slopes = grads
    slopes_by_row = torch.empty_like(lse) if needs_slopes else None
    kernels.backward(
        query=query, key=key, value=value, lse=lse, bias=bias, alibi_slopes=alibi_slopes, **others,
        grad_query=grad_query, grad_key=grad_key, grad_value=grad_value, grad_bias=grad_bias if needs_bias else None,
        grad_slopes=slopes_by_row, scratch=lse.new_empty(3, *lse.shape),
    )  # fmt: skip
    if needs_slopes:
        grad_slopes = slopes_by_row.sum(-1).sum_to_size(grad_slopes.shape)
    return grad_query, grad_key, grad_value, grad_bias, grad_slopes
