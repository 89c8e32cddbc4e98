"""Exact attention, tiled: FlashAttention (arXiv 2205.14135), FlashAttention-2 (2307.08691).

    S = scale · q kᵀ;  softcap · tanh(S / softcap);  + bias − slope · |p − j|;  masked entries −inf
    P = softmax(S);  o = P v;  lse = logsumexp(S)

with p = i + M − N the position of query i among the keys. Backward, from (q, k, v, o, lse, do, dlse):

    Δ = rowsum(do ∘ o) − dlse;  dS = P ∘ (do vᵀ − Δ);  dv = Pᵀ do;  dq = scale · dS k;  dk = scale · dSᵀ q

One torch op serves the four public functions: dense [B, H, N, D] views, packed sequences (cu_seqlens) and caches in
pages (block_table). A fully masked row has output 0, lse −inf and zero gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.expect import (
    can_read,
    expect,
    expect_alike,
    expect_device,
    expect_dtype,
    expect_integer,
    expect_lengths,
    expect_number,
    expect_shape,
    expect_tensor,
    expect_type,
)
from ..core.registry import (
    FLOATS,
    INTERPRET,
    Sample,
    Workload,
    autocast,
    register,
    second_order,
    torch_op,
    triton_declines,
)

UNBOUNDED = -1  # a window's side without a limit
FLOATING = (torch.float64, *FLOATS)
MAX_HEAD_DIM = 256
DENSE = ("[B, H, N, D]", "[B, Hk, M, D]", "[B, Hk, M, Dv]")
PACKED = ("[total_q, H, D]", "[total_k, Hk, D]", "[total_k, Hk, Dv]")
CACHE = ("[B, H, n, D]", "[B, Hk, S, D]", "[B, Hk, S, Dv]")
PAGES = ("[B, H, n, D]", "[P, Hk, page, D]", "[P, Hk, page, Dv]")


# ------------------------------------------------------------------------------------------------ reference


def reference(
    query: Tensor,  # [B, H, N, D]
    key: Tensor,  # [B, Hk, M, D], or pages [P, Hk, page, D]
    value: Tensor,  # [B, Hk, M, Dv], or pages [P, Hk, page, Dv]
    bias: Tensor | None,  # [B or 1, H or 1, N or 1, M or 1], bool or float
    alibi_slopes: Tensor | None,  # [B or 1, H]
    key_lengths: Tensor | None,  # [B]
    cu_seqlens_q: Tensor | None,  # [S + 1]: B is 1, and sequence s owns rows cu_q[s] … cu_q[s + 1]
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,  # [B, pages]
    seed: Tensor | None,  # [], int64
    window_left: int,
    window_right: int,
    align_lengths: bool,  # the last query stands at the last valid key, not at the last key
    scale: float,
    softcap: float,  # 0 is off
    dropout_p: float,
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
    return _zero_rows(weights.to(value.dtype) @ value, owned), lse.to(_statistics_dtype(query))


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


def _statistics_dtype(t: Tensor) -> torch.dtype:
    """The dtype of accumulators and of lse."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ torch ops


def _empty(like: Tensor, last: int) -> Tensor:
    """[B, H, N, last], in memory [B, N, H, last] where `like` has its heads inside: no copy after a projection."""
    B, H, N, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(B, N, H, last).transpose(1, 2)
    return like.new_empty(B, H, N, last)


def _outputs(query, key, value, *_):
    lse = query.new_empty(query.shape[:3], dtype=_statistics_dtype(query))
    return _empty(query, value.size(3)), lse


def _gradients(grad_out, grad_lse, query, key, value, out, lse, bias, alibi_slopes, *rest):
    needs_bias, needs_slopes = rest[-3:-1]
    return (
        *(_empty(t, t.size(3)) for t in (query, key, value)),
        torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if needs_bias else query.new_empty(0),
        lse.new_empty(alibi_slopes.shape if needs_slopes else 0),
    )


def _save(ctx, inputs, output):
    *tensors, window_left, window_right, align_lengths, scale, softcap, dropout_p, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.scalars = (window_left, window_right, scale, softcap, dropout_p)
    ctx.no_gradient = align_lengths or inputs[8] is not None
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    if ctx.no_gradient:
        raise NotImplementedError("decode_attention has no gradient; use attention with key_lengths")
    query, key, value, bias, slopes, lengths, cu_q, cu_k, _, seed, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    needs_bias, needs_slopes = ctx.needs_input_grad[3:5]
    grads = _attention_backward_op(
        *(grad_out, grad_lse, query, key, value, out, lse, bias, slopes, lengths, cu_q, cu_k, seed),
        *(*ctx.scalars, needs_bias, needs_slopes, ctx.backend),
    )
    return *grads[:3], grads[3] if needs_bias else None, grads[4] if needs_slopes else None, *[None] * 12


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:13])
    ctx.scalars = inputs[13:18]
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    grad_out, grad_lse, query, key, value, _, _, bias, slopes, lengths, cu_q, cu_k, seed = ctx.saved_tensors
    window_left, window_right, scale, softcap, dropout_p = ctx.scalars

    def forward(query, key, value, bias, slopes):
        return reference(
            *(query, key, value, bias, slopes, lengths, cu_q, cu_k, None, seed),
            *(window_left, window_right, False, scale, softcap, dropout_p),
        )

    second = second_order(forward, (query, key, value, bias, slopes), (grad_out, grad_lse), cotangents)
    return *second[:5], None, None, *second[5:], *[None] * 12


def _triton(*arguments):
    from ..kernels import attention as kernels

    query, key, value, bias, slopes, _, cu_seqlens_q, _, block_table, seed = arguments[:10]
    out, lse = _outputs(query, key, value)
    size = kernels.scratch_size(query, key, value, bias, slopes, cu_seqlens_q, block_table, seed)
    kernels.forward(*arguments[:-1], out, lse, lse.new_empty(size))
    return out, lse


def _triton_backward(*arguments):
    from ..kernels import attention as kernels

    lse, needs_bias, needs_slopes = arguments[6], *arguments[-3:-1]
    *grads, grad_bias, grad_slopes = _gradients(*arguments)
    slopes_by_row = torch.empty_like(lse) if needs_slopes else None
    kernels.backward(
        *arguments[:-3],
        *(*grads, grad_bias if needs_bias else None, slopes_by_row),
        scratch=lse.new_empty(3, *lse.shape),
    )
    if needs_slopes:
        grad_slopes = slopes_by_row.sum(-1).sum_to_size(grad_slopes.shape)
    return *grads, grad_bias, grad_slopes


_TENSORS = """Tensor? bias, Tensor? alibi_slopes, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"""
_WINDOW = """SymInt window_left, SymInt window_right"""
_SCALARS = """float scale, float softcap, float dropout_p"""

_attention_backward_op = torch_op(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    f"Tensor lse, {_TENSORS}, Tensor? seed, {_WINDOW}, {_SCALARS}, bool needs_bias, bool needs_slopes, int backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gradients,
    implementations={"triton": _triton_backward},
    setup_context=_save_backward,
    backward=_double_backward,
)

_attention_op = torch_op(
    f"attention(Tensor query, Tensor key, Tensor value, {_TENSORS}, Tensor? block_table, Tensor? seed, {_WINDOW}, "
    f"bool align_lengths, {_SCALARS}, int backend) -> (Tensor, Tensor)",
    fake=_outputs,
    implementations={"triton": _triton},
    setup_context=_save,
    backward=_backward,
)


def _head_declines(query, key, value, *_) -> str | None:
    """`supports` of every kernel: the reference takes what scaled_dot_product_attention may ask for beyond."""
    if 1 <= query.size(-1) <= MAX_HEAD_DIM and 1 <= value.size(-1) <= MAX_HEAD_DIM:
        return None
    return f"it takes head dimensions from 1 to {MAX_HEAD_DIM}"


_SUPPORTS = {
    "cpu": _head_declines,
    "triton": lambda *arguments: _head_declines(*arguments) or triton_declines(*arguments),
}


# ------------------------------------------------------------------------------------------------ public functions


def _attention(
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
    _check_qkv(query, key, value, DENSE)
    B, H, N, D = query.shape
    M = key.size(2)
    expect(key.size(0) == B, "key", "batch {B} to match query's", key, B=B)
    if bias is not None:
        bias = _check_bias(bias, "bias", query, (B, H, N, M))
    if alibi_slopes is not None:
        _check_dense(alibi_slopes, "alibi_slopes", "[H] or [B, H]")
        expect_type(alibi_slopes.is_floating_point(), "alibi_slopes", "a floating dtype", alibi_slopes)
        expect_device(alibi_slopes, "alibi_slopes", query, "query")
        expect(alibi_slopes.shape in ((H,), (B, H)), "alibi_slopes", "[{H}] or [{B}, {H}]", alibi_slopes, B=B, H=H)
        alibi_slopes = alibi_slopes.reshape(-1, H).to(_statistics_dtype(query))
    if key_lengths is not None:
        key_lengths = _check_lengths(key_lengths, "key_lengths", query, B, M)
    dropout_p = expect_number(dropout_p, "dropout_p", 0, 1)
    window_left, window_right = _check_window(window, causal)
    out, lse = run(
        *(query, key, value, bias, alibi_slopes, key_lengths, None, None, None, _draw_seed(dropout_p, query)),
        *(window_left, window_right, False, _check_scale(scale, D), _check_softcap(softcap), float(dropout_p)),
    )
    return (out, lse) if return_lse else out


def _scaled_dot_product_attention(
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
    lead = _check_leading(query, key, value, enable_gqa)
    N, M, D = query.size(-2), key.size(-2), query.size(-1)
    if attn_mask is not None:
        attn_mask = _check_bias(attn_mask, "attn_mask", query, (*lead, N, M))
    query, key, value, attn_mask = _fold(query, key, value, attn_mask, lead)
    window_right = UNBOUNDED
    if is_causal:  # windows count from the bottom right: of the keys that any query sees, i + N − M there is i here
        if M > N:
            key, value = key[:, :, :N], value[:, :, :N]
        window_right = N - key.size(2)
    if dropout_p == 1:  # nothing is kept, of outputs and of gradients
        value, dropout_p = 0 * value, 0.0
    out, _ = run(
        *(query, key, value, attn_mask, None, None, None, None, None, _draw_seed(dropout_p, query)),
        *(UNBOUNDED, window_right, False, _check_scale(scale, D), 0.0, float(dropout_p)),
    )
    return out if len(lead) == 2 else out.reshape(*lead, N, out.size(-1))


def _varlen_attention(
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
    _check_qkv(query, key, value, PACKED)
    fits = cu_seqlens_k is not None or key.size(0) == query.size(0)
    expect(fits, "cu_seqlens_k", "offsets, since query and key differ in length", cu_seqlens_k)
    cu_seqlens_q = _check_offsets(cu_seqlens_q, "cu_seqlens_q", query, query.size(0))
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    else:
        cu_seqlens_k = _check_offsets(cu_seqlens_k, "cu_seqlens_k", query, key.size(0))
        expect_shape(cu_seqlens_k, "cu_seqlens_k", cu_seqlens_q.shape, "cu_seqlens_q")
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    window_left, window_right = _check_window(window, causal)
    out, lse = run(
        *(query, key, value, None, None, None, cu_seqlens_q, cu_seqlens_k, None, None, window_left, window_right),
        *(False, _check_scale(scale, query.size(-1)), _check_softcap(softcap), 0.0),
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _decode_attention(
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
    _check_qkv(query, key_cache, value_cache, PAGES if paged else CACHE, "key_cache", "value_cache")
    B, S = query.size(0), key_cache.size(2)
    if not paged:
        expect(key_cache.size(0) == B, "key_cache", "batch {B} to match query's", key_cache, B=B)
    else:
        expect_lengths(block_table, "block_table", "[B, pages]", query, "query")
        expect(block_table.size(0) == B, "block_table", "[{B}, pages] to match query's batch", block_table, B=B)
        block_table, page, S = block_table.long(), S, S * block_table.size(1)
        expect(key_cache.size(0) > 0 or S == 0, "key_cache", "at least one page", key_cache)
    cache_lengths = _check_lengths(cache_lengths, "cache_lengths", query, B, S)
    if paged and can_read(block_table) and can_read(cache_lengths):
        places = torch.arange(block_table.size(1), device=block_table.device)
        used = places < (cache_lengths[:, None] + page - 1) // max(page, 1)
        stray = used & ((block_table < 0) | (block_table >= key_cache.size(0)))
        if stray.any():
            strays, last = block_table[stray].tolist(), key_cache.size(0) - 1
            expect(False, "block_table", "page numbers from 0 to {last}", strays, last=last)
    window_left, window_right = _check_window(window, causal)
    out, _ = run(
        *(query, key_cache, value_cache, None, None, cache_lengths, None, None, block_table, None),
        *(window_left, window_right, True, _check_scale(scale, query.size(-1)), _check_softcap(softcap), 0.0),
    )
    return out


# ------------------------------------------------------------------------------------------------ checks


def _check_qkv(query, key, value, layouts, key_name="key", value_name="value") -> None:
    """All but the batch. In every layout the heads come second and the head dimension last."""
    query_layout, key_layout, value_layout = layouts
    expect_tensor(query, "query", query_layout, FLOATING)
    for t, name, layout in ((key, key_name, key_layout), (value, value_name, value_layout)):
        expect_tensor(t, name, layout)
        expect_alike(t, name, query, "query")
    shape, key_shape, value_shape, limit = query.shape, key.shape, value.shape, MAX_HEAD_DIM
    H, Hk, D, Dv = shape[1], key_shape[1], shape[-1], value_shape[-1]
    expect(1 <= D <= limit, "query", "a head dimension from 1 to {limit}", query, limit=limit)
    expect(key_shape[-1] == D, key_name, "last dimension {D} to match query's", key, D=D)
    expect(Hk == H or (Hk > 0 and H % Hk == 0), key_name, "a number of heads that divides query's {H}", key, H=H)
    if value_shape[:-1] != key_shape[:-1]:
        expect_shape(value, value_name, (*key_shape[:-1], Dv), key_name)
    expect(1 <= Dv <= limit, value_name, "a head dimension from 1 to {limit}", value, limit=limit)


def _check_leading(query, key, value, enable_gqa) -> tuple[int, ...]:
    """[..., H], to which the dimensions before the last two broadcast; with enable_gqa the heads divide instead."""
    named = ((query, "query", "[..., H, N, D]"), (key, "key", "[..., Hk, M, D]"), (value, "value", "[..., Hk, M, Dv]"))
    rank = 3 if enable_gqa else 2
    for t, name, layout in named:
        _check_dense(t, name, layout)
        if t.dim() < rank:
            expect(False, name, "rank {rank} or more {layout}", t, rank=rank, layout=layout)
    expect_dtype(query, "query", FLOATING)
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    H, M, D, lead = shape[-rank], key_shape[-2], shape[-1], shape[:-rank]
    for t, name, sizes in ((key, "key", key_shape), (value, "value", value_shape)):
        expect_alike(t, name, query, "query")
        if enable_gqa:
            good = sizes[-3] > 0 and H % sizes[-3] == 0
            expect(good, name, "a number of heads that divides query's {H}", t, H=H)
        other = sizes[:-rank]
        if other != lead:
            if not all(have == want or have == 1 or want == 1 for have, want in zip(other[::-1], lead[::-1])):
                wanted = list(lead)
                expect(False, name, "leading dimensions that fit {wanted}, or enable_gqa=True", t, wanted=wanted)
            lead = torch.broadcast_shapes(lead, other)
    expect(key_shape[-1] == D, "key", "last dimension {D} to match query's", key, D=D)
    expect(value_shape[-2] == M, "value", "length {M} to match key's", value, M=M)
    return (*lead, H) if enable_gqa else tuple(lead)


def _fold(query, key, value, bias, lead) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Everything as the op takes it, [B, H, N, D]: leading dimensions broadcast where they must, batches in one."""
    if all([t.dim() == 4 and t.shape[:2] == lead for t in (query, key, value)]):
        return query, key, value, bias
    *batch, H = (1, 1, *lead)[-max(len(lead), 2) :]

    def fold(t, heads):
        return t.expand(*batch, heads, -1, -1).flatten(0, -4)

    heads, heads_v = (t.size(-3) if t.dim() > 2 else 1 for t in (key, value))
    if heads != heads_v:
        key, value = (
            t if n in (1, H) else t.repeat_interleave(H // n, -3) for t, n in ((key, heads), (value, heads_v))
        )
        heads = H
    if bias is not None and len(batch) > 1:
        wide = any(n != 1 for n in bias.shape[:-3])
        bias = (bias.expand(*batch, -1, -1, -1) if wide else bias).flatten(0, -4)
    return fold(query, H), fold(key, heads), fold(value, heads), bias


def _check_dense(t, name, layout) -> None:
    """A dense tensor of any rank."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.is_nested:
        expect_tensor(t, name, layout)


def _check_bias(bias, name, query, full) -> Tensor:
    """The bias with dimensions of its own for all of `full`, and four at least."""
    _check_dense(bias, name, "[B, H, N, M]")
    expect_device(bias, name, query, "query")
    dtypes = (torch.bool, query.dtype, _statistics_dtype(query))
    expect_dtype(bias, name, dtypes)
    fits = all(have in (1, want) for have, want in zip(reversed(bias.shape), reversed(full)))
    if not fits or bias.dim() > len(full):
        expect(False, name, "broadcastable to {full}", bias, full=list(full))
    return bias[(None,) * (max(len(full), 4) - bias.dim())]


def _check_lengths(lengths, name, query, B, M) -> Tensor:
    expect_lengths(lengths, name, "[B]", query, "query")
    expect(lengths.size(0) == B, name, "[{B}] to match query's batch", lengths, B=B)
    if can_read(lengths):
        values = lengths.tolist()
        expect(all(0 <= value <= M for value in values), name, "lengths from 0 to {M}", values, M=M)
    return lengths.long()


def _check_offsets(offsets, name, query, rows) -> Tensor:
    expect_lengths(offsets, name, "[S + 1]", query, "query")
    expect(offsets.size(0) > 0, name, "[S + 1]", offsets)
    if can_read(offsets):
        values = offsets.tolist()
        good = values[0] == 0 and values[-1] <= rows and values == sorted(values)
        expect(good, name, "ascending offsets from 0 to at most {rows}", values, rows=rows)
    return offsets.long()


def _check_window(window, causal) -> tuple[int, int]:
    left = right = UNBOUNDED
    if window is not None:
        expect_type(isinstance(window, tuple | list), "window", "a tuple (left, right)", window)
        expect(len(window) == 2, "window", "two sides (left, right)", window)
        left, right = (UNBOUNDED if side is None else expect_integer(side, "window") for side in window)
        expect(left >= UNBOUNDED and right >= UNBOUNDED, "window", "sides ≥ 0, or None or -1 for unbounded", window)
    return left, 0 if causal else right


def _check_scale(scale, D) -> float:
    if scale is None:
        return D**-0.5 if D else 1.0
    return float(expect_number(scale, "scale"))


def _check_softcap(softcap) -> float:
    return 0.0 if softcap is None else float(expect_number(softcap, "softcap", 0))


def _draw_seed(dropout_p, query) -> Tensor | None:
    """Drawn as a tensor: tracing and graph capture stay whole."""
    return torch.randint(2**63 - 1, (), device=query.device) if dropout_p > 0 else None


# ------------------------------------------------------------------------------------------------ declarations


def _dense(
    B, H, N, M, D, *, Hk=None, Dv=None, bias=None, slopes=None, lengths=None, layout="bhnd", size=1.0, shift=None,
    coarse=False, **options,
):  # fmt: skip
    """make(dtype, device) for `attention`. bias: (kind, shape); slopes: shape; size: multiplies the query.

    shift: (by row, by key): what their product adds to the scores, up to the dtype's largest number. coarse: numbers
    of few bits, so that products are the same in any order of summation: a row that sees one key has dP = Δ, and in
    the gradients a huge score is what it was in the output.
    """

    def make(dtype, device):
        def draw(heads, length, width):
            if layout == "bnhd":  # as a projection leaves it: heads inside
                return torch.randn(B, length, heads, width, dtype=dtype, device=device).transpose(1, 2)
            if layout == "expanded":  # one sequence for the whole batch
                return torch.randn(1, heads, length, width, dtype=dtype, device=device).expand(B, -1, -1, -1)
            if layout == "dmajor":  # the last dimension is the strided one
                return torch.randn(B, heads, width, length, dtype=dtype, device=device).mT
            return torch.randn(B, heads, length, width, dtype=dtype, device=device)

        inputs = dict(query=size * draw(H, N, D), key=draw(Hk or H, M, D), value=draw(Hk or H, M, Dv or D), **options)
        if coarse:
            inputs |= {name: _round_coarsely(inputs[name]) for name in ("query", "key", "value")}
        if shift is not None:
            most = 0.9 * torch.finfo(dtype).max ** 0.5
            inputs["query"][..., 0], inputs["key"][..., 0] = (f.double().clamp(-most, most).to(device) for f in shift)
        statistics = _statistics_dtype(inputs["query"])
        if bias is not None:
            kind, shape = bias
            if kind == "bool":
                inputs["bias"] = torch.rand(shape, device=device) < 0.7
            elif isinstance(kind, float):  # a mask that is not -inf: all but the last third of the keys
                masked = torch.arange(shape[-1], device=device) < shape[-1] * 2 // 3
                inputs["bias"] = masked.expand(shape).to(dtype) * max(kind, torch.finfo(dtype).min)
            elif kind == "lowest":  # some keys of all rows, and all keys of some rows
                inputs["bias"] = torch.zeros(shape, dtype=dtype, device=device)
                inputs["bias"][..., shape[-1] // 2 :] = inputs["bias"][..., ::3, :] = torch.finfo(dtype).min
            else:
                inputs["bias"] = torch.randn(shape, dtype=statistics if kind == "fp32" else dtype, device=device)
            if kind == "inf":
                inputs["bias"].masked_fill_(torch.rand(shape, device=device) < 0.3, -math.inf)
        if slopes is not None:
            inputs["alibi_slopes"] = torch.rand(slopes, dtype=statistics, device=device)
        if lengths is not None:
            inputs["key_lengths"] = torch.tensor(lengths, device=device)
            _spoil_beyond(inputs["key"], inputs["value"], lengths)
        return inputs

    return make


def _spoil_beyond(key: Tensor, value: Tensor, lengths) -> None:
    """Unused memory may hold anything, NaN and infinities too."""
    for b, length in enumerate(lengths):
        key[b, :, length:], value[b, :, length:] = math.nan, math.inf


def _round_coarsely(t: Tensor) -> Tensor:
    return (4 * t).round() / 4


def _packed(lengths_q, lengths_k, H, D, *, Hk=None, Dv=None, spare=0, coarse=False, **options):
    """make(dtype, device) for `varlen_attention`; `spare` rows at the end belong to no sequence, and hold NaN."""

    def make(dtype, device):
        def offsets(lengths):
            return torch.tensor([0, *lengths]).cumsum(0).int().to(device)

        def draw(lengths, heads, width):
            rows = torch.randn(sum(lengths) + spare, heads, width, dtype=dtype, device=device)
            rows[sum(lengths) :] = math.nan
            return rows

        inputs = dict(query=draw(lengths_q, H, D))
        other = lengths_q if lengths_k is None else lengths_k
        inputs |= dict(key=draw(other, Hk or H, D), value=draw(other, Hk or H, Dv or D))
        if coarse:
            inputs = {name: _round_coarsely(value) for name, value in inputs.items()}
        inputs |= dict(cu_seqlens_q=offsets(lengths_q), cu_seqlens_k=lengths_k and offsets(lengths_k))
        return inputs | options

    return make


def _cached(B, H, n, S, D, lengths, *, Hk=None, Dv=None, page=None, **options):
    """make(dtype, device) for `decode_attention`; with `page` the cache is cut into shuffled pages of that size."""

    def make(dtype, device):
        block_table = None
        caches = [torch.randn(B, Hk or H, S, width, dtype=dtype, device=device) for width in (D, Dv or D)]
        _spoil_beyond(*caches, lengths if len(lengths) == B else lengths * B)
        if page is not None:
            pages = B * S // page
            order = torch.randperm(pages, device=device)
            block_table = order.view(B, S // page).int()
            for which, cache in enumerate(caches):
                cut = cache.unflatten(2, (S // page, page)).transpose(1, 2).flatten(0, 1)  # [B · pages, Hk, page, D]
                caches[which] = torch.empty_like(cut)
                caches[which][order] = cut
        query = torch.randn(B, H, n, D, dtype=dtype, device=device)
        cache_lengths = torch.tensor(lengths, device=device) if len(lengths) == B else torch.full((B,), *lengths)
        inputs = dict(query=query, key_cache=caches[0], value_cache=caches[1], cache_lengths=cache_lengths.to(device))
        return inputs | dict(block_table=block_table) | options

    return make


# The gradient of a bias that shifts whole rows is the row sum of dS: 0, but for lse. Eager sums its own dS to 0;
# ours, like every FlashAttention, takes Δ from the output as it was stored, and the sum over rows keeps that rounding.
_ROW_SUMS = 16.0
# The slopes' gradients are a handful of numbers, each a sum of thousands: eager's error there is a matter of luck.
_FEW_SUMS = 4.0
# Where a row sees one key, dP − Δ is 0: ours leaves the rounding of both, eager's softmax exactly nothing.
_ONE_KEY = 4.0
# Triton's interpreter has no fused multiply-add: it rounds a large exponent twice where a GPU and the CPU do once.
_NO_FMA = 4.0 if INTERPRET else 1.0

_LARGE = (1e4 * (-1.0) ** torch.arange(40), torch.ones(70))
_HUGE = (1e19 * (-1.0) ** torch.arange(40), 1e19 * torch.linspace(-1, 1, 150))
_HUGE_EQUAL = (1e19 * (-1.0) ** torch.arange(40), torch.full((150,), 1e19))
_GROWING = (torch.full((20,), 35.0), torch.linspace(0, 1, 300))  # the running maximum rises with every tile

# Where softmax cannot move (one key, a bias that shifts whole rows) the exact gradient is 0 and any rounding error is
# infinitely large beside it: those samples take lse along, whose gradient is not.
_attention_samples = [
    Sample("plain", _dense(2, 2, 64, 64, 32)),
    Sample("causal", _dense(1, 2, 128, 128, 64, causal=True)),
    Sample("several tiles", _dense(1, 2, 193, 321, 64)),
    Sample("several tiles, causal", _dense(1, 1, 321, 257, 48, causal=True)),
    Sample("many queries", _dense(1, 1, 385, 70, 16)),
    Sample("many heads", _dense(*((2, 2, 40, 70) if INTERPRET else (4, 4, 70, 130)), 8, causal=True)),
    Sample("odd sizes", _dense(2, 3, 37, 53, 17)),
    Sample("one", _dense(1, 1, 1, 1, 1, return_lse=True), _ONE_KEY),
    Sample("one query", _dense(2, 4, 1, 77, 40, Hk=2)),
    Sample("few queries, long keys", _dense(1, 2, 3, 1031, 24, causal=True)),
    Sample("one key", _dense(2, 2, 19, 1, 8, return_lse=True), _ONE_KEY),
    Sample("more queries than keys, causal", _dense(1, 2, 41, 23, 16, causal=True)),
    Sample("grouped heads, causal", _dense(2, 6, 45, 61, 33, Hk=2, causal=True)),
    Sample("one key head", _dense(1, 5, 20, 34, 20, Hk=1)),
    Sample("narrow value", _dense(1, 2, 33, 47, 64, Dv=5)),
    Sample("wide value", _dense(1, 2, 33, 47, 12, Dv=130)),
    Sample("widest head", _dense(1, 1, 35, 70, 256)),
    Sample("widest odd head", _dense(1, 1, 18, 40, 255, causal=True)),
    Sample("bool mask", _dense(2, 2, 33, 47, 16, bias=("bool", (2, 1, 33, 47)))),
    Sample("bool mask over keys", _dense(2, 2, 33, 47, 16, bias=("bool", (2, 1, 1, 47)))),
    Sample("rows that see nothing", _dense(2, 2, 9, 3, 16, bias=("bool", (9, 3)), causal=True)),
    Sample("bias", _dense(2, 2, 34, 50, 16, bias=("float", (2, 2, 34, 50)))),
    Sample("bias of a head", _dense(2, 2, 34, 50, 16, bias=("float", (2, 34, 50)))),
    Sample("bias over keys, fp32", _dense(2, 2, 34, 50, 16, bias=("fp32", (2, 1, 1, 50)))),
    Sample("bias over queries", _dense(2, 2, 34, 50, 16, bias=("float", (2, 34, 1)), return_lse=True), _ROW_SUMS),
    Sample("bias of one number", _dense(2, 2, 34, 50, 16, bias=("fp32", ()), return_lse=True), _ROW_SUMS),
    Sample("bias of all heads, many queries", _dense(1, 3, 150, 70, 16, Hk=1, bias=("float", (150, 70)))),
    Sample("bias with -inf", _dense(1, 2, 34, 5, 16, bias=("inf", (2, 34, 5)))),
    Sample("window", _dense(1, 2, 97, 97, 16, window=(20, 5))),
    Sample("causal window", _dense(1, 2, 150, 190, 16, window=(40, None), causal=True)),
    Sample("window of one", _dense(1, 2, 45, 60, 16, window=(0, 0), return_lse=True, size=0.3), _ONE_KEY),
    Sample("softcap", _dense(1, 2, 40, 70, 16, softcap=3.0, size=4.0)),
    Sample("softcap and bias, causal", _dense(1, 2, 40, 70, 16, softcap=3.0, causal=True, bias=("inf", (40, 70)))),
    Sample("alibi", _dense(2, 4, 40, 60, 16, slopes=(4,), causal=True), _FEW_SUMS),
    Sample("alibi of a batch", _dense(2, 4, 40, 30, 16, slopes=(2, 4)), _FEW_SUMS),
    Sample("alibi, more queries than keys, lse", _dense(2, 4, 40, 30, 16, slopes=(4,), return_lse=True), _FEW_SUMS),
    Sample("key lengths", _dense(3, 2, 40, 60, 16, lengths=(60, 0, 31))),
    Sample("key lengths, causal window", _dense(3, 2, 40, 60, 16, lengths=(1, 17, 59), causal=True, window=(9, None))),
    Sample("scale", _dense(1, 2, 33, 40, 16, scale=-0.3)),
    Sample("lse", _dense(2, 2, 40, 60, 24, return_lse=True, causal=True)),
    Sample("lse of masked rows", _dense(2, 2, 40, 30, 24, return_lse=True, causal=True, lengths=(0, 12))),
    Sample("dropout", _dense(2, 2, 45, 70, 16, dropout_p=0.3)),
    Sample("dropout, grouped, causal", _dense(1, 4, 45, 70, 16, Hk=2, dropout_p=0.1, causal=True, return_lse=True)),
    Sample("scores of ±1e4", _dense(1, 2, 40, 70, 16, shift=_LARGE, scale=1.0), _NO_FMA),
    Sample("scores that grow along the keys", _dense(1, 2, 20, 300, 16, shift=_GROWING, scale=1.0), _NO_FMA),
    Sample("scores of ±1e38, one key a row", _dense(1, 2, 40, 150, 16, shift=_HUGE, scale=1.0, coarse=True)),
    Sample("scores of ±1e38 and a mask", _dense(1, 1, 40, 150, 8, shift=_HUGE, bias=("bool", (40, 150)), coarse=True)),
    Sample("scale of 1e-30", _dense(1, 2, 20, 50, 16, scale=1e-30, return_lse=True)),
    Sample("mask of -1e10", _dense(1, 2, 40, 200, 16, bias=(-1e10, (40, 200)), return_lse=True)),
    Sample("mask of -1e38, one query", _dense(2, 2, 1, 300, 16, bias=(-1e38, (1, 300)), return_lse=True)),
    Sample("mask of -1e38 over keys, causal", _dense(1, 2, 70, 150, 16, bias=(-1e38, (1, 150)), causal=True)),
    Sample("mask of the lowest number", _dense(2, 2, 34, 150, 16, bias=("lowest", (2, 1, 34, 150)))),
    # Of more numbers than finite differences are asked for, which vanish beside a huge one.
    Sample("mask of the lowest number, lse", _dense(1, 2, 34, 90, 16, bias=("lowest", (34, 90)), return_lse=True)),
    Sample("softcap of 1e30", _dense(1, 2, 20, 50, 16, softcap=1e30)),
    Sample("softcap of 1e-30", _dense(1, 2, 20, 50, 16, softcap=1e-30, return_lse=True)),
    Sample("heads inside", _dense(2, 3, 40, 70, 16, layout="bnhd", causal=True)),
    Sample("expanded", _dense(3, 2, 40, 70, 16, layout="expanded")),
    Sample("strided head dim", _dense(2, 2, 40, 70, 16, layout="dmajor", causal=True)),
    Sample("scores of ±1e38, equal", _dense(1, 2, 40, 150, 16, shift=_HUGE_EQUAL, scale=1.0)),
    Sample("scale of 2^30", _dense(1, 2, 40, 150, 16, scale=2.0**30, coarse=True)),
    Sample("scale of -2^30", _dense(1, 2, 40, 150, 16, scale=-(2.0**30), coarse=True)),
    Sample("no queries", _dense(2, 2, 0, 5, 8, return_lse=True)),
    Sample("no keys", _dense(2, 2, 5, 0, 8, return_lse=True)),
    Sample("no batch", _dense(0, 2, 5, 6, 8, causal=True)),
]


def _pairs(N: int, M: int, causal: bool) -> float:
    """Query-key pairs that a head must score."""
    return sum(max(0, min(M, i + 1 + M - N)) for i in range(N)) if causal else float(N * M)


def _dense_flops(inputs) -> float:
    (B, H, N, D), (_, _, M, Dv) = inputs["query"].shape, inputs["value"].shape
    return 2 * B * H * _pairs(N, M, inputs.get("causal") or inputs.get("is_causal")) * (D + Dv)


def _traffic(inputs) -> float:
    """Every tensor read once and an output like the query written."""
    tensors = [t for t in inputs.values() if isinstance(t, Tensor)]
    return float(sum(t.numel() * t.element_size() for t in [*tensors, inputs["query"]]))


def _job(label, make, flops=_dense_flops, **more) -> Workload:
    return Workload(label, make, flops=flops, bytes=_traffic, **more)


_attention_workloads = [
    _job("B1 H8 N16 D64", _dense(1, 8, 16, 16, 64), quick=True),
    _job("B1 H8 N512 D64 causal", _dense(1, 8, 512, 512, 64, causal=True), quick=True),
    _job("B1 H8 N2048 D64 causal", _dense(1, 8, 2048, 2048, 64, causal=True), quick=True),
    _job("B1 H8 N1024 D64 causal", _dense(1, 8, 1024, 1024, 64, causal=True), quick=True),
    _job("B1 H8 N4096 D64 causal", _dense(1, 8, 4096, 4096, 64, causal=True)),
    _job("B1 H8 N2048 D64", _dense(1, 8, 2048, 2048, 64), quick=True),
    _job("B8 H8 N256 D64", _dense(8, 8, 256, 256, 64), quick=True),
    _job("B1 H8 N1024 D128 causal", _dense(1, 8, 1024, 1024, 128, causal=True), quick=True),
    _job("B1 H4 N1024 D256", _dense(1, 4, 1024, 1024, 256)),
    _job("B2 H16 Hk4 N512 D64 causal", _dense(2, 16, 512, 512, 64, Hk=4, causal=True)),
    _job("B4 H12 N197 D80 heads inside", _dense(4, 12, 197, 197, 80, layout="bnhd"), quick=True),
    _job("B2 H8 N1024 D64 bias", _dense(2, 8, 1024, 1024, 64, bias=("float", (8, 1024, 1024)))),
    _job("B1 H8 N1024 D64 causal", _dense(1, 8, 1024, 1024, 64, causal=True), train=True, quick=True),
    _job("B4 H8 N256 D64", _dense(4, 8, 256, 256, 64), train=True),
    _job("B1 H8 N1024 D128 causal", _dense(1, 8, 1024, 1024, 128, causal=True), train=True),
]


def _sdpa(*sizes, is_causal=False, enable_gqa=False, unbatched=False, **options):
    """make(dtype, device) for `scaled_dot_product_attention`, from `attention`'s."""
    dense = _dense(*sizes, **options)

    def make(dtype, device):
        inputs = dense(dtype, device)
        if "bias" in inputs:
            inputs["attn_mask"] = inputs.pop("bias")
        if unbatched:
            inputs |= {name: inputs[name][0] for name in ("query", "key", "value")}
        return inputs | dict(is_causal=is_causal, enable_gqa=enable_gqa)

    return make


_sdpa_samples = [
    Sample("plain", _sdpa(2, 2, 33, 47, 16)),
    Sample("causal", _sdpa(2, 2, 40, 40, 16, is_causal=True)),
    Sample("causal, fewer queries", _sdpa(2, 2, 21, 40, 16, is_causal=True)),
    Sample("causal, more queries", _sdpa(2, 2, 40, 21, 16, is_causal=True)),
    Sample("bool mask", _sdpa(2, 2, 33, 47, 16, bias=("bool", (33, 47)))),
    Sample("float mask", _sdpa(2, 2, 33, 47, 16, bias=("float", (2, 1, 33, 47)))),
    Sample("grouped heads", _sdpa(2, 4, 33, 47, 16, Hk=2, enable_gqa=True, scale=0.2)),
    Sample("unbatched", _sdpa(1, 3, 20, 30, 16, unbatched=True, is_causal=True)),
]
_sdpa_workloads = [
    _job("B2 H8 N512 D64 causal", _sdpa(2, 8, 512, 512, 64, is_causal=True), quick=True),
    _job("B2 H8 N384 D64 bool mask", _sdpa(2, 8, 384, 384, 64, bias=("bool", (2, 1, 384, 384)))),
]


def _ragged_flops(inputs) -> float:
    H, D, Dv = inputs["query"].size(1), inputs["query"].size(2), inputs["value"].size(2)
    cu_k = inputs["cu_seqlens_k"] if inputs["cu_seqlens_k"] is not None else inputs["cu_seqlens_q"]
    lengths = zip(inputs["cu_seqlens_q"].diff().tolist(), cu_k.diff().tolist())
    return 2 * H * (D + Dv) * sum(_pairs(n, m, inputs.get("causal")) for n, m in lengths)


_varlen_samples = [
    Sample("plain", _packed((33, 1, 70), None, 2, 16)),
    Sample("causal", _packed((33, 1, 70), (40, 12, 70), 4, 24, Hk=2, causal=True, return_lse=True)),
    Sample("empty sequences", _packed((0, 20, 0, 17, 0), (3, 30, 0, 0, 0), 2, 16, return_lse=True)),
    Sample("rows of no sequence", _packed((12, 20), (30, 21), 2, 16, spare=7, return_lse=True)),
    Sample("window and softcap", _packed((50, 64), (70, 40), 2, 16, Dv=10, window=(9, 4), softcap=2.0)),
    Sample("scale of 2^30", _packed((50, 64), (70, 40), 2, 16, scale=2.0**30, coarse=True)),
    Sample("no sequences", _packed((), None, 2, 16)),
]
_ragged = (31, 500, 77, 210, 4, 333, 128, 65, 17, 402, 96, 250)
_varlen_workloads = [
    _job("12 sequences of 4–500, H8 D64", _packed(_ragged, None, 8, 64), _ragged_flops, quick=True),
    _job("12 sequences of 4–500, H8 D64 causal", _packed(_ragged, None, 8, 64, causal=True), _ragged_flops),
    _job("12 sequences of 4–500, H8 D64 causal", _packed(_ragged, None, 8, 64, causal=True), _ragged_flops, train=True),
]


def _decode_flops(inputs) -> float:
    (_, H, n, D), Dv = inputs["query"].shape, inputs["value_cache"].size(3)
    return 2.0 * H * n * (D + Dv) * int(inputs["cache_lengths"].sum())


_decode_samples = [
    Sample("one token", _cached(3, 4, 1, 90, 24, (90, 1, 40), Hk=2)),
    Sample("three tokens", _cached(2, 2, 3, 64, 16, (64, 20))),
    Sample("more tokens than entries", _cached(2, 2, 5, 64, 16, (3, 0))),
    Sample("not causal", _cached(2, 2, 3, 64, 16, (50, 20), causal=False)),
    Sample("window, softcap", _cached(2, 4, 2, 200, 16, (150, 20), Hk=1, window=(30, None), softcap=2.0)),
    Sample("pages", _cached(2, 4, 2, 96, 16, (96, 37), Hk=2, page=16)),
    Sample("odd pages", _cached(2, 2, 1, 91, 20, (80, 0), page=7, Dv=9)),
    Sample("long cache", _cached(1, 4, 1, 1500, 64, (1499,), Hk=2)),
    Sample("long cache, scale of 1e9", _cached(1, 4, 1, 1500, 64, (1499,), Hk=2, scale=1e9)),
    Sample("pages, scale of 1e9", _cached(2, 4, 2, 160, 16, (160, 37), Hk=2, page=16, scale=1e9)),
]
_decode_workloads = [
    _job("B1 H32 Hk8 S4096 D128", _cached(1, 32, 1, 4096, 128, (4096,), Hk=8), _decode_flops, quick=True),
    _job("B8 H32 Hk8 S2048 D128", _cached(8, 32, 1, 2048, 128, (2048,), Hk=8), _decode_flops, quick=True),
    _job("B4 H16 S1024 D64", _cached(4, 16, 1, 1024, 64, (1024,)), _decode_flops),
    _job("B8 H32 Hk8 S2048 D128 pages of 16", _cached(8, 32, 1, 2048, 128, (2048,), Hk=8, page=16), _decode_flops),
]

_common = dict(kernel=_attention_op, reference=reference, supports=_SUPPORTS)
_inputs = ("query", "key", "value")

attention = register(
    _attention,
    **_common,
    samples=_attention_samples,
    workloads=_attention_workloads,
    differentiable=(*_inputs, "bias", "alibi_slopes"),
    random=True,
)
scaled_dot_product_attention = register(
    _scaled_dot_product_attention,
    **_common,
    samples=_sdpa_samples,
    workloads=_sdpa_workloads,
    differentiable=(*_inputs, "attn_mask"),
    random=True,
)
varlen_attention = register(
    _varlen_attention, **_common, samples=_varlen_samples, workloads=_varlen_workloads, differentiable=_inputs
)
decode_attention = register(_decode_attention, **_common, samples=_decode_samples, workloads=_decode_workloads)
