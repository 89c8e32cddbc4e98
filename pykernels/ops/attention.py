"""Exact attention, tiled: FlashAttention (arXiv 2205.14135), FlashAttention-2 (2307.08691).

    S = scale · q kᵀ;  softcap · tanh(S / softcap);  + bias − slope · |p − j|;  masked entries −inf
    P = softmax(S);  o = P v;  lse = logsumexp(S)

with p = i + M − N the position of query i among the keys. Backward, from (q, k, v, o, lse, do, dlse):

    Δ = rowsum(do ∘ o) − dlse;  dS = P ∘ (do vᵀ − Δ);  dv = Pᵀ do;  dq = scale · dS k;  dk = scale · dSᵀ q

One torch op serves the four public functions: dense [B, H, N, D] views, packed sequences (cu_seqlens) and caches in
pages (block_table). A fully masked row has output 0, lse −inf and zero gradients.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..core.backends import triton_declines
from ..core.declaration import public
from ..core.dtypes import accumulator_of, autocast
from ..core.expect import (
    can_read,
    expect,
    expect_device,
    expect_lengths,
    expect_number,
    expect_shape,
    expect_type,
)
from ..core.torch_op import torch_op
from ..launch import attention as launch
from .attention_checks import (
    CACHE,
    DENSE,
    MAX_HEAD_DIM,
    PACKED,
    PAGES,
    UNBOUNDED,
    check_bias,
    check_dense,
    check_leading,
    check_lengths,
    check_offsets,
    check_qkv,
    check_scale,
    check_softcap,
    check_window,
    draw_seed,
    fold,
)

# ------------------------------------------------------------------------------------------------ reference


def reference(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, Hk, M, D], or pages [P, Hk, page, D]
    value: Tensor,  # [B, Hk, M, Dv], or pages [P, Hk, page, Dv]
    bias: Tensor | None = None,  # [B or 1, H or 1, N or 1, M or 1], bool or float
    alibi_slopes: Tensor | None = None,  # [B or 1, H]
    key_lengths: Tensor | None = None,  # [B]
    cu_seqlens_q: Tensor | None = None,  # [S + 1]: B is 1, and sequence s owns rows cu_q[s] … cu_q[s + 1]
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,  # [B, pages]
    seed: Tensor | None = None,  # [], int64
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    align_lengths: bool = False,  # the last query stands at the last valid key, not at the last key
    scale: float = 1.0,
    softcap: float = 0.0,  # 0 is off
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, N, Dv], lse [B, H, N]) by the equations above, with the whole score matrix in memory."""
    if block_table is not None:
        key, value = (t[block_table.clamp(0, len(t) - 1)].transpose(1, 2).flatten(2, 3) for t in (key, value))
    N, M, groups = query.size(2), key.size(2), query.size(1) // max(key.size(1), 1)
    position, column = (torch.arange(n, device=query.device) for n in (N, M))
    allowed = torch.ones((), dtype=torch.bool, device=query.device)
    # Rows that no sequence owns may hold NaN, and 0 · NaN is NaN: they are zeroed before anything is multiplied.
    owned = allowed  # queries, [N] or []
    if cu_seqlens_q is not None:
        of_row, position, length_q = _locate(position, cu_seqlens_q)
        of_column, column, length_k = _locate(column, cu_seqlens_k)
        position = position + (length_k - length_q)[of_row]
        owned, valid = (sequence < len(cu_seqlens_q) - 1 for sequence in (of_row, of_column))
        allowed = (of_row[:, None] == of_column) & owned[:, None]
        query, key, value = (_zero_rows(t, own) for t, own in ((query, owned), (key, valid), (value, valid)))
    elif align_lengths:
        position = position + (key_lengths.clamp(0, M) - N)[:, None, None]
    else:
        position = position + (M - N)
    if key_lengths is not None:
        valid = column < key_lengths[:, None, None]  # [B, 1, M]
        allowed = allowed & valid[..., None, :]
        key, value = _zero_rows(key, valid), _zero_rows(value, valid)

    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = scale * query @ key.mT  # [B, H, N, M]
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    distance = position[..., None] - column
    if window_left >= 0:
        allowed = allowed & (distance <= window_left)
    if window_right >= 0:
        allowed = allowed & (-distance <= window_right)
    if bias is not None and bias.dtype == torch.bool:
        allowed = allowed & bias
    elif bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, :, None, None] * distance.abs()
    scores = scores.masked_fill(~allowed, -math.inf)

    empty = (scores == -math.inf).all(-1, keepdim=True)  # such a row is kept away from the softmax: its gradient is NaN
    scores = scores.masked_fill(empty, 0)
    # Less the maximum, which a sum of huge scores would round to: its gradient, e^(S − lse), would not add up to 1.
    top = scores.detach().amax(-1, keepdim=True) if M else torch.zeros_like(empty, dtype=scores.dtype)
    lse = ((scores - top).logsumexp(-1) + top[..., 0]).masked_fill(empty[..., 0], -math.inf)
    weights = scores.softmax(-1).masked_fill(empty, 0)
    if dropout_p:
        keep = dropout_keep(seed, dropout_p, weights.shape)
        weights = torch.where(keep, weights / (1 - dropout_p), 0)
    return _zero_rows(weights.to(value.dtype) @ value, owned), lse.to(accumulator_of(query.dtype))


def _zero_rows(t: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep[..., None], t, 0)


def _locate(index: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sequence of each index, place within it, lengths); past the last sequence comes one more, of length 0."""
    lengths = torch.cat([cu_seqlens.diff(), cu_seqlens.new_zeros(1)])
    sequence = torch.searchsorted(cu_seqlens, index, right=True) - 1
    return sequence, index - cu_seqlens[sequence], lengths


def dropout_keep(seed: Tensor, dropout_p: float, shape: torch.Size) -> Tensor:
    """The entries that dropout keeps, bool [B, H, N, M]: the same on every backend, from Philox4x32-10.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Key: the seed. Counter: (j / 4, i, b·H + h).
    """
    B, H, N, M = shape
    low = 0xFFFFFFFF
    j, i, bh = (torch.arange(n, device=seed.device) for n in (-(-M // 4), N, B * H))
    c0, c1, c2 = torch.broadcast_tensors(j, i[:, None], bh[:, None, None])
    c3, k0, k1 = torch.zeros_like(c0), seed & low, (seed >> 32) & low
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64-bit products; >> copies the sign, hence the masks
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    words = torch.stack([c0, c1, c2, c3], dim=-1).flatten(2)[..., :M]
    return (words >= _dropout_threshold(dropout_p)).view(shape)


def _dropout_threshold(dropout_p: float) -> int:
    return min(round(dropout_p * 2**32), 2**32 - 1)


# ------------------------------------------------------------------------------------------------ torch ops


_ROWS = "Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
_WINDOW = "SymInt window_left, SymInt window_right"
_NUMBERS = "float scale, float softcap, float dropout_p"

attention_backward_op = torch_op(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, Tensor? bias, Tensor? alibi_slopes, {_ROWS}, Tensor? seed, {_WINDOW}, {_NUMBERS}, bool needs_bias, "
    "bool needs_slopes, int backend) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, Tensor grad_alibi_slopes)",
    fake=launch.gradients,
    launchers={"triton": launch.triton_backward},
    reference=reference,
)


def _gradient(grad_out, grad_lse, out, lse, block_table, align_lengths, needs, **others):
    if align_lengths or block_table is not None:
        raise NotImplementedError("decode_attention has no gradient; use attention with key_lengths")
    return attention_backward_op.gradients(
        grad_out=torch.zeros_like(out) if grad_out is None else grad_out,
        grad_lse=grad_lse,
        out=out,
        lse=lse,
        needs_bias="bias" in needs,
        needs_slopes="alibi_slopes" in needs,
        **others,
    )


attention_op = torch_op(
    f"attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? alibi_slopes, {_ROWS}, "
    f"Tensor? block_table, Tensor? seed, {_WINDOW}, bool align_lengths, {_NUMBERS}, int backend) "
    "-> (Tensor out, Tensor lse)",
    fake=launch.outputs,
    launchers={"triton": launch.triton},
    gradient=_gradient,
)


def _head_declines(query, key, value, *_) -> str | None:
    """`supports` of every kernel: the reference takes what scaled_dot_product_attention may ask for beyond."""
    if 1 <= query.size(-1) <= MAX_HEAD_DIM and 1 <= value.size(-1) <= MAX_HEAD_DIM:
        return None
    return f"it takes head dimensions from 1 to {MAX_HEAD_DIM}"


_made_of = functools.partial(
    public,
    kernel=attention_op,
    reference=reference,
    supports={
        "cpu": _head_declines,
        "triton": lambda *arguments: _head_declines(*arguments) or triton_declines(*arguments),
    },
)


# ------------------------------------------------------------------------------------------------ public functions


@_made_of(differentiable=("query", "key", "value", "bias", "alibi_slopes"))
def attention(
    run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention, softmax(scale · query keyᵀ + bias) value, in memory linear in N and M.

    Args:
        query: [B, H, N, D], any strides, D from 1 to 256; fp32, bf16, fp16 (and fp64 on the CPU).
        key: [B, Hk, M, D]; Hk divides H, and query head h reads key head h // (H / Hk) (GQA, MQA).
        value: [B, Hk, M, Dv]; Dv from 1 to 256 may differ from D.
        bias: broadcastable to [B, H, N, M]. bool: True may be attended to. Float, in the query's dtype or fp32: added
            to the scaled (and capped) scores; differentiable; -inf masks.
        causal: query i sees keys j ≤ i + M − N, aligned to the bottom right.
        window: (left, right): query i sees keys from i + M − N − left to i + M − N + right; None or -1 is unbounded.
        scale: multiplies query·key; D^-0.5 unless given. As softcap and dropout_p a number, numpy's too: torch.compile
            compiles once for each of its values, and once for all lengths.
        softcap: scores become softcap · tanh(scores / softcap), before bias; None or 0 is off (Gemma 2, 2408.00118).
        alibi_slopes: [H] or [B, H]: slope · |i + M − N − j| is taken off the scores (ALiBi, 2108.12409);
            differentiable.
        key_lengths: [B] int32 or int64: keys of each sequence that are valid, from 0 to M; masks further.
        dropout_p: probability in [0, 1) with which a weight is dropped; the seed comes from torch's generator, and the
            mask is the same on every backend.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        output [B, H, N, Dv] in the query's dtype, laid out in memory like the query; with return_lse also lse
        [B, H, N] in fp32 (fp64 for fp64), natural logarithm. Both are differentiable, twice too. A row that sees no
        key has output 0, lse -inf and zero gradients.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value other than the above, before anything is computed; a
            number that is a tensor, whose gradient would be lost.

    Differences from F.scaled_dot_product_attention: causal is aligned to the last key, masked rows are 0, and bias
    gradients, windows, softcap, ALiBi and lse exist. Source: FlashAttention-2, arXiv 2307.08691.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value, DENSE)
    B, H, N, D = query.shape
    M = key.size(2)
    expect(key.size(0) == B, "key", "batch {B} to match query's", key, B=B)
    if bias is not None:
        bias = check_bias(bias, "bias", query, (B, H, N, M))
    if alibi_slopes is not None:
        check_dense(alibi_slopes, "alibi_slopes", "[H] or [B, H]")
        expect_type(alibi_slopes.is_floating_point(), "alibi_slopes", "a floating dtype", alibi_slopes)
        expect_device(alibi_slopes, "alibi_slopes", query, "query")
        expect(alibi_slopes.shape in ((H,), (B, H)), "alibi_slopes", "[{H}] or [{B}, {H}]", alibi_slopes, B=B, H=H)
        alibi_slopes = alibi_slopes.reshape(-1, H).to(accumulator_of(query.dtype))
    if key_lengths is not None:
        key_lengths = check_lengths(key_lengths, "key_lengths", query, B, M)
    dropout_p = expect_number(dropout_p, "dropout_p", 0, 1)
    window_left, window_right = check_window(window, causal)
    out, lse = run(
        query,
        key,
        value,
        bias=bias,
        alibi_slopes=alibi_slopes,
        key_lengths=key_lengths,
        seed=draw_seed(dropout_p, query),
        window_left=window_left,
        window_right=window_right,
        scale=check_scale(scale, D),
        softcap=check_softcap(softcap),
        dropout_p=float(dropout_p),
    )
    return (out, lse) if return_lse else out


@_made_of(differentiable=("query", "key", "value", "attn_mask"))
def scaled_dot_product_attention(
    run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Drop-in for torch.nn.functional.scaled_dot_product_attention.

    Args:
        query: [..., H, N, D]: any number of batch dimensions, or none; without heads [N, D]. fp32, bf16, fp16, fp64.
        key, value: [..., Hk, M, D] and [..., Hk, M, Dv]; the leading dimensions of all three broadcast. With enable_gqa
            Hk divides H instead.
        attn_mask: broadcastable to [..., H, N, M], bool (True is attended to) or float, in the query's dtype or fp32
            (added to the scores).
        dropout_p: probability from 0 to 1 with which a weight is dropped.
        is_causal: query i sees keys j ≤ i: aligned to the top left, as in torch. Not together with attn_mask.
        scale: a number; D^-0.5 unless given.
        enable_gqa: let key and value have fewer heads than query.

    Returns:
        [..., H, N, Dv].

    Raises:
        ValueError, TypeError: a shape, dtype, device or value other than the above; attn_mask together with is_causal;
            leading dimensions that do not broadcast; a scale or dropout_p that is a tensor, whose gradient would be
            lost; sparse and nested tensors.

    The same function as torch's, except that a fully masked row is 0 and that the random stream of dropout is ours.
    Head dimensions of 0 or above 256, which no kernel takes, go through the reference.
    """
    query, key, value = autocast(query, key, value)
    expect(attn_mask is None or not is_causal, "attn_mask", "None together with is_causal=True", attn_mask)
    dropout_p = expect_number(dropout_p, "dropout_p", 0)
    expect(dropout_p <= 1, "dropout_p", "a probability from 0 to 1", dropout_p)
    lead = check_leading(query, key, value, enable_gqa)
    N, M, D = query.size(-2), key.size(-2), query.size(-1)
    if attn_mask is not None:
        attn_mask = check_bias(attn_mask, "attn_mask", query, (*lead, N, M))
    query, key, value, attn_mask = fold(query, key, value, attn_mask, lead)
    window_right = UNBOUNDED
    if is_causal:  # windows count from the bottom right: of the keys that any query sees, i + N − M there is i here
        if M > N:
            key, value = key[:, :, :N], value[:, :, :N]
        window_right = N - key.size(2)
    if dropout_p == 1:  # nothing is kept, of outputs and of gradients
        value, dropout_p = 0 * value, 0.0
    out, _ = run(
        query,
        key,
        value,
        bias=attn_mask,
        seed=draw_seed(dropout_p, query),
        window_right=window_right,
        scale=check_scale(scale, D),
        dropout_p=float(dropout_p),
    )
    return out if len(lead) == 2 else out.reshape(*lead, N, out.size(-1))


@_made_of(differentiable=("query", "key", "value"))
def varlen_attention(
    run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over packed sequences of different lengths, without padding and without maximum lengths.

    Args:
        query: [total_q, H, D]: the sequences' queries one after the other.
        key, value: [total_k, Hk, D] and [total_k, Hk, Dv].
        cu_seqlens_q: [S + 1] int32 or int64: sequence s owns rows cu_seqlens_q[s] up to cu_seqlens_q[s + 1] of query;
            begins with 0 and ascends. Rows past its end belong to no sequence: their output is 0.
        cu_seqlens_k: the same for key and value; cu_seqlens_q unless given.
        causal, window, scale, softcap, return_lse: as in `attention`, aligned within each sequence.

    Returns:
        output [total_q, H, Dv]; with return_lse also lse [H, total_q].

    Raises:
        ValueError, TypeError: as `attention`; offsets that do not begin with 0, descend or pass the total.
    """
    query, key, value = autocast(query, key, value)
    check_qkv(query, key, value, PACKED)
    fits = cu_seqlens_k is not None or key.size(0) == query.size(0)
    expect(fits, "cu_seqlens_k", "offsets, since query and key differ in length", cu_seqlens_k)
    cu_seqlens_q = check_offsets(cu_seqlens_q, "cu_seqlens_q", query, query.size(0))
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    else:
        cu_seqlens_k = check_offsets(cu_seqlens_k, "cu_seqlens_k", query, key.size(0))
        expect_shape(cu_seqlens_k, "cu_seqlens_k", cu_seqlens_q.shape, "cu_seqlens_q")
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    window_left, window_right = check_window(window, causal)
    out, lse = run(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        window_left=window_left,
        window_right=window_right,
        scale=check_scale(scale, query.size(-1)),
        softcap=check_softcap(softcap),
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


@_made_of()
def decode_attention(
    run,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of a few new tokens to a cache of keys and values, contiguous or in pages. No gradient.

    Args:
        query: [B, H, n, D], the n newest tokens of each sequence.
        key_cache, value_cache: [B, Hk, S, D] and [B, Hk, S, Dv]; with block_table pages [P, Hk, page, D] and
            [P, Hk, page, Dv]. Write the new tokens' own entries first.
        cache_lengths: [B] int32 or int64: valid entries of each sequence, the new tokens' included.
        block_table: [B, pages] int32 or int64: entry j of sequence b stands in page block_table[b, j // page].
        causal: the last query is aligned with the last valid entry, the one before with the one before that.
        window, scale, softcap: as in `attention`.

    Returns:
        [B, H, n, Dv].

    Raises:
        ValueError, TypeError: as `attention`; lengths beyond the cache; page numbers beyond the pages in use.
        NotImplementedError: when a gradient is asked of the result.
    """
    query, key_cache, value_cache = autocast(query, key_cache, value_cache)
    paged = block_table is not None
    check_qkv(query, key_cache, value_cache, PAGES if paged else CACHE, "key_cache", "value_cache")
    B, S = query.size(0), key_cache.size(2)
    if not paged:
        expect(key_cache.size(0) == B, "key_cache", "batch {B} to match query's", key_cache, B=B)
    else:
        expect_lengths(block_table, "block_table", "[B, pages]", query, "query")
        expect(block_table.size(0) == B, "block_table", "[{B}, pages] to match query's batch", block_table, B=B)
        block_table, page, S = block_table.long(), S, S * block_table.size(1)
        expect(key_cache.size(0) > 0 or S == 0, "key_cache", "at least one page", key_cache)
    cache_lengths = check_lengths(cache_lengths, "cache_lengths", query, B, S)
    if paged and can_read(block_table) and can_read(cache_lengths):
        places = torch.arange(block_table.size(1), device=block_table.device)
        used = places < (cache_lengths[:, None] + page - 1) // max(page, 1)
        stray = used & ((block_table < 0) | (block_table >= key_cache.size(0)))
        if stray.any():
            strays, last = block_table[stray].tolist(), key_cache.size(0) - 1
            expect(False, "block_table", "page numbers from 0 to {last}", strays, last=last)
    window_left, window_right = check_window(window, causal)
    out, _ = run(
        query,
        key_cache,
        value_cache,
        key_lengths=cache_lengths,
        block_table=block_table,
        window_left=window_left,
        window_right=window_right,
        align_lengths=True,
        scale=check_scale(scale, query.size(-1)),
        softcap=check_softcap(softcap),
    )
    return out
