"""Product keys: a search over n² keys that costs two over n, and the memory lookup made of it.

    s1 = K1 q1, s2 = K2 q2, q = (q1, q2);  the k best of each, descending (a, b their ranks);
    candidates s1[a] + s2[b] with id i_a·n + j_b;  the k best of these;  w = softmax;  y = Σ over heads and k of w V[id]

(Lample et al., 1907.05242.) As both lists descend, only pairs of ranks with (a+1)(b+1) ≤ k can win: as many others are
no worse. The order is defined by these two stages: of equal sums the lower a is first, then the lower b.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.backends import REFERENCE
from ..core.declaration import public
from ..core.dtypes import autocast
from ..core.expect import expect, expect_alike, expect_tensor
from ..core.torch_op import torch_op
from ..launch import product_key as launch
from . import topk
from .topk import check_k, check_rows
from .weighted_gather import check_sparse, gather, gather_backward_op, gather_op, sparse_gather


def search(
    query: Tensor,  # [N, H, d]
    sub_keys: Tensor,  # [H, 2, n, d/2]
    k: int,
) -> tuple[Tensor, Tensor]:
    """(scores in the accumulators' dtype, ids), [N, H, k], by two searches and a stable sort of the candidate pairs."""
    N, H, d = query.shape
    n = sub_keys.size(2)
    scores, places = topk.search(query.reshape(N, 2 * H, d // 2), sub_keys.flatten(0, 1), k, 1.0)
    scores, places = scores.view(N, H, 2, k), places.view(N, H, 2, k)
    pairs = [(a, b) for a in range(k) for b in range(k // (a + 1))]
    first, second = torch.tensor(pairs, device=query.device).unbind(1)
    sums = scores[:, :, 0, first] + scores[:, :, 1, second]
    sums, winners = sums.sort(dim=-1, descending=True, stable=True)
    winners = winners[..., :k]
    i, j = (places[:, :, half].gather(-1, ranks[winners]) for half, ranks in enumerate((first, second)))
    return sums[..., :k], i * n + j


def lookup(search, gather):
    """The memory made of a search and a gather: (output [N, 1, dv], weights [N, H, k], ids [N, H, k]).

    sparse: the gradient of values is.
    """

    def look(query, sub_keys, values, k, sparse, *backend):
        scores, ids = search(query, sub_keys, k, *backend)
        weights = scores.softmax(-1)
        rows, shares = ids.flatten(1)[:, None], weights.flatten(1)[:, None]
        if sparse:
            output = sparse_gather(values, rows, shares, *(backend or (REFERENCE,)))
        else:
            output = gather(values[None], rows, shares, *backend)
        return output, weights, ids

    return look


# ------------------------------------------------------------------------------------------------ checks


def _check_search(query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, int]:
    """(the query as [N, H, d], k)."""
    check_rows(query, "query", "[..., H, d]", 2)
    H, d = query.shape[-2:]
    expect(d >= 2 and d % 2 == 0, "query", "an even d in [..., H, d]", query)
    expect_tensor(sub_keys, "sub_keys", "[H, 2, n, d/2]")
    fits = (sub_keys.size(0), sub_keys.size(1), 2 * sub_keys.size(3)) == (H, 2, d)
    if not fits:
        expect(False, "sub_keys", f"[{H}, 2, n, {d // 2}] to match query", sub_keys)
    expect_alike(sub_keys, "sub_keys", query, "query")
    k = check_k(k, sub_keys.size(2), "the number of sub-keys")
    return query.flatten(0, -3) if query.dim() > 2 else query[None], k


# ------------------------------------------------------------------------------------------------ torch op


def _gradient(grad_scores, query, sub_keys, ids, needs, backend):
    """A sum's gradient goes to both of its halves: the gradients of two searches over n, side by side."""
    N, H, k = ids.shape
    n = sub_keys.size(2)
    keys = sub_keys.flatten(0, 1)  # [2H, n, d/2]
    halves = query.reshape(N, 2 * H, keys.size(2))
    places = torch.stack((ids // n, ids % n), 2).view(N, 2 * H, k)
    weights = grad_scores[:, :, None].expand(N, H, 2, k).reshape(N, 2 * H, k)
    grads = {}
    if "query" in needs:
        grads["query"] = gather_op(keys, places, weights, backend).view(query.shape)
    if "sub_keys" in needs:
        grad_keys, _ = gather_backward_op(halves, keys, places, weights, True, False, backend)
        grads["sub_keys"] = grad_keys.view(sub_keys.shape)
    return grads


search_op = torch_op(
    "product_key_search(Tensor query, Tensor sub_keys, int k, int backend) -> (Tensor scores, Tensor ids)",
    fake=launch.outputs,
    launchers={"triton": launch.triton},
    gradient=_gradient,
)


# ------------------------------------------------------------------------------------------------ public functions


@public(
    kernel=search_op,
    reference=search,
    supports={"cpu": lambda *_: None, "triton": lambda query, sub_keys, k: launch.triton_declines(query, k)},
    differentiable=("query", "sub_keys"),
)
def product_key_search(run, query: Tensor, sub_keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Search of n² product keys per head: the k best sums of a score in each of two sets of n keys.

    Args:
        query: [..., H, d], d even, any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        sub_keys: [H, 2, n, d/2] in query's dtype: for each head the keys of the query's first and second half. Key
            i·n + j of the product is (sub_keys[h, 0, i], sub_keys[h, 1, j]).
        k: from 1 to n. (On GPUs Triton's kernel takes up to 2048; beyond, the reference runs.)

    Returns:
        scores [..., H, k] in query's dtype, descending in fp32 (fp64), and indices [..., H, k] int64 into the n² keys.
        Candidates are the k best of each half, descending, equal ones by the lower index; of equal sums the one of the
        lower first rank comes first, then of the lower second. Differentiable, twice too, in query and sub_keys.

    Raises:
        ValueError, TypeError: a shape, dtype, device or k other than the above, before anything is computed.

    Source: Lample et al., Large Memory Layers with Product Keys, 1907.05242, section 3.2.
    """
    query, sub_keys = autocast(query, sub_keys)
    flat, k = _check_search(query, sub_keys, k)
    scores, ids = run(flat, sub_keys, k)
    shape = (*query.shape[:-1], k)
    return scores.to(query.dtype).reshape(shape), ids.reshape(shape)


@public(
    kernel=lookup(search_op, gather_op),
    reference=lookup(search, gather),
    supports={"cpu": lambda *_: None, "triton": lambda query, s, values, k, sparse: launch.triton_declines(query, k)},
    differentiable=("query", "sub_keys", "values"),
)
def product_key_memory(
    run,
    query: Tensor,
    sub_keys: Tensor,
    values: Tensor,
    k: int,
    *,
    return_weights: bool = False,
    sparse_grad: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Product-key memory: per head the softmax over its k best of n² keys; their values, weighted, summed over heads.

    Args:
        query: [..., H, d], d even, any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        sub_keys: [H, 2, n, d/2] in query's dtype, as in product_key_search.
        values: [n², dv] in query's dtype, for all heads.
        k: from 1 to n. (On GPUs Triton's kernel takes up to 2048; beyond, the reference runs.)
        return_weights: return the weights and indices as well.
        sparse_grad: the gradient of values is sparse, as in `weighted_gather`. The results are the same, to the bit.

    Returns:
        output [..., dv] in query's dtype, or (output, weights [..., H, k] in query's dtype, indices [..., H, k] int64).
        Softmax and sum are fp32 (fp64). Differentiable, twice too, in query, sub_keys and values; rows that were not
        selected have a gradient of zero.

    Raises:
        ValueError, TypeError: a shape, dtype, device or k other than the above, before anything is computed.

    Source: Lample et al., 1907.05242, section 3; Berges et al., Memory Layers at Scale, 2412.09764, section 2.
    """
    query, sub_keys, values = autocast(query, sub_keys, values)
    flat, k = _check_search(query, sub_keys, k)
    expect_tensor(values, "values", "[n², dv]")
    rows = sub_keys.size(2) ** 2
    expect(values.size(0) == rows, "values", "[{rows}, dv], a row for each pair of sub_keys", values, rows=rows)
    expect_alike(values, "values", sub_keys, "sub_keys")
    if sparse_grad:
        check_sparse("product_key_memory")
    output, weights, ids = run(flat, sub_keys, values, k, bool(sparse_grad))
    output = output.reshape(*query.shape[:-2], values.size(1))
    if not return_weights:
        return output
    shape = (*query.shape[:-1], k)
    return output, weights.to(query.dtype).reshape(shape), ids.reshape(shape)
