"""Exact attention in Triton: out = softmax(scale q kᵀ, capped, biased, masked) v, and its gradients.

  forward   S = scale · q kᵀ;  S ← cap · tanh(S / cap);  S ← S + bias − slope · |p − j|;  masked S = −inf
            lse = log Σ_j e^S;  out = Σ_j e^(S − lse) · keep/(1−p) · v_j
  backward  Δ = rowsum(do ∘ o) − dlse;  P = e^(S − lse);  dP = (do vᵀ) · keep/(1−p);  dS = P ∘ (dP − Δ)
            dv = (P · keep/(1−p))ᵀ do;  dbias = dS;  dslope = −Σ dS · |p − j|
            dS ← dS · (1 − tanh²);  dq = scale · dS k;  dk = scale · dSᵀ q

Query i has position p = i + offset and sees key j when p − left ≤ j ≤ p + right, j < length and the bias says so.

  kernel      a program owns                      reads                              writes
  _forward    BLOCK_M query rows of one head      q once; k, v over visible blocks   out, lse (of a split: partials)
              (or of a whole group of heads, or a share of the keys, when queries are few)
  _merge      BLOCK_M rows                        the splits' partials               out, lse
  _grad_q     BLOCK_M query rows of one head      q, do, o once; k, v                dq, Δ, lse in base 2, dslope by row
  _grad_kv    BLOCK_N key rows of one key head    k, v once; q, do of its group      dk, dv
  _grad_bias  BLOCK_M × BLOCK_N of the bias       everything the tile is             dbias
                                                  broadcast over

Nothing is shared between programs and nothing is atomic, so results are the same from run to run. Each pass over the
blocks has up to three loops: only the first and the last, where windows and ragged ends cut through tiles, pay for
masks. Exponentials are base 2. A large lse, rounded, has lost the logarithm of its sum, and from 1e9 on its rounding
exceeds the exponent's range: for a block with such a row, _grad_q finds maximum and sum again. Streamed tiles come
through tensor descriptors where the hardware has them (sm_90 on): with pointers, the addresses alone cost the backward
its registers.

Where the special-function unit would limit the forward, some columns' exponentials are a cubic on the FMA units
(_exp2, BY_FMA): of 66 operations a pass 64 are left to it at D = 64 on sm_90, 61 and 63 at D = 64 and 128 on sm_100.
By the static audit (bf16, causal; what limits a loop, and the attainable share of the tensor peak if all units overlap
/ if none do; nothing was timed):

                     sm_80                    sm_90                    sm_100
  _forward D = 64    tensor 1.00/.29          tensor 1.00/.28          MUFU 0.56/.19
           D = 128   shared memory 0.78/.34   tensor 1.00/.38          tensor 1.00/.28
  _grad_q  D = 64    tensor 1.00/.38          tensor 1.00/.34          MUFU 0.80/.26
           D = 128   shared memory 0.80/.38   tensor 1.00/.41          tensor 1.00/.34
  _grad_kv D = 64    shared memory 0.69/.33   shared memory 0.98/.34   shared memory 0.46/.20
           D = 128   shared memory 0.61/.34   tensor 1.00/.42          shared memory 0.63/.27
"""
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_tiles import (
    LARGE,
    LOG2E,
    LOWEST,
    LOWEST_64,
    _base,
    _dot,
    _dropped,
    _exp2,
    _grad_scores,
    _high,
    _keep,
    _length,
    _load,
    _load_bias,
    _load_rows,
    _load_slope,
    _locate,
    _low,
    _paged,
    _probabilities,
    _products,
    _rows,
    _scores,
    _store,
    _stream,
    _tiles,
    _unit,
)

MAX_HEAD_DIM = 256


# ---- kernels ---------------------------------------------------------------------------------------------------------
# strides: (batch, head, row, column) in elements. N, M: rows of the query and key axes (packed: of all S sequences).
# blocks: slots of the owned axis, see _locate. left, right, scale, softcap, threshold, inv_keep: as in the equations.
# One compilation serves all counts and windows, and but for these all lengths: a single query has kernels of its own,
# and where N is the distance of rows of lse and Δ (a split's: count), its being a multiple of 16 makes loads wide, as
# does M's of the loads of a bias, which it masks.

_COUNTS = ["B", "S", "steps", "blocks", "part", "pages", "left", "right", "bias_B"]

@triton.jit(do_not_specialize=[*_COUNTS, "M"], do_not_specialize_on_alignment=["N", "splits"])
def _forward(
        q_ptr, k_ptr, v_ptr, bias_ptr, slopes_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr, table_ptr, seed_ptr, out_ptr,
        lse_ptr, q_strides, k_strides, v_strides, bias_strides, slopes_strides, out_strides,
        H, GROUP, N, M, S, steps, blocks, splits, part, pages, left, right, scale, softcap, threshold, inv_keep,
        D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE: tl.constexpr,
        LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, FLIP: tl.constexpr, ALIGN: tl.constexpr,
        PACK: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr, SPLIT: tl.constexpr, BULK: tl.constexpr,
        BY_FMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    EXACT: tl.constexpr = (q_ptr.dtype.element_ty == tl.float32) or SOFTCAP == 2
    FOREIGN: tl.constexpr = (lengths_ptr is not None) or (cu_k_ptr is not None)
    SCORED: tl.constexpr = (bias_ptr is not None) or (slopes_ptr is not None) or SOFTCAP
    LOW: tl.constexpr = LOWEST_64 if ACC == tl.float64 else LOWEST
    unit = _unit(bias_ptr, slopes_ptr, scale, softcap, SOFTCAP, ACC)
    factor = unit * LOG2E
    pid = tl.program_id(0)
    if ONE:  # block, as where few queries meet a cache
        blocks = 1
    slot = pid % blocks
    if RIGHT:
        slot = blocks - 1 - slot  # the longest rows first
    pid = pid // blocks
    split = pid % splits
    pid = pid // splits
    heads = H // GROUP if PACK else H
    b = pid // heads
    h = pid % heads
    hk = h if PACK else h // GROUP
    block, q_first, n, k_first, m = _locate(slot, cu_q_ptr, cu_k_ptr, S, steps, N, M, BLOCK_M)
    count = n * GROUP if PACK else n
    if block * BLOCK_M >= count:
        return
    length, offset = _length(lengths_ptr, b, n, m, ALIGN)
    if EVEN:  # as it is: so that the compiler can tell, and a bias's masked loads are wide
        length = length // 16 * 16

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < count
    if PACK:  # tile row r is query r % n of the group's head r // n
        i = rows % n
        g = (rows // n).to(tl.int64)
        h *= GROUP
        first, last = offset, n - 1 + offset
    else:
        i = rows
        g = tl.zeros_like(rows).to(tl.int64)
        first = block * BLOCK_M + offset
        last = tl.minimum(block * BLOCK_M + BLOCK_M, n) - 1 + offset
    p = i + offset
    q_rows = g * q_strides[1] + i.to(tl.int64) * q_strides[2]
    q = _load(_base(q_ptr, b, h, q_first, q_strides), q_rows, valid, q_strides[3], D, BLOCK_D)  # [BLOCK_M, D]
    if FLIP:  # so that scale > 0 and the largest product gives the largest score
        q = -q
    if table_ptr is not None:
        table_ptr += b.to(tl.int64) * (M // PAGE)
    if bias_ptr is not None:
        bias_ptr = _base(bias_ptr, b, h, 0, bias_strides)
    slope = _load_slope(slopes_ptr, b, h, slopes_strides)

    edges = _tiles(first, last, length, left, right, LEFT, RIGHT, BLOCK_N)
    low = _low(p, left, LEFT)
    high = _high(p, length, right, RIGHT)
    if SPLIT:  # this split's share of the visible blocks
        share = tl.cdiv(tl.cdiv(edges[3] - edges[0], BLOCK_N), splits) * BLOCK_N
        begin = tl.minimum(edges[0] + split * share, edges[3])
        end = tl.minimum(begin + share, edges[3])
        whole_begin = tl.minimum(tl.maximum(edges[1], begin), end)
        edges = (begin, whole_begin, tl.minimum(tl.maximum(edges[2], begin), end), end)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    top = tl.full((BLOCK_M,), LOW, ACC)
    for phase in tl.static_range(0 if LEFT else 1, 3):
        for start in tl.range(edges[phase], edges[phase + 1], BLOCK_N):
            j = start + tl.arange(0, BLOCK_N)
            limit = length if phase != 1 else None
            if table_ptr is None:
                k = _stream(k_ptr, b, hk, k_first, start, j, limit, k_strides, D, BLOCK_D, BULK, FOREIGN)
            else:
                k = _paged(k_ptr, hk, j, limit, table_ptr, pages, k_strides, PAGE, D, BLOCK_D)
            s = _products(q, k, ACC)  # [BLOCK_M, BLOCK_N]
            if SCORED or phase != 1:
                bias = None
                if bias_ptr is not None:
                    bias = _load_bias(bias_ptr, i[:, None], j[None, :], n, length, bias_strides, phase != 1)
                s, _ = _scores(s, p[:, None], j[None, :], bias, slope, j[None, :], _rows(low), _rows(high), scale,
                               softcap, SOFTCAP, EXACT, phase != 1)
                new_top = tl.maximum(top, tl.max(s, 1))
                prob = tl.exp2((s - new_top[:, None]) * factor)
            else:
                new_top = tl.maximum(top, tl.max(s, 1))
                prob = _exp2((s - new_top[:, None]) * factor, BY_FMA)
            decay = tl.exp2((top - new_top) * factor)
            total = total * decay + tl.sum(prob, 1)
            if seed_ptr is not None:
                prob = tl.where(_keep(seed_ptr, i, start, b * H + h, threshold, BLOCK_N), prob, 0.0)
            if table_ptr is None:
                v = _stream(v_ptr, b, hk, k_first, start, j, limit, v_strides, DV, BLOCK_DV, BULK, FOREIGN)
            else:
                v = _paged(v_ptr, hk, j, limit, table_ptr, pages, v_strides, PAGE, DV, BLOCK_DV)
            acc = _dot(prob.to(v.dtype), v, acc * decay[:, None])  # [BLOCK_M, DV]
            top = new_top

    dead = total == 0  # no key seen: exactly, since the largest score adds 1
    acc = tl.where(dead[:, None], 0.0, acc * (inv_keep / tl.where(dead, 1.0, total))[:, None])
    lse = tl.where(dead, float("-inf"), top * unit + tl.log(tl.where(dead, 1.0, total)))
    lse_rows = (b.to(tl.int64) * H + h) * N + q_first + g * N + i
    if SPLIT:  # top and total apart, for their sum is rounded
        out_ptr += tl.cast(split, tl.int64) * part * DV
        lse_ptr += tl.cast(split, tl.int64) * part
        lse = top
        tl.store(lse_ptr + tl.cast(splits, tl.int64) * part + lse_rows, total, mask=valid)
    out_rows = g * out_strides[1] + i.to(tl.int64) * out_strides[2]
    _store(_base(out_ptr, b, h, q_first, out_strides), out_rows, valid, out_strides[3], acc, DV, BLOCK_DV)
    tl.store(lse_ptr + lse_rows, lse, mask=valid)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=["N", "splits"])
def _merge(part_ptr, part_top_ptr, out_ptr, lse_ptr, out_strides, H, N, count, splits, unit,
           DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr):
    """out = Σ_s w_s out_s / Σ_s w_s over partials [splits, count = B·H·N, DV], w_s = total_s e^((top_s − top)·unit);
    after the tops come the totals."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    LOW: tl.constexpr = LOWEST_64 if ACC == tl.float64 else LOWEST
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < count
    acc = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
    total = tl.zeros((BLOCK_M,), ACC)
    top = tl.full((BLOCK_M,), LOW, ACC)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * count + rows
        part_top = tl.load(part_top_ptr + at, mask=valid, other=LOW)
        part_total = tl.load(part_top_ptr + tl.cast(splits, tl.int64) * count + at, mask=valid, other=0)
        part = _load(part_ptr, at * DV, valid, 1, DV, BLOCK_DV)  # [BLOCK_M, DV]
        new_top = tl.maximum(top, part_top)
        decay = tl.exp2((top - new_top) * (unit * LOG2E))
        weight = part_total * tl.exp2((part_top - new_top) * (unit * LOG2E))
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        top = new_top
    dead = total == 0
    acc = acc / tl.where(dead, 1.0, total)[:, None]
    out_rows = rows // N // H * out_strides[0] + rows // N % H * out_strides[1] + rows % N * out_strides[2]
    _store(out_ptr, out_rows, valid, out_strides[3], acc, DV, BLOCK_DV)
    tl.store(lse_ptr + rows, tl.where(dead, float("-inf"), top * unit + tl.log(tl.where(dead, 1.0, total))), mask=valid)


@triton.jit(do_not_specialize=_COUNTS)
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
    factor = _unit(bias_ptr, slopes_ptr, multiplier, softcap, SOFTCAP, ACC) * LOG2E
    pid = tl.program_id(0)
    slot = pid % blocks
    if RIGHT:
        slot = blocks - 1 - slot
    b = pid // blocks // H
    h = pid // blocks % H
    hk = h // GROUP
    block, q_first, n, k_first, m = _locate(slot, cu_q_ptr, cu_k_ptr, S, steps, N, M, BLOCK_M)
    if block * BLOCK_M >= n:
        return
    length, offset = _length(lengths_ptr, b, n, m, False)

    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    p = i + offset
    valid = i < n
    wide = i.to(tl.int64)
    row = (b.to(tl.int64) * H + h) * N + q_first
    do = _load(_base(do_ptr, b, h, q_first, do_strides), wide * do_strides[2], valid, do_strides[3], DV, BLOCK_DV)
    out = _load(_base(out_ptr, b, h, q_first, out_strides), wide * out_strides[2], valid, out_strides[3], DV, BLOCK_DV)
    lse = tl.load(lse_ptr + row + i, mask=valid, other=float("-inf"))
    dead = lse == float("-inf")  # fully masked and absent rows: P = 0
    delta = tl.sum(do.to(ACC) * out.to(ACC), 1)  # [BLOCK_M]
    if dlse_ptr is not None:
        delta -= tl.load(_base(dlse_ptr, b, h, q_first, dlse_strides) + wide * dlse_strides[2], mask=valid, other=0)
    delta = tl.where(dead, 0.0, delta)
    tl.store(delta_ptr + row + i, delta, mask=valid)
    q = _load(_base(q_ptr, b, h, q_first, q_strides), wide * q_strides[2], valid, q_strides[3], D, BLOCK_D)
    if FLIP:  # as in the forward
        q = -q
    if bias_ptr is not None:
        bias_ptr = _base(bias_ptr, b, h, 0, bias_strides)
    slope = _load_slope(slopes_ptr, b, h, slopes_strides)

    first = block * BLOCK_M + offset
    last = tl.minimum(block * BLOCK_M + BLOCK_M, n) - 1 + offset
    edges = _tiles(first, last, length, left, right, LEFT, RIGHT, BLOCK_N)
    first_seen = _low(p, left, LEFT)
    last_seen = _high(p, length, right, RIGHT)

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
                k = _stream(k_ptr, b, hk, k_first, start, j, limit, k_strides, D, BLOCK_D, BULK, FOREIGN)
                s = _products(q, k, ACC)  # [BLOCK_M, BLOCK_N]
                bias = None
                if bias_ptr is not None:
                    bias = _load_bias(bias_ptr, i[:, None], j[None, :], n, length, bias_strides, phase != 1)
                s, _ = _scores(s, p[:, None], j[None, :], bias, slope, j[None, :], _rows(first_seen), _rows(last_seen),
                               multiplier, softcap, SOFTCAP, EXACT, phase != 1)
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
            k = _stream(k_ptr, b, hk, k_first, start, j, limit, k_strides, D, BLOCK_D, BULK, FOREIGN)
            v = _stream(v_ptr, b, hk, k_first, start, j, limit, v_strides, DV, BLOCK_DV, BULK, FOREIGN)
            s = _products(q, k, ACC)  # [BLOCK_M, BLOCK_N]
            bias = None
            if bias_ptr is not None:
                bias = _load_bias(bias_ptr, i[:, None], j[None, :], n, length, bias_strides, phase != 1)
            s, slack = _scores(s, p[:, None], j[None, :], bias, slope, j[None, :], _rows(first_seen), _rows(last_seen),
                               multiplier, softcap, SOFTCAP, EXACT, phase != 1)
            keep = None
            if seed_ptr is not None:
                keep = _keep(seed_ptr, i, start, b * H + h, threshold, BLOCK_N)
            prob = _probabilities(s, top[:, None], low[:, None], factor)
            dp = _dropped(_products(do, v, ACC), keep, inv_keep)  # [BLOCK_M, BLOCK_N]
            ds = _grad_scores(prob, dp, delta[:, None], bias, phase != 1)
            if dslope_ptr is not None:
                dslope -= tl.sum(ds * tl.abs(p[:, None] - j[None, :]).to(ACC), 1)
            if SOFTCAP:
                ds = ds * slack
            dq = _dot(ds.to(k.dtype), k, dq)  # [BLOCK_M, D]

    _store(_base(dq_ptr, b, h, q_first, dq_strides), wide * dq_strides[2], valid, dq_strides[3], dq * scale, D, BLOCK_D)
    if dslope_ptr is not None:
        tl.store(dslope_ptr + row + i, dslope, mask=valid)


@triton.jit(do_not_specialize=_COUNTS)
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
    factor = _unit(bias_ptr, slopes_ptr, multiplier, softcap, SOFTCAP, ACC) * LOG2E
    pid = tl.program_id(0)
    heads = H // GROUP
    b = pid // blocks // heads
    hk = pid // blocks % heads
    block, k_first, m, q_first, n = _locate(pid % blocks, cu_k_ptr, cu_q_ptr, S, steps, M, N, BLOCK_N)
    if block * BLOCK_N >= m:
        return
    length, offset = _length(lengths_ptr, b, n, m, False)

    j = block * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = j.to(tl.int64)
    k = _load(_base(k_ptr, b, hk, k_first, k_strides), wide * k_strides[2], j < length, k_strides[3], D, BLOCK_D)
    if FLIP:
        k = -k
    v = _load(_base(v_ptr, b, hk, k_first, v_strides), wide * v_strides[2], j < length, v_strides[3], DV, BLOCK_DV)

    # The queries that see these keys: the windows change places. Keys beyond the length are seen by none,
    # so a block that holds some masks all of its tiles.
    first = block * BLOCK_N - offset
    last = tl.minimum(block * BLOCK_N + BLOCK_N, length) - 1 - offset
    count = tl.where(block * BLOCK_N < length, n, 0)
    edges = _tiles(first, last, count, right, left, RIGHT, LEFT, BLOCK_M)
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
            slope = _load_slope(slopes_ptr, b, h, slopes_strides)
            i = start + tl.arange(0, BLOCK_M)
            p = i + offset
            limit = n if phase != 1 else None
            q = _stream(q_ptr, b, h, q_first, start, i, limit, q_strides, D, BLOCK_D, BULK, FOREIGN)
            do = _stream(do_ptr, b, h, q_first, start, i, limit, do_strides, DV, BLOCK_DV, BULK, FOREIGN)
            s = _products(k, q, ACC)  # [BLOCK_N, BLOCK_M]
            bias = None
            if bias_ptr is not None:
                bias_base = _base(bias_ptr, b, h, 0, bias_strides)
                bias = _load_bias(bias_base, i[None, :], j[:, None], n, length, bias_strides, phase != 1)
            s, slack = _scores(s, p[None, :], j[:, None], bias, slope, i[None, :], first_seeing[:, None],
                               _rows(last_seeing), multiplier, softcap, SOFTCAP, EXACT, phase != 1)
            keep = None
            if seed_ptr is not None:
                keep = tl.trans(_keep(seed_ptr, i, block * BLOCK_N, b * H + h, threshold, BLOCK_N))
            top = _load_rows(top_ptr + row, i, limit, 0)  # [BLOCK_M]
            low = _load_rows(low_ptr + row, i, limit, float("inf"))
            prob = _probabilities(s, top[None, :], low[None, :], factor)
            dv = _dot(_dropped(prob, keep, inv_keep).to(do.dtype), do, dv)  # [BLOCK_N, DV]
            dp = _dropped(_products(v, do, ACC), keep, inv_keep)  # [BLOCK_N, BLOCK_M]
            delta = _load_rows(delta_ptr + row, i, limit, 0)  # [BLOCK_M]
            ds = _grad_scores(prob, dp, delta[None, :], bias, phase != 1)
            if SOFTCAP:
                ds = ds * slack
            dk = _dot(ds.to(q.dtype), q, dk)  # [BLOCK_N, D]

    valid = j < m
    dk = dk * scale
    _store(_base(dk_ptr, b, hk, k_first, dk_strides), wide * dk_strides[2], valid, dk_strides[3], dk, D, BLOCK_D)
    _store(_base(dv_ptr, b, hk, k_first, dv_strides), wide * dv_strides[2], valid, dv_strides[3], dv, DV, BLOCK_DV)


@triton.jit(do_not_specialize=_COUNTS)
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
        length, offset = _length(lengths_ptr, b, N, M, False)
        i = start_i + tl.arange(0, BLOCK_M)
        j = start_j + tl.arange(0, BLOCK_N)
        p = i + offset
        wide_i = i.to(tl.int64)
        wide_j = j.to(tl.int64)
        row = (b.to(tl.int64) * H + h) * N
        top = _load_rows(top_ptr + row, i, N, 0)
        low = _load_rows(low_ptr + row, i, N, float("inf"))
        delta = _load_rows(delta_ptr + row, i, N, 0)
        q = _load(_base(q_ptr, b, h, 0, q_strides), wide_i * q_strides[2], i < N, q_strides[3], D, BLOCK_D)
        if FLIP:
            q = -q
        do = _load(_base(do_ptr, b, h, 0, do_strides), wide_i * do_strides[2], i < N, do_strides[3], DV, BLOCK_DV)
        k = _load(_base(k_ptr, b, hk, 0, k_strides), wide_j * k_strides[2], j < length, k_strides[3], D, BLOCK_D)
        v = _load(_base(v_ptr, b, hk, 0, v_strides), wide_j * v_strides[2], j < length, v_strides[3], DV, BLOCK_DV)
        s = _products(q, k, ACC)  # [BLOCK_M, BLOCK_N]
        bias_base = _base(bias_ptr, b, h, 0, bias_strides)
        bias = _load_bias(bias_base, i[:, None], j[None, :], N, length, bias_strides, True)
        first_seen = _low(p, left, LEFT)
        last_seen = _high(p, length, right, RIGHT)
        s, _ = _scores(s, p[:, None], j[None, :], bias, _load_slope(slopes_ptr, b, h, slopes_strides), j[None, :],
                       _rows(first_seen), _rows(last_seen), multiplier, softcap, SOFTCAP, EXACT, True)
        keep = None
        if seed_ptr is not None:
            keep = _keep(seed_ptr, i, start_j, b * H + h, threshold, BLOCK_N)
        prob = _probabilities(s, top[:, None], low[:, None], LOG2E)
        dp = _dropped(_products(do, v, ACC), keep, inv_keep)  # [BLOCK_M, BLOCK_N]
        acc += _grad_scores(prob, dp, delta[:, None], bias, True)

    # Rows beyond N and keys beyond the length added exact zeros (lse = +inf, s = −inf), so sums need no mask.
    if ONE_N:
        acc = tl.sum(acc, 0, keep_dims=True)
    if ONE_M:
        acc = tl.sum(acc, 1, keep_dims=True)
    i = own_row * BLOCK_M + tl.arange(0, 1 if ONE_N else BLOCK_M)
    j = own_col * BLOCK_N + tl.arange(0, 1 if ONE_M else BLOCK_N)
    ptrs = (_base(dbias_ptr, own_b, own_h, 0, dbias_strides)
            + i.to(tl.int64)[:, None] * dbias_strides[2] + j.to(tl.int64)[None, :] * dbias_strides[3])
    mask = (i < (1 if ONE_N else N))[:, None] & (j < (1 if ONE_M else M))[None, :]
    tl.store(ptrs, acc.to(dbias_ptr.dtype.element_ty), mask=mask)


# ---- launches --------------------------------------------------------------------------------------------------------

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1

# Multiprocessors of the usual part of each target, which decide how far decoding splits its keys.
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170,
                   "gfx90a": 104, "gfx942": 304, "gfx950": 256}
BULK_TARGETS = {"sm_90", "sm_100", "interpreter"}  # sm_120 has them, but its mma.sync takes tiles through registers
# Where the special-function unit limits the forward pass: see _exp2. In the bits named a thread's own registers differ,
# so each computes only what it keeps: 2 of 64 exponentials by multiply-adds, and 4 where there is time for more.
BY_FMA = {("sm_90", 64): 0b1111001, ("sm_100", 64): 0b111001, ("sm_100", 128): 0b111101, ("interpreter", 64): 0b1001}
FAMILIES = {"sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma 120", "gfx90a": "mfma", "gfx942": "mfma",
            "gfx950": "mfma"}  # else "mma"

# {table: {kernel: (BLOCK_M, BLOCK_N, num_warps, num_stages) for head dims up to 64, 128, 256}}, chosen by the static
# audit: the highest share of the tensor peak among those that spill nothing with a two-sided window. A family's table
# is for 2-byte inputs with windows and lengths only; bias, ALiBi, softcap and dropout cost registers, hence "scored".
CONFIGS = {
    "mma": {"forward": ((128, 32, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2)),
            "grad_q": ((128, 32, 4, 2), (128, 64, 8, 2), (32, 32, 4, 2)),
            "grad_kv": ((32, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 2))},
    "wgmma": {"forward": ((128, 128, 8, 2), (128, 128, 8, 2), (128, 64, 8, 2)),
              "grad_q": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
              "grad_kv": ((64, 128, 8, 2), (64, 128, 8, 2), (64, 32, 8, 1)),
              "grad_kv packed": ((64, 128, 8, 2), (32, 128, 8, 2), (64, 32, 8, 1))},
    "tcgen05": {"forward": ((128, 128, 8, 2), (128, 128, 8, 2), (64, 64, 4, 1)),
                "grad_q": ((128, 128, 8, 2), (128, 128, 8, 2), (64, 64, 8, 2)),
                "grad_kv": ((128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 1))},
    "mfma": {"forward": ((128, 64, 4, 2), (128, 32, 4, 2), (64, 32, 4, 2)),
             "decode": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
             "grad_q": ((128, 32, 4, 2), (128, 32, 4, 2), (32, 32, 4, 1)),
             "grad_kv": ((32, 64, 4, 2), (16, 64, 4, 1), (16, 64, 4, 1)),
             "grad_bias": ((16, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1))},
    "scored": {"forward": ((64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
               "decode": ((16, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2)),
               "grad_q": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2)),
               "grad_kv": ((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
               "grad_bias": ((32, 64, 4, 2), (16, 32, 4, 2), (16, 16, 8, 2))},
    "fp32": {"forward": ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
             "decode": ((16, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
             "grad_q": ((16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
             "grad_kv": ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
             "grad_bias": ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1))},
}
CONFIGS["mma 120"] = CONFIGS["mma"] | {"grad_q": ((128, 32, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2))}


def _target():
    if INTERPRETED:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch.split(":")[0]


def _config(kernel, query, value, scored=True, packed=False):
    """-> (BLOCK_M, BLOCK_N), launch options"""
    if INTERPRETED:  # any size is right there: small ones meet more edges on small inputs
        return (16, 16), {}
    dim = max(query.shape[3], value.shape[3])
    family = FAMILIES.get(_target(), "mma")
    # Masks along D cost registers as ragged sequences do, and queries that fill no large tile need none.
    packed = packed or dim not in (64, 128, 256) or query.shape[2] < 128
    if family.startswith("mma") and packed:  # its best tiles have no register to spare
        scored = True
    elif family == "mfma":  # 512 registers: scores cost no smaller tiles
        scored = False
    table = CONFIGS["fp32" if query.dtype.itemsize == 4 else "scored" if scored else family]
    row = table.get(f"{kernel} packed", table[kernel]) if packed else table[kernel]
    *blocks, warps, stages = row[0 if dim <= 64 else 1 if dim <= 128 else 2]
    if family == "mfma":  # eight warps would halve its registers
        warps = min(warps, 4)
    return tuple(blocks), {"num_warps": warps, "num_stages": stages}


def _padded(dim):
    return max(16, triton.next_power_of_2(dim))


def _broadcast(tensor):
    """Strides with 0 for dimensions of size 1"""
    return () if tensor is None else tuple(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride()))


def _bulk(rows, *tensors):
    """-> (the tensors, as descriptors of [rows, D] tiles where target and layouts allow it; whether they do).
    fp32's exact products take operands from registers, which pointers fill better: no spill instead of 500 bytes."""
    def strides(t):
        return [16 if n == 1 else s for n, s in zip(t.shape[:3], t.stride())]

    bulk = _target() in BULK_TARGETS and all(
        (t.dtype.itemsize == 2 or INTERPRETED) and t.stride(3) == 1 and t.data_ptr() % 16 == 0 and t.numel() > 0
        and all(s > 0 and s * t.dtype.itemsize % 16 == 0 for s in strides(t)) for t in tensors)
    if not bulk:
        return (*tensors, False)
    return (*(TensorDescriptor(t, list(t.shape), [*strides(t), 1], [1, 1, rows, _padded(t.shape[3])])
              for t in tensors), True)


def _plan(query, key, value, bias, alibi_slopes, cu_seqlens_q, block_table, seed, softcap=0.0):
    """-> (pack heads of a group into one tile?, splits of the keys, blocks, options) of the forward pass"""
    B, H, N, _ = query.shape
    Hk, M = key.shape[1], key.shape[2]
    if block_table is not None:
        M *= block_table.shape[1]
    few = N <= 64 and cu_seqlens_q is None
    scored = few or softcap > 0 or any(x is not None for x in (bias, alibi_slopes, seed))
    kernel = "decode" if few else "forward"
    (block_m, block_n), options = _config(kernel, query, value, scored, cu_seqlens_q is not None)
    if not few or not H:
        return False, 1, (block_m, block_n), options
    pack = Hk < H and bias is None and alibi_slopes is None and seed is None
    rows, heads = (N * H // Hk, Hk) if pack else (N, H)
    block_m = min(64, max(block_m, triton.next_power_of_2(rows)))
    programs = B * heads * triton.cdiv(rows, block_m)
    wanted = triton.cdiv(2 * MULTIPROCESSORS.get(_target(), 4), max(programs, 1))
    return pack, max(1, min(wanted, M // (4 * block_n))), (block_m, block_n), options


def _multiplier(scale):
    """Of products, whose sign FLIP takes; not 0, which would make a NaN of a masked score"""
    return max(abs(scale), 1e-30)


def _softcap_kind(softcap):
    """False: none; 2: so large that it would multiply the cancellation of a tanh near 0; else True"""
    return 2 if softcap > 256 else softcap > 0


def scratch_size(query, key, value, bias, alibi_slopes, cu_seqlens_q, block_table, seed):
    """Elements (of lse's dtype) that `forward` needs in `scratch`; 0 when the keys are not split."""
    splits = _plan(query, key, value, bias, alibi_slopes, cu_seqlens_q, block_table, seed)[1]
    B, H, N, _ = query.shape
    return splits * B * H * N * (value.shape[3] + 2) if splits > 1 else 0


def _packed(rows, block, cu_seqlens):
    """-> (S, bisection steps, slots of an axis of `rows` rows), see _locate"""
    if cu_seqlens is None:
        return 0, 0, triton.cdiv(rows, block)
    edges = cu_seqlens.shape[0]
    return edges - 1, edges.bit_length(), rows // block + edges + 1


def _masks(query, keys, window_left, window_right, dropout_p):
    """-> (left, right), (threshold, inv_keep), (LEFT, RIGHT)"""
    reach = query.shape[2] + keys  # as good as any larger window, and p + right cannot overflow
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    inv_keep = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
    windows = min(window_left, reach), min(window_right, reach)
    return windows, (threshold, inv_keep), (window_left >= 0, window_right >= 0)


def forward(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, block_table, seed,
            window_left, window_right, align_lengths, scale, softcap, dropout_p, out, lse, scratch=None):
    """Writes out: [B,H,N,Dv] (any strides) and lse: [B,H,N] contiguous, every element of them.

    query [B,H,N,D], key [B,Hk,M,D], value [B,Hk,M,Dv] (pages [P,Hk,page,·] with block_table [B,pages], contiguous), any
    strides. bias: rank 4, each dimension 1 or full, bool or float. alibi_slopes [B or 1,H]; key_lengths [B] int64,
    cu_seqlens [S+1] int64 and seed (int64, one element) contiguous; all optional. scratch: `scratch_size(...)`
    elements of lse's dtype.
    """
    B, H, N, D = query.shape
    Hk, M, DV = key.shape[1], key.shape[2], value.shape[3]
    page, pages = 1, 0
    if block_table is not None:
        page, pages = M, key.shape[0]
        M *= block_table.shape[1]
    if B * H * N == 0:
        return
    pack, splits, (block_m, block_n), options = _plan(
        query, key, value, bias, alibi_slopes, cu_seqlens_q, block_table, seed, softcap)
    group = H // Hk
    S, steps, blocks = _packed(N * group if pack else N, block_m, cu_seqlens_q)
    windows, dropout, sides = _masks(query, M, window_left, window_right, dropout_p)
    part, part_lse, part_strides = out, lse, out.stride()
    if splits > 1:
        part, part_lse, part_strides = scratch, scratch[splits * B * H * N * DV:], (H * N * DV, N * DV, DV, 1)
    k, v, bulk = (key, value, False) if block_table is not None else _bulk(block_n, key, value)
    multiplier = _multiplier(scale)
    by_fma = BY_FMA.get((_target(), max(64, _padded(max(D, DV)))), 0) if query.dtype.itemsize == 2 else 0
    _forward[(blocks * splits * B * (Hk if pack else H),)](
        query, k, v, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, block_table, seed, part, part_lse,
        query.stride(), key.stride(), value.stride(), _broadcast(bias), _broadcast(alibi_slopes), part_strides,
        H, group, N, M, S, steps, blocks, splits, B * H * N, pages, *windows, multiplier, softcap, *dropout,
        D, DV, _padded(D), _padded(DV), page, *sides, _softcap_kind(softcap), scale < 0, align_lengths, pack,
        N <= 64 and blocks == 1, bias is not None and key_lengths is None and M % 16 == 0, splits > 1, bulk, by_fma,
        block_m, block_n, **options)
    if splits > 1:
        _merge[(triton.cdiv(B * H * N, 16),)](
            part, part_lse, out, lse, out.stride(), H, N, B * H * N, splits,
            1.0 if bias is not None or alibi_slopes is not None else softcap or multiplier, DV, _padded(DV), 16)


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
    windows, dropout, sides = _masks(query, M, window_left, window_right, dropout_p)
    extras = bias, alibi_slopes, key_lengths
    strides = (query.stride(), key.stride(), value.stride(), _broadcast(bias), _broadcast(alibi_slopes),
               grad_out.stride())
    scalars = *windows, scale, _multiplier(scale), softcap, *dropout
    constants = D, DV, _padded(D), _padded(DV), *sides, _softcap_kind(softcap), scale < 0
    if B * H * N:
        (block_m, block_n), options = _config("grad_q", query, value, scored, cu_seqlens_q is not None)
        S, steps, blocks = _packed(N, block_m, cu_seqlens_q)
        k, v, bulk = _bulk(block_n, key, value)
        _grad_q[(blocks * B * H,)](
            query, k, v, *extras, cu_seqlens_q, cu_seqlens_k, seed, grad_out, out, lse, grad_lse, grad_query, top,
            low, delta, grad_slopes, *strides, out.stride(), () if grad_lse is None else grad_lse.stride(),
            grad_query.stride(), H, group, N, M, S, steps, blocks, *scalars, *constants, bulk, block_m, block_n,
            **options)
    if B * Hk * M:
        if window_right < 0:  # as a window that reaches everything: without its branch the compiler spills (40 bytes)
            scalars = windows[0], N + M, *scalars[2:]
            constants = *constants[:5], True, *constants[6:]
        (block_m, block_n), options = _config("grad_kv", query, value, scored, cu_seqlens_q is not None)
        S, steps, blocks = _packed(M, block_n, cu_seqlens_k)
        q, do, bulk = _bulk(block_m, query, grad_out)
        _grad_kv[(blocks * B * Hk,)](
            q, key, value, *extras, cu_seqlens_q, cu_seqlens_k, seed, do, top, low, delta, grad_key, grad_value,
            *strides, grad_key.stride(), grad_value.stride(),
            H, group, N, M, S, steps, blocks, *scalars, *constants, bulk, group > 1, block_m, block_n, **options)
    if grad_bias is not None and grad_bias.numel():
        (block_m, block_n), options = _config("grad_bias", query, value)
        bias_B, bias_H, bias_N, bias_M = bias.shape
        one_n, one_m = bias_N == 1, bias_M == 1
        tiles = (1 if one_n else triton.cdiv(N, block_m)) * (1 if one_m else triton.cdiv(M, block_n))
        _grad_bias[(tiles * bias_B * bias_H,)](
            query, key, value, *extras, seed, grad_out, top, low, delta, grad_bias, *strides, grad_bias.stride(),
            B, H, group, N, M, *scalars, bias_B, bias_H, *constants, one_n, one_m, block_m, block_n, **options)


# What `python -m pykernels audit` may find here, and why it is shipped all the same.
AUDIT_EXCEPTIONS = [
    dict(kernel="_grad_q", check="spill", where={"BLOCK_D": 256, "dtype": "float32"},
         reason="five fp32 tiles 256 wide do not fit in the registers whatever the tile; half precision does"),
    dict(kernel="_grad_q", check="spill", where={"BLOCK_D": 128, "BULK": False},
         reason="40 bytes on sm_80, in no loop: what the rarely run pass over rows of huge scores adds"),
]
