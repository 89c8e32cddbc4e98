"""The exact search on torch tensors: its results, uninitialised, and the GPU's launches. Op: ops/topk.py."""

from __future__ import annotations

import torch

from ..core import backends, native
from ..core.backends import ON_HOST
from ..core.dtypes import accumulator_of
from ..core.layout import rows

LARGEST_TRITON_K = 2048  # candidates that a block of threads can hold and sort
LARGEST_LIST = 256  # k to which csrc/cuda/topk.cu keeps lists; beyond, it writes all scores
DIGITS, BINS = 3, 2048  # of a score, as csrc/cuda/topk_large.cu counts them
SECTION = 2048  # keys whose selected scores a block of theirs collects
LAUNCH_ENTRIES = 2**16 if ON_HOST else 2**24  # entries of lists, or scores, that a launch has for its queries


def outputs(query, k):
    shape = (query.size(0), query.size(1), k)
    return query.new_empty(shape, dtype=accumulator_of(query.dtype)), query.new_empty(shape, dtype=torch.int64)


# ------------------------------------------------------------------------------------------------ Triton


def triton_declines(query, k) -> str | None:
    if k > LARGEST_TRITON_K:
        return f"it holds at most {LARGEST_TRITON_K} candidates a query"
    return backends.triton_declines(query)


def triton(query, keys, k, scale):
    from ..kernels import topk as kernels

    results = outputs(query, k)
    kernels.search(*rows(query, keys), scale, *results)
    return results


# ------------------------------------------------------------------------------------------------ CUDA


def cuda_declines(query, keys) -> str | None:
    if query.dtype == torch.float64:
        return "it takes fp32, bf16 and fp16"
    if keys.size(1) >= 2**32:
        return f"it counts fewer than 2^32 keys, not {keys.size(1)}"
    if keys.size(2) >= 2**24:
        return f"it takes rows of fewer than 2^24 numbers, not {keys.size(2)}"
    return None


def cuda(query, keys, k, scale):
    scores, indices = outputs(query, k)
    N, H, _ = scores.shape
    if N * H == 0:
        return scores, indices
    query, keys = rows(query, keys)
    M = keys.size(1)
    large = k > LARGEST_LIST
    splits = _splits(query, keys, k)
    row = M if large else splits * k
    most = max(1, LAUNCH_ENTRIES // (H * row))
    for first in range(0, N, most):
        some = slice(first, first + most)
        if large:
            scores[some], indices[some] = _cuda_by_digits(query[some], keys, k, scale)
        else:
            lists = indices.new_empty(splits, *indices[some].shape)
            native.cuda("topk_search", query[some], keys, lists, scores[some], indices[some], scale)
    return scores, indices


def _splits(query, keys, k) -> int:
    """Shares of the keys that make two blocks of queries and keys for each multiprocessor.

    Each share reports k candidates, so it has some times as many keys.
    """
    N, H, _ = query.shape
    if query.is_cuda:
        wanted, shortest = 2 * torch.cuda.get_device_properties(query.device).multi_processor_count, max(512, 4 * k)
    else:
        wanted, shortest = 5, 128  # any are right: these meet more edges on small inputs
    blocks = H * -(-N // (4 if N <= 4 else 16 if N <= 16 else 64))
    return max(1, min(-(-wanted // blocks), keys.size(1) // shortest))


def _cuda_by_digits(query, keys, k, scale):
    """Of all scores the k-th by its digits, what comes before it in the order of the keys, and this sorted."""
    (N, H, _), M = query.shape, keys.size(1)
    scores = query.new_empty(N, H, M + M % 2, dtype=torch.float32)
    histograms = query.new_zeros(N, H, DIGITS, BINS, dtype=torch.int32)
    counts = query.new_empty(N, H, -(-M // SECTION), 2, dtype=torch.int64)
    native.cuda("topk_count", query, keys, scores, histograms, counts, scale, k)
    best, indices = scores.new_empty(N, H, k), counts.new_empty(N, H, k)
    native.cuda("topk_collect", scores, histograms, counts.cumsum(2) - counts, best, indices, M)
    best, places = best.sort(dim=-1, descending=True, stable=True)
    return best, indices.gather(-1, places)
