"""Product-key search in Triton: s1 = K1 q1 and s2 = K2 q2 by topk.py's search; of the k best of each the k best sums.

    candidates s1[a] + s2[b], a and b ranks with (a+1)(b+1) ≤ k;  of equal sums the lower a first, then the lower b
    id = i_a·n + j_b

_pairs: a program owns ROWS queries of one head each; reads their two lists, writes scores and ids. The ranks
2^g − 1 ≤ a < 2^(g+1) − 1 meet only b < k / 2^g: that makes, for each g up to log2 k, one run of K candidates (K: the
power of two from k on), which is sorted and joined with the best so far. At k = 32 these are 192 of 1024 pairs, 119 of
which can win; the rest are masked. A pair is found again by a·K + b, which is also what orders equal sums.
"""

import triton
import triton.language as tl

from . import topk


@triton.jit(do_not_specialize=["N"])
def _pairs(
        halves_ptr, places_ptr, scores_ptr, ids_ptr, N, n, k, K: tl.constexpr, LOG_K: tl.constexpr, ROWS: tl.constexpr):
    """halves, places: [N, 2, k], the results of both searches; scores, ids: [N, k]"""
    ACC: tl.constexpr = scores_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, N - 1).to(tl.int64)[:, None]  # rows past the last repeat it, to the same results
    rank = tl.arange(0, K)[None, :]
    first = row * (2 * k)
    s, j = topk.nothing(ROWS, K, ACC)
    for g in range(LOG_K + 1):
        b = rank & ((K >> g) - 1)
        a = (1 << g) - 1 + (rank >> (LOG_K - g))
        wins = (a + 1) * (b + 1) <= k
        sums = tl.load(halves_ptr + first + a, mask=wins) + tl.load(halves_ptr + first + k + b, mask=wins)  # [ROWS, K]
        none_s, none_j = topk.nothing(ROWS, K, ACC)
        new_j = tl.where(wins, (a * K + b).to(s.dtype), none_j)
        new_s, new_j = topk.sort_runs(tl.where(wins, topk.order(sums), none_s), new_j, K)
        s, j = topk.join(s, j, new_s, new_j, 0)
    a, b = (j // K), (j % K)
    inside = rank < k
    ids = tl.load(places_ptr + first + a, mask=inside) * n + tl.load(places_ptr + first + k + b, mask=inside)
    tl.store(scores_ptr + row * k + rank, topk.score_of(s), mask=inside)
    tl.store(ids_ptr + row * k + rank, ids, mask=inside)


def search(query, sub_keys, scores, ids):
    """Writes scores: [N, H, k], fp32 (fp64 for fp64), and ids: [N, H, k], int64.

    query: [N, H, d] and sub_keys: [H, 2, n, d/2]; all contiguous; k ≤ n < 2³¹, d ≥ 2.
    """
    N, H, k = scores.shape
    n, half = sub_keys.shape[2:]
    if not N * H:
        return
    halves, places = scores.new_empty(N, 2 * H, k), ids.new_empty(N, 2 * H, k)
    topk.search(query.view(N, 2 * H, half), sub_keys.view(2 * H, n, half), 1.0, halves, places)
    K = max(2, triton.next_power_of_2(k))
    rows, options = topk.rows_of(K)
    _pairs[(triton.cdiv(N * H, rows),)](
        halves, places, scores, ids, N * H, n, k, K, K.bit_length() - 1, rows, **options)


# What `python -m pykernels audit` may find here, and why it is shipped all the same.
AUDIT_EXCEPTIONS = [
    dict(kernel="_pairs", check="narrow load",
         reason="scores are looked up by rank, each from a list of k that stays in the nearest cache"),
]
