"""The linear recurrence in Triton (RWKV-5, -6 and -7): a matrix per head, S: [K, V], whose rows decay, d = e^w ≤ 1.

    RWKV-6  S_t = d_t∘S_{t−1} + k_t v_tᵀ;                       y_t = scale · r_tᵀ(S_{t−1} + diag(u) k_t v_tᵀ)
    RWKV-7  S_t = d_t∘S_{t−1} + b_t (a_tᵀ S_{t−1}) + k_t v_tᵀ;  y_t = scale · r_tᵀ S_t

A few steps are taken one after another. Many are cut into chunks of L = CHUNK = 16, and a chunk with the state S before
it is

    y = Y_r S + V_y v;  s = Y_a S + V_s v (RWKV-7);  S ← total∘S + Z_bᵀ s + Z_kᵀ v

where Y_r, Y_a, Z_b, Z_k: [L, K], V_y, V_s: [L, L] and total: [K] do not depend on S, so that all chunks find theirs
side by side. Row i of Y_r is what y_i reads S through, pulled back from step i to the start: from scale·r_i, over
steps j descending,

    V_y[i,j] = y_r·k_j;  y_r ← d_j∘y_r + (y_r·b_j) a_j    (RWKV-6: V_y[i,i] = Σ y_r u k_i and no a, and only j < i pull)

and Y_a and V_s come from a_i in the same way over j < i. Z_b and Z_k are b_j and k_j damped by all steps after j, total
is the whole chunk's decay. This is the recurrence read backwards: products of decays only, never a quotient of them,
and no system of equations to solve.

  symbol                   variable
  r, w, k, v, u, a, b, S   the same; d for e^w. Y_r, Y_a, V_y, V_s, s: y_r, y_a, v_y, v_s, s
  Z_k, Z_b                 k · after, b · after
  step, channel of K, column of V                              i or t, e, n

  kernel      a program owns                 reads                               writes
  _recurrent  BLOCK_V columns of a head's S  everything, a step at a time        y, the last state, checkpoints
  _scores     one chunk of one head          r, w, k, a, b of the chunk          Y_r, Z_k, Y_a, Z_b; V_y, V_s; total
  _chunks     BLOCK_V columns of a head's S  those and v, a chunk at a time      y, the last state, checkpoints

S is held as Sᵀ: that is the left operand of every product, so a product's result enters the next chunk as it is.
"""
import triton
import triton.language as tl

from .target import INTERPRETED, padded
from .tiles import LOG2E, split_bf16

CHUNK = tl.constexpr(16)  # L, the steps that a program takes at once
SAVED = tl.constexpr(32)  # steps from one saved state to the next


# ---- tiles -----------------------------------------------------------------------------------------------------------

@triton.jit
def _load(ptr, t, T, stride, j, N, EVEN: tl.constexpr):
    """Elements j of rows t; zeros beyond row T and, unless EVEN, beyond element N. t: [R, 1] and j: [1, C] make a tile,
    a scalar t and j: [C] a row."""
    mask = t < T
    if not EVEN:
        mask = mask & (j < N)
    return tl.load(ptr + tl.cast(t, tl.int64) * stride + j, mask=mask, other=0)


@triton.jit
def _decay(w):
    return tl.exp2(w * LOG2E)


@triton.jit
def _put(tile, column, valid, j):
    """column: [R], zero where not valid: [R, 1], becomes column j of tile: [R, C]"""
    column = tl.where(valid, column[:, None], 0.0)
    return tl.where(tl.arange(0, tile.shape[1])[None, :] == j, column, tile)


# ---- sums of pieces --------------------------------------------------------------------------------------------------
# Three bf16 numbers hold an fp32 one to its last bit, and six products of theirs its product with another: matrix units
# do those faster than one product of fp32, on NVIDIA they have none. What S depends on is that exact; a half-precision
# y is read through two. Against tf32 in three passes this took half the instructions (a third with RWKV-7), since
# operands come split from _scores and what a product gives need not be rearranged to enter the next one.

@triton.jit
def _store_pieces(ptrs, x, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    pieces = split_bf16(x, ptrs.dtype.element_ty, COUNT)
    for n in tl.static_range(COUNT):
        tl.store(ptrs + n * LENGTH, pieces[n])


@triton.jit
def _load_pieces(ptrs, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    if COUNT == 1:
        return (tl.load(ptrs),)
    elif COUNT == 2:
        return tl.load(ptrs), tl.load(ptrs + LENGTH)
    else:
        return tl.load(ptrs), tl.load(ptrs + LENGTH), tl.load(ptrs + 2 * LENGTH)


@triton.jit
def _product(x, y, acc, COUNT: tl.constexpr, LARGEST: tl.constexpr = 0):
    """acc + the products of pieces n of x and m of y with LARGEST ≤ n + m < COUNT, the smallest first"""
    for back in tl.static_range(COUNT - LARGEST):
        for n in tl.static_range(len(x)):
            for m in tl.static_range(len(y)):
                if n + m == COUNT - 1 - back:
                    acc = tl.dot(x[n], y[m], acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


# ---- chunks, side by side --------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["T", "chunks"])
def _scores(
        r_ptr, w_ptr, k_ptr, u_ptr, a_ptr, b_ptr, rows_ptr, pairs_ptr, decays_ptr, scale, T, chunks, H, K,
        READ: tl.constexpr, FEED: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """rows: [B·H, chunks, pieces of Y_r, Z_k, Y_a, Z_b, L, BLOCK_K]; pairs: [B·H, chunks, pieces of V_y, V_s, L, L],
    READ of Y_r and V_y, FEED of the others, zeros beyond K; decays: [B·H, chunks, BLOCK_K] in Acc"""
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    CORRECTED: tl.constexpr = a_ptr is not None
    LENGTH: tl.constexpr = CHUNK * BLOCK_K
    AREA: tl.constexpr = CHUNK * CHUNK
    place = tl.program_id(0).to(tl.int64)
    first = (place % chunks).to(tl.int32) * CHUNK
    head = place // chunks
    start = (head // H * T * H + head % H) * K
    stride = H * K
    r_ptr += start
    w_ptr += start
    k_ptr += start

    i = tl.arange(0, CHUNK)[:, None]
    e = tl.max_contiguous(tl.arange(0, BLOCK_K), 4)[None, :]  # one layout whatever the dtype: no exchange in the loop
    rows = rows_ptr + place * ((READ + (3 if CORRECTED else 1) * FEED) * LENGTH) + i * BLOCK_K + e
    pairs = pairs_ptr + place * ((READ + (FEED if CORRECTED else 0)) * AREA) + i * CHUNK + tl.arange(0, CHUNK)[None, :]
    y_r = _load(r_ptr, first + i, T, stride, e, K, EVEN).to(ACC) * scale  # [L, BLOCK_K]
    v_y = tl.zeros((CHUNK, CHUNK), ACC)
    after = tl.full((CHUNK, BLOCK_K), 1.0, ACC)  # the decay of the chunk's steps after one's own
    if CORRECTED:
        a_ptr += start
        b_ptr += start
        y_a = _load(a_ptr, first + i, T, stride, e, K, EVEN).to(ACC)  # [L, BLOCK_K]
        v_s = tl.zeros((CHUNK, CHUNK), ACC)
    else:
        u = _load(u_ptr, head % H, H, K, e, K, EVEN)  # [1, BLOCK_K]
    for back in range(CHUNK):
        j = CHUNK - 1 - back
        t = first + j + i * 0  # the same row for all: what a thread needs of it, it loads
        d = _decay(_load(w_ptr, t, T, stride, e, K, EVEN))
        k = _load(k_ptr, t, T, stride, e, K, EVEN).to(ACC)
        if CORRECTED:
            a = _load(a_ptr, t, T, stride, e, K, EVEN).to(ACC)
            b = _load(b_ptr, t, T, stride, e, K, EVEN).to(ACC)
            v_y = _put(v_y, tl.sum(y_r * k, 1), i >= j, j)
            y_r = tl.where(i >= j, y_r * d + tl.sum(y_r * b, 1)[:, None] * a, y_r)
            v_s = _put(v_s, tl.sum(y_a * k, 1), i > j, j)
            y_a = tl.where(i > j, y_a * d + tl.sum(y_a * b, 1)[:, None] * a, y_a)
        else:
            v_y = _put(v_y, tl.sum(y_r * tl.where(i == j, u * k, k), 1), i >= j, j)
            y_r = tl.where(i > j, y_r * d, y_r)
        after = tl.where(i < j, after * d, after)
        if back == CHUNK - 1:
            tl.store(decays_ptr + place * BLOCK_K + e + i * 0, after * d, mask=i == 0)
    _store_pieces(rows, y_r, LENGTH, READ)
    _store_pieces(pairs, v_y, AREA, READ)
    k = _load(k_ptr, first + i, T, stride, e, K, EVEN).to(ACC)
    _store_pieces(rows + READ * LENGTH, k * after, LENGTH, FEED)
    if CORRECTED:
        _store_pieces(rows + (READ + FEED) * LENGTH, y_a, LENGTH, FEED)
        b = _load(b_ptr, first + i, T, stride, e, K, EVEN).to(ACC)
        _store_pieces(rows + (READ + 2 * FEED) * LENGTH, b * after, LENGTH, FEED)
        _store_pieces(pairs + READ * AREA, v_s, AREA, FEED)


# ---- one after another -----------------------------------------------------------------------------------------------

@triton.jit
def _load_state(state_ptr, at, inside, ACC: tl.constexpr):
    if state_ptr is None:
        return tl.zeros(inside.shape, ACC)
    else:
        return tl.load(state_ptr + at, mask=inside, other=0)


@triton.jit
def _save(checkpoints_ptr, at, inside, S, t, heads, K, V):
    """The state before step t, if it is one of those that are kept; at: where in the first"""
    t = tl.cast(t, tl.int32)
    if t % SAVED == 0:
        checkpoints_ptr += heads.to(tl.int64) * K * V * (t // SAVED)
        tl.store(checkpoints_ptr + at, S, mask=inside)


@triton.jit(do_not_specialize=["T", "chunks", "heads"])
def _chunks(
        v_ptr, rows_ptr, pairs_ptr, decays_ptr, state_ptr, y_ptr, final_ptr, checkpoints_ptr, T, chunks, heads, H, K, V,
        CORRECTED: tl.constexpr, READ: tl.constexpr, FEED: tl.constexpr, VALUE: tl.constexpr, EVEN: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """rows, pairs, decays: see _scores; heads: B·H; VALUE: pieces of v; EVEN: V needs no masks"""
    ACC: tl.constexpr = final_ptr.dtype.element_ty
    DTYPE: tl.constexpr = rows_ptr.dtype.element_ty
    LENGTH: tl.constexpr = CHUNK * BLOCK_K
    AREA: tl.constexpr = CHUNK * CHUNK
    blocks = tl.cdiv(V, BLOCK_V)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    e = tl.arange(0, BLOCK_K)
    i = tl.arange(0, CHUNK)
    start = (head // H * T * H + head % H) * V
    inside = (n < V)[:, None] & (e < K)[None, :]
    at = head * K * V + e[None, :] * V + n[:, None]
    tile = i[:, None] * BLOCK_K + e[None, :]
    tile_t = i[None, :] * BLOCK_K + e[:, None]  # [BLOCK_K, L] of what is stored as [L, BLOCK_K]
    pair_t = i[None, :] * CHUNK + i[:, None]
    decays_ptr += head * chunks * BLOCK_K + e
    total = tl.load(decays_ptr)
    S = _load_state(state_ptr, at, inside, ACC)  # [BLOCK_V, BLOCK_K]
    for chunk in range(chunks):
        if checkpoints_ptr is not None:
            _save(checkpoints_ptr, at, inside, S, chunk * CHUNK, heads, K, V)
        place = head * chunks + chunk
        rows = rows_ptr + place * ((READ + (3 if CORRECTED else 1) * FEED) * LENGTH)
        pairs = pairs_ptr + place * ((READ + (FEED if CORRECTED else 0)) * AREA) + pair_t
        t = (i + chunk * CHUNK)[None, :]
        v = _load(v_ptr + start, t, T, H * V, n[:, None], V, EVEN)  # [BLOCK_V, L]
        v = split_bf16(v if VALUE == 1 else v.to(ACC), DTYPE, VALUE)
        before = split_bf16(S, DTYPE, FEED)
        y = tl.zeros((BLOCK_V, CHUNK), ACC)
        y = _product(v, _load_pieces(pairs, AREA, READ), y, READ)  # [BLOCK_V, L]
        y = _product(before, _load_pieces(rows + tile_t, LENGTH, READ), y, READ)  # [BLOCK_V, L]
        rows += READ * LENGTH
        S *= total[None, :]
        total = tl.load(decays_ptr + tl.minimum(chunk + 1, chunks - 1) * BLOCK_K)  # needed at once in the next pass
        S = _product(v, _load_pieces(rows + tile, LENGTH, FEED), S, FEED)  # [BLOCK_V, BLOCK_K]
        if CORRECTED:
            rows += FEED * LENGTH
            y_a = _load_pieces(rows + tile_t, LENGTH, FEED)
            s = tl.zeros((BLOCK_V, CHUNK), ACC)
            low = _product(v, _load_pieces(pairs + READ * AREA, AREA, FEED), s, FEED)  # [BLOCK_V, L]
            low = _product(before, y_a, low, FEED, FEED - 1)  # [BLOCK_V, L]
            s = _product(before, y_a, s, FEED - 1)  # [BLOCK_V, L], beside it: all else waits for them
            rows += FEED * LENGTH
            s = split_bf16(s + low, DTYPE, FEED)
            S = _product(s, _load_pieces(rows + tile, LENGTH, FEED), S, FEED)  # [BLOCK_V, BLOCK_K]
        mask = t < T if EVEN else (t < T) & (n < V)[:, None]
        ptrs = y_ptr + start + tl.cast(t, tl.int64) * (H * V) + n[:, None]
        tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(final_ptr + at, S, mask=inside)


@triton.jit(do_not_specialize=["T", "heads"])
def _recurrent(
        r_ptr, w_ptr, k_ptr, v_ptr, u_ptr, a_ptr, b_ptr, state_ptr, y_ptr, final_ptr, checkpoints_ptr, scale, T, heads,
        H, K, V, EVEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """heads: B·H; EVEN: neither K nor V needs masks"""
    ACC: tl.constexpr = final_ptr.dtype.element_ty
    blocks = tl.cdiv(V, BLOCK_V)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    e = tl.arange(0, BLOCK_K)
    start = head // H * T * H + head % H
    inside = (e < K)[:, None] & (n < V)[None, :]
    at = head * K * V + e[:, None] * V + n[None, :]
    S = _load_state(state_ptr, at, inside, ACC)  # [BLOCK_K, BLOCK_V]
    if u_ptr is not None:
        u = _load(u_ptr, head % H, H, K, e, K, EVEN)
    for t in range(T):
        if checkpoints_ptr is not None:
            _save(checkpoints_ptr, at, inside, S, t, heads, K, V)
        r = _load(r_ptr + start * K, t, T, H * K, e, K, EVEN).to(ACC)
        k = _load(k_ptr + start * K, t, T, H * K, e, K, EVEN).to(ACC)
        v = _load(v_ptr + start * V, t, T, H * V, n, V, EVEN).to(ACC)
        d = _decay(_load(w_ptr + start * K, t, T, H * K, e, K, EVEN))
        kv = k[:, None] * v[None, :]
        if u_ptr is not None:
            read = S + u[:, None] * kv
            S = S * d[:, None] + kv
        else:
            a = _load(a_ptr + start * K, t, T, H * K, e, K, EVEN).to(ACC)
            b = _load(b_ptr + start * K, t, T, H * K, e, K, EVEN).to(ACC)
            S = S * d[:, None] + kv + b[:, None] * tl.sum(a[:, None] * S, 0)[None, :]  # [BLOCK_V]
            read = S
        y = tl.sum(r[:, None] * read, 0) * scale  # [BLOCK_V]
        ptrs = y_ptr + start * V + tl.cast(t, tl.int64) * (H * V) + n
        tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=n < V)
    tl.store(final_ptr + at, S, mask=inside)


# ---- launches --------------------------------------------------------------------------------------------------------


BLOCK_V = 16  # rows of Sᵀ, the fewest that a matrix unit takes: the most programs
MAX_CHUNKED = 128  # of K: beyond, RWKV-7's operands do not fit in the registers

# {backend: {kernel: num_warps for K up to 64, 128}}, chosen by the static audit: those that spill nothing and issue the
# fewest instructions a warp. Two warps share the state of a 64-wide head: alone, one would issue 1.7 times as many.
CONFIGS = {
    "cuda": {"scores": (4, 4), "chunks half": (2, 2), "chunks fp32": (2, 4)},
    "hip": {"scores": (2, 4), "chunks half": (1, 1), "chunks fp32": (1, 1)},
}


def _config(kernel, K):
    """-> BLOCK_K, launch options"""
    block_k = padded(K)
    if INTERPRETED:
        return block_k, {}
    if kernel == "recurrent":
        return block_k, {"num_warps": max(1, min(block_k // 64, 8))}
    target = triton.runtime.driver.active.get_current_target()
    # gfx950 would prefetch straight into LDS, four bytes a lane, at twice the instructions.
    stages = 1 if str(target.arch).startswith("gfx950") else 2
    return block_k, {"num_warps": CONFIGS[target.backend][kernel][0 if K <= 64 else 1], "num_stages": stages}


def _pieces(like, exact):
    """-> an empty tensor in the pieces' dtype, their number in what y is read through, in what S depends on, in v"""
    if exact.dtype.itemsize == 8:
        return exact.new_empty(0), 1, 1, 1
    piece = exact.new_empty(0) if INTERPRETED else exact.new_empty(0).bfloat16()  # see to_bf16
    if like.dtype.itemsize == 4:
        return piece, 3, 3, 3
    return piece, 2, 3, 1 if like.dtype == piece.dtype else 2


def _in_chunks(T, K):
    return T >= CHUNK.value and K <= MAX_CHUNKED


def forward(r, w, k, v, u, a, b, state, scale, y, final, checkpoints):
    """Writes y, final and checkpoints (if it has any) from contiguous tensors; their shapes are in the op's file.
    u makes it RWKV-6, a and b RWKV-7."""
    B, T, H, K = r.shape
    V, L, corrected = v.shape[3], CHUNK.value, a is not None
    saved = checkpoints if checkpoints.shape[0] else None
    if B * H * V == 0:
        return
    programs = triton.cdiv(V, BLOCK_V) * B * H
    if not _in_chunks(T, K):
        block_k, options = _config("recurrent", K)
        _recurrent[(programs,)](
            r, w, k, v, u, a, b, state, y, final, saved, scale, T, B * H, H, K, V,
            K == block_k and V % BLOCK_V == 0, block_k, BLOCK_V, **options)
        return
    chunks = triton.cdiv(T, L)
    piece, read, feed, value = _pieces(r, w)
    block_k, options = _config("scores", K)
    rows = piece.new_empty(B * H, chunks, read + (3 if corrected else 1) * feed, L, block_k)
    pairs = piece.new_empty(B * H, chunks, read + (feed if corrected else 0), L, L)
    decays = w.new_empty(B * H, chunks, block_k)
    _scores[(B * H * chunks,)](
        r, w, k, u, a, b, rows, pairs, decays, scale, T, chunks, H, K, read, feed, K == block_k, block_k, **options)
    block_k, options = _config("chunks half" if r.dtype.itemsize == 2 else "chunks fp32", K)
    _chunks[(programs,)](
        v, rows, pairs, decays, state, y, final, saved, T, chunks, B * H, H, K, V, corrected, read, feed, value,
        V % BLOCK_V == 0, block_k, BLOCK_V, **options)
