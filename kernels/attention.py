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
(exp2, BY_FMA): of 66 operations a pass 64 are left to it at D = 64 on sm_90, 61 and 63 at D = 64 and 128 on sm_100.
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
    LOWEST,
    LOWEST_64,
    base_of,
    dot,
    exp2,
    high_of,
    keep_mask,
    length_of,
    load,
    load_bias,
    load_paged,
    load_slope,
    locate,
    low_of,
    products,
    rows_at,
    score,
    store,
    stream_tile,
    tile_range,
    unit_of,
)
from .target import INTERPRETED, padded, target, units
from .tiles import LOG2E

# ---- kernels ---------------------------------------------------------------------------------------------------------
# strides: (batch, head, row, column) in elements. N, M: rows of the query and key axes (packed: of all S sequences).
# blocks: slots of the owned axis, see locate. left, right, scale, softcap, threshold, inv_keep: as in the equations.
# One compilation serves all counts and windows, and but for these all lengths: a single query has kernels of its own,
# and where N is the distance of rows of lse and Δ (a split's: count), its being a multiple of 16 makes loads wide, as
# does M's of the loads of a bias, which it masks.

COUNTS = ["B", "S", "steps", "blocks", "part", "pages", "left", "right", "bias_B"]

@triton.jit(do_not_specialize=[*COUNTS, "M"], do_not_specialize_on_alignment=["N", "splits"])
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
    unit = unit_of(bias_ptr, slopes_ptr, scale, softcap, SOFTCAP, ACC)
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
    block, q_first, n, k_first, m = locate(slot, cu_q_ptr, cu_k_ptr, S, steps, N, M, BLOCK_M)
    count = n * GROUP if PACK else n
    if block * BLOCK_M >= count:
        return
    length, offset = length_of(lengths_ptr, b, n, m, ALIGN)
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
    q = load(base_of(q_ptr, b, h, q_first, q_strides), q_rows, valid, q_strides[3], D, BLOCK_D)  # [BLOCK_M, D]
    if FLIP:  # so that scale > 0 and the largest product gives the largest score
        q = -q
    if table_ptr is not None:
        table_ptr += b.to(tl.int64) * (M // PAGE)
    if bias_ptr is not None:
        bias_ptr = base_of(bias_ptr, b, h, 0, bias_strides)
    slope = load_slope(slopes_ptr, b, h, slopes_strides)

    edges = tile_range(first, last, length, left, right, LEFT, RIGHT, BLOCK_N)
    low = low_of(p, left, LEFT)
    high = high_of(p, length, right, RIGHT)
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
                k = stream_tile(k_ptr, b, hk, k_first, start, j, limit, k_strides, D, BLOCK_D, BULK, FOREIGN)
            else:
                k = load_paged(k_ptr, hk, j, limit, table_ptr, pages, k_strides, PAGE, D, BLOCK_D)
            s = products(q, k, ACC)  # [BLOCK_M, BLOCK_N]
            if SCORED or phase != 1:
                bias = None
                if bias_ptr is not None:
                    bias = load_bias(bias_ptr, i[:, None], j[None, :], n, length, bias_strides, phase != 1)
                s, _ = score(s, p[:, None], j[None, :], bias, slope, j[None, :], rows_at(low), rows_at(high), scale,
                               softcap, SOFTCAP, EXACT, phase != 1)
                new_top = tl.maximum(top, tl.max(s, 1))
                prob = tl.exp2((s - new_top[:, None]) * factor)
            else:
                new_top = tl.maximum(top, tl.max(s, 1))
                prob = exp2((s - new_top[:, None]) * factor, BY_FMA)
            decay = tl.exp2((top - new_top) * factor)
            total = total * decay + tl.sum(prob, 1)
            if seed_ptr is not None:
                prob = tl.where(keep_mask(seed_ptr, i, start, b * H + h, threshold, BLOCK_N), prob, 0.0)
            if table_ptr is None:
                v = stream_tile(v_ptr, b, hk, k_first, start, j, limit, v_strides, DV, BLOCK_DV, BULK, FOREIGN)
            else:
                v = load_paged(v_ptr, hk, j, limit, table_ptr, pages, v_strides, PAGE, DV, BLOCK_DV)
            acc = dot(prob.to(v.dtype), v, acc * decay[:, None])  # [BLOCK_M, DV]
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
    store(base_of(out_ptr, b, h, q_first, out_strides), out_rows, valid, out_strides[3], acc, DV, BLOCK_DV)
    tl.store(lse_ptr + lse_rows, lse, mask=valid)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=["N", "splits"])
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
        part = load(part_ptr, at * DV, valid, 1, DV, BLOCK_DV)  # [BLOCK_M, DV]
        new_top = tl.maximum(top, part_top)
        decay = tl.exp2((top - new_top) * (unit * LOG2E))
        weight = part_total * tl.exp2((part_top - new_top) * (unit * LOG2E))
        acc = acc * decay[:, None] + part * weight[:, None]
        total = total * decay + weight
        top = new_top
    dead = total == 0
    acc = acc / tl.where(dead, 1.0, total)[:, None]
    out_rows = rows // N // H * out_strides[0] + rows // N % H * out_strides[1] + rows % N * out_strides[2]
    store(out_ptr, out_rows, valid, out_strides[3], acc, DV, BLOCK_DV)
    tl.store(lse_ptr + rows, tl.where(dead, float("-inf"), top * unit + tl.log(tl.where(dead, 1.0, total))), mask=valid)


# ---- launches --------------------------------------------------------------------------------------------------------

BULK_TARGETS = {"sm_90", "sm_100", "interpreter"}  # sm_120 has them, but its mma.sync takes tiles through registers
# Where the special-function unit limits the forward pass: see exp2. In the bits named a thread's own registers differ,
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


def config(kernel, query, value, scored=True, packed=False):
    """-> (BLOCK_M, BLOCK_N), launch options"""
    if INTERPRETED:
        return (16, 16), {}
    dim = max(query.shape[3], value.shape[3])
    family = FAMILIES.get(target(), "mma")
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


def broadcast(tensor):
    """Strides with 0 for dimensions of size 1"""
    return () if tensor is None else tuple(0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride()))


def in_bulk(rows, *tensors):
    """-> (the tensors, as descriptors of [rows, D] tiles where target and layouts allow it; whether they do).
    fp32's exact products take operands from registers, which pointers fill better: no spill instead of 500 bytes."""
    def strides(t):
        return [16 if n == 1 else s for n, s in zip(t.shape[:3], t.stride())]

    bulk = target() in BULK_TARGETS and all(
        (t.dtype.itemsize == 2 or INTERPRETED) and t.stride(3) == 1 and t.data_ptr() % 16 == 0 and t.numel() > 0
        and all(s > 0 and s * t.dtype.itemsize % 16 == 0 for s in strides(t)) for t in tensors)
    if not bulk:
        return (*tensors, False)
    return (*(TensorDescriptor(t, list(t.shape), [*strides(t), 1], [1, 1, rows, padded(t.shape[3])])
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
    (block_m, block_n), options = config(kernel, query, value, scored, cu_seqlens_q is not None)
    if not few or not H:
        return False, 1, (block_m, block_n), options
    pack = Hk < H and bias is None and alibi_slopes is None and seed is None
    rows, heads = (N * H // Hk, Hk) if pack else (N, H)
    block_m = min(64, max(block_m, triton.next_power_of_2(rows)))
    programs = B * heads * triton.cdiv(rows, block_m)
    wanted = triton.cdiv(2 * units(), max(programs, 1))
    return pack, max(1, min(wanted, M // (4 * block_n))), (block_m, block_n), options


def multiplier_of(scale):
    """Of products, whose sign FLIP takes; not 0, which would make a NaN of a masked score"""
    return max(abs(scale), 1e-30)


def softcap_kind(softcap):
    """False: none; 2: so large that it would multiply the cancellation of a tanh near 0; else True"""
    return 2 if softcap > 256 else softcap > 0


def scratch_size(query, key, value, bias, alibi_slopes, cu_seqlens_q, block_table, seed):
    """Elements (of lse's dtype) that `forward` needs in `scratch`; 0 when the keys are not split."""
    splits = _plan(query, key, value, bias, alibi_slopes, cu_seqlens_q, block_table, seed)[1]
    B, H, N, _ = query.shape
    return splits * B * H * N * (value.shape[3] + 2) if splits > 1 else 0


def packed_axis(rows, block, cu_seqlens):
    """-> (S, bisection steps, slots of an axis of `rows` rows), see locate"""
    if cu_seqlens is None:
        return 0, 0, triton.cdiv(rows, block)
    edges = cu_seqlens.shape[0]
    return edges - 1, edges.bit_length(), rows // block + edges + 1


def masks(query, keys, window_left, window_right, dropout_p):
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
    S, steps, blocks = packed_axis(N * group if pack else N, block_m, cu_seqlens_q)
    (left, right), (threshold, inv_keep), (LEFT, RIGHT) = masks(query, M, window_left, window_right, dropout_p)
    part, part_lse, part_strides = out, lse, out.stride()
    if splits > 1:
        part, part_lse, part_strides = scratch, scratch[splits * B * H * N * DV:], (H * N * DV, N * DV, DV, 1)
    k, v, bulk = (key, value, False) if block_table is not None else in_bulk(block_n, key, value)
    multiplier = multiplier_of(scale)
    by_fma = BY_FMA.get((target(), max(64, padded(max(D, DV)))), 0) if query.dtype.itemsize == 2 else 0
    _forward[(blocks * splits * B * (Hk if pack else H),)](
        q_ptr=query, k_ptr=k, v_ptr=v, bias_ptr=bias, slopes_ptr=alibi_slopes, lengths_ptr=key_lengths,
        cu_q_ptr=cu_seqlens_q, cu_k_ptr=cu_seqlens_k, table_ptr=block_table, seed_ptr=seed, out_ptr=part,
        lse_ptr=part_lse, q_strides=query.stride(), k_strides=key.stride(), v_strides=value.stride(),
        bias_strides=broadcast(bias), slopes_strides=broadcast(alibi_slopes), out_strides=part_strides,
        H=H, GROUP=group, N=N, M=M, S=S, steps=steps, blocks=blocks, splits=splits, part=B * H * N, pages=pages,
        left=left, right=right, scale=multiplier, softcap=softcap, threshold=threshold, inv_keep=inv_keep,
        D=D, DV=DV, BLOCK_D=padded(D), BLOCK_DV=padded(DV), PAGE=page, LEFT=LEFT, RIGHT=RIGHT,
        SOFTCAP=softcap_kind(softcap), FLIP=scale < 0, ALIGN=align_lengths, PACK=pack, ONE=N <= 64 and blocks == 1,
        EVEN=bias is not None and key_lengths is None and M % 16 == 0, SPLIT=splits > 1, BULK=bulk, BY_FMA=by_fma,
        BLOCK_M=block_m, BLOCK_N=block_n, **options)
    if splits > 1:
        _merge[(triton.cdiv(B * H * N, 16),)](
            part, part_lse, out, lse, out.stride(), H, N, B * H * N, splits,
            1.0 if bias is not None or alibi_slopes is not None else softcap or multiplier, DV, padded(DV), 16)
