"""The vocabulary of attention.py: where a program works, how tiles come and go, and the mathematics of one tile.

  S ← cap · tanh(scale · q·k / cap) + bias − slope · |p − j|, −inf where masked;  P = e^(S − lse);  dS = P ∘ (dP − Δ)

Scores have a unit (unit_of), by which they are multiplied after the difference from a maximum: s · unit, rounded, is
off by more than an exponent holds from 1e9 on, and infinite at 3e38. A product would join that difference in one
operation, which does not round it as its maximum was rounded: so a score is no product of another.
Nothing here loops over a sequence or knows which gradient is wanted. A bare `return` gives None,
which Triton 3.6 returns in no other way.
"""
import triton
import triton.language as tl

from .tiles import LOG2E

LARGE = tl.constexpr(1024.0)  # |lse| from which on its rounding is too much for an exponent
# Finite numbers that no score is below: subtracting them never makes a NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOWEST_64 = tl.constexpr(-1.7976931348623157e308)


# ---- where a program works -------------------------------------------------------------------------------------------

@triton.jit
def _edge(cu_ptr, t, S, total):
    """First row of sequence t of a packed axis; t = 0 and S + 1 stand for the rows before and after all sequences."""
    edge = tl.load(cu_ptr + t - 1, mask=(t >= 1) & (t <= S + 1), other=0)
    edge = tl.minimum(tl.maximum(edge, 0), total).to(tl.int32)
    return tl.where(t > S + 1, total, edge)


@triton.jit
def locate(slot, own_cu_ptr, other_cu_ptr, S, steps, own, other, BLOCK: tl.constexpr):
    """-> (block, first own row, own rows, first other row, other rows) of the slot-th block of the owned axis.

    A packed axis gives sequence t the slots from ⌊start_t / BLOCK⌋ + t on, at least as many as it needs, so the host
    knows neither lengths nor their maximum; the sequence is found by bisection.
    """
    if own_cu_ptr is None:
        return slot, 0, own, 0, other
    else:
        t = slot * 0
        top = S + 1
        for _ in range(steps):
            middle = (t + top + 1) // 2
            before = _edge(own_cu_ptr, middle, S, own) // BLOCK + middle <= slot
            t = tl.where(before, middle, t)
            top = tl.where(before, top, middle - 1)
        first = _edge(own_cu_ptr, t, S, own)
        count = tl.maximum(_edge(own_cu_ptr, t + 1, S, own) - first, 0)
        other_first = _edge(other_cu_ptr, t, S, other)
        other_count = tl.maximum(_edge(other_cu_ptr, t + 1, S, other) - other_first, 0)
        other_count = tl.where((t >= 1) & (t <= S), other_count, 0)
        return slot - first // BLOCK - t, first, count, other_first, other_count


@triton.jit
def tile_range(first, last, count, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    """Edges of three loops in steps of BLOCK over 0..count, for owned positions first..last that each see
    [position − before, position + after]: tiles cut at the near end, tiles that all see whole, the rest.
    Every edge is a multiple of BLOCK that the compiler can tell: else a bias loads one element at a time."""
    low = 0
    high = count
    whole_low = 0
    whole_high = count
    if BEFORE:
        low = tl.maximum(first - before, 0) // BLOCK * BLOCK
        whole_low = tl.cdiv(tl.maximum(last - before, 0), BLOCK) * BLOCK
    if AFTER:
        high = tl.minimum(count, last + after + 1)
        whole_high = tl.minimum(count, first + after + 1)
    high = tl.maximum(tl.cdiv(tl.maximum(high, 0), BLOCK) * BLOCK, low)
    whole_low = tl.minimum(whole_low, high)
    whole_high = tl.maximum(tl.maximum(whole_high, 0) // BLOCK * BLOCK, whole_low)
    return low, whole_low, whole_high, high


@triton.jit
def low_of(p, left, LEFT: tl.constexpr):
    """The first keys that queries at positions p: [BLOCK_M] see, or None"""
    if LEFT:
        return p - left
    else:
        return


@triton.jit
def high_of(p, length, right, RIGHT: tl.constexpr):
    """The key after the last that queries at positions p: [BLOCK_M] see"""
    return tl.minimum(p + (right + 1), length) if RIGHT else tl.zeros_like(p) + length


@triton.jit
def rows_at(bound):
    if bound is None:
        return
    else:
        return bound[:, None]


@triton.jit
def length_of(lengths_ptr, b, N, M, ALIGN: tl.constexpr):
    """-> (valid keys, position of query 0) of sequence b with N queries and M keys."""
    if lengths_ptr is None:
        return M, M - N
    else:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), M).to(tl.int32)
        return length, (length if ALIGN else M) - N


# ---- loads and stores ------------------------------------------------------------------------------------------------

@triton.jit
def base_of(ptr, b, h, row, strides):
    return (ptr + tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[1]
            + tl.cast(row, tl.int64) * strides[2])


@triton.jit
def _pointers(base, rows, stride, BLOCK_D: tl.constexpr):
    """rows: [R] offsets in elements -> [R, BLOCK_D]"""
    return base + (rows[:, None] + tl.arange(0, BLOCK_D).to(tl.int64)[None, :] * stride)


@triton.jit
def _inside(valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """valid: [R] or None (every row is) -> mask [R or 1, BLOCK_D or 1], None where nothing is to be masked"""
    cols = tl.arange(0, BLOCK_D)[None, :] < D
    if valid is None:
        if D == BLOCK_D:
            return
        else:
            return cols
    else:
        if D == BLOCK_D:
            return valid[:, None]
        else:
            return valid[:, None] & cols


@triton.jit
def load(base, rows, valid, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[R, BLOCK_D], zero where not valid: beyond a length there may be anything, and 0 · NaN is NaN"""
    mask = _inside(valid, D, BLOCK_D)
    if mask is None:
        return tl.load(_pointers(base, rows, stride, BLOCK_D))
    else:
        return tl.load(_pointers(base, rows, stride, BLOCK_D), mask=mask, other=0)


@triton.jit
def stream_tile(source, b, h, first, start, rows, limit, strides, D: tl.constexpr, BLOCK_D: tl.constexpr,
            BULK: tl.constexpr, FOREIGN: tl.constexpr):
    """Rows start.. of a head, counted from its row `first` -> [R, BLOCK_D]. limit: None, or the number of valid rows:
    those past it are zero or repeat the last, which needs no mask beside the one that the scores have.

    BULK: source is a tensor descriptor, whose loads hold no addresses in registers and are zero beyond the tensor;
    FOREIGN: past the last valid row lies something else than the tensor's end.
    """
    if BULK:
        tile = source.load([b.to(tl.int32), h.to(tl.int32), first + start, 0])
        tile = tl.reshape(tile, (rows.shape[0], BLOCK_D))
        if FOREIGN and limit is not None:
            tile = tl.where((rows < limit)[:, None], tile, 0.0)
        return tile
    else:
        if limit is not None:
            rows = tl.minimum(rows, limit - 1)
        return load(base_of(source, b, h, first, strides), rows.to(tl.int64) * strides[2], None, strides[3], D, BLOCK_D)


@triton.jit
def load_paged(source, h, j, limit, table_ptr, pages, strides, PAGE: tl.constexpr, D: tl.constexpr,
               BLOCK_D: tl.constexpr):
    """Keys j of a head through its block table's row -> [BLOCK_N, BLOCK_D], past the limit repeating the last"""
    if limit is not None:
        j = tl.minimum(j, limit - 1)
    page = tl.load(table_ptr + j // PAGE)
    page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
    rows = page * strides[0] + (j % PAGE).to(tl.int64) * strides[2]
    return load(base_of(source, 0, h, 0, strides), rows, None, strides[3], D, BLOCK_D)


@triton.jit
def store(base, rows, valid, stride, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    ptrs = _pointers(base, rows, stride, BLOCK_D)
    tl.store(ptrs, tile.to(base.dtype.element_ty), mask=_inside(valid, D, BLOCK_D))


@triton.jit
def load_bias(base, i, j, N, length, strides, MASKED: tl.constexpr):
    """i, j: [BLOCK_M, 1], [1, BLOCK_N] or both transposed"""
    mask = i < N
    if MASKED:
        mask = mask & (j < length)
    return tl.load(base + i.to(tl.int64) * strides[2] + j.to(tl.int64) * strides[3], mask=mask, other=0)


@triton.jit
def load_slope(slopes_ptr, b, h, strides):
    if slopes_ptr is None:
        return
    else:
        return tl.load(slopes_ptr + b * strides[0] + h * strides[1])


@triton.jit
def load_statistics(ptr, i, limit, other):
    if limit is None:
        return tl.load(ptr + i)
    else:
        return tl.load(ptr + i, mask=i < limit, other=other)


# ---- tile mathematics; p, j: [BLOCK_M, 1] and [1, BLOCK_N], or, where keys are the rows, both transposed -------------

@triton.jit
def dot(a, b, acc):
    """Exact for fp32 as well: never TF32."""
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def products(a, b, ACC: tl.constexpr):
    """[R, D] · [C, D] -> a bᵀ: [R, C]"""
    return tl.dot(a, tl.trans(b), input_precision="ieee", out_dtype=ACC)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    t = (1 - e) / (1 + e)
    t = tl.where(x < 0, -t, t)
    if EXACT:  # 1 − e cancels near 0: there, the odd series up to x¹¹
        z = x * x
        series = ((((-1382 / 155925 * z + 62 / 2835) * z - 17 / 315) * z + 2 / 15) * z - 1 / 3) * z
        t = tl.where(tl.abs(x) < 0.25, x + x * series, t)
    return t


@triton.jit
def unit_of(bias_ptr, slopes_ptr, scale, softcap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """What scores are multiples of: 1 where something was added to them"""
    if (bias_ptr is not None) or (slopes_ptr is not None):
        return tl.full((), 1.0, ACC)
    elif SOFTCAP:
        return tl.full((), softcap, ACC)
    else:
        return tl.full((), scale, ACC)


@triton.jit
def score(s, p, j, bias, slope, x, low, high, scale, softcap, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
            MASKED: tl.constexpr):
    """Products s = q·k -> (scores in their unit, −inf where masked; derivative of the softcap).
    MASKED: the streamed index x is seen by an owned row from its low up to its high: bounds by row, since a thread
    holds few rows."""
    slack = 1.0
    if SOFTCAP:
        t = tanh(s * (scale / softcap), EXACT)
        slack = 1 - t * t
        s = t
    if (bias is not None) or (slope is not None):
        s *= softcap if SOFTCAP else scale
    if bias is not None:
        if bias.dtype == tl.int1:
            s = tl.where(bias, s, float("-inf"))
        else:
            s += bias.to(s.dtype)
    if slope is not None:
        s -= slope * tl.abs(p - j).to(s.dtype)
    if MASKED:
        if high is None:
            seen = x >= low
        elif low is None:
            seen = x < high
        else:
            seen = (x >= low) & (x < high)
        s = tl.where(seen, s, float("-inf"))
    return s, slack


@triton.jit
def keep_mask(seed_ptr, i, start, row, threshold, BLOCK_N: tl.constexpr):
    """Dropout's mask for query rows i: [BLOCK_M] and keys start..start + BLOCK_N (start % 4 = 0) of row b·H + h.
    Philox gives four words to a counter: those of four neighbouring keys."""
    quads = start // 4 + tl.arange(0, BLOCK_N // 4)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), quads[None, :], i[:, None], row, 0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_N / 4, 2, 2]
    return tl.reshape(words, (i.shape[0], BLOCK_N)) >= tl.cast(threshold, tl.uint32)


@triton.jit
def exp2_by_fma(x):
    """2^x for x ≤ 0 without the special-function unit: adding 1.5·2²³ + 127 rounds x to an integer n and leaves
    n + 127, the exponent of 2^n, in the lowest bits; the fraction's power is a cubic. 2^x = 0 exactly if x ≤ −127."""
    x = tl.maximum(x, -127.0, tl.PropagateNan.ALL)
    rounded = x + 12583039.0
    f = x - (rounded - 12583039.0)  # −½ … ½
    power = ((0.05500893294811249 * f + 0.24221095442771912) * f + 0.6932829022407532) * f + 1  # to 1.01e-4
    return power * (rounded.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)  # not added: NaN stays NaN


@triton.jit
def exp2(x, BY_FMA: tl.constexpr):
    """2^x for x: [BLOCK_M, BLOCK_N]; by multiply-adds in the columns that have none of BY_FMA's bits (0: in none)."""
    e = tl.exp2(x)
    if BY_FMA:
        e = tl.where((tl.arange(0, x.shape[1]) & BY_FMA == 0)[None, :], exp2_by_fma(x), e)
    return e


@triton.jit
def probabilities(s, top, low, factor):
    """Scores, top in their unit, low in base 2 (of infinity, P is 0) -> P = 2^((s − top) · factor − low)"""
    return tl.exp2((s - top) * factor - low)


@triton.jit
def dropped(x, keep, inv_keep):
    if keep is None:
        return x
    else:
        return tl.where(keep, x * inv_keep, 0.0)


@triton.jit
def grad_scores(prob, dp, delta, bias, MASKED: tl.constexpr):
    """dS before the softcap"""
    ds = prob * (dp - delta)
    if MASKED or bias is not None:  # 0 · NaN would let a masked value through
        ds = tl.where(prob == 0, 0.0, ds)
    return ds
