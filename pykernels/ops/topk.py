"""Top-k search of keys by inner product, and the memory lookup made of it.

    s_m = scale · q·K_m;  I = the indices of the k largest s, descending;  w = softmax(s_I);  y = Σ_j w_j V_{I_j}

(Memory Layers at Scale, 2412.09764.) Scores are fp32 (fp64) and the order is that of their values: equal ones go by
the lower index first, and NaN is above all, as torch.topk has it. Scores that were not selected have no gradient, so

    dq = scale Σ_j ds_j K_{I_j};   dK_m = scale Σ_{n, j: I_nj = m} ds_nj q_n

which are the weighted gather of the keys and its gradient: nothing of size n × M is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.declaration import public
from ..core.dtypes import DTYPES, accumulator_of, autocast
from ..core.expect import expect, expect_alike, expect_dtype, expect_integer, expect_number, expect_tensor, expect_type
from ..core.torch_op import torch_op
from ..launch import topk as launch
from .weighted_gather import gather, gather_backward_op, gather_op


def search(
    query: Tensor,  # [N, H, d]
    keys: Tensor,  # [H, M, d]
    k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(scores, in the accumulators' dtype, and indices [N, H, k]) by a stable sort of all scores."""
    acc = accumulator_of(query.dtype)
    scores = scale * torch.einsum("nhd,hmd->nhm", query.to(acc), keys.to(acc))
    scores, indices = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], indices[..., :k]


def lookup(search: Callable, gather: Callable) -> Callable:
    """The memory made of a search and a gather: (output [N, H, dv], weights, indices [N, H, k])."""

    def look(query, keys, values, k, scale, *backend):
        scores, indices = search(query, keys, k, scale, *backend)
        weights = scores.softmax(-1)
        return gather(values, indices, weights, *backend), weights, indices

    return look


# ------------------------------------------------------------------------------------------------ checks


def _check_search(query: Tensor, keys: Tensor, k: int) -> tuple[bool, int]:
    """(whether each head has its own keys, k)."""
    check_rows(query, "query", "[..., d]", 1)
    expect_type(isinstance(keys, Tensor), "keys", "a tensor [M, d] or [H, M, d]", keys)
    expect(keys.dim() in (2, 3), "keys", "[M, d] or [H, M, d]", keys)
    layout = "[H, M, d]" if keys.dim() == 3 else "[M, d]"
    expect_tensor(keys, "keys", layout)
    expect_alike(keys, "keys", query, "query")
    d = query.size(-1)
    expect(d >= 1, "query", "d of 1 or more in [..., d]", query)
    expect(keys.size(-1) == d, "keys", "[M, {d}] to match query's last dimension", keys, d=d)
    batched = keys.dim() == 3
    if batched and (query.dim() < 2 or query.size(-2) != keys.size(0)):
        expect(False, "query", f"[..., {keys.size(0)}, {d}] to match the heads of keys", query)
    return batched, check_k(k, keys.size(-2), "the number of keys")


def check_rows(value: Tensor, name: str, layout: str, rank: int) -> None:
    """A dense floating tensor of any number of leading dimensions."""
    expect_type(isinstance(value, Tensor), name, "a tensor {layout}", value, layout=layout)
    expect_dtype(value, name, DTYPES)
    dense = value.layout is torch.strided and not value.is_nested
    expect_type(dense, name, "a dense tensor {layout}", value, layout=layout)
    expect(value.dim() >= rank, name, "rank {rank} or more {layout}", value, rank=rank, layout=layout)


def check_k(k: int, largest: int, what: str) -> int:
    k = expect_integer(k, "k")
    expect(1 <= k <= largest, "k", "from 1 to {what}, {largest}", k, what=what, largest=largest)
    return k


def _flatten(query: Tensor, keys: Tensor, batched: bool) -> tuple[Tensor, Tensor]:
    """query as [N, H, d] and keys as [H, M, d]."""
    heads = keys.size(0) if batched else 1
    flat = query.reshape(math.prod(query.shape[: -2 if batched else -1]), heads, query.size(-1))
    return flat, keys if batched else keys[None]


# ------------------------------------------------------------------------------------------------ torch op


def _gradient(grad_scores, query, keys, scale, indices, needs, backend):
    weights, grads = scale * grad_scores, {}
    if "query" in needs:
        grads["query"] = gather_op(keys, indices, weights, backend)
    if "keys" in needs:
        grads["keys"] = gather_backward_op(query, keys, indices, weights, True, False, backend)[0]
    return grads


search_op = torch_op(
    "topk_search(Tensor query, Tensor keys, int k, float scale, int backend) -> (Tensor scores, Tensor indices)",
    fake=launch.outputs,
    launchers={"triton": launch.triton, "cuda": launch.cuda},
    gradient=_gradient,
)


# ------------------------------------------------------------------------------------------------ public functions


@public(
    kernel=search_op,
    reference=search,
    supports={
        "cpu": lambda *_: None,
        "triton": lambda query, keys, k, scale: launch.triton_declines(query, k),
        "cuda": lambda query, keys, k, scale: launch.cuda_declines(query, keys),
    },
    differentiable=("query", "keys"),
)
def topk_search(run, query: Tensor, keys: Tensor, k: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Exact search: the k keys of the largest inner product with each query, without the matrix of scores.

    Args:
        query: [..., d], any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        keys: [M, d] in query's dtype, any M; or [H, M, d], where query [..., H, d] has its own keys for each head.
        k: from 1 to M. (On GPUs Triton's kernel takes up to 2048; beyond, the CUDA kernel if it passed its first-use
            test there, else the reference.)
        scale: multiplies the scores.

    Returns:
        scores [..., k] in query's dtype, descending, and indices [..., k] int64. The order is that of scores in fp32
        (fp64): of equal ones the lower index is first, and NaN is above all, as in torch.topk. Differentiable, twice
        too, in query and keys; keys that were not selected have a gradient of zero. Memory beyond inputs and results
        does not depend on M, but for the reference's (k > 2048, and fp64, on GPUs), which holds all scores.

    Raises:
        ValueError, TypeError: a shape, dtype, device or k other than the above, before anything is computed.

    Source: the lookup of Lample et al., 1907.05242, and Berges et al., 2412.09764, over all keys.
    """
    query, keys = autocast(query, keys)
    batched, k = _check_search(query, keys, k)
    scale = float(expect_number(scale, "scale"))
    flat, keys = _flatten(query, keys, batched)
    scores, indices = run(flat, keys, k, scale)
    shape = (*query.shape[:-1], k)
    return scores.to(query.dtype).reshape(shape), indices.reshape(shape)


@public(
    kernel=lookup(search_op, gather_op),
    reference=lookup(search, gather),
    supports={
        "cpu": lambda *_: None,
        "triton": lambda query, keys, values, k, scale: launch.triton_declines(query, k),
        "cuda": lambda query, keys, values, k, scale: launch.cuda_declines(query, keys),
    },
    differentiable=("query", "keys", "values"),
)
def topk_memory(
    run,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float = 1.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Memory lookup: the values of the k keys nearest to each query, weighted by the softmax of their scores.

    Args:
        query: [..., d], any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        keys: [M, d] in query's dtype, any M; or [H, M, d], where query [..., H, d] has its own keys for each head.
        values: [M, dv] in query's dtype; with keys of [H, M, d] also [H, M, dv].
        k: from 1 to M. (On GPUs Triton's kernel takes up to 2048; beyond, the CUDA kernel if it passed its first-use
            test there, else the reference.)
        scale: multiplies the scores.
        return_weights: return the weights and indices as well.

    Returns:
        output [..., dv] in query's dtype, or (output, weights [..., k] in query's dtype, indices [..., k] int64) in
        the order of topk_search. Softmax and sum are fp32 (fp64). Differentiable, twice too, in query, keys and
        values; rows that were not selected have a gradient of zero.

    Raises:
        ValueError, TypeError: a shape, dtype, device or k other than the above, before anything is computed.

    Source: Berges et al., Memory Layers at Scale, 2412.09764, section 2.1.
    """
    query, keys, values = autocast(query, keys, values)
    batched, k = _check_search(query, keys, k)
    scale = float(expect_number(scale, "scale"))
    expect_type(isinstance(values, Tensor), "values", "a tensor [M, dv] or [H, M, dv]", values)
    layout = "[H, M, dv]" if values.dim() == 3 else "[M, dv]"
    expect_tensor(values, "values", layout)
    tables = values.shape[:-1] in (keys.shape[:-1], keys.shape[-2:-1])
    if not tables:
        expect(False, "values", f"{list(keys.shape[-2:-1])} rows to match keys", values)
    expect_alike(values, "values", query, "query")
    flat, keys = _flatten(query, keys, batched)
    values = values if values.dim() == 3 else values[None].expand(keys.size(0), -1, -1)
    output, weights, indices = run(flat, keys, values, k, scale)
    output = output.reshape(*query.shape[:-1], values.size(2))
    if not return_weights:
        return output
    shape = (*query.shape[:-1], k)
    return output, weights.to(query.dtype).reshape(shape), indices.reshape(shape)
