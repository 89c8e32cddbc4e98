"""The gradients of the linear recurrence in Triton (RWKV-6's and RWKV-7's), in chunks of L = SAVED steps on tensor
cores, parallel over all of T but for one short recurrence.

    S_t = diag(d_t) S_{t−1} + Σ z_t oᵀ_t;   d = e^w;  what reads the state takes xᵀ_t S_{t−1}, of gradient h_t

           readers (x, h)           writers (z, o)    and, within a step,
  RWKV-6   (r, g)                   (k, v)            y += scale · (r·(u∘k)) v
  RWKV-7   (r∘d, g), (a, c)         (k, v), (b, s)    y += scale · ((r·k) v + (r·b) s)         (s = S_{t−1}ᵀ a, u = 1)

g = scale · gy, c the gradient of s. S is the state at the chunk's start, G the gradient of the one at its end, and for
a pair j < i within the chunk with p_ij = h_i·o_j, and W_ij = ∏ d_t over j < t < i (W_iS: over t < i, W_Ej: t > j):

    gx_i = W_iS∘(S h_i) + Σ_{j<i} W_ij∘z_j p_ij;    gz_j = W_Ej∘(G o_j) + Σ_{i>j} W_ij∘x_i p_ij
    gw_t = W_ES∘rowsum(S∘G) + Σ_{i>t} x_i∘W_iS∘(S h_i) + Σ_{j<t} z_j∘W_Ej∘(G o_j) + Σ_{j<t<i} x_i∘z_j∘W_ij p_ij
    G ← W_ES∘G + Σ_i (x_i∘W_iS) h_iᵀ

A pair is dealt with at the level of the highest bit in which i and j differ: there, i lies in the right and j in the
left half of one block of 2·2^level steps, and W_ij = W_{i,middle} W_{middle,j}, two products over steps of one half
each. So a level is a dot, no exponent is positive, nothing is the difference of two sums, and gw's last sum falls
apart into those over i for t in the right half and those over j for t in the left. RWKV-7's triangular
M = (1 − A_ab)⁻¹, with A_xz[i,j] = x_i·(W_ij∘z_j), grows from block to block the same way. With X = x∘W_iS, Z = z∘W_Ej:

    s = Y_a S + V_s v;  c = Y_b G + S_yᵀ g;  gv = Y_k G + V_yᵀ g;  G ← W_ES∘G + X_aᵀ (Y_b G) + Y_rᵀ g
    Y_a = M X_a,  Y_r = X_r + A_rb Y_a,  Y_b = Mᵀ Z_b,  Y_k = Z_k + A_akᵀ Y_b
    V_s = M A_ak,  S_y = A_rb M,  V_y = A_rk + A_rb V_s: how v enters s, s enters y and v enters y

(RWKV-6: Y_k = Z_k, Y_r = X_r, V_y = A_rk, no s and c; the diagonal of A_r holds what stays within a step.)

  symbol                      variable                          symbol               variable
  r, w, k, v, u, a, b, S, G   the same; d for e^w               Y_r, Y_a, Y_b, Y_k   y_r, y_a, y_b, y_k: [L, K]
  g, gr, gw, …                g, grad_r, grad_w, …              X_a                  x_a
  p of readers and writers    p_gv, p_gs, p_cv, p_cs: [L, L]    V_y, V_s, S_y        v_y, v_s, s_y: [L, L]
  W_iS, W_Ej, W_ES            head_d, tail_d, total             step, channel of K, column of V:  i, e, n

  kernel     a program owns                       reads                            writes
  _prepare   a chunk of a head                    r, w, k, a, b                    Y, X_a, W_ES, V_y, V_s, S_y
  _chain     BLOCK_V columns of a head's G        Y_r, X_a, Y_b, W_ES, gy          G of every chunk, the first state's
  _values    a chunk's BLOCK_V columns            Y, [L, L], S, G, v, gy           gv, s, c
  _keys      a chunk's BLOCK_K channels           all inputs, S, G, s, c, p        gr, gw, gk, ga, gb, gu by chunk
"""
import triton
import triton.language as tl

from .linear_recurrence import SAVED
from .target import INTERPRETED, is_amd, padded
from .tiles import LOG2E, dot_at

LEVELS = tl.constexpr(5)


# ---- levels: [L, BLOCK_K] and [L, L] ---------------------------------------------------------------------------------

@triton.jit
def _steps(WIDTH: tl.constexpr):
    """[L, WIDTH] of the row's number"""
    return tl.broadcast_to(tl.arange(0, SAVED)[:, None], (SAVED, WIDTH))


@triton.jit
def _lengthen(head, tail, d, level):
    """Products of d over the steps of one's block of 2^level that come before one, and after -> of 2·2^level"""
    i = _steps(d.shape[1])
    block = 1 << level
    left = tl.gather(head * d, tl.maximum((i & -block) - 1, 0), 0)  # all of the block to the left
    right = tl.gather(tail * d, tl.minimum((i | (block - 1)) + 1, SAVED - 1), 0)
    is_right = (i & block) != 0
    return tl.where(is_right, head * left, head), tl.where(is_right, tail, tail * right)


@triton.jit
def _level(p, level):
    """p: [L, L] where a pair is dealt with at this level, else 0"""
    i, j = tl.arange(0, SAVED)[:, None], tl.arange(0, SAVED)[None, :]
    return tl.where(((i ^ j) >> level == 1) & (i > j), p, 0.0)


@triton.jit
def _crossed(level, DTYPE: tl.constexpr):
    """[L, L]: whether the step of the row lies between that of the column and the middle"""
    t, s = tl.arange(0, SAVED)[:, None], tl.arange(0, SAVED)[None, :]
    is_right = (s >> level) % 2 == 1
    return tl.where((t >> level == s >> level) & tl.where(is_right, s > t, s < t), 1.0, 0.0).to(DTYPE)


@triton.jit
def _diagonal(values):
    """[L] -> [L, L]"""
    i, j = tl.arange(0, SAVED)[:, None], tl.arange(0, SAVED)[None, :]
    return tl.where(i == j, values[:, None], 0.0)


@triton.jit
def _product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    return dot_at(a, b, tl.zeros((a.shape[0], b.shape[1]), ACC), PRECISION)


@triton.jit
def _pairs(x, z, level, PRECISION: tl.constexpr):
    """A level of A: [L, L]"""
    return _level(_product(x, tl.trans(z), x.dtype, PRECISION), level)


# ---- loads and stores ------------------------------------------------------------------------------------------------

@triton.jit
def _place(place, chunks, T, H):
    """Program -> (chunk, head of all heads, first row in [B·T·H, ·], valid rows); chunks of a head are neighbours"""
    chunk, head = place % chunks, place // chunks
    row = (head // H * T + chunk * SAVED) * H + head % H
    return chunk, head, row, T - chunk * SAVED


@triton.jit
def _load(ptr, row, H, count, j, WIDTH: tl.constexpr, EVEN: tl.constexpr, AGAIN: tl.constexpr = False):
    """Columns j of a head's rows of a chunk: [L, BLOCK], zero beyond the edges. AGAIN: they will be read again"""
    i = tl.arange(0, SAVED)[:, None]
    ptrs = ptr + row * WIDTH + i * (H * WIDTH) + j[None, :]
    mask = i < count if EVEN else (i < count) & (j < WIDTH)[None, :]
    return tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_last" if AGAIN else "")


@triton.jit
def _store(ptr, row, H, count, j, tile, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    i = tl.arange(0, SAVED)[:, None]
    ptrs = ptr + row * WIDTH + i * (H * WIDTH) + j[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=i < count if EVEN else (i < count) & (j < WIDTH)[None, :])


@triton.jit
def _tile_ptrs(ptr, place, i, j, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return ptr + place * (ROWS * WIDTH) + i[:, None] * WIDTH + j[None, :]


@triton.jit
def _load_tile(ptr, place, i, j, ROWS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Rows i, columns j of the place-th matrix [ROWS, WIDTH], zero beyond its edges"""
    ptrs = _tile_ptrs(ptr, place, i, j, ROWS, WIDTH)
    if EVEN:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(i < ROWS)[:, None] & (j < WIDTH)[None, :], other=0)


@triton.jit
def _store_tile(ptr, place, i, j, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    ptrs = _tile_ptrs(ptr, place, i, j, ROWS, WIDTH)
    if EVEN:
        tl.store(ptrs, tile.to(ptr.dtype.element_ty))
    else:
        tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(i < ROWS)[:, None] & (j < WIDTH)[None, :])


# ---- kernels ---------------------------------------------------------------------------------------------------------
# One compilation serves all B, T and H. EVEN_K, EVEN_V: the block divides all of K, V. Scratch is padded to whole
# chunks: a step beyond T has d = 1 and zeros.

_PLACES = ["T", "H", "chunks", "heads"]


@triton.jit(do_not_specialize=_PLACES)
def _prepare(
        r_ptr, w_ptr, k_ptr, u_ptr, a_ptr, b_ptr, total_ptr, y_r_ptr, y_k_ptr, x_a_ptr, y_a_ptr, y_b_ptr, v_s_ptr,
        s_y_ptr, v_y_ptr, T, H, chunks, K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_K: tl.constexpr):
    
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    place = tl.program_id(0).to(tl.int64)
    _, head, row, count = _place(place, chunks, T, H)
    i = tl.arange(0, SAVED)
    a_rk = tl.zeros((SAVED, SAVED), ACC)
    a_rb, a_ak, a_ab = a_rk, a_rk, a_rk

    for first in range(0, K, BLOCK_K):
        e = first + tl.arange(0, BLOCK_K)
        d = tl.exp2(_load(w_ptr, row, H, count, e, K, EVEN_K) * LOG2E)
        r = _load(r_ptr, row, H, count, e, K, EVEN_K).to(ACC)
        k = _load(k_ptr, row, H, count, e, K, EVEN_K).to(ACC)
        if a_ptr is None:
            u = tl.load(u_ptr + head % H * K + e, mask=e < K, other=0)
            a_rk += _diagonal(tl.sum(r * k * u[None, :], 1))
        else:
            a = _load(a_ptr, row, H, count, e, K, EVEN_K).to(ACC)
            b = _load(b_ptr, row, H, count, e, K, EVEN_K).to(ACC)
            a_rk += _diagonal(tl.sum(r * k, 1))
            a_rb += _diagonal(tl.sum(r * b, 1))
            r *= d
        head_d = tl.full((SAVED, BLOCK_K), 1, ACC)
        tail_d = head_d
        for level in range(LEVELS):
            a_rk += _pairs(r * head_d, k * tail_d, level, PRECISION)
            if a_ptr is not None:
                a_rb += _pairs(r * head_d, b * tail_d, level, PRECISION)
                a_ak += _pairs(a * head_d, k * tail_d, level, PRECISION)
                a_ab += _pairs(a * head_d, b * tail_d, level, PRECISION)
            head_d, tail_d = _lengthen(head_d, tail_d, d, level)
        total = tl.sum(tl.where((i == SAVED - 1)[:, None], head_d * d, 0.0), 0)
        tl.store(total_ptr + place * K + e, total, mask=e < K)
        if a_ptr is None:
            _store_tile(y_r_ptr, place, e, i, tl.trans(r * head_d), K, SAVED, EVEN_K)
            _store_tile(y_k_ptr, place, i, e, k * tail_d, SAVED, K, EVEN_K)

    if a_ptr is not None:
        m = _diagonal(tl.full((SAVED,), 1, ACC)) + _level(a_ab, 0)
        for level in range(1, LEVELS):
            m = dot_at(m, _product(_level(a_ab, level), m, ACC, PRECISION), m, PRECISION)  # [L, L]
        rb_m = _product(a_rb, m, ACC, PRECISION)  # [L, L]
        _store_tile(v_s_ptr, place, i, i, _product(m, a_ak, ACC, PRECISION), SAVED, SAVED, True)
        _store_tile(s_y_ptr, place, i, i, rb_m, SAVED, SAVED, True)
        a_rk = dot_at(rb_m, a_ak, a_rk, PRECISION)  # [L, L]
        for first in range(0, K, BLOCK_K):
            e = first + tl.arange(0, BLOCK_K)
            d = tl.exp2(_load(w_ptr, row, H, count, e, K, EVEN_K) * LOG2E)
            head_d = tl.full((SAVED, BLOCK_K), 1, ACC)
            tail_d = head_d
            for level in range(LEVELS):
                head_d, tail_d = _lengthen(head_d, tail_d, d, level)
            x_a = _load(a_ptr, row, H, count, e, K, EVEN_K).to(ACC) * head_d
            _store_tile(x_a_ptr, place, e, i, tl.trans(x_a), K, SAVED, EVEN_K)
            x_a = _product(m, x_a, ACC, PRECISION)  # [L, BLOCK_K]
            _store_tile(y_a_ptr, place, i, e, x_a, SAVED, K, EVEN_K)
            x_r = _load(r_ptr, row, H, count, e, K, EVEN_K).to(ACC) * d * head_d
            x_r = dot_at(a_rb, x_a, x_r, PRECISION)  # [L, BLOCK_K]
            _store_tile(y_r_ptr, place, e, i, tl.trans(x_r), K, SAVED, EVEN_K)
            y_b = _load(b_ptr, row, H, count, e, K, EVEN_K).to(ACC) * tail_d
            y_b = _product(tl.trans(m), y_b, ACC, PRECISION)  # [L, BLOCK_K]
            _store_tile(y_b_ptr, place, i, e, y_b, SAVED, K, EVEN_K)
            y_k = _load(k_ptr, row, H, count, e, K, EVEN_K).to(ACC) * tail_d
            y_k = dot_at(tl.trans(a_ak), y_b, y_k, PRECISION)  # [L, BLOCK_K]
            _store_tile(y_k_ptr, place, i, e, y_k, SAVED, K, EVEN_K)
    _store_tile(v_y_ptr, place, i, i, a_rk, SAVED, SAVED, True)


@triton.jit(do_not_specialize=_PLACES)
def _chain(
        grad_y_ptr, grad_state_ptr, total_ptr, y_r_ptr, x_a_ptr, y_b_ptr, ends_ptr, grad_state0_ptr, T, H, chunks,
        scale, K: tl.constexpr, V: tl.constexpr, EVEN_K: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """ends_ptr: G of every chunk, [heads, chunks, K, V]. BLOCK_K holds all of K."""
    ACC: tl.constexpr = total_ptr.dtype.element_ty
    EVEN: tl.constexpr = EVEN_K and EVEN_V
    head = (tl.program_id(0) // tl.cdiv(V, BLOCK_V)).to(tl.int64)
    n = tl.program_id(0) % tl.cdiv(V, BLOCK_V) * BLOCK_V + tl.arange(0, BLOCK_V)
    i, e = tl.arange(0, SAVED), tl.arange(0, BLOCK_K)
    if grad_state_ptr is None:
        G = tl.zeros((BLOCK_K, BLOCK_V), ACC)
    else:
        G = _load_tile(grad_state_ptr, head, e, n, K, V, EVEN)
    for back in range(chunks):
        place = head * chunks + (chunks - 1 - back)
        _, _, row, count = _place(place, chunks, T, H)
        _store_tile(ends_ptr, place, e, n, G, K, V, EVEN)
        g = _load(grad_y_ptr, row, H, count, n, V, EVEN_V).to(ACC) * scale
        y_r = _load_tile(y_r_ptr, place, e, i, K, SAVED, EVEN_K)
        total = tl.load(total_ptr + place * K + e, mask=e < K, other=0)
        before = dot_at(y_r, g, G * total[:, None], PRECISION)  # [BLOCK_K, BLOCK_V]
        if x_a_ptr is not None:
            y_b = _load_tile(y_b_ptr, place, i, e, SAVED, K, EVEN_K)
            x_a = _load_tile(x_a_ptr, place, e, i, K, SAVED, EVEN_K)
            c = _product(y_b, G, ACC, PRECISION)  # [L, BLOCK_V]
            before = dot_at(x_a, c, before, PRECISION)  # [BLOCK_K, BLOCK_V]
        G = before
    if grad_state0_ptr is not None:
        _store_tile(grad_state0_ptr, head, e, n, G, K, V, EVEN)


@triton.jit(do_not_specialize=_PLACES)
def _values(
        grad_y_ptr, v_ptr, checkpoints_ptr, ends_ptr, y_k_ptr, y_a_ptr, y_b_ptr, v_s_ptr, s_y_ptr, v_y_ptr, p_ptr,
        s_ptr, c_ptr, grad_v_ptr, T, H, chunks, heads, scale, K: tl.constexpr, V: tl.constexpr, EVEN_K: tl.constexpr,
        EVEN_V: tl.constexpr, PRECISION: tl.constexpr, ROUNDED: tl.constexpr, BLOCK_K: tl.constexpr,
        BLOCK_V: tl.constexpr):
    """ROUNDED: the precision of gv, which nothing else is made of.
    p_ptr: p of (g, v), with s_ptr also of (g, s), (c, v) and (c, s): [heads, chunks, 1 or 4, L, L].
    s_ptr, c_ptr: [heads, chunks, L, V]"""
    ACC: tl.constexpr = checkpoints_ptr.dtype.element_ty
    EVEN: tl.constexpr = EVEN_K and EVEN_V
    place = tl.program_id(0).to(tl.int64)
    chunk, head, row, count = _place(place, chunks, T, H)
    i = tl.arange(0, SAVED)
    p_gv = tl.zeros((SAVED, SAVED), ACC)
    p_gs, p_cv, p_cs = p_gv, p_gv, p_gv
    for first_v in range(0, V, BLOCK_V):
        n = first_v + tl.arange(0, BLOCK_V)
        g = _load(grad_y_ptr, row, H, count, n, V, EVEN_V).to(ACC) * scale
        v = _load(v_ptr, row, H, count, n, V, EVEN_V)
        v_y = _load_tile(v_y_ptr, place, i, i, SAVED, SAVED, True)
        grad_v = _product(tl.trans(v_y), g, ACC, ROUNDED)  # [L, BLOCK_V]
        s, c = grad_v, grad_v
        if s_ptr is not None:
            s = _product(_load_tile(v_s_ptr, place, i, i, SAVED, SAVED, True), v, ACC, PRECISION)  # [L, BLOCK_V]
            s_y = _load_tile(s_y_ptr, place, i, i, SAVED, SAVED, True)
            c = _product(tl.trans(s_y), g, ACC, PRECISION)  # [L, BLOCK_V]
        for first_k in range(0, K, BLOCK_K):
            e = first_k + tl.arange(0, BLOCK_K)
            G = _load_tile(ends_ptr, place, e, n, K, V, EVEN)
            y_k = _load_tile(y_k_ptr, place, i, e, SAVED, K, EVEN_K)
            grad_v = dot_at(y_k, G, grad_v, ROUNDED)  # [L, BLOCK_V]
            if s_ptr is not None:
                y_b = _load_tile(y_b_ptr, place, i, e, SAVED, K, EVEN_K)
                c = dot_at(y_b, G, c, PRECISION)  # [L, BLOCK_V]
                y_a = _load_tile(y_a_ptr, place, i, e, SAVED, K, EVEN_K)
                S = _load_tile(checkpoints_ptr, chunk * heads + head, e, n, K, V, EVEN)
                s = dot_at(y_a, S, s, PRECISION)  # [L, BLOCK_V]
        _store(grad_v_ptr, row, H, count, n, grad_v, V, EVEN_V)
        p_gv = dot_at(g, tl.trans(v), p_gv, PRECISION)  # [L, L]
        if s_ptr is not None:
            _store_tile(s_ptr, place, i, n, s, SAVED, V, EVEN_V)
            _store_tile(c_ptr, place, i, n, c, SAVED, V, EVEN_V)
            p_gs = dot_at(g, tl.trans(s), p_gs, PRECISION)  # [L, L]
            p_cv = dot_at(c, tl.trans(v), p_cv, PRECISION)  # [L, L]
            p_cs = dot_at(c, tl.trans(s), p_cs, PRECISION)  # [L, L]
    if s_ptr is None:
        _store_tile(p_ptr, place, i, i, p_gv, SAVED, SAVED, True)
    else:
        _store_tile(p_ptr, place * 4, i, i, p_gv, SAVED, SAVED, True)
        _store_tile(p_ptr, place * 4 + 1, i, i, p_gs, SAVED, SAVED, True)
        _store_tile(p_ptr, place * 4 + 2, i, i, p_cv, SAVED, SAVED, True)
        _store_tile(p_ptr, place * 4 + 3, i, i, p_cs, SAVED, SAVED, True)


@triton.jit(do_not_specialize=_PLACES)
def _keys(
        grad_y_ptr, r_ptr, w_ptr, k_ptr, v_ptr, u_ptr, a_ptr, b_ptr, checkpoints_ptr, ends_ptr, total_ptr, p_ptr, s_ptr,
        c_ptr, grad_r_ptr, grad_w_ptr, grad_k_ptr, grad_u_ptr, grad_a_ptr, grad_b_ptr, T, H, chunks, heads, scale,
        K: tl.constexpr, V: tl.constexpr, EVEN_K: tl.constexpr, EVEN_V: tl.constexpr, PRECISION: tl.constexpr,
        BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """grad_u_ptr: [chunks, heads, K]. p comes from memory, since the compiler gives dots that hang together one way to
    share them among warps, and that of an [L, L] one would have them repeat the work on [L, BLOCK_K]."""
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    EVEN: tl.constexpr = EVEN_K and EVEN_V
    SETS: tl.constexpr = 1 if a_ptr is None else 4
    MASK: tl.constexpr = tl.bfloat16 if PRECISION == "bf16x6" else ACC
    AGAIN: tl.constexpr = True  # read again at the end, so that no register is held over both loops
    place = (tl.program_id(0) // tl.cdiv(K, BLOCK_K)).to(tl.int64)
    e = tl.program_id(0) % tl.cdiv(K, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    i = tl.arange(0, SAVED)
    chunk, head, row, count = _place(place, chunks, T, H)

    d = tl.exp2(_load(w_ptr, row, H, count, e, K, EVEN_K, AGAIN) * LOG2E)
    r = _load(r_ptr, row, H, count, e, K, EVEN_K, AGAIN).to(ACC)
    k = _load(k_ptr, row, H, count, e, K, EVEN_K, AGAIN).to(ACC)
    p_gv = _load_tile(p_ptr, place * SETS, i, i, SAVED, SAVED, True)
    a, b, p_gs, p_cv, p_cs = r, k, p_gv, p_gv, p_gv
    if a_ptr is not None:
        a = _load(a_ptr, row, H, count, e, K, EVEN_K, AGAIN).to(ACC)
        b = _load(b_ptr, row, H, count, e, K, EVEN_K, AGAIN).to(ACC)
        r *= d
        p_gs = _load_tile(p_ptr, place * SETS + 1, i, i, SAVED, SAVED, True)
        p_cv = _load_tile(p_ptr, place * SETS + 2, i, i, SAVED, SAVED, True)
        p_cs = _load_tile(p_ptr, place * SETS + 3, i, i, SAVED, SAVED, True)
    grad_r = tl.zeros((SAVED, BLOCK_K), ACC)
    grad_k, grad_a, grad_b, grad_w = grad_r, grad_r, grad_r, grad_r
    head_d = tl.full((SAVED, BLOCK_K), 1, ACC)
    tail_d = head_d
    for level in tl.range(LEVELS, disable_licm=True):
        x_r, z_k = r * head_d, k * tail_d
        p = _level(p_gv, level)
        gx_r = _product(p, z_k, ACC, PRECISION)  # [L, BLOCK_K]
        gz_k = _product(tl.trans(p), x_r, ACC, PRECISION)  # [L, BLOCK_K]
        crossing = tl.zeros((SAVED, BLOCK_K), ACC)
        if a_ptr is not None:
            x_a, z_b = a * head_d, b * tail_d
            p = _level(p_gs, level)
            gx_r = dot_at(p, z_b, gx_r, PRECISION)  # [L, BLOCK_K]
            gz_b = _product(tl.trans(p), x_r, ACC, PRECISION)  # [L, BLOCK_K]
            p = _level(p_cv, level)
            gx_a = _product(p, z_k, ACC, PRECISION)  # [L, BLOCK_K]
            gz_k = dot_at(tl.trans(p), x_a, gz_k, PRECISION)  # [L, BLOCK_K]
            p = _level(p_cs, level)
            gx_a = dot_at(p, z_b, gx_a, PRECISION)  # [L, BLOCK_K]
            gz_b = dot_at(tl.trans(p), x_a, gz_b, PRECISION)  # [L, BLOCK_K]
            gx_a *= head_d
            gz_b *= tail_d
            grad_a += gx_a
            grad_b += gz_b
            crossing = a * gx_a + b * gz_b
        gx_r *= head_d
        gz_k *= tail_d
        grad_r += gx_r
        grad_k += gz_k
        crossing += r * gx_r + k * gz_k
        grad_w = dot_at(_crossed(level, MASK), crossing, grad_w, PRECISION)  # [L, BLOCK_K]
        head_d, tail_d = _lengthen(head_d, tail_d, d, level)

    gx_r = tl.zeros((SAVED, BLOCK_K), ACC)
    gx_a, gz_k, gz_b = gx_r, gx_r, gx_r
    both = tl.zeros((BLOCK_K,), ACC)
    for first in range(0, V, BLOCK_V):
        n = first + tl.arange(0, BLOCK_V)
        S = _load_tile(checkpoints_ptr, chunk * heads + head, e, n, K, V, EVEN)
        G = _load_tile(ends_ptr, place, e, n, K, V, EVEN)
        both += tl.sum(S * G.to(ACC), 1)
        g = _load(grad_y_ptr, row, H, count, n, V, EVEN_V).to(ACC) * scale
        v = _load(v_ptr, row, H, count, n, V, EVEN_V)
        gx_r = dot_at(g, tl.trans(S), gx_r, PRECISION)  # [L, BLOCK_K]
        gz_k = dot_at(v, tl.trans(G), gz_k, PRECISION)  # [L, BLOCK_K]
        if a_ptr is not None:
            c = _load_tile(c_ptr, place, i, n, SAVED, V, EVEN_V)
            s = _load_tile(s_ptr, place, i, n, SAVED, V, EVEN_V)
            gx_a = dot_at(c, tl.trans(S), gx_a, PRECISION)  # [L, BLOCK_K]
            gz_b = dot_at(s, tl.trans(G), gz_b, PRECISION)  # [L, BLOCK_K]
    gx_r *= head_d
    gz_k *= tail_d
    grad_r += gx_r
    grad_k += gz_k
    r = _load(r_ptr, row, H, count, e, K, EVEN_K).to(ACC)
    k = _load(k_ptr, row, H, count, e, K, EVEN_K).to(ACC)
    before, after = r * gx_r, k * gz_k
    if a_ptr is not None:
        d = tl.exp2(_load(w_ptr, row, H, count, e, K, EVEN_K) * LOG2E)
        a = _load(a_ptr, row, H, count, e, K, EVEN_K).to(ACC)
        b = _load(b_ptr, row, H, count, e, K, EVEN_K).to(ACC)
        grad_r *= d
        before = d * before
        grad_w += r * grad_r
        gx_a *= head_d
        gz_b *= tail_d
        before += a * gx_a
        after += b * gz_b
        _store(grad_a_ptr, row, H, count, e, grad_a + gx_a, K, EVEN_K)
        grad_b += gz_b
    t, other = i[:, None], i[None, :]
    grad_w = dot_at(tl.where(other > t, 1.0, 0.0).to(MASK), before, grad_w, PRECISION)  # [L, BLOCK_K]
    grad_w = dot_at(tl.where(other < t, 1.0, 0.0).to(MASK), after, grad_w, PRECISION)  # [L, BLOCK_K]
    grad_w += (both * tl.load(total_ptr + place * K + e, mask=e < K, other=0))[None, :]

    own = tl.load(p_ptr + place * (SETS * SAVED * SAVED) + i * (SAVED + 1))[:, None]
    if a_ptr is not None:
        own_b = tl.load(p_ptr + (place * SETS + 1) * (SAVED * SAVED) + i * (SAVED + 1))[:, None]
        grad_r += k * own + b * own_b
        grad_k += r * own
        _store(grad_b_ptr, row, H, count, e, grad_b + r * own_b, K, EVEN_K)
    else:
        u = tl.load(u_ptr + head % H * K + e, mask=e < K, other=0)[None, :]
        grad_r += u * k * own
        grad_k += u * r * own
        tl.store(grad_u_ptr + (chunk * heads + head) * K + e, tl.sum(r * k * own, 0), mask=e < K)
    _store(grad_r_ptr, row, H, count, e, grad_r, K, EVEN_K)
    _store(grad_k_ptr, row, H, count, e, grad_k, K, EVEN_K)
    _store(grad_w_ptr, row, H, count, e, grad_w, K, EVEN_K)


# ---- launches --------------------------------------------------------------------------------------------------------

# {op: {kernel: (BLOCK_K, BLOCK_V, num_warps, num_stages)}}; a block is no larger than K or V needs, _chain's holds K
CONFIGS = {
    "wkv6": {"prepare": (64, 32, 4, 2), "chain": (64, 32, 4, 3), "values": (32, 64, 4, 3), "keys": (64, 16, 8, 2)},
    "wkv7": {"prepare": (16, 32, 4, 2), "chain": (64, 32, 4, 3), "values": (32, 16, 4, 2), "keys": (64, 16, 8, 1)},
}


def _config(op, kernel, K, V):
    """-> BLOCK_K, BLOCK_V, launch options"""
    if INTERPRETED:
        return padded(K) if kernel == "chain" else 16, 16, {}
    block_k, block_v, warps, stages = CONFIGS[op][kernel]
    block_k = padded(K) if kernel == "chain" else min(block_k, padded(K))
    if kernel == "chain" and block_k > 64:  # three stages of such tiles are too much for shared memory
        block_v, warps, stages = 16, 8, 2 if block_k == 128 else 1
    options = {"num_warps": warps, "num_stages": stages}
    if is_amd():  # tiles of 32 rows: instructions of 32 rows would leave most waves the same work
        # One stage: gfx950 would copy fp32 tiles four bytes a lane.
        options = {"num_warps": min(warps, 4), "num_stages": 1, "matrix_instr_nonkdim": 16}
    return block_k, min(block_v, padded(V)), options


def backward(grad_y, grad_state, r, w, k, v, u, a, b, state, checkpoints, scale, grad_r, grad_w, grad_k, grad_v, grad_u,
             grad_a, grad_b, grad_state0, bf16):
    """Writes every grad_ of a tensor that is given.

    Everything is contiguous. grad_y [B,T,H,V] or None; r, k, a, b [B,T,H,K] and v [B,T,H,V] of one dtype; w [B,T,H,K],
    u [H,K], state and grad_state [B,H,K,V] in the dtype of sums. u makes it RWKV-6, a and b RWKV-7; state and
    grad_state may be None. checkpoints [⌈T/L⌉,B,H,K,V]: the states before every L-th step. bf16: gv, of
    which nothing else is made, is as exact as bf16.
    """
    B, T, H, K = r.shape
    V, steps = v.shape[3], SAVED.value
    heads, chunks = B * H, triton.cdiv(T, steps)
    corrected, places = a is not None, heads * chunks
    op = "wkv7" if corrected else "wkv6"
    precision = "ieee" if is_amd() or INTERPRETED else "bf16x6"
    rounded = "bf16" if bf16 else precision
    if grad_y is None:
        grad_y = v.new_zeros(v.shape)

    def scratch(*shape, when=True):
        return w.new_empty(places, *shape) if when else None

    total, v_y, p = scratch(K), scratch(steps, steps), scratch(4 if corrected else 1, steps, steps)
    y_r, y_k, ends = scratch(K, steps), scratch(steps, K), scratch(K, V)
    x_a, y_a, y_b = (scratch(K * steps, when=corrected) for _ in range(3))
    v_s, s_y = (scratch(steps, steps, when=corrected) for _ in range(2))
    s, c = (scratch(steps, V, when=corrected) for _ in range(2))
    by_chunk = None if corrected else w.new_empty(chunks, heads, K)

    if places:
        block_k, _, options = _config(op, "prepare", K, V)
        _prepare[(places,)](
            r, w, k, u, a, b, total, y_r, y_k, x_a, y_a, y_b, v_s, s_y, v_y, T, H, chunks,
            K, K % block_k == 0, precision, block_k, **options)
    if heads and (chunks or state is not None):
        block_k, block_v, options = _config(op, "chain", K, V)
        _chain[(heads * triton.cdiv(V, block_v),)](
            grad_y, grad_state, total, y_r, x_a, y_b, ends, None if state is None else grad_state0, T, H, chunks, scale,
            K, V, block_k == K, V % block_v == 0, precision, block_k, block_v, **options)
    if places:
        block_k, block_v, options = _config(op, "values", K, V)
        _values[(places,)](
            grad_y, v, checkpoints, ends, y_k, y_a, y_b, v_s, s_y, v_y, p, s, c, grad_v, T, H, chunks, heads, scale,
            K, V, K % block_k == 0, V % block_v == 0, precision, rounded, block_k, block_v, **options)
        block_k, block_v, options = _config(op, "keys", K, V)
        _keys[(places * triton.cdiv(K, block_k),)](
            grad_y, r, w, k, v, u, a, b, checkpoints, ends, total, p, s, c, grad_r, grad_w, grad_k, by_chunk,
            *((grad_a, grad_b) if corrected else (None, None)), T, H, chunks, heads, scale,
            K, V, K % block_k == 0, V % block_v == 0, precision, block_k, block_v, **options)
    if u is not None:
        grad_u.copy_(by_chunk.view(chunks * B, H, K).sum(0))


# What `python -m pykernels audit` may find here, and why it is shipped all the same.
AUDIT_EXCEPTIONS = [
    *(dict(kernel=kernel, check="spill", where={"PRECISION": "bf16x6"}, reason=reason)
      for kernel, reason in (
          ("_keys", "three pieces of two operands need registers; RWKV-7 has twice the tiles; other sizes spill more"),
          ("_prepare", "4 bytes, on sm_100 alone"),
          ("_values", "RWKV-7 has four times the tiles: up to 80 bytes on sm_100; other sizes do no better"))),
    *(dict(kernel=kernel, check="spill", where={"EVEN_K": False},
           reason="masks along K cost RWKV-7 the registers that a power of two leaves free")
      for kernel in ("_prepare", "_keys")),
    dict(kernel="_values", check="spill", where={"EVEN_V": False},
         reason="masks along V, and more than one block of it, cost RWKV-7 registers; a multiple of 64 spills nothing"),
    *(dict(kernel=kernel, check="async copy", where={"EVEN_V": False},
           reason="rows of an odd width are not aligned to what an asynchronous copy takes")
      for kernel in ("_chain", "_values")),
]
