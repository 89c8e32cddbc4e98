"""The gradients of exact attention in Triton: equations, kernels and their limits are in attention.py's header."""
import triton
import triton.language as tl

from .attention import COUNTS, broadcast, config, in_bulk, masks, multiplier_of, packed_axis, softcap_kind
from .attention_tiles import (
    LARGE,
    LOWEST,
    LOWEST_64,
    base_of,
    dot,
    dropped,
    grad_scores,
    high_of,
    keep_mask,
    length_of,
    load,
    load_bias,
    load_slope,
    load_statistics,
    locate,
    low_of,
    probabilities,
    products,
    rows_at,
    score,
    store,
    stream_tile,
    tile_range,
    unit_of,
)
from .target import padded
from .tiles import LOG2E

# ---- kernels ---------------------------------------------------------------------------------------------------------
# Arguments are those of _forward, see attention.py.

@triton.jit(do_not_specialize=COUNTS)
def _grad_q(
        q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, seed_ptr, do_ptr, out_ptr, lse_ptr,
        dlse_ptr, dq_ptr, top_ptr, low_ptr, delta_ptr, dslope_ptr, q_strides, k_strides, v_strides, bias_strides,
        slopes_strides, do_strides, out_strides, dlse_strides, dq_strides,
        H, GROUP, N, M, S, steps, blocks, left, right, scale, multiplier, softcap, threshold, inv_keep,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LEFT: tl.constexpr,
        RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FLIP: tl.constexpr, BULK: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    EXACT: tl.constexpr = (q_ptr.dtype.element_ty == tl.float32) or SOFTCAP == 2
    FOREIGN: tl.constexpr = (lengths_ptr is not None) or (cu_k_ptr is not None)
    factor = unit_of(bias_ptr, slopes_ptr, multiplier, softcap, SOFTCAP, ACC) * LOG2E
    pid = tl.program_id(0)
    slot = pid % blocks
    if RIGHT:
        slot = blocks - 1 - slot
    b = pid // blocks // H
    h = pid // blocks % H
    hk = h // GROUP
    block, q_first, n, k_first, m = locate(slot, cu_q_ptr, cu_k_ptr, S, steps, N, M, BLOCK_M)
    if block * BLOCK_M >= n:
        return
    length, offset = length_of(lengths_ptr, b, n, m, False)

    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    p = i + offset
    valid = i < n
    wide = i.to(tl.int64)
    row = (b.to(tl.int64) * H + h) * N + q_first
    do = load(base_of(do_ptr, b, h, q_first, do_strides), wide * do_strides[2], valid, do_strides[3], DV, BLOCK_DV)
    out = load(base_of(out_ptr, b, h, q_first, out_strides), wide * out_strides[2], valid, out_strides[3], DV, BLOCK_DV)
    lse = tl.load(lse_ptr + row + i, mask=valid, other=float("-inf"))
    dead = lse == float("-inf")  # fully masked and absent rows: P = 0
    delta = tl.sum(do.to(ACC) * out.to(ACC), 1)  # [BLOCK_M]
    if dlse_ptr is not None:
        delta -= tl.load(base_of(dlse_ptr, b, h, q_first, dlse_strides) + wide * dlse_strides[2], mask=valid, other=0)
    delta = tl.where(dead, 0.0, delta)
    tl.store(delta_ptr + row + i, delta, mask=valid)
    q = load(base_of(q_ptr, b, h, q_first, q_strides), wide * q_strides[2], valid, q_strides[3], D, BLOCK_D)
    if FLIP:  # as in the forward
        q = -q
    if bias_ptr is not None:
        bias_ptr = base_of(bias_ptr, b, h, 0, bias_strides)
    slope = load_slope(slopes_ptr, b, h, slopes_strides)

    first = block * BLOCK_M + offset
    last = tl.minimum(block * BLOCK_M + BLOCK_M, n) - 1 + offset
    edges = tile_range(first, last, length, left, right, LEFT, RIGHT, BLOCK_N)
    first_seen = low_of(p, left, LEFT)
    last_seen = high_of(p, length, right, RIGHT)

    top = tl.zeros((BLOCK_M,), ACC)
    low = tl.where(dead, float("inf"), lse * LOG2E)
    is_large = (tl.abs(lse) > LARGE) & (dead == 0)
    if tl.max(is_large.to(tl.int32)) > 0:
        best = tl.full((BLOCK_M,), LOWEST_64 if ACC == tl.float64 else LOWEST, ACC)
        total = tl.zeros((BLOCK_M,), ACC)
        for phase in tl.static_range(0 if LEFT else 1, 3):
            for start in tl.range(edges[phase], edges[phase + 1], BLOCK_N):
                j = start + tl.arange(0, BLOCK_N)
                limit = length if phase != 1 else None
                k = stream_tile(k_ptr, b, hk, k_first, start, j, limit, k_strides, D, BLOCK_D, BULK, FOREIGN)
                s = products(q, k, ACC)  # [BLOCK_M, BLOCK_N]
                bias = None
                if bias_ptr is not None:
                    bias = load_bias(bias_ptr, i[:, None], j[None, :], n, length, bias_strides, phase != 1)
                s, _ = score(s, p[:, None], j[None, :], bias, slope, j[None, :], rows_at(first_seen),
                             rows_at(last_seen), multiplier, softcap, SOFTCAP, EXACT, phase != 1)
                new = tl.maximum(best, tl.max(s, 1))
                prob = tl.exp2((s - new[:, None]) * factor)
                total = total * tl.exp2((best - new) * factor) + tl.sum(prob, 1)
                best = new
        top = tl.where(is_large, best, top)
        low = tl.where(is_large, tl.log2(tl.where(total == 0, 1.0, total)), low)
    tl.store(top_ptr + row + i, top, mask=valid)
    tl.store(low_ptr + row + i, low, mask=valid)

    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    dslope = tl.zeros((BLOCK_M,), ACC)
    for phase in tl.static_range(0 if LEFT else 1, 3):
        for start in tl.range(edges[phase], edges[phase + 1], BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            limit = length if phase != 1 else None
            k = stream_tile(k_ptr, b, hk, k_first, start, j, limit, k_strides, D, BLOCK_D, BULK, FOREIGN)
            v = stream_tile(v_ptr, b, hk, k_first, start, j, limit, v_strides, DV, BLOCK_DV, BULK, FOREIGN)
            s = products(q, k, ACC)  # [BLOCK_M, BLOCK_N]
            bias = None
            if bias_ptr is not None:
                bias = load_bias(bias_ptr, i[:, None], j[None, :], n, length, bias_strides, phase != 1)
            s, slack = score(s, p[:, None], j[None, :], bias, slope, j[None, :], rows_at(first_seen),
                             rows_at(last_seen), multiplier, softcap, SOFTCAP, EXACT, phase != 1)
            keep = None
            if seed_ptr is not None:
                keep = keep_mask(seed_ptr, i, start, b * H + h, threshold, BLOCK_N)
            prob = probabilities(s, top[:, None], low[:, None], factor)
            dp = dropped(products(do, v, ACC), keep, inv_keep)  # [BLOCK_M, BLOCK_N]
            ds = grad_scores(prob, dp, delta[:, None], bias, phase != 1)
            if dslope_ptr is not None:
                dslope -= tl.sum(ds * tl.abs(p[:, None] - j[None, :]).to(ACC), 1)
            if SOFTCAP:
                ds = ds * slack
            dq = dot(ds.to(k.dtype), k, dq)  # [BLOCK_M, D]

    dq_base = base_of(dq_ptr, b, h, q_first, dq_strides)
    store(dq_base, wide * dq_strides[2], valid, dq_strides[3], dq * scale, D, BLOCK_D)
    if dslope_ptr is not None:
        tl.store(dslope_ptr + row + i, dslope, mask=valid)


@triton.jit(do_not_specialize=COUNTS)
def _grad_kv(
        q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, seed_ptr, do_ptr, top_ptr,
        low_ptr, delta_ptr, dk_ptr, dv_ptr, q_strides, k_strides, v_strides, bias_strides, slopes_strides, do_strides,
        dk_strides, dv_strides, H, GROUP, N, M, S, steps, blocks, left, right, scale, multiplier, softcap, threshold,
        inv_keep,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LEFT: tl.constexpr,
        RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FLIP: tl.constexpr, BULK: tl.constexpr, GQA: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    ACC: tl.constexpr = top_ptr.dtype.element_ty
    EXACT: tl.constexpr = (k_ptr.dtype.element_ty == tl.float32) or SOFTCAP == 2
    FOREIGN: tl.constexpr = cu_q_ptr is not None
    factor = unit_of(bias_ptr, slopes_ptr, multiplier, softcap, SOFTCAP, ACC) * LOG2E
    pid = tl.program_id(0)
    heads = H // GROUP
    b = pid // blocks // heads
    hk = pid // blocks % heads
    block, k_first, m, q_first, n = locate(pid % blocks, cu_k_ptr, cu_q_ptr, S, steps, M, N, BLOCK_N)
    if block * BLOCK_N >= m:
        return
    length, offset = length_of(lengths_ptr, b, n, m, False)

    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = j.to(tl.int64)
    k = load(base_of(k_ptr, b, hk, k_first, k_strides), wide * k_strides[2], j < length, k_strides[3], D, BLOCK_D)
    if FLIP:
        k = -k
    v = load(base_of(v_ptr, b, hk, k_first, v_strides), wide * v_strides[2], j < length, v_strides[3], DV, BLOCK_DV)

    # The queries that see these keys: the windows change places. Keys beyond the length are seen by none,
    # so a block that holds some masks all of its tiles.
    first = block * BLOCK_N - offset
    last = tl.minimum(block * BLOCK_N + BLOCK_N, length) - 1 - offset
    count = tl.where(block * BLOCK_N < length, n, 0)
    edges = tile_range(first, last, count, right, left, RIGHT, LEFT, BLOCK_M)
    edges = (edges[0], edges[1], tl.where(block * BLOCK_N + BLOCK_N <= length, edges[2], edges[1]), edges[3])
    first_seeing = tl.where(j < length, (j - (offset + right)) if RIGHT else 0, 2**31 - 1)  # [BLOCK_N]
    last_seeing = j + (left + 1 - offset) if LEFT else None

    dk = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), ACC)
    for phase in tl.static_range(0 if RIGHT else 1, 3):
        tiles = (edges[phase + 1] - edges[phase]) // BLOCK_M
        for turn in tl.range(tiles * GROUP):  # heads and blocks in one loop, which pipelines across heads
            h = hk * GROUP + (turn // tiles if GQA else 0)
            start = edges[phase] + (turn % tiles if GQA else turn) * BLOCK_M
            row = (b.to(tl.int64) * H + h) * N + q_first
            slope = load_slope(slopes_ptr, b, h, slopes_strides)
            i = start + tl.arange(0, BLOCK_M)
            p = i + offset
            limit = n if phase != 1 else None
            q = stream_tile(q_ptr, b, h, q_first, start, i, limit, q_strides, D, BLOCK_D, BULK, FOREIGN)
            do = stream_tile(do_ptr, b, h, q_first, start, i, limit, do_strides, DV, BLOCK_DV, BULK, FOREIGN)
            s = products(k, q, ACC)  # [BLOCK_N, BLOCK_M]
            bias = None
            if bias_ptr is not None:
                bias_base = base_of(bias_ptr, b, h, 0, bias_strides)
                bias = load_bias(bias_base, i[None, :], j[:, None], n, length, bias_strides, phase != 1)
            s, slack = score(s, p[None, :], j[:, None], bias, slope, i[None, :], first_seeing[:, None],
                               rows_at(last_seeing), multiplier, softcap, SOFTCAP, EXACT, phase != 1)
            keep = None
            if seed_ptr is not None:
                keep = tl.trans(keep_mask(seed_ptr, i, block * BLOCK_N, b * H + h, threshold, BLOCK_N))
            top = load_statistics(top_ptr + row, i, limit, 0)  # [BLOCK_M]
            low = load_statistics(low_ptr + row, i, limit, float("inf"))
            prob = probabilities(s, top[None, :], low[None, :], factor)
            dv = dot(dropped(prob, keep, inv_keep).to(do.dtype), do, dv)  # [BLOCK_N, DV]
            dp = dropped(products(v, do, ACC), keep, inv_keep)  # [BLOCK_N, BLOCK_M]
            delta = load_statistics(delta_ptr + row, i, limit, 0)  # [BLOCK_M]
            ds = grad_scores(prob, dp, delta[None, :], bias, phase != 1)
            if SOFTCAP:
                ds = ds * slack
            dk = dot(ds.to(q.dtype), q, dk)  # [BLOCK_N, D]

    valid = j < m
    dk = dk * scale
    store(base_of(dk_ptr, b, hk, k_first, dk_strides), wide * dk_strides[2], valid, dk_strides[3], dk, D, BLOCK_D)
    store(base_of(dv_ptr, b, hk, k_first, dv_strides), wide * dv_strides[2], valid, dv_strides[3], dv, DV, BLOCK_DV)


@triton.jit(do_not_specialize=COUNTS)
def _grad_bias(
        q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, lengths_ptr, seed_ptr, do_ptr, top_ptr, low_ptr, delta_ptr,
        dbias_ptr, q_strides, k_strides, v_strides, bias_strides, slopes_strides, do_strides, dbias_strides,
        B, H, GROUP, N, M, left, right, scale, multiplier, softcap, threshold, inv_keep, bias_B, bias_H,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LEFT: tl.constexpr,
        RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FLIP: tl.constexpr, ONE_N: tl.constexpr, ONE_M: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """ONE_N, ONE_M: the bias has one row, one column."""
    ACC: tl.constexpr = top_ptr.dtype.element_ty
    EXACT: tl.constexpr = (q_ptr.dtype.element_ty == tl.float32) or SOFTCAP == 2
    row_tiles = tl.cdiv(N, BLOCK_M)
    col_tiles = tl.cdiv(M, BLOCK_N)
    rows, row_turns = (1, row_tiles) if ONE_N else (row_tiles, 1)  # tiles of the bias, and how often each repeats
    cols, col_turns = (1, col_tiles) if ONE_M else (col_tiles, 1)
    head_turns = H // bias_H
    pid = tl.program_id(0)
    own_col = pid % cols
    own_row = pid // cols % rows
    own_h = pid // cols // rows % bias_H
    own_b = pid // cols // rows // bias_H

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for turn in range((B // bias_B) * head_turns * row_turns * col_turns):
        start_j = (own_col + turn % col_turns) * BLOCK_N
        start_i = (own_row + turn // col_turns % row_turns) * BLOCK_M
        h = own_h + turn // (col_turns * row_turns) % head_turns
        b = own_b + turn // (col_turns * row_turns * head_turns)
        hk = h // GROUP
        length, offset = length_of(lengths_ptr, b, N, M, False)
        i = start_i + tl.arange(0, BLOCK_M)
        j = start_j + tl.arange(0, BLOCK_N)
        p = i + offset
        wide_i = i.to(tl.int64)
        wide_j = j.to(tl.int64)
        row = (b.to(tl.int64) * H + h) * N
        top = load_statistics(top_ptr + row, i, N, 0)
        low = load_statistics(low_ptr + row, i, N, float("inf"))
        delta = load_statistics(delta_ptr + row, i, N, 0)
        q = load(base_of(q_ptr, b, h, 0, q_strides), wide_i * q_strides[2], i < N, q_strides[3], D, BLOCK_D)
        if FLIP:
            q = -q
        do = load(base_of(do_ptr, b, h, 0, do_strides), wide_i * do_strides[2], i < N, do_strides[3], DV, BLOCK_DV)
        k = load(base_of(k_ptr, b, hk, 0, k_strides), wide_j * k_strides[2], j < length, k_strides[3], D, BLOCK_D)
        v = load(base_of(v_ptr, b, hk, 0, v_strides), wide_j * v_strides[2], j < length, v_strides[3], DV, BLOCK_DV)
        s = products(q, k, ACC)  # [BLOCK_M, BLOCK_N]
        bias_base = base_of(bias_ptr, b, h, 0, bias_strides)
        bias = load_bias(bias_base, i[:, None], j[None, :], N, length, bias_strides, True)
        first_seen = low_of(p, left, LEFT)
        last_seen = high_of(p, length, right, RIGHT)
        s, _ = score(s, p[:, None], j[None, :], bias, load_slope(slopes_ptr, b, h, slopes_strides), j[None, :],
                       rows_at(first_seen), rows_at(last_seen), multiplier, softcap, SOFTCAP, EXACT, True)
        keep = None
        if seed_ptr is not None:
            keep = keep_mask(seed_ptr, i, start_j, b * H + h, threshold, BLOCK_N)
        prob = probabilities(s, top[:, None], low[:, None], LOG2E)
        dp = dropped(products(do, v, ACC), keep, inv_keep)  # [BLOCK_M, BLOCK_N]
        acc += grad_scores(prob, dp, delta[:, None], bias, True)

    # Rows beyond N and keys beyond the length added exact zeros (lse = +inf, s = −inf), so sums need no mask.
    if ONE_N:
        acc = tl.sum(acc, 0, keep_dims=True)
    if ONE_M:
        acc = tl.sum(acc, 1, keep_dims=True)
    i = own_row * BLOCK_M + tl.arange(0, 1 if ONE_N else BLOCK_M)
    j = own_col * BLOCK_N + tl.arange(0, 1 if ONE_M else BLOCK_N)
    ptrs = (base_of(dbias_ptr, own_b, own_h, 0, dbias_strides)
            + i.to(tl.int64)[:, None] * dbias_strides[2] + j.to(tl.int64)[None, :] * dbias_strides[3])
    mask = (i < (1 if ONE_N else N))[:, None] & (j < (1 if ONE_M else M))[None, :]
    tl.store(ptrs, acc.to(dbias_ptr.dtype.element_ty), mask=mask)


# ---- launches --------------------------------------------------------------------------------------------------------

def backward(grad_out, grad_lse, query, key, value, out, lse, bias, alibi_slopes, key_lengths, cu_seqlens_q,
             cu_seqlens_k, seed, window_left, window_right, scale, softcap, dropout_p, grad_query, grad_key, grad_value,
             grad_bias, grad_slopes, scratch):
    """Writes grad_query, grad_key, grad_value (shapes of their namesakes, any strides), every element of them.

    grad_lse: [B,H,N], any strides, or None. grad_bias: the bias's own shape and dtype, or None when not wanted.
    grad_slopes: the slopes' gradient by query row, [B,H,N] contiguous of lse's dtype, to be summed over N (and over B
    for slopes [1,H]) by the caller, or None. scratch: [3,B,H,N] contiguous of lse's dtype. The rest as in `forward`.
    """
    B, H, N, D = query.shape
    Hk, M, DV = key.shape[1], key.shape[2], value.shape[3]
    group = H // Hk if Hk else 1
    top, low, delta = scratch
    scored = softcap > 0 or any(x is not None for x in (bias, alibi_slopes, seed))
    (left, right), (threshold, inv_keep), (LEFT, RIGHT) = masks(query, M, window_left, window_right, dropout_p)
    inputs = dict(
        q_ptr=query, k_ptr=key, v_ptr=value, bias_ptr=bias, slopes_ptr=alibi_slopes, lengths_ptr=key_lengths,
        seed_ptr=seed, do_ptr=grad_out, top_ptr=top, low_ptr=low, delta_ptr=delta,
        q_strides=query.stride(), k_strides=key.stride(), v_strides=value.stride(), bias_strides=broadcast(bias),
        slopes_strides=broadcast(alibi_slopes), do_strides=grad_out.stride(), H=H, GROUP=group, N=N, M=M,
        left=left, right=right, scale=scale, multiplier=multiplier_of(scale), softcap=softcap, threshold=threshold,
        inv_keep=inv_keep, D=D, DV=DV, BLOCK_D=padded(D), BLOCK_DV=padded(DV), LEFT=LEFT, RIGHT=RIGHT,
        SOFTCAP=softcap_kind(softcap), FLIP=scale < 0)
    sequences = dict(cu_q_ptr=cu_seqlens_q, cu_k_ptr=cu_seqlens_k)
    if B * H * N:
        (block_m, block_n), options = config("grad_q", query, value, scored, cu_seqlens_q is not None)
        S, steps, blocks = packed_axis(N, block_m, cu_seqlens_q)
        k, v, bulk = in_bulk(block_n, key, value)
        _grad_q[(blocks * B * H,)](
            **inputs | dict(k_ptr=k, v_ptr=v), **sequences, out_ptr=out, lse_ptr=lse, dlse_ptr=grad_lse,
            dq_ptr=grad_query, dslope_ptr=grad_slopes, out_strides=out.stride(),
            dlse_strides=() if grad_lse is None else grad_lse.stride(), dq_strides=grad_query.stride(),
            S=S, steps=steps, blocks=blocks, BULK=bulk, BLOCK_M=block_m, BLOCK_N=block_n, **options)
    if B * Hk * M:
        if window_right < 0:  # as a window that reaches everything: without its branch the compiler spills (40 bytes)
            inputs |= dict(right=N + M, RIGHT=True)
        (block_m, block_n), options = config("grad_kv", query, value, scored, cu_seqlens_q is not None)
        S, steps, blocks = packed_axis(M, block_n, cu_seqlens_k)
        q, do, bulk = in_bulk(block_m, query, grad_out)
        _grad_kv[(blocks * B * Hk,)](
            **inputs | dict(q_ptr=q, do_ptr=do), **sequences, dk_ptr=grad_key, dv_ptr=grad_value,
            dk_strides=grad_key.stride(), dv_strides=grad_value.stride(), S=S, steps=steps, blocks=blocks, BULK=bulk,
            GQA=group > 1, BLOCK_M=block_m, BLOCK_N=block_n, **options)
    if grad_bias is not None and grad_bias.numel():
        (block_m, block_n), options = config("grad_bias", query, value)
        bias_B, bias_H, bias_N, bias_M = bias.shape
        one_n, one_m = bias_N == 1, bias_M == 1
        tiles = (1 if one_n else triton.cdiv(N, block_m)) * (1 if one_m else triton.cdiv(M, block_n))
        _grad_bias[(tiles * bias_B * bias_H,)](
            **inputs, dbias_ptr=grad_bias, dbias_strides=grad_bias.stride(), B=B, bias_B=bias_B, bias_H=bias_H,
            ONE_N=one_n, ONE_M=one_m, BLOCK_M=block_m, BLOCK_N=block_n, **options)


# What `python -m pykernels audit` may find here, and why it is shipped all the same.
AUDIT_EXCEPTIONS = [
    dict(kernel="_grad_q", check="spill", where={"BLOCK_D": 256, "dtype": "float32"},
         reason="five fp32 tiles 256 wide do not fit in the registers whatever the tile; half precision does"),
    dict(kernel="_grad_q", check="spill", where={"BLOCK_D": 128, "BULK": False},
         reason="40 bytes on sm_80, in no loop: what the rarely run pass over rows of huge scores adds"),
]
