"""LSTM, GRU and Elman RNN in Triton, one launch a step: the recurrent product, the cell and its state together.

    LSTM  i, f, o = σ(·), g = tanh(·) of W_ih x + b_ih + W_hh h + b_hh;  c' = f∘c + i∘g;  h' = [W_hr] (o ∘ tanh c')
    GRU   r, z = σ(·);  n = tanh(W_in x + b_in + r∘(W_hn h + b_hn));  h' = (1 − z)∘n + z∘h
    RNN   h' = tanh or relu of W_ih x + b_ih + W_hh h + b_hh

  kernel          a program owns                      reads                             writes
  _step           BLOCK_B sequences × BLOCK_H units   h of its sequences, all gates'    h' (or o ∘ tanh c'), its state,
                  of one step                         rows of W_hh for its units        what backward reads
  _project        BLOCK_B × BLOCK_H of h' (LSTM)      o ∘ tanh c', rows of W_hr         h'
  _step_backward  as _step, one step of backward      gradients of the gates of the     gradients of its cells' gates,
                                                      step after, columns of W_hh       of its state, h before the step
  _grad_hidden    BLOCK_B × BLOCK_H of dh' (_project) as _step_backward                 dh', h before the step

A sequence's neighbours in time are known by (t, row, count): at step t, sequence b < count stands in row row + b. A
step that is not there has count 0. Products with all rows at once (W_ih x, the weights' gradients) are a library's.

All gates of a unit are columns of one tile: one dot a pass and, since the slot of a gate is the lowest and the highest
bit of the column, all four land in one thread's registers and no exchange is needed. Dots are exact in fp32.
"""
import triton
import triton.language as tl

from .target import INTERPRETED, is_amd
from .tiles import LOG2E

LSTM, GRU, RNN_TANH, RNN_RELU = (tl.constexpr(cell) for cell in range(4))
INPUT, HIDDEN, SAVED = (tl.constexpr(part) for part in range(3))


# ---- cells: [BLOCK_B, BLOCK_H] each ----------------------------------------------------------------------------------
# Quotients whose denominators lie in (0, 2], so that several share one reciprocal: an LSTM's cell takes three exp2 and
# two reciprocals. What shares one shares its NaN: only gates that meet in the same result do.

@triton.jit
def _sigmoid(x):
    """-> (numerator, denominator), exact to some ulp in both tails"""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    return tl.where(x < 0, e, 1.0), 1 + e


@triton.jit
def _tanh(x):
    """-> (numerator, denominator). fp32: the minimax quotient of Eigen (ptanh_float), 3 ulp from 0 to ∞"""
    if x.dtype == tl.float64:
        e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
        return tl.where(x < 0, e - 1, 1 - e), 1 + e
    else:
        x = tl.where(x > 7.905311, 7.905311, tl.where(x < -7.905311, -7.905311, x))
        z = x * x
        p = -2.76076847742355e-16 * z + 2.00018790482477e-13
        p = (p * z - 8.60467152213735e-11) * z + 5.12229709037114e-08
        p = (p * z + 1.48572235717979e-05) * z + 6.37261928875436e-04
        q = (1.19825839466702e-06 * z + 1.18534705686654e-04) * z + 2.26843463243900e-03
        return (p * z + 4.89352455891786e-03) * x, q * z + 4.89352518554385e-03


@triton.jit
def _cell(s0, s1, s2, s3, state, CELL: tl.constexpr):
    """Pre-activations (GRU: of r, z and the two halves of n), state c or h -> (h', state', what backward reads)"""
    if CELL == LSTM:
        i, di = _sigmoid(s0)
        f, df = _sigmoid(s1)
        g, dg = _tanh(s2)
        both = di * df
        inverse = 1 / (both * dg)
        g *= both * inverse
        inverse *= dg
        i *= df * inverse
        f *= di * inverse
        c = f * state + i * g
        o, do = _sigmoid(s3)
        u, du = _tanh(c)
        inverse = 1 / (do * du)
        o *= inverse
        return o * u, c, i, f, g, o * du
    elif CELL == GRU:
        r, dr = _sigmoid(s0)
        z, dz = _sigmoid(s1)
        inverse = 1 / (dr * dz)
        r *= dz * inverse
        z *= dr * inverse
        n, dn = _tanh(s2 + r * s3)
        n /= dn
        h = n + z * (state - n)
        return h, h, r, z, n, s3
    else:
        if CELL == RNN_TANH:
            h, d = _tanh(s0)
            h /= d
        else:
            h = tl.where(s0 < 0, 0.0, s0)
        return h, h, h, h, h, h


@triton.jit
def _cell_backward(dh, dc, g0, g1, g2, g3, c, before, CELL: tl.constexpr):
    """dh', dc', what forward saved, c', the state before -> (gradients of the gates, of the state before).
    GRU: of n, r, z, W_hn h + b_hn, so that those of W_ih and those of W_hh lie side by side. RNN: g0 is h'."""
    if CELL == LSTM:
        u, du = _tanh(c)
        u /= du
        do = dh * u
        dc += dh * g3 * (1 - u * u)
        return (dc * g2 * (g0 * (1 - g0)), dc * before * (g1 * (1 - g1)), dc * g0 * (1 - g2 * g2),
                do * (g3 * (1 - g3)), dc * g1)
    elif CELL == GRU:
        dz = dh * (before - g2) * (g1 * (1 - g1))
        dn = dh * (1 - g1) * (1 - g2 * g2)
        return dn, dn * g3 * (g0 * (1 - g0)), dz, dn * g0, dh * g1
    else:
        if CELL == RNN_TANH:
            d = dh * (1 - g0 * g0)
        else:
            d = tl.where(g0 > 0, dh, 0.0)
        return d, d, d, d, tl.zeros_like(d)


# ---- tiles -----------------------------------------------------------------------------------------------------------

@triton.jit
def _load_rows(ptrs, valid, k, K, EVEN: tl.constexpr):
    """Columns k: [1, BLOCK_K] of the rows at ptrs: [R, 1]; zero where not valid: [R, 1], None if all are"""
    if EVEN and valid is None:
        return tl.load(ptrs + k)
    elif EVEN:
        return tl.load(ptrs + k, mask=valid, other=0)
    else:
        return tl.load(ptrs + k, mask=(k < K) if valid is None else valid & (k < K), other=0)


@triton.jit
def _products(acc, a_ptrs, a_valid, w_ptrs, w_valid, K, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of a at a_ptrs: [BLOCK_B, 1], rows of W at w_ptrs: [N, 1] -> acc + a Wᵀ: [BLOCK_B, N]"""
    for start in range(0, K, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        a = _load_rows(a_ptrs, a_valid, k, K, EVEN)
        w = _load_rows(w_ptrs, w_valid, k, K, EVEN)
        acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee", out_dtype=acc.dtype)  # [BLOCK_B, N]
    return acc


@triton.jit
def _columns(first, H, CELL: tl.constexpr, PART: tl.constexpr, BLOCK_H: tl.constexpr):
    """Where the columns of a tile of BLOCK_H units from `first` on stand among a row's gates -> ([N], valid: [N]).
    PART: among W_ih's or W_hh's rows, where a GRU has three and its n goes to a slot of its own; or what is saved."""
    if CELL <= GRU:
        n = tl.arange(0, 4 * BLOCK_H)
        slot = n // (2 * BLOCK_H) * 2 + n % 2
        unit = first + n // 2 % BLOCK_H
    else:
        unit = first + tl.arange(0, BLOCK_H)
        slot = unit * 0
    valid = unit < H
    if CELL == GRU and PART != SAVED:
        valid = valid & (slot != (3 if PART == INPUT else 2))
        slot = tl.minimum(slot, 2)
    return slot * H + tl.minimum(unit, H - 1), valid


@triton.jit
def _slots(tile, CELL: tl.constexpr):
    """[BLOCK_B, N] -> four times [BLOCK_B, BLOCK_H]"""
    if CELL <= GRU:
        tile = tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 4, 2)), (0, 2, 1, 3))
        even, odd = tl.split(tile)
        s0, s2 = tl.split(even)
        s1, s3 = tl.split(odd)
        return s0, s1, s2, s3
    else:
        return tile, tile, tile, tile


@triton.jit
def _tile(s0, s1, s2, s3, CELL: tl.constexpr):
    """The reverse of _slots"""
    if CELL <= GRU:
        tile = tl.permute(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (0, 2, 1, 3))
        return tl.reshape(tile, (tile.shape[0], 2 * tile.shape[2] * 2))
    else:
        return s0


# ---- loads and stores; matrices are contiguous -----------------------------------------------------------------------

@triton.jit
def _at(ptr, rows, width, j):
    """Pointers to columns j of rows: [BLOCK_B]"""
    return ptr + (rows.to(tl.int64) * width)[:, None] + j[None, :]


@triton.jit
def _active(b, t, count, lengths_ptr, B):
    """Whether sequences b: [BLOCK_B] take step t, which stands in `count` rows -> [BLOCK_B, 1]"""
    active = b < count
    if lengths_ptr is not None:
        active = active & (t < tl.load(lengths_ptr + tl.minimum(b, B - 1)))
    return active[:, None]


@triton.jit
def _reset(resets_ptr, rows, valid):
    if resets_ptr is None:
        return  # None: Triton 3.6 returns it in no other way
    else:
        return tl.load(resets_ptr + rows, mask=valid, other=0)[:, None] != 0


@triton.jit
def _cut(x, reset):
    if reset is None:
        return x
    else:
        return tl.where(reset, 0.0, x)


@triton.jit
def _load_before(stored_ptr, initial_ptr, rows, b, width, j, live, taken, ACC: tl.constexpr):
    """Columns j of the state before the step: where that step was taken, in its row of `stored`, else in `initial`"""
    stored = tl.load(_at(stored_ptr, rows, width, j), mask=live & taken, other=0).to(ACC)
    return tl.where(taken, stored, tl.load(_at(initial_ptr, b, width, j), mask=live & ~taken, other=0).to(ACC))


# ---- kernels ---------------------------------------------------------------------------------------------------------
# One compilation serves all steps, T and B. GATES: rows of the weights, STORED: columns of what backward reads, in H.

_PLACES = ["row_0", "t", "row", "count", "t_before", "row_before", "count_before", "t_after", "row_after",
           "count_after", "B"]


@triton.jit(do_not_specialize=_PLACES)
def _step(
        x_ptr, pre_ptr, h_ptr, w_ih_ptr, w_hh_ptr, b_ih_ptr, b_hh_ptr, lengths_ptr, resets_ptr, output_ptr, hidden_ptr,
        h_n_ptr, state_ptr, new_state_ptr, gates_ptr, cells_ptr, row_0, t, row, count, t_before, row_before,
        count_before, B, I, H, P, CELL: tl.constexpr, EVEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_K: tl.constexpr):
    """pre_ptr: W_ih x, rows as input's; without it, this is the only step and W_ih x is done here. h_ptr: rows of h,
    those of output's and, from row_0, the initial ones: one matrix, since a load from either of two is not a wide one.
    hidden_ptr: [B, H] for o ∘ tanh c' where `_project` follows. state_ptr and new_state_ptr may be one."""
    ACC: tl.constexpr = tl.float64 if output_ptr.dtype.element_ty == tl.float64 else tl.float32
    GATES: tl.constexpr = 4 if CELL == LSTM else 3 if CELL == GRU else 1
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.program_id(1) * BLOCK_H
    j = first + tl.arange(0, BLOCK_H)
    active = _active(b, t, count, lengths_ptr, B)
    reset = _reset(resets_ptr, row + b, b < count)
    mask = (b < count)[:, None] & (j < H)[None, :]
    live = active & (j < H)[None, :]

    from_x, x_valid = _columns(first, H, CELL, INPUT, BLOCK_H)
    from_h, h_valid = _columns(first, H, CELL, HIDDEN, BLOCK_H)
    acc = tl.zeros((BLOCK_B, from_x.shape[0]), ACC)
    if pre_ptr is not None:
        valid = (b < count)[:, None] & x_valid[None, :]
        acc += tl.load(_at(pre_ptr, row + b, GATES * H, from_x), mask=valid, other=0).to(ACC)
    if b_ih_ptr is not None:
        bias = tl.load(b_ih_ptr + from_x, mask=x_valid, other=0).to(ACC)
        acc += (bias + tl.load(b_hh_ptr + from_h, mask=h_valid, other=0).to(ACC))[None, :]
    state = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    if state_ptr is not None:
        state = _cut(tl.load(_at(state_ptr, b, H, j), mask=mask, other=0).to(ACC), reset)

    # Rows past the last repeat it, as do units past H, and are never stored. A GRU has a slot too many for its rows.
    inner = tl.minimum(b, count - 1)
    if pre_ptr is None:
        rows = x_ptr + (inner.to(tl.int64) * I)[:, None]
        columns = w_ih_ptr + (from_x.to(tl.int64) * I)[:, None]
        valid = x_valid[:, None] if CELL == GRU else None
        acc = _products(acc, rows, None, columns, valid, I, EVEN, BLOCK_K)  # [BLOCK_B, N]
    taken = _active(inner, t_before, count_before, lengths_ptr, B)
    rows = h_ptr + (tl.where(taken, row_before, row_0) + inner[:, None]).to(tl.int64) * P
    columns = w_hh_ptr + (from_h.to(tl.int64) * P)[:, None]
    valid = h_valid[:, None] if CELL == GRU else None
    kept = None if reset is None else ~reset
    acc = _products(acc, rows, kept, columns, valid, P, EVEN, BLOCK_K)  # [BLOCK_B, N]
    s0, s1, s2, s3 = _slots(acc, CELL)
    h, state, g0, g1, g2, g3 = _cell(s0, s1, s2, s3, state, CELL)

    h = tl.where(active, h, 0.0).to(output_ptr.dtype.element_ty)
    if hidden_ptr is not None:
        tl.store(_at(hidden_ptr, b, H, j), h, mask=mask)
    else:
        tl.store(_at(output_ptr, row + b, H, j), h, mask=mask)
        if h_n_ptr is not None:
            tl.store(_at(h_n_ptr, b, H, j), h, mask=live)
    if new_state_ptr is not None:
        tl.store(_at(new_state_ptr, b, H, j), state.to(new_state_ptr.dtype.element_ty), mask=live)
    if gates_ptr is not None:
        saved, valid = _columns(first, H, CELL, SAVED, BLOCK_H)
        gates = tl.where(active, _tile(g0, g1, g2, g3, CELL), 0.0)
        tl.store(_at(gates_ptr, row + b, 4 * H, saved), gates, mask=(b < count)[:, None] & valid[None, :])
    if cells_ptr is not None:
        tl.store(_at(cells_ptr, row + b, H, j), tl.where(active, state, 0.0), mask=mask)


@triton.jit(do_not_specialize=_PLACES)
def _project(
        hidden_ptr, w_ptr, lengths_ptr, output_ptr, h_n_ptr, t, row, count, B, H, P, EVEN: tl.constexpr,
        BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """h' = W_hr (o ∘ tanh c')"""
    ACC: tl.constexpr = tl.float64 if output_ptr.dtype.element_ty == tl.float64 else tl.float32
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    p = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    active, inside = _active(b, t, count, lengths_ptr, B), (p < P)[None, :]
    rows = hidden_ptr + (tl.minimum(b, count - 1).to(tl.int64) * H)[:, None]
    columns = w_ptr + (tl.minimum(p, P - 1).to(tl.int64) * H)[:, None]
    acc = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    acc = _products(acc, rows, None, columns, None, H, EVEN, BLOCK_K)  # [BLOCK_B, BLOCK_H]
    h = tl.where(active, acc, 0.0).to(output_ptr.dtype.element_ty)
    tl.store(_at(output_ptr, row + b, P, p), h, mask=(b < count)[:, None] & inside)
    if h_n_ptr is not None:
        tl.store(_at(h_n_ptr, b, P, p), h, mask=active & inside)


@triton.jit
def _incoming(
        grad_output_ptr, grad_gates_ptr, w_ptr, lengths_ptr, resets_ptr, grad_h_ptr, b, j, active, row, t_after,
        row_after, count_after, B, H, P, CELL: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr):
    """-> dh': [BLOCK_B, BLOCK_H] for columns j: from the output, the step after and grad_h: [B, P] in Acc. That holds
    the final state's gradient, then what a GRU passes by, and after its first step a sequence leaves h0's there.
    w_ptr: W_hh transposed, [P, G·H]."""
    GATES: tl.constexpr = 4 if CELL == LSTM else 3 if CELL == GRU else 1
    STORED: tl.constexpr = 4 if CELL <= GRU else 1
    ACC: tl.constexpr = grad_h_ptr.dtype.element_ty
    taken = _active(b, t_after, count_after, lengths_ptr, B)
    reset = _reset(resets_ptr, row_after + b, b < count_after)
    inside = (j < P)[None, :]
    here = (b < B)[:, None] & inside
    dh = tl.load(_at(grad_h_ptr, b, P, j), mask=here, other=0)
    if grad_output_ptr is not None:
        dh += tl.load(_at(grad_output_ptr, row + b, P, j), mask=active & inside, other=0).to(ACC)

    rows = (row_after + tl.minimum(b, tl.maximum(count_after - 1, 0))).to(tl.int64) * (STORED * H)
    if CELL == GRU:  # n comes first there, for W_ih alone
        rows += H
    columns = w_ptr + (tl.minimum(j, P - 1).to(tl.int64) * (GATES * H))[:, None]
    K = tl.where(tl.program_id(0) * b.shape[0] < count_after, GATES * H, 0)
    acc = tl.zeros((b.shape[0], j.shape[0]), ACC)
    acc = _products(acc, grad_gates_ptr + rows[:, None], None, columns, None, K, EVEN, BLOCK_K)  # [BLOCK_B, BLOCK_H]
    dh += tl.where(taken, _cut(acc, reset), 0.0)
    tl.store(_at(grad_h_ptr, b, P, j), dh, mask=here & ~active)
    return dh


@triton.jit
def _copy_before(output_ptr, h0_ptr, previous_ptr, lengths_ptr, reset, b, j, active, row, count, t_before, row_before,
                 count_before, B, P, ACC: tl.constexpr):
    """-> h before the step: [BLOCK_B, BLOCK_H] for columns j, 0 where not active; in previous: rows as output's, too"""
    taken, inside = _active(b, t_before, count_before, lengths_ptr, B), (j < P)[None, :]
    h = _cut(_load_before(output_ptr, h0_ptr, row_before + b, b, P, j, active & inside, taken, ACC), reset)
    if previous_ptr is not None:
        kept = h.to(previous_ptr.dtype.element_ty)
        tl.store(_at(previous_ptr, row + b, P, j), kept, mask=(b < count)[:, None] & inside)
    return h


@triton.jit(do_not_specialize=_PLACES)
def _grad_hidden(
        grad_output_ptr, grad_gates_ptr, w_ptr, lengths_ptr, resets_ptr, grad_h_ptr, h0_ptr, output_ptr, previous_ptr,
        grad_hidden_ptr, t, row, count, t_before, row_before, count_before, t_after, row_after, count_after, B, H, P,
        CELL: tl.constexpr, EVEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    p = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    active, inside = _active(b, t, count, lengths_ptr, B), (p < P)[None, :]
    dh = _incoming(grad_output_ptr, grad_gates_ptr, w_ptr, lengths_ptr, resets_ptr, grad_h_ptr, b, p, active, row,
                   t_after, row_after, count_after, B, H, P, CELL, EVEN, BLOCK_K)
    tl.store(_at(grad_h_ptr, b, P, p), tl.zeros_like(dh), mask=active & inside)
    kept = tl.where(active, dh, 0.0).to(grad_hidden_ptr.dtype.element_ty)
    tl.store(_at(grad_hidden_ptr, row + b, P, p), kept, mask=(b < count)[:, None] & inside)
    if previous_ptr is not None:
        _copy_before(output_ptr, h0_ptr, previous_ptr, lengths_ptr, _reset(resets_ptr, row + b, b < count), b, p,
                     active, row, count, t_before, row_before, count_before, B, P, dh.dtype)


@triton.jit(do_not_specialize=_PLACES)
def _step_backward(
        grad_output_ptr, grad_hidden_ptr, grad_gates_ptr, w_ptr, lengths_ptr, resets_ptr, grad_h_ptr, grad_c_ptr,
        h0_ptr, c0_ptr, output_ptr, gates_ptr, cells_ptr, previous_ptr, t, row, count, t_before, row_before,
        count_before, t_after, row_after, count_after, B, H, P, CELL: tl.constexpr, EVEN: tl.constexpr,
        BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr):
    """grad_hidden_ptr: dh' of all rows, from `_grad_hidden`, and w_ptr: W_hr transposed, [H, P]; else as _incoming."""
    ACC: tl.constexpr = grad_h_ptr.dtype.element_ty
    STORED: tl.constexpr = 4 if CELL <= GRU else 1
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    j = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    active = _active(b, t, count, lengths_ptr, B)
    reset = _reset(resets_ptr, row + b, b < count)
    live = active & (j < H)[None, :]

    ptrs = _at(gates_ptr, row + b, STORED * H, j)  # gate by gate: a tile as forward's would change layouts eight times
    g0 = tl.load(ptrs, mask=live, other=0).to(ACC)
    g1, g2, g3 = g0, g0, g0
    if STORED == 4:
        g1 = tl.load(ptrs + H, mask=live, other=0)
        g2 = tl.load(ptrs + 2 * H, mask=live, other=0)
        g3 = tl.load(ptrs + 3 * H, mask=live, other=0)
    zero = tl.zeros((BLOCK_B, BLOCK_H), ACC)
    c, before, dc = zero, zero, zero
    if CELL == LSTM:
        taken = _active(b, t_before, count_before, lengths_ptr, B)
        c = tl.load(_at(cells_ptr, row + b, H, j), mask=live, other=0)
        before = _cut(_load_before(cells_ptr, c0_ptr, row_before + b, b, H, j, live, taken, ACC), reset)
        dc = tl.load(_at(grad_c_ptr, b, H, j), mask=live, other=0)
    if grad_hidden_ptr is None:
        if CELL == GRU or previous_ptr is not None:
            h = _copy_before(output_ptr, h0_ptr, previous_ptr, lengths_ptr, reset, b, j, active, row, count, t_before,
                             row_before, count_before, B, H, ACC)
            if CELL == GRU:
                before = h
        dh = _incoming(grad_output_ptr, grad_gates_ptr, w_ptr, lengths_ptr, resets_ptr, grad_h_ptr, b, j, active, row,
                       t_after, row_after, count_after, B, H, H, CELL, EVEN, BLOCK_K)
    else:
        rows = grad_hidden_ptr + ((row + tl.minimum(b, count - 1)).to(tl.int64) * P)[:, None]
        columns = w_ptr + (tl.minimum(j, H - 1).to(tl.int64) * P)[:, None]
        dh = _products(zero, rows, None, columns, None, P, EVEN, BLOCK_K)  # [BLOCK_B, BLOCK_H]

    d0, d1, d2, d3, state = _cell_backward(dh, dc, g0, g1, g2, g3, c, before, CELL)
    state = _cut(state, reset)
    if CELL == LSTM:
        tl.store(_at(grad_c_ptr, b, H, j), state, mask=live)
    if grad_hidden_ptr is None:
        tl.store(_at(grad_h_ptr, b, H, j), state if CELL == GRU else zero, mask=live)
    DTYPE: tl.constexpr = grad_gates_ptr.dtype.element_ty
    mask = (b < count)[:, None] & (j < H)[None, :]
    ptrs = _at(grad_gates_ptr, row + b, STORED * H, j)
    tl.store(ptrs, tl.where(active, d0, 0.0).to(DTYPE), mask=mask)
    if STORED == 4:
        tl.store(ptrs + H, tl.where(active, d1, 0.0).to(DTYPE), mask=mask)
        tl.store(ptrs + 2 * H, tl.where(active, d2, 0.0).to(DTYPE), mask=mask)
        tl.store(ptrs + 3 * H, tl.where(active, d3, 0.0).to(DTYPE), mask=mask)


# ---- launches --------------------------------------------------------------------------------------------------------

# {family: {kernel: (BLOCK_B, BLOCK_H, BLOCK_K, num_warps, num_stages) for up to 16, 64 and more sequences}}. Shared
# memory limits a step. By the static audit blocks twice as wide in H would raise a block's share of the tensor peak
# (bf16, up to 16 sequences: .29 to .36 on sm_80, .14 to .18 on sm_90; up to 64: .67 to .73, .50 to .57), but halve the
# programs, of which there are fewer than multiprocessors: 32 and 16 for H = 256.
CONFIGS = {
    "half": {"step": ((16, 8, 128, 2, 4), (64, 16, 64, 4, 4), (64, 32, 64, 8, 3)),
             "products": ((16, 16, 128, 2, 4), (64, 16, 128, 4, 3), (64, 32, 64, 8, 3))},
    "fp32": {"step": ((16, 8, 32, 4, 2), (32, 16, 16, 4, 2), (32, 16, 16, 4, 2)),
             "products": ((16, 16, 32, 4, 2), (32, 32, 16, 4, 2), (32, 32, 16, 4, 2))},
}


def _config(kernel, like, B, K):
    """-> BLOCK_B, BLOCK_H, BLOCK_K, whether that divides all of K, launch options"""
    if INTERPRETED:
        return 16, 32, 16, all(k % 16 == 0 for k in K), {}
    table = CONFIGS["half" if like.dtype.itemsize == 2 else "fp32"][kernel]
    block_b, block_h, block_k, warps, stages = table[0 if B <= 16 else 1 if B <= 64 else 2]
    if is_amd():  # with 64 lanes, eight would load 4 bytes
        warps = min(warps, 4)
    return block_b, block_h, block_k, all(k % block_k == 0 for k in K), {"num_warps": warps, "num_stages": stages}


def _places(T, B, batch_sizes, reverse):
    """(t, row, count) of each step in the order of running, one that is not there before and after"""
    counts = [B] * T if batch_sizes is None else batch_sizes.tolist()
    places, row = [], 0
    for t, count in enumerate(counts):
        places.append((t, row, count))
        row += count
    return [(0, 0, 0), *places[:: -1 if reverse else 1], (0, 0, 0)]


def _gates(cell):
    return (4, 3, 1, 1)[cell]


def forward(x, pre, T, batch_sizes, h, row_0, w_ih, w_hh, b_ih, b_hh, w_hr, lengths, resets, cell, reverse, output, h_n,
            state, new_state, hidden, gates, cells):
    """Writes output, new_state (which may be state), and h_n, gates and cells where they are given.

    Everything is contiguous. x: [B, I] for a single step, or pre: input's rows of W_ih x, [rows, G·H] in any dtype.
    h: a matrix with the initial state from row row_0 on, above it output (if there is more than one step).
    state: [B, H], c of an LSTM and h of a GRU before the steps, overwritten; hidden: [B, H] scratch with w_hr.
    """
    P = w_hh.shape[1]
    B, H = h.shape[0] - row_0, w_hh.shape[0] // _gates(cell)
    inputs = x.shape[1] if pre is None else 0
    block_b, block_h, *blocks, options = _config("step" if cell < 2 else "products", output, B, (inputs, P))
    *p_blocks, p_options = _config("products", output, B, (H,))
    before, *places, _ = _places(T, B, batch_sizes, reverse)
    for place in places:
        count = place[2]
        if count:
            _step[(triton.cdiv(count, block_b), triton.cdiv(H, block_h))](
                x, pre, h, w_ih, w_hh, b_ih, b_hh, lengths, resets, output, hidden, h_n, state, new_state, gates, cells,
                row_0, *place, *before, B, inputs, H, P, cell, blocks[1], block_b, block_h, blocks[0], **options)
        if count and w_hr is not None:
            _project[(triton.cdiv(count, p_blocks[0]), triton.cdiv(P, p_blocks[1]))](
                hidden, w_hr, lengths, output, h_n, *place, B, H, P, p_blocks[3], *p_blocks[:3], **p_options)
        before = place


def backward(grad_output, T, batch_sizes, h0, c0, w_hh_t, w_hr_t, lengths, resets, output, gates, cells, cell, reverse,
             grad_h, grad_c, grad_gates, grad_hidden, previous):
    """Writes grad_gates, and grad_hidden and previous where they are given, rows as output's; turns grad_h: [B, P] and
    grad_c: [B, H] in Acc, the gradients of the final state, into those of the initial one.

    Everything is contiguous. w_hh_t: [P, G·H]; w_hr_t: [H, P]. grad_gates: of i, f, g, o; of n, r, z, W_hn h + b_hn;
    of the sum. grad_hidden: of h', needed with w_hr. previous: h before the step.
    """
    B, P = h0.shape
    H = w_hh_t.shape[1] // _gates(cell)
    *blocks, options = _config("products", output, B, (w_hh_t.shape[1],))
    *p_blocks, p_options = _config("products", output, B, (P,))
    saved = gates if cell < 2 else output
    places = _places(T, B, batch_sizes, reverse)
    for before, place, after in zip([(0, 0, 0), *places][-3::-1], places[-2::-1], places[::-1]):
        count = max(place[2], after[2])
        where = *place, *before, *after, B, H, P, cell
        if count and w_hr_t is not None:
            _grad_hidden[(triton.cdiv(count, blocks[0]), triton.cdiv(P, blocks[1]))](
                grad_output, grad_gates, w_hh_t, lengths, resets, grad_h, h0, output, previous, grad_hidden, *where,
                blocks[3], *blocks[:3], **options)
        if place[2] and w_hr_t is not None:
            _step_backward[(triton.cdiv(place[2], p_blocks[0]), triton.cdiv(H, p_blocks[1]))](
                None, grad_hidden, grad_gates, w_hr_t, lengths, resets, grad_h, grad_c, h0, c0, output, saved, cells,
                None, *where, p_blocks[3], *p_blocks[:3], **p_options)
        if count and w_hr_t is None:
            _step_backward[(triton.cdiv(count, blocks[0]), triton.cdiv(H, blocks[1]))](
                grad_output, None, grad_gates, w_hh_t, lengths, resets, grad_h, grad_c, h0, c0, output, saved, cells,
                previous, *where, blocks[3], *blocks[:3], **options)
