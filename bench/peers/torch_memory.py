"""What one writes in torch: a matrix product and torch.topk, F.embedding_bag for the weighted sum of the rows.

Half precision is raised to fp32 for the scores, as the order of the results is that of fp32 scores.
"""

import math

import torch
from torch.nn import functional as F

NAME = "torch"


def missing() -> str | None:
    return None


def topk_search(query, keys, k, *, scale=1.0):
    scores, indices = _search(query, keys, k, scale)
    return scores.to(query.dtype), indices


def topk_memory(query, keys, values, k, *, scale=1.0, return_weights=False):
    if keys.dim() == 3 or return_weights:
        raise NotImplementedError("one set of keys and the output alone")
    scores, indices = _search(query, keys, k, scale)
    return weighted_gather(values, indices, scores.softmax(-1).to(values.dtype))


def product_key_search(query, sub_keys, k):
    scores, indices = _product_search(query, sub_keys, k)
    return scores.to(query.dtype), indices


def product_key_memory(query, sub_keys, values, k, *, return_weights=False):
    if return_weights:
        raise NotImplementedError("the output alone")
    scores, indices = _product_search(query, sub_keys, k)
    return weighted_gather(values, indices.flatten(-2), scores.softmax(-1).to(values.dtype).flatten(-2))


def weighted_gather(values, indices, weights, *, sparse_grad=False):
    *bags, k = indices.shape
    if indices.numel() == 0 or values.size(1) == 0:
        raise NotImplementedError("F.embedding_bag fails on nothing")
    flat = (math.prod(bags), k)
    weights = weights.to(values.dtype).reshape(flat)
    out = F.embedding_bag(indices.reshape(flat), values, per_sample_weights=weights, mode="sum", sparse=sparse_grad)
    return out.view(*bags, values.size(1))


def _exact(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _search(query, keys, k, scale):
    if keys.dim() == 3:
        scores = torch.einsum("...hd,hmd->...hm", _exact(query), _exact(keys))
    else:
        scores = _exact(query) @ _exact(keys).T
    return (scores if scale == 1 else scale * scores).topk(k)


def _product_search(query, sub_keys, k):
    """All k² pairs of the two lists, as the public implementations have it."""
    n = sub_keys.size(2)
    halves = _exact(query).unflatten(-1, (2, -1))
    scores, places = torch.einsum("...hsd,hsnd->...hsn", halves, _exact(sub_keys)).topk(k)
    sums = (scores[..., 0, :, None] + scores[..., 1, None, :]).flatten(-2)
    ids = (places[..., 0, :, None] * n + places[..., 1, None, :]).flatten(-2)
    sums, winners = sums.topk(k)
    return sums, ids.gather(-1, winners)
