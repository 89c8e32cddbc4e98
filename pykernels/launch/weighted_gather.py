"""The weighted gather on torch tensors: results, uninitialised, and the GPU's launches. Ops: ops/weighted_gather.py.

Triton's kernels and CUDA's are the same three: kernels/weighted_gather.py describes them.
"""

from __future__ import annotations

import torch

from ..core import native
from ..core.backends import CUDA
from ..core.layout import dense, rows

LOT = 32  # hits that a warp of the CUDA kernels sums


def output(values, indices):
    return values.new_empty(indices.size(0), indices.size(1), values.size(2))


def gradients(values, weights, for_values, for_weights):
    return (
        values.new_empty(values.shape if for_values else 0),
        weights.new_empty(weights.shape if for_weights else 0),
    )


def used_rows(grad_y, indices):
    used = torch.library.get_ctx().new_dynamic_size()
    return indices.new_empty(used), grad_y.new_empty(used, grad_y.size(2))


class _Cuda:
    @staticmethod
    def forward(values, indices, weights, out):
        native.cuda("gather_sum_rows", values, indices, weights, out)

    @staticmethod
    def dot_rows(grad, values, indices, grad_weights):
        native.cuda("gather_dot_rows", grad, values, indices, grad_weights)

    @staticmethod
    def sum_rows(grad, weights, rows, order, out):
        cut = weights.new_empty(-(-rows.numel() // LOT), 2, grad.size(1))
        native.cuda("gather_sum_hits", grad, weights, rows, order, cut, out)


def _kernels(backend):
    if backend == CUDA:
        return _Cuda
    from ..kernels import weighted_gather

    return weighted_gather


def gpu(values, indices, weights, backend):
    out = output(values, indices)
    _kernels(backend).forward(*rows(values), *dense(indices, weights), out)
    return out


def gpu_backward(grad_y, values, indices, weights, for_values, for_weights, backend):
    kernels = _kernels(backend)
    grad_y, indices, weights = dense(grad_y, indices, weights)
    grad_values, grad_weights = gradients(values, weights, for_values, for_weights)
    if for_values:
        hits = _sorted_hits(indices, values.size(1))
        kernels.sum_rows(grad_y.flatten(0, 1), weights.flatten(0, 1), *hits, grad_values.zero_().flatten(0, 1))
    if for_weights:
        kernels.dot_rows(grad_y, *rows(values), indices, grad_weights)
    return grad_values, grad_weights


def gpu_rows(grad_y, indices, weights, table_rows, backend):
    hit, order = _sorted_hits(indices, table_rows)
    inside = hit < table_rows
    used, place = hit[inside].unique_consecutive(return_inverse=True)
    sums = grad_y.new_empty(used.size(0), grad_y.size(2))
    grad_y, weights = dense(grad_y.flatten(0, 1), weights.flatten(0, 1))
    _kernels(backend).sum_rows(grad_y, weights, place.to(order.dtype), order[inside], sums)
    return used.long(), sums


def _sorted_hits(indices, M):
    """(rows of all tables, one after the other, ascending, the flat positions of their indices, ascending in a row).

    Indices out of range come last, as row G·M. In 32 bits where these are enough: half the passes of a radix sort.
    """
    G = indices.size(1)
    tables = torch.arange(G, device=indices.device)[:, None]
    hit = torch.where((indices >= 0) & (indices < M), tables * M + indices, G * M).flatten()
    # The kernels count past the last hit of a lot that is not full: 64 numbers below the end of 32 bits.
    dtype = torch.int32 if max(G * M, hit.numel()) < 2**31 - 64 else torch.int64
    hit, order = hit.to(dtype).sort(stable=True)
    return hit, order.to(dtype)
