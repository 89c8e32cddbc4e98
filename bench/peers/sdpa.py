"""F.scaled_dot_product_attention, as a careful user would call it for each of the attention ops.

A mask that follows from the sizes alone is built once; one that needs the data is part of the call.
"""

import functools
import math

import torch
import torch.nn.functional as F

NAME = "sdpa"


def missing() -> str | None:
    return None


def scaled_dot_product_attention(**inputs):
    return F.scaled_dot_product_attention(**inputs)


def attention(
    query, key, value, *, bias=None, causal=False, window=None, scale=None, softcap=None, alibi_slopes=None,
    key_lengths=None, dropout_p=0.0, return_lse=False,
):  # fmt: skip
    _refuse(softcap=softcap, dropout_p=dropout_p, return_lse=return_lse)
    N, M = query.size(2), key.size(2)
    plain = causal and N == M and window is None and bias is None and alibi_slopes is None and key_lengths is None
    mask = None if plain else _band(N, M, causal, window, query.device)
    if key_lengths is not None:
        valid = (torch.arange(M, device=query.device) < key_lengths[:, None])[:, None, None]
        mask = valid if mask is None else mask & valid
    if alibi_slopes is not None:
        slopes = alibi_slopes.expand(1, -1) if alibi_slopes.dim() == 1 else alibi_slopes
        alibi = -slopes[..., None, None] * _distance(N, M, query.device).abs()
        bias = alibi if bias is None else bias + alibi
    if bias is not None and bias.dtype != torch.bool:
        bias = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        mask = bias.to(query.dtype)
    elif bias is not None:
        mask = bias if mask is None else mask & bias
    return _sdpa(query, key, value, mask, plain, scale)


def varlen_attention(
    query, key, value, cu_seqlens_q, cu_seqlens_k=None, *, causal=False, window=None, scale=None, softcap=None,
    return_lse=False,
):  # fmt: skip
    """One call a sequence."""
    _refuse(softcap=softcap, return_lse=return_lse)
    lengths_q = cu_seqlens_q.diff().tolist()
    lengths_k = lengths_q if cu_seqlens_k is None else cu_seqlens_k.diff().tolist()
    spare = query.size(0) - sum(lengths_q)
    parts = zip(
        query.split([*lengths_q, spare]),
        key.split([*lengths_k, key.size(0) - sum(lengths_k)]),
        value.split([*lengths_k, value.size(0) - sum(lengths_k)]),
        strict=True,
    )
    rows = []
    for n, (q, k, v) in zip(lengths_q, parts):  # the spare rows have no length
        out = attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), causal=causal, window=window, scale=scale)
        rows.append(out[0].transpose(0, 1).reshape(n, query.size(1), -1))
    return torch.cat([*rows, query.new_zeros(spare, query.size(1), value.size(2))])


def decode_attention(
    query, key_cache, value_cache, cache_lengths, *, block_table=None, causal=True, window=None, scale=None,
    softcap=None,
):  # fmt: skip
    """Pages are gathered first, since torch cannot read them in place."""
    _refuse(softcap=softcap)
    if block_table is not None:
        key_cache, value_cache = (t[block_table].transpose(1, 2).flatten(2, 3) for t in (key_cache, value_cache))
    n, S = query.size(2), key_cache.size(2)
    if n == 1 and window is None and bool((cache_lengths == S).all()):
        return _sdpa(query, key_cache, value_cache, None, False, scale)  # one token sees all of a full cache
    column = torch.arange(S, device=query.device)
    lengths = cache_lengths.view(-1, 1, 1, 1)
    distance = (lengths - n + torch.arange(n, device=query.device)[:, None]) - column
    left, right = _sides(causal, window)
    mask = (column < lengths) & (distance >= -right if right >= 0 else True) & (distance <= left if left >= 0 else True)
    return _sdpa(query, key_cache, value_cache, mask, False, scale)


def _refuse(**options):
    for name, value in options.items():
        if value:
            raise NotImplementedError(f"F.scaled_dot_product_attention has no equivalent of {name}={value}")


def _sdpa(query, key, value, mask, causal, scale):
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=grouped)


def _sides(causal, window):
    left, right = (-1 if side is None else side for side in window or (-1, -1))
    return left, 0 if causal else right


@functools.lru_cache(maxsize=4)
def _distance(N, M, device):
    return torch.arange(N, device=device)[:, None] + (M - N) - torch.arange(M, device=device)


@functools.lru_cache(maxsize=4)
def _band(N, M, causal, window, device):
    """The mask of causal and window, aligned to the bottom right; None where they mask nothing."""
    left, right = _sides(causal, window)
    if left < 0 and right < 0:
        return None
    distance = _distance(N, M, device)
    return (distance >= -right if right >= 0 else True) & (distance <= left if left >= 0 else True)
