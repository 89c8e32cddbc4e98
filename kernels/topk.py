"""Exact top-k search in Triton: of s_m = scale · q·K_m the k largest, equal ones by the lower index, NaN above all.

  kernel    a program owns                             reads                     writes
  _search   BLOCK_M queries of one head and one of     its queries once, its     the K best of its keys for each query,
            `splits` shares of the keys                share of the keys         sorted (K: the power of two from k on)
  _merge    ROWS queries' results for one head each    the lists of all splits   scores, indices

A score is a pair of integers: its bits, made to order as it does, and the index of its key. The order of pairs is
total, so neither blocks nor splits show in the result. For each query a program keeps a list of the K best, a buffer,
and in registers the bar, the k-th best score so far. Scores that pass the bar are appended to the buffer; between
groups of key blocks, if a row has enough of them, buffers are sorted and joined with the lists, which raises the bar.
Lists and buffers are scratch memory that no other program sees, and their size does not depend on M.

The first version sorted each block of scores of which any passed: with 64 queries that is nearly every block (64 of 64
at M = 4096, k = 32), now it is five sorts. The loop over a group's blocks holds no barrier, else it is not pipelined.

Sorting is bitonic, on tiles seen as hypercubes: the partner in a comparison is a neighbour along an axis of size 2.
"""
import triton
import triton.language as tl

from .target import INTERPRETED, target, units

# ---- pairs (s, j): a score's order and its key's index, integers as wide as the score --------------------------------

@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@triton.jit
def order(score):
    """Floats -> integers of the same width in the order of the search, none of them the lowest: −0 is 0, NaN the top.
    In integers alone, since what was not stored may be a signalling NaN"""
    BITS: tl.constexpr = score.dtype.primitive_bitwidth
    TOP: tl.constexpr = 2**(BITS - 1) - 1
    INFINITY: tl.constexpr = 0x7FF << 52 if BITS == 64 else 0xFF << 23
    bits = score.to(tl.int64 if BITS == 64 else tl.int32, bitcast=True)
    s = bits ^ ((bits >> (BITS - 1)) & TOP)
    return tl.where((bits & TOP) > INFINITY, TOP, tl.where(s == -1, 0, s))  # −1 is −0's


@triton.jit
def score_of(s):
    """The inverse of order; of the lowest integer, which is no score's, a NaN"""
    BITS: tl.constexpr = s.dtype.primitive_bitwidth
    TOP: tl.constexpr = 2**(BITS - 1) - 1
    return (s ^ ((s >> (BITS - 1)) & TOP)).to(tl.float64 if BITS == 64 else tl.float32, bitcast=True)


@triton.jit
def nothing(R: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """[R, K] pairs that come after every other"""
    TOP: tl.constexpr = 2**(ACC.primitive_bitwidth - 1) - 1
    j = tl.full((R, K), TOP, tl.int64 if ACC.primitive_bitwidth == 64 else tl.int32)
    return -1 - j, j


@triton.jit
def _before(s, j, other_s, other_j):
    """Whether the other pair comes first"""
    return (other_s > s) | ((other_s == s) & (other_j < j))


@triton.jit
def _partner(x, AXIS: tl.constexpr):
    """The neighbour of each element along an axis of size 2; integers wrap, so the difference is exact"""
    return tl.sum(x, AXIS, keep_dims=True) - x


@triton.jit
def _bit(i: tl.constexpr, RANK: tl.constexpr):
    """Bit i of an element's place in a hypercube: [1, …, 2, …, 1]"""
    return tl.reshape(tl.arange(0, 2), [1] * (RANK - 1 - i) + [2] + [1] * i)


@triton.jit
def _cube(x):
    return tl.reshape(x, [2] * _log2(x.numel) if x.numel > 1 else [1])


@triton.jit
def _sort_bitonic(s, j, STAGE: tl.constexpr, up):
    """Cubes of bitonic runs of 2^STAGE -> the runs sorted, ascending where up is 1, descending where it is 0"""
    RANK: tl.constexpr = _log2(s.numel)
    for i in tl.static_range(STAGE):
        other_s, other_j = _partner(s, RANK - STAGE + i), _partner(j, RANK - STAGE + i)
        swap = _before(s, j, other_s, other_j) ^ ((_bit(STAGE - 1 - i, RANK) ^ up) != 0)
        s, j = tl.where(swap, other_s, s), tl.where(swap, other_j, j)
    return s, j


@triton.jit
def _directions(STAGE: tl.constexpr, LAST: tl.constexpr, RANK: tl.constexpr):
    """The even runs of 2^STAGE ascending, the odd ones descending; when there is but one a row, ascending"""
    if STAGE < LAST:
        return 1 - _bit(STAGE, RANK)
    else:
        return 1


@triton.jit
def _first(s, j, AXIS: tl.constexpr):
    """Of each two neighbours along an axis of size 2 the one that comes first; the axis goes"""
    other_s, other_j = _partner(s, AXIS), _partner(j, AXIS)
    swap = _before(s, j, other_s, other_j)
    return tl.max(tl.where(swap, other_s, s), AXIS), tl.max(tl.where(swap, other_j, j), AXIS)  # both are the same


@triton.jit
def sort_runs(s, j, K: tl.constexpr):
    """s, j: [R, W] -> runs of K sorted, the even runs of a row ascending, the odd ones descending"""
    RANK: tl.constexpr = _log2(s.numel)
    LAST: tl.constexpr = _log2(s.shape[1])
    cube_s, cube_j = _cube(s), _cube(j)
    for stage in tl.static_range(1, _log2(K) + 1):
        cube_s, cube_j = _sort_bitonic(cube_s, cube_j, stage, _directions(stage, LAST, RANK))
    return tl.reshape(cube_s, s.shape), tl.reshape(cube_j, j.shape)


@triton.jit
def join(best_s, best_j, s, j, up):
    """The lists best: [R, K], descending, and s, j: [R, W], runs of K as sort_runs makes them -> the K best of all of
    them, ascending if up is 1, descending if it is 0"""
    R: tl.constexpr = best_s.shape[0]
    K: tl.constexpr = best_s.shape[1]
    LOG_K: tl.constexpr = _log2(K)
    LEVELS: tl.constexpr = _log2(s.shape[1]) - LOG_K
    RANK: tl.constexpr = _log2(s.numel)
    s, j = _cube(s), _cube(j)
    for level in tl.static_range(LEVELS):  # of an ascending and a descending run, element by element, the better one
        s, j = _first(s, j, RANK - 1 - level - LOG_K)
        s, j = _sort_bitonic(s, j, LOG_K, _directions(LOG_K, LOG_K + LEVELS - 1 - level, RANK - 1 - level))
    s, j = tl.reshape(s, (R, K)), tl.reshape(j, (R, K))
    swap = _before(best_s, best_j, s, j)
    s, j = _cube(tl.where(swap, s, best_s)), _cube(tl.where(swap, j, best_j))
    s, j = _sort_bitonic(s, j, LOG_K, up)
    return tl.reshape(s, (R, K)), tl.reshape(j, (R, K))


# ---- loads and stores ------------------------------------------------------------------------------------------------
# In memory a block of pairs is its scores and, SIZE elements on, their indices, bit by bit in the scores' dtype: the
# second address is a constant away from the first.

@triton.jit
def _load_pairs(ptr, places, inside, SIZE: tl.constexpr):
    """Nothing where not inside, though there is memory: a mask would make narrow loads"""
    score = tl.load(ptr + places)
    none_s, none_j = nothing(1, 1, score.dtype)
    j = tl.load(ptr + places + SIZE).to(none_j.dtype, bitcast=True)
    j = tl.where(inside, j, none_j)
    return tl.where(j == none_j, none_s, order(score)), j  # nothing was stored with the score NaN


@triton.jit
def _store_pairs(ptr, places, score, j, SIZE: tl.constexpr, mask=None):
    tl.store(ptr + places, score, mask=mask)
    tl.store(ptr + places + SIZE, j.to(score.dtype, bitcast=True), mask=mask)


@triton.jit
def _load_part(rows, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns d to d + BLOCK_D of rows: [R] pointers -> [R, BLOCK_D], zero beyond D"""
    cols = d + tl.arange(0, BLOCK_D)[None, :]
    if D % BLOCK_D == 0:
        return tl.load(rows[:, None] + cols)
    else:
        return tl.load(rows[:, None] + cols, mask=cols < D, other=0)


# ---- kernels ---------------------------------------------------------------------------------------------------------

@triton.jit
def _products(q, keys, acc):
    """q: [BLOCK_M, BLOCK_D], keys: [BLOCK_N, BLOCK_D] -> acc + q keysᵀ: [BLOCK_M, BLOCK_N]. Never TF32"""
    if acc.shape[0] == 1:
        return acc + tl.sum(q.to(acc.dtype) * keys.to(acc.dtype), 1)[None, :]
    else:
        return tl.dot(q, tl.trans(keys), acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _flush(list_ptr, found_ptr, counts_ptr, valid, most, old, up, BLOCK_M: tl.constexpr, K: tl.constexpr,
           CAPACITY: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Joins the first `valid` rows of the buffer, none of which has more than `most` pairs, with the lists, if these
    are `old`. Lists are descending; up: 1 leaves them ascending."""
    tl.debug_barrier()  # what is loaded here other threads have stored
    for first in range(0, valid, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        places = rows * K + tl.arange(0, K)[None, :]
        s, j = _load_pairs(list_ptr, places, old, BLOCK_M * K)  # [ROWS, K]
        count = tl.load(counts_ptr + rows).to(tl.int32)  # [ROWS, 1]
        for start in range(0, tl.maximum(most, 1), CHUNK):
            place = start + tl.arange(0, CHUNK)[None, :]
            new_s, new_j = _load_pairs(found_ptr, rows * CAPACITY + place, place < count, BLOCK_M * CAPACITY)
            new_s, new_j = sort_runs(new_s, new_j, K)  # [ROWS, CHUNK]
            s, j = join(s, j, new_s, new_j, (start + CHUNK >= most).to(tl.int32) * up)
        tl.debug_barrier()  # all have loaded the lists
        _store_pairs(list_ptr, places, score_of(s), j, BLOCK_M * K)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["N", "M", "share", "blocks"])
def _search(
        query_ptr, keys_ptr, lists_ptr, buffers_ptr, query_strides, keys_strides, scale, N, H, M, share, blocks, k,
        D: tl.constexpr, BLOCK_D: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
        ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):
    """For each program [splits, H, blocks] lists has pairs [BLOCK_M, K] and buffers pairs [BLOCK_M, CHUNK + GROUP] and
    the numbers of those [BLOCK_M], padded to 16. A split has `share` keys. If a row of the buffer holds CHUNK pairs,
    buffers are sorted: GROUP keys more always fit. GROUP is a multiple of CHUNK. Sorting takes ROWS rows and CHUNK
    pairs of each at a time."""
    ACC: tl.constexpr = lists_ptr.dtype.element_ty
    CAPACITY: tl.constexpr = CHUNK + GROUP
    pid = tl.program_id(0)
    h = (pid // blocks % H).to(tl.int64)
    split = pid // blocks // H
    own = tl.arange(0, BLOCK_M)
    valid = tl.minimum(N - pid % blocks * BLOCK_M, BLOCK_M)
    n = pid % blocks * BLOCK_M + tl.minimum(own, valid - 1)  # rows past the last repeat it and are never sorted
    start = split * share
    end = tl.minimum(start + share, M)
    query_rows = query_ptr + h * query_strides[1] + n.to(tl.int64) * query_strides[0]
    keys_ptr += h * keys_strides[0]
    list_ptr = lists_ptr + pid.to(tl.int64) * (2 * BLOCK_M * K)
    found_ptr = buffers_ptr + pid.to(tl.int64) * (2 * BLOCK_M * CAPACITY + max(BLOCK_M, 16))
    counts_ptr = found_ptr + 2 * BLOCK_M * CAPACITY

    if D <= BLOCK_D:
        q = _load_part(query_rows, 0, D, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    count = tl.zeros((BLOCK_M,), tl.int32)
    bar = tl.full((BLOCK_M,), float("nan"), ACC)  # nothing is below it
    old = start < 0
    length = start * 0 + CHUNK
    while start < end:
        stop = tl.minimum(start + length, end)
        for block in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
            j = block + tl.arange(0, BLOCK_N)
            # Keys past the last repeat it, which needs no mask beside the one that scores have.
            rows = keys_ptr + tl.minimum(j, M - 1).to(tl.int64) * keys_strides[1]
            s = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            if D <= BLOCK_D:
                s = _products(q, _load_part(rows, 0, D, BLOCK_D), s)
            else:
                for d in range(0, D, BLOCK_D):
                    s = _products(_load_part(query_rows, d, D, BLOCK_D), _load_part(rows, d, D, BLOCK_D), s)
            s = s * scale
            passes = ((s <= bar[:, None]) == 0) & (j < stop)[None, :]  # NaN on either side passes
            if tl.max(passes.to(tl.int32)) > 0:
                spots = own[:, None] * CAPACITY + (count[:, None] + tl.cumsum(passes.to(tl.int32), 1) - 1)
                wide = tl.broadcast_to(j.to(nothing(1, 1, ACC)[1].dtype)[None, :], s.shape)
                _store_pairs(found_ptr, spots, s, wide, BLOCK_M * CAPACITY, passes)
                count += tl.sum(passes.to(tl.int32), 1)
        # Groups double, as long as they may: on random keys each lets pass about 0.7 k a query.
        length = tl.minimum(2 * length, GROUP)
        start = stop
        most = tl.max(count)
        if (most >= CHUNK) | (start >= end):
            # The last time even splits leave their lists ascending, odd ones descending: runs as `join` takes them.
            up = (start >= end).to(tl.int32) * (1 - split % 2)
            tl.store(counts_ptr + own, count.to(ACC))
            _flush(list_ptr, found_ptr, counts_ptr, valid, most, old, up, BLOCK_M, K, CAPACITY, CHUNK, ROWS)
            count = tl.zeros_like(count)
            bar = tl.load(list_ptr + tl.minimum(own, valid - 1) * K + (k - 1))  # of a place that is empty still: NaN
            old = start > 0


@triton.jit(do_not_specialize=["N", "splits", "blocks"])
def _merge(
        lists_ptr, scores_ptr, indices_ptr, N, H, blocks, splits, k, BLOCK_M: tl.constexpr, K: tl.constexpr,
        WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """lists: as _search leaves them; scores, indices: [N, H, k]. WIDTH: pairs of a query joined at once"""
    ACC: tl.constexpr = scores_ptr.dtype.element_ty
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    out = tl.minimum(out, N * H - 1).to(tl.int64)  # rows past the last repeat it
    n, h = out // H, out % H
    place = tl.arange(0, WIDTH)[None, :]
    run = place // K
    s, j = nothing(ROWS, K, ACC)
    for first in range(0, splits, WIDTH // K):
        split = tl.minimum(first + run, splits - 1).to(tl.int64)
        block = (split * H + h) * blocks + n // BLOCK_M  # [ROWS, WIDTH]
        at = (block * (2 * BLOCK_M) + n % BLOCK_M) * K + place % K
        new_s, new_j = _load_pairs(lists_ptr, at, first + run < splits, BLOCK_M * K)
        s, j = join(s, j, new_s, new_j, 0)
    place = tl.arange(0, K)[None, :]
    tl.store(scores_ptr + out * k + place, score_of(s), mask=place < k)
    tl.store(indices_ptr + out * k + place, j.to(tl.int64), mask=place < k)


# ---- launches --------------------------------------------------------------------------------------------------------

MERGED_PAIRS = 4096  # that a merge holds in registers
SCRATCH_PAIRS = 2**15 if INTERPRETED else 2**24  # pairs of scratch memory that a launch has for its queries

# Where eight warps take exact fp32 tiles of 32 queries: by the static audit the share of the multiply-adds' peak goes
# from .81 to .86 on sm_80 and from .38 to .47 on sm_100 and sm_120 (128 numbers a key), twice as many warps are
# resident, and sm_80 no longer spills. Elsewhere they lose: sm_90 would spill up to 24 bytes, sm_86 and sm_89 go from
# .32 to .28.
EIGHT_WARPS = {"sm_80", "sm_100", "sm_120"}


def _plan(N, H, M, D, k, size):
    """-> (splits, constants and options of _search), for N queries and M keys of D numbers of `size` bytes"""
    K = max(2, triton.next_power_of_2(k))
    if INTERPRETED:
        block_m, block_n, block_d = 1 if N == 1 else max(16, min(triton.next_power_of_2(N), 64)), 32, 64
        chunk, group, pairs, warps, stages = 32, 128, 64 * 32, 4, 1
    elif N == 1:  # products stay in registers, and wide loads go there at once
        block_m, block_n, block_d = 1, 64, 256
        chunk, group, pairs, warps, stages = 256, 1024, 256, 4, 1
    else:
        block_m = max(16, min(triton.next_power_of_2(N), 64 if size == 2 and K <= 64 else 32))
        block_n, block_d = 64, 256 if size == 2 else 128
        eight = size == 4 and block_m == 32 and K <= 256 and target() in EIGHT_WARPS
        warps = 8 if block_m == 64 or eight else 4
        chunk, group, pairs, stages = 128, 512, 128 * warps, 3 if size == 2 else 2
    chunk = max(chunk, K)
    block_d = max(16, min(triton.next_power_of_2(D), block_d))
    programs = H * triton.cdiv(N, block_m)
    wanted = triton.cdiv(2 * units(), programs)
    shortest = max(32, K) if INTERPRETED else max(512, 4 * K)  # a split reports K candidates, whatever its share
    splits = max(1, min(wanted, M // shortest))
    options = {"D": D, "BLOCK_D": block_d, "K": K, "GROUP": max(group, chunk), "CHUNK": chunk,
               "ROWS": min(block_m, max(1, pairs // chunk)), "BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages,
               "num_warps": warps}
    if target().startswith("sm_"):  # without a limit ptxas finds one that it likes better and spills to meet it
        options["maxnreg"] = 128 if (N == 1 and K <= 256) or (size == 4 and warps == 8) else 248
    return splits, options


def rows_of(width):
    """-> (rows of so many pairs that a program sorts together, launch options)"""
    return 64 if INTERPRETED else max(1, 128 // width), {"num_warps": min(8, max(1, width // 256))}


def _width(K, splits):
    """Pairs of a query that a merge joins at once; few numbers, so that a growing M compiles few kernels"""
    width = K if splits == 1 else 8 * max(K, 8)
    while width < min(K * splits, MERGED_PAIRS):
        width *= 8
    return min(width, max(K, MERGED_PAIRS))


def search(query, keys, scale, scores, indices):
    """Writes scores: [N, H, k], fp32 (fp64 for fp64), and indices: [N, H, k], int64, both contiguous.

    query: [N, H, d] and keys: [H, M, d], of any strides but 1 in the last dimension; k ≤ M, d ≥ 1, M below 2³¹ − 4096.
    """
    N, H, k = scores.shape
    if not N * H:
        return
    most = max(1, SCRATCH_PAIRS // (H * (640 + 3 * k)))
    for first in range(0, N, most):
        some = slice(first, first + most)
        _search_some(query[some], keys, scale, scores[some], indices[some])


def _search_some(query, keys, scale, scores, indices):
    N, H, k = scores.shape
    M, D = keys.shape[1:]
    splits, options = _plan(N, H, M, D, k, query.dtype.itemsize)
    K, block_m, capacity = options["K"], options["BLOCK_M"], options["CHUNK"] + options["GROUP"]
    share = triton.cdiv(triton.cdiv(M, splits), options["BLOCK_N"]) * options["BLOCK_N"]
    splits, blocks = triton.cdiv(M, share), triton.cdiv(N, block_m)
    programs = splits * H * blocks
    lists = scores.new_empty(programs * 2 * block_m * K)
    buffers = scores.new_empty(programs * (2 * block_m * capacity + max(block_m, 16)))
    _search[(programs,)](
        query, keys, lists, buffers, query.stride()[:2], keys.stride()[:2], scale, N, H, M, share, blocks, k, **options)
    rows, options = rows_of(width := _width(K, splits))
    _merge[(triton.cdiv(N * H, rows),)](
        lists, scores, indices, N, H, blocks, splits, k, block_m, K, width, rows, **options)


# What `python -m pykernels audit` may find here, and why it is shipped all the same.
AUDIT_EXCEPTIONS = [
    dict(kernel="_search", check="spill",
         where={"dtype": "float32", "target": ("sm_100", "sm_120"), "BLOCK_M": (16, 32)},
         reason="ptxas puts 8 to 48 bytes a thread aside whatever it may use: exact fp32 tiles spill with 128, 248 and "
                "255 registers alike; four warps for 32 queries spill less and lose a fifth of the share, eight for 16 "
                "queries spill nothing and lose half of it"),
    dict(kernel="_merge", check="spill", where={"dtype": "float32", "target": "sm_100", "WIDTH": 2048},
         reason="8 bytes, outside every loop"),
]
