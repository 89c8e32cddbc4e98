"""The search of product keys on torch tensors: its results and Triton's launch. Op: ops/product_key.py."""

from __future__ import annotations

from ..core.layout import dense
from .topk import outputs, triton_declines

__all__ = ["outputs", "triton", "triton_declines"]


def triton(query, sub_keys, k):
    from ..kernels import product_key as kernels

    results = outputs(query, k)
    kernels.search(*dense(query, sub_keys), *results)
    return results
