"""Weighted sums of a table's rows chosen by index, in Triton, and their gradients.

  forward    y_n = Σ_j w_nj V[i_nj]
  backward   dw_nj = dy_n · V[i_nj];  dV[m] = Σ_{n, j: i_nj = m} w_nj dy_n

  kernel      a program owns                       reads                            writes
  _forward    BLOCK columns of a bag               its rows, ROWS side by side      y
  _dot_rows   ROWS entries of a bag                their rows, BLOCK columns at     dw
                                                   a time; the bag's dy
  _sum_hits   BLOCK columns of HITS hits, sorted   order, w and dy of the hits      dV of rows that end within, sums of
              by row, then position                                                 those cut at either end
  _join       BLOCK columns of a row that was cut  its sums, in order               its dV

A bag is (n, g): table g's. An index out of range is a row of zeros: it is not read. The hits are sorted by the caller,
and cut into equal lots wherever rows begin and end, so that a row with all the hits costs no more than any others; a
lot adds in order and the lots' sums are added in order: nothing is atomic, and the bits are the same in every run.
"""
import triton
import triton.language as tl

from .target import INTERPRETED, lanes


@triton.jit
def _columns(block, dv, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """-> columns, which of these exist"""
    c = block * BLOCK + tl.arange(0, BLOCK)
    return c, (c < dv) | EVEN


# ---- reading a table -------------------------------------------------------------------------------------------------

@triton.jit
def _row_numbers(indices_ptr, first, j, k, M):
    """indices: [ROWS] of entries j of a bag -> rows, which of these exist"""
    m = tl.load(indices_ptr + first + j, mask=j < k, other=-1)
    return m, (m >= 0) & (m < M)


@triton.jit(do_not_specialize=["k", "M"])
def _forward(
        values_ptr, indices_ptr, weights_ptr, y_ptr, G, k, M, dv, table_stride, row_stride, EVEN: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """values_ptr: [G, M, dv], indices_ptr, weights_ptr: [N, G, k], y_ptr: [N, G, dv]"""
    blocks = tl.cdiv(dv, BLOCK)
    bag = (tl.program_id(0) // blocks).to(tl.int64)
    c, inside = _columns(tl.program_id(0) % blocks, dv, EVEN, BLOCK)
    table_ptr = values_ptr + bag % G * table_stride + c[None, :]
    first = bag * k
    j = tl.arange(0, ROWS)
    sums = tl.zeros((ROWS, BLOCK), weights_ptr.dtype.element_ty)
    m, exists = _row_numbers(indices_ptr, first, j, k, M)
    for _ in range(0, k, ROWS):
        w = tl.load(weights_ptr + first + j, mask=j < k, other=0)
        rows = tl.load(table_ptr + m[:, None] * row_stride, mask=exists[:, None] & inside[None, :], other=0)
        j += ROWS
        m, exists = _row_numbers(indices_ptr, first, j, k, M)  # while the rows are on their way
        sums += w[:, None] * rows.to(sums.dtype)
    y = tl.sum(sums, 0)  # [ROWS, BLOCK] -> [BLOCK]
    tl.store(y_ptr + bag * dv + c, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["k", "M"])
def _dot_rows(
        grad_ptr, values_ptr, indices_ptr, grad_weights_ptr, G, k, M, dv, table_stride, row_stride, EVEN: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """grad_ptr: [N, G, dv], values_ptr: [G, M, dv], indices_ptr, grad_weights_ptr: [N, G, k]"""
    parts = tl.cdiv(k, ROWS)
    bag = (tl.program_id(0) // parts).to(tl.int64)
    j = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    m, exists = _row_numbers(indices_ptr, bag * k, j, k, M)
    rows_ptr = values_ptr + bag % G * table_stride + m[:, None] * row_stride
    sums = tl.zeros((ROWS, BLOCK), grad_weights_ptr.dtype.element_ty)
    for block in range(0, tl.cdiv(dv, BLOCK)):
        c, inside = _columns(block, dv, EVEN, BLOCK)
        rows = tl.load(rows_ptr + c[None, :], mask=exists[:, None] & inside[None, :], other=0)
        grad = tl.load(grad_ptr + bag * dv + c, mask=inside, other=0)
        sums += rows.to(sums.dtype) * grad[None, :].to(sums.dtype)
    tl.store(grad_weights_ptr + bag * k + j, tl.sum(sums, 1), mask=j < k)  # [ROWS, BLOCK] -> [ROWS]


# ---- the table's gradient --------------------------------------------------------------------------------------------

@triton.jit
def _row_at(rows_ptr, i, count):
    """The row that hit i is of; −1 for a hit that is not there"""
    return tl.load(rows_ptr + i, mask=(i >= 0) & (i < count), other=-1)


@triton.jit(do_not_specialize=["count", "k", "M"])
def _sum_hits(
        grad_ptr, weights_ptr, rows_ptr, order_ptr, out_ptr, cut_ptr, count, k, M, dv, EVEN: tl.constexpr,
        HITS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """grad_ptr: [bags, dv], weights_ptr: [bags, k]. rows_ptr, order_ptr: [count], the hits' rows, ascending, and their
    positions in weights, of one dtype. out_ptr: [M, dv]. cut_ptr: [lots, 2, dv], the sums of the row that a lot before
    began, and of the row that the lot after goes on with."""
    blocks = tl.cdiv(dv, BLOCK)
    lot = tl.program_id(0) // blocks
    c, inside = _columns(tl.program_id(0) % blocks, dv, EVEN, BLOCK)
    first = lot.to(rows_ptr.dtype.element_ty) * HITS
    row = _row_at(rows_ptr, first, count)
    begun = _row_at(rows_ptr, first - 1, count) == row
    goes_on = begun
    acc = tl.zeros((BLOCK,), weights_ptr.dtype.element_ty)
    cut = acc
    for i_0 in range(0, HITS, STEPS):
        grads, weights, rows = (), (), (row,)
        for s in tl.static_range(STEPS):
            i = first + i_0 + s
            position = tl.load(order_ptr + i, mask=i < count, other=0)
            bag = (position // k).to(tl.int64)
            grads = grads + (tl.load(grad_ptr + bag * dv + c, mask=inside, other=0),)
            weights = weights + (tl.load(weights_ptr + position, mask=i < count, other=0),)
            rows = rows + (_row_at(rows_ptr, i + 1, count),)
        for s in tl.static_range(STEPS):
            there = first + i_0 + s < count
            acc += tl.where(there, weights[s] * grads[s].to(acc.dtype), 0.0)
            ends = there & (rows[s] != rows[s + 1])
            out = rows[s].to(tl.int64) * dv + c
            exists = (rows[s] >= 0) & (rows[s] < M)
            tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=inside & (ends & exists & (begun == 0)))
            cut = tl.where(begun, acc, cut)
            acc = tl.where(ends, 0.0, acc)
            begun = begun & (ends == 0)
        row = rows[STEPS]
    if goes_on:
        tl.store(cut_ptr + lot.to(tl.int64) * 2 * dv + c, cut, mask=inside)
    tl.store(cut_ptr + (lot.to(tl.int64) * 2 + 1) * dv + c, acc, mask=inside)


@triton.jit(do_not_specialize=["count", "lots", "steps", "M"])
def _join(
        rows_ptr, cut_ptr, out_ptr, count, lots, steps, M, dv, EVEN: tl.constexpr, HITS: tl.constexpr,
        ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Program `lot`: the row that begins in it and goes on in the lots after. steps: 2^steps > lots. As _sum_hits."""
    blocks = tl.cdiv(dv, BLOCK)
    lot = tl.program_id(0) // blocks
    c, inside = _columns(tl.program_id(0) % blocks, dv, EVEN, BLOCK)
    first = lot.to(rows_ptr.dtype.element_ty) * HITS
    row = _row_at(rows_ptr, first + HITS - 1, count)
    before = _row_at(rows_ptr, first - 1, count)
    if (_row_at(rows_ptr, first + HITS, count) == row) & (before != row) & (row >= 0) & (row < M):
        last, none = lot + 1, lots  # the last lot that begins with this row, by bisection
        for _ in range(0, steps):
            middle = (last + none) // 2
            found = _row_at(rows_ptr, middle.to(first.dtype) * HITS, count) == row
            last = tl.where(found, middle, last)
            none = tl.where(found, none, middle)
        acc = tl.zeros((ROWS, BLOCK), cut_ptr.dtype.element_ty)
        for part in range(lot, last + 1, ROWS):
            parts = part + tl.arange(0, ROWS)
            at = parts.to(tl.int64) * 2 + tl.where(parts == lot, 1, 0)
            ptrs = cut_ptr + at[:, None] * dv + c[None, :]
            acc += tl.load(ptrs, mask=(parts <= last)[:, None] & inside[None, :], other=0)
        total = tl.sum(acc, 0)  # [ROWS, BLOCK] -> [BLOCK]
        tl.store(out_ptr + row.to(tl.int64) * dv + c, total.to(out_ptr.dtype.element_ty), mask=inside)


# ---- launches --------------------------------------------------------------------------------------------------------

ENOUGH_PROGRAMS = 264  # of one warp that keep a GPU busy; fewer take four warps each, side by side over rows
HITS = 16 if INTERPRETED else 32  # hits of a lot


def _block(dv, itemsize):
    """-> EVEN, BLOCK: 16 bytes a lane of one warp, or all columns where these are fewer"""
    block = 64 if INTERPRETED else lanes() * 16 // itemsize
    block = min(block, triton.next_power_of_2(max(dv, 1)))
    return {"EVEN": dv % block == 0, "BLOCK": block}


def _strides(values):
    return values.stride(0), values.stride(1)


def forward(values, indices, weights, out):
    """Writes out: [N, G, dv]; rows of values [G, M, dv] are contiguous, as are indices and weights [N, G, k]."""
    N, G, k = indices.shape
    _, M, dv = values.shape
    if not out.numel():
        return
    options = _block(dv, values.dtype.itemsize)
    programs = N * G * triton.cdiv(dv, options["BLOCK"])
    warps = 1 if programs >= ENOUGH_PROGRAMS or INTERPRETED else 4
    _forward[(programs,)](
        values, indices, weights, out, G, k, M, dv, *_strides(values), **options, ROWS=8 * warps, num_warps=warps)


def dot_rows(grad, values, indices, grad_weights):
    """Writes grad_weights: [N, G, k]; grad: [N, G, dv]. As forward."""
    N, G, k = indices.shape
    _, M, dv = values.shape
    if not grad_weights.numel():
        return
    options = _block(dv, values.dtype.itemsize) | {"ROWS": 8}
    _dot_rows[(N * G * triton.cdiv(k, options["ROWS"]),)](
        grad, values, indices, grad_weights, G, k, M, dv, *_strides(values), **options, num_warps=1)


def sum_rows(grad, weights, rows, order, out):
    """Writes the used rows of out: [M, dv], contiguous. grad: [bags, dv], weights: [bags, k]; rows, order: [count], of
    the hits their rows, ascending (those from M on are left out), and their positions in weights, flat."""
    count, (M, dv) = rows.shape[0], out.shape
    if not count or not out.numel():
        return
    options = _block(dv, grad.dtype.itemsize) | {"HITS": HITS}
    lots = triton.cdiv(count, HITS)
    cut = weights.new_empty((lots, 2, dv))
    grid = (lots * triton.cdiv(dv, options["BLOCK"]),)
    _sum_hits[grid](
        grad, weights, rows, order, out, cut, count, weights.shape[1], M, dv, **options, STEPS=min(8, HITS),
        num_warps=1)
    if lots > 1:
        _join[grid](rows, cut, out, count, lots, lots.bit_length(), M, dv, **options, ROWS=8, num_warps=1)
