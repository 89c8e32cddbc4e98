"""Top-k search of keys by inner product, and the memory lookup made of it.

    s_m = scale · q·K_m;  I = the indices of the k largest s, descending;  w = softmax(s_I);  y = Σ_j w_j V_{I_j}

(Memory Layers at Scale, 2412.09764.) Scores are fp32 (fp64) and the order is that of their values: equal ones go by
the lower index first, and NaN is above all, as torch.topk has it. Scores that were not selected have no gradient, so

    dq = scale Σ_j ds_j K_{I_j};   dK_m = scale Σ_{n, j: I_nj = m} ds_nj q_n

which are the weighted gather of the keys and its gradient: nothing of size n × M is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core import native
from ..core.expect import expect, expect_alike, expect_dtype, expect_integer, expect_number, expect_tensor, expect_type
from ..core.registry import FLOATS, INTERPRET, ON_HOST, Sample, Workload, autocast, register, torch_op, triton_declines
from .weighted_gather import gather, gather_backward_op, gather_op
from .wkv4 import exact_of

LARGEST_TRITON_K = 2048  # what a block of threads can hold and sort
LARGEST_CUDA_LIST = 256  # k to which csrc/topk.cu keeps lists; beyond, it writes scores
AT_ONCE = 2**16 if ON_HOST else 2**24  # entries of lists, or scores, that a launch has for its queries
_DTYPES = (torch.float64, *FLOATS)


def search(
    query: Tensor,  # [N, H, d]
    keys: Tensor,  # [H, M, d]
    k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(scores, exact, and indices [N, H, k]) by a stable sort of all scores."""
    exact = exact_of(query.dtype)
    scores = scale * torch.einsum("nhd,hmd->nhm", query.to(exact), keys.to(exact))
    scores, indices = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :k], indices[..., :k]


def lookup(search: Callable, gather: Callable) -> Callable:
    """The memory made of a search and a gather: (output [N, H, dv], weights, indices [N, H, k])."""

    def look(query, keys, values, k, scale, *backend):
        scores, indices = search(query, keys, k, scale, *backend)
        weights = scores.softmax(-1)
        return gather(values, indices, weights, *backend), weights, indices

    return look


# ------------------------------------------------------------------------------------------------ torch op


def _outputs(query, keys, k, scale, backend):
    shape = (query.size(0), query.size(1), k)
    return query.new_empty(shape, dtype=exact_of(query.dtype)), query.new_empty(shape, dtype=torch.int64)


def _save(ctx, inputs, output):
    query, keys, _, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(query, keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_scores, _):
    query, keys, indices = ctx.saved_tensors
    weights = ctx.scale * grad_scores
    grad_query = grad_keys = None
    if ctx.needs_input_grad[0]:
        grad_query = gather_op(keys, indices, weights, ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_keys = gather_backward_op(query, keys, indices, weights, True, False, ctx.backend)[0]
    return grad_query, grad_keys, None, None, None


def _triton(query, keys, k, scale, backend):
    from ..kernels import topk as kernels

    results = _outputs(query, keys, k, scale, backend)
    query, keys = (t if t.stride(2) == 1 else t.contiguous() for t in (query, keys))
    kernels.search(query, keys, scale, *results)
    return results


def _cuda(query, keys, k, scale, backend):
    scores, indices = _outputs(query, keys, k, scale, backend)
    N, H, _ = scores.shape
    if N * H == 0:
        return scores, indices
    query, keys = (t if t.stride(2) == 1 else t.contiguous() for t in (query, keys))
    M = keys.size(1)
    large = k > LARGEST_CUDA_LIST
    splits = _splits(query, keys, k)
    row = M if large else splits * k
    most = max(1, AT_ONCE // (H * row))
    for first in range(0, N, most):
        some = slice(first, first + most)
        if large:
            scores[some], indices[some] = _cuda_by_digits(query[some], keys, k, scale)
        else:
            lists = indices.new_empty(splits, *indices[some].shape)
            native.cuda("topk_search", query[some], keys, lists, scores[some], indices[some], scale)
    return scores, indices


def _splits(query: Tensor, keys: Tensor, k: int) -> int:
    """Shares of the keys that make two blocks of queries and keys for each multiprocessor. Each reports k candidates,
    so it has some times as many keys."""
    N, H, _ = query.shape
    if query.is_cuda:
        wanted, shortest = 2 * torch.cuda.get_device_properties(query.device).multi_processor_count, max(512, 4 * k)
    else:
        wanted, shortest = 5, 128  # any are right: these meet more edges on small inputs
    blocks = H * -(-N // (4 if N <= 4 else 16 if N <= 16 else 64))
    return max(1, min(-(-wanted // blocks), keys.size(1) // shortest))


def _cuda_by_digits(query, keys, k, scale):
    """Of all scores the k-th by its digits, what comes before it in the order of the keys, and this sorted."""
    (N, H, _), M = query.shape, keys.size(1)
    scores = query.new_empty(N, H, M + M % 2, dtype=torch.float32)
    histograms = query.new_zeros(N, H, 3, 2048, dtype=torch.int32)
    counts = query.new_empty(N, H, -(-M // 2048), 2, dtype=torch.int64)
    native.cuda("topk_count", query, keys, scores, histograms, counts, scale, k)
    best, indices = scores.new_empty(N, H, k), counts.new_empty(N, H, k)
    native.cuda("topk_collect", scores, histograms, counts.cumsum(2) - counts, best, indices, M)
    best, places = best.sort(dim=-1, descending=True, stable=True)
    return best, indices.gather(-1, places)


search_op = torch_op(
    "topk_search(Tensor query, Tensor keys, int k, float scale, int backend) -> (Tensor, Tensor)",
    fake=_outputs,
    implementations={"triton": _triton, "cuda": _cuda},
    setup_context=_save,
    backward=_backward,
)


def triton_search_declines(query: Tensor, k: int) -> str | None:
    if k > LARGEST_TRITON_K:
        return f"it holds at most {LARGEST_TRITON_K} candidates a query"
    return triton_declines(query)


def cuda_search_declines(query: Tensor, keys: Tensor) -> str | None:
    if query.dtype == torch.float64:
        return "it takes fp32, bf16 and fp16"
    if keys.size(1) >= 2**32:
        return f"it counts fewer than 2^32 keys, not {keys.size(1)}"
    if keys.size(2) >= 2**24:
        return f"it takes rows of fewer than 2^24 numbers, not {keys.size(2)}"
    return None


# ------------------------------------------------------------------------------------------------ public functions


def _topk_search(run, query: Tensor, keys: Tensor, k: int, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Exact search: the k keys of the largest inner product with each query, without the matrix of scores.

    Args:
        query: [..., d], any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        keys: [M, d] in query's dtype, any M; or [H, M, d], where query [..., H, d] has its own keys for each head.
        k: from 1 to M. (On GPUs Triton's kernel takes up to 2048; beyond, the CUDA kernel if it passed its first-use
            test there, else the reference.)
        scale: multiplies the scores.

    Returns:
        scores [..., k] in query's dtype, descending, and indices [..., k] int64. The order is that of scores in fp32
        (fp64): of equal ones the lower index is first, and NaN is above all, as in torch.topk. Differentiable, twice
        too, in query and keys; keys that were not selected have a gradient of zero. Memory beyond inputs and results
        does not depend on M, but for the reference's (k > 2048, and fp64, on GPUs), which holds all scores.

    Raises:
        ValueError, TypeError: a shape, dtype, device or k other than the above, before anything is computed.

    Source: the lookup of Lample et al., 1907.05242, and Berges et al., 2412.09764, over all keys.
    """
    query, keys = autocast(query, keys)
    batched, k = _check_search(query, keys, k)
    scale = float(expect_number(scale, "scale"))
    flat, keys = _flatten(query, keys, batched)
    scores, indices = run(flat, keys, k, scale)
    shape = (*query.shape[:-1], k)
    return scores.to(query.dtype).reshape(shape), indices.reshape(shape)


def _topk_memory(
    run,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    scale: float = 1.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Memory lookup: the values of the k keys nearest to each query, weighted by the softmax of their scores.

    Args:
        query: [..., d], any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        keys: [M, d] in query's dtype, any M; or [H, M, d], where query [..., H, d] has its own keys for each head.
        values: [M, dv] in query's dtype; with keys of [H, M, d] also [H, M, dv].
        k: from 1 to M. (On GPUs Triton's kernel takes up to 2048; beyond, the CUDA kernel if it passed its first-use
            test there, else the reference.)
        scale: multiplies the scores.
        return_weights: return the weights and indices as well.

    Returns:
        output [..., dv] in query's dtype, or (output, weights [..., k] in query's dtype, indices [..., k] int64) in
        the order of topk_search. Softmax and sum are fp32 (fp64). Differentiable, twice too, in query, keys and
        values; rows that were not selected have a gradient of zero.

    Raises:
        ValueError, TypeError: a shape, dtype, device or k other than the above, before anything is computed.

    Source: Berges et al., Memory Layers at Scale, 2412.09764, section 2.1.
    """
    query, keys, values = autocast(query, keys, values)
    batched, k = _check_search(query, keys, k)
    scale = float(expect_number(scale, "scale"))
    expect_type(isinstance(values, Tensor), "values", "a tensor [M, dv] or [H, M, dv]", values)
    layout = "[H, M, dv]" if values.dim() == 3 else "[M, dv]"
    expect_tensor(values, "values", layout)
    tables = values.shape[:-1] in (keys.shape[:-1], keys.shape[-2:-1])
    if not tables:
        expect(False, "values", f"{list(keys.shape[-2:-1])} rows to match keys", values)
    expect_alike(values, "values", query, "query")
    flat, keys = _flatten(query, keys, batched)
    values = values if values.dim() == 3 else values[None].expand(keys.size(0), -1, -1)
    output, weights, indices = run(flat, keys, values, k, scale)
    output = output.reshape(*query.shape[:-1], values.size(2))
    if not return_weights:
        return output
    shape = (*query.shape[:-1], k)
    return output, weights.to(query.dtype).reshape(shape), indices.reshape(shape)


def _check_search(query: Tensor, keys: Tensor, k: int) -> tuple[bool, int]:
    """(whether each head has its own keys, k)."""
    check_rows(query, "query", "[..., d]", 1)
    expect_type(isinstance(keys, Tensor), "keys", "a tensor [M, d] or [H, M, d]", keys)
    expect(keys.dim() in (2, 3), "keys", "[M, d] or [H, M, d]", keys)
    layout = "[H, M, d]" if keys.dim() == 3 else "[M, d]"
    expect_tensor(keys, "keys", layout)
    expect_alike(keys, "keys", query, "query")
    d = query.size(-1)
    expect(d >= 1, "query", "d of 1 or more in [..., d]", query)
    expect(keys.size(-1) == d, "keys", "[M, {d}] to match query's last dimension", keys, d=d)
    batched = keys.dim() == 3
    if batched and (query.dim() < 2 or query.size(-2) != keys.size(0)):
        expect(False, "query", f"[..., {keys.size(0)}, {d}] to match the heads of keys", query)
    return batched, check_k(k, keys.size(-2), "the number of keys")


def check_rows(value: Tensor, name: str, layout: str, rank: int) -> None:
    """A dense floating tensor of any number of leading dimensions."""
    expect_type(isinstance(value, Tensor), name, "a tensor {layout}", value, layout=layout)
    expect_dtype(value, name, _DTYPES)
    dense = value.layout is torch.strided and not value.is_nested
    expect_type(dense, name, "a dense tensor {layout}", value, layout=layout)
    expect(value.dim() >= rank, name, "rank {rank} or more {layout}", value, rank=rank, layout=layout)


def check_k(k: int, largest: int, what: str) -> int:
    k = expect_integer(k, "k")
    expect(1 <= k <= largest, "k", "from 1 to {what}, {largest}", k, what=what, largest=largest)
    return k


def _flatten(query: Tensor, keys: Tensor, batched: bool) -> tuple[Tensor, Tensor]:
    """query as [N, H, d] and keys as [H, M, d]."""
    heads = keys.size(0) if batched else 1
    flat = query.reshape(math.prod(query.shape[: -2 if batched else -1]), heads, query.size(-1))
    return flat, keys if batched else keys[None]


# ------------------------------------------------------------------------------------------------ declaration


def grid(*shape, dtype, device) -> Tensor:
    """Random multiples of 1/4 up to 2, whose scores are exact in fp32 in any order of summation, and often tie."""
    return (torch.randint(-8, 9, shape, device=device) / 4).to(dtype)


def apart(draw: Callable[[int], Tensor], best: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """`count` queries from draw(n) whose best scores [n, ..., k] are not so near one another that rounding orders them.

    Where rounding decides, implementations that are right to the last bits of their scores return other indices.
    """
    queries = draw(count)
    for _ in range(20):
        scores = best(queries)
        near = (scores.diff().abs() < 1e-5 * scores.abs().amax(-1, keepdim=True)).flatten(1).any(1)
        if not near.any():
            break
        queries[near] = draw(int(near.sum()))
    return queries


def enlarged(t: Tensor) -> Tensor:
    """By so much that the scores of two such are of 1e37 and more, in fp16 of 1e5."""
    return t * (2.0**8 if t.dtype == torch.float16 else 2.0**61)


def _inputs(M, d, shape, k, *, dv=None, heads=None, draw="normal", scale=None, share=False, large=False):
    """make(dtype, device). shape: of the queries, without heads and d. draw: "normal", without near ties; "grid", with
    ties; "equal", all the same; "rising", every key better than those before. share: one table of values for all heads.
    """

    def make(dtype, device):
        options = dict(dtype=dtype, device=device)
        tables, rows = ((heads,), (*shape, heads)) if heads else ((), shape)
        if draw == "grid":
            query, keys = grid(*rows, d, **options), grid(*tables, M, d, **options)
        elif draw == "equal":
            query, keys = torch.ones(*rows, d, **options), torch.ones(*tables, M, d, **options)
        elif draw == "rising":
            query, keys = grid(*rows, d, **options).abs() + 0.25, torch.zeros(*tables, M, d, **options)
            keys += (torch.arange(M, device=device) / 4).clamp(max=60).to(dtype)[:, None]
        else:
            keys = torch.randn(*tables, M, d, **options)
            exact = keys.double().view(-1, M, d)

            def best(query):
                return torch.einsum("nhd,hmd->nhm", query.double(), exact).topk(min(k + 1, M)).values

            query = apart(lambda n: torch.randn(n, heads or 1, d, **options), best, math.prod(shape)).view(*rows, d)
            if large:
                query, keys = enlarged(query), enlarged(keys)
        inputs = dict(query=query, keys=keys)
        if dv is not None:
            inputs["values"] = torch.randn(*(() if share else tables), M, dv, **options)
        inputs["k"] = k
        return inputs if scale is None else inputs | dict(scale=scale)

    return make


def _flops(inputs) -> float:
    query, keys = inputs["query"], inputs["keys"]
    return 2.0 * query.numel() * keys.size(-2)


def _traffic(inputs) -> float:
    """Every input read once and every result written; of values only the rows that are used."""
    query, keys, k = inputs["query"], inputs["keys"], inputs["k"]
    n, size = query.numel() // query.size(-1), query.element_size()
    if "values" in inputs:
        results = n * (k + 1) * inputs["values"].size(-1) * size
    else:
        results = n * k * (size + 8)
    return float((query.numel() + keys.numel()) * size + results)


def _workloads(dv=None):
    shapes = [
        (65536, 128, 1, 32),
        (65536, 128, 256, 32),
        (500000, 64, 16, 10),
        (4096, 64, 2048, 32),
        (200000, 96, 64, 100),
    ]
    for M, d, n, k in shapes if dv is None else shapes[:2]:
        for train in (False,) if dv is None else (False, True):
            yield Workload(
                f"M{M} d{d} n{n} k{k}" + ("" if dv is None else f" dv{dv}"),
                _inputs(M, d, (n,), k, dv=dv),
                flops=_flops,
                bytes=_traffic,
                train=train,
                train_flops=1.0,  # backward touches the k selected rows alone
                quick=M < 100_000,
            )


_MANY = 260 if INTERPRET else 900  # keys: the interpreter takes milliseconds for each block of them

_BACKENDS = {
    "search": {
        "cpu": lambda *_: None,
        "triton": lambda query, keys, k, scale: triton_search_declines(query, k),
        "cuda": lambda query, keys, k, scale: cuda_search_declines(query, keys),
    },
    "memory": {
        "cpu": lambda *_: None,
        "triton": lambda query, keys, values, k, scale: triton_search_declines(query, k),
        "cuda": lambda query, keys, values, k, scale: cuda_search_declines(query, keys),
    },
}

topk_search = register(
    _topk_search,
    kernel=search_op,
    reference=search,
    supports=_BACKENDS["search"],
    samples=[
        Sample("plain", _inputs(40, 8, (5,), 4)),
        Sample("one query, one key", _inputs(1, 1, (), 1)),
        Sample("one query", _inputs(300, 7, (), 5)),
        Sample("all keys", _inputs(13, 4, (3,), 13)),
        Sample("odd sizes, scaled", _inputs(131, 13, (3, 5), 9, scale=-0.3)),
        Sample("heads", _inputs(50, 12, (2, 3), 7, heads=3)),
        Sample("ties", _inputs(260 if INTERPRET else 1500, 6, (3 if INTERPRET else 9,), 33, draw="grid")),
        Sample("ties, heads, many queries", _inputs(_MANY, 5, (18 if INTERPRET else 70,), 17, heads=2, draw="grid")),
        Sample("ties, all equal", _inputs(_MANY, 8, (4,), 40, draw="equal")),
        Sample("every key better than those before, then ties", _inputs(_MANY, 9, (3,), 21, draw="rising")),
        Sample("deep", _inputs(90, 200, (20,), 8)),
        Sample("deep, nine queries", _inputs(60, 300, (9,), 8)),
        Sample(
            "large k, ties", _inputs(_MANY if INTERPRET else 3001, 4, (2,), 150 if INTERPRET else 2048, draw="grid")
        ),
        Sample("many keys, one query", _inputs(_MANY if INTERPRET else 20000, 16, (1,), 32)),
        Sample("many keys", _inputs(_MANY if INTERPRET else 9000, 16, (17 if INTERPRET else 33,), 10)),
        Sample("scores of ±1e38", _inputs(40, 8, (5,), 4, large=True)),
        Sample("no queries", _inputs(9, 4, (0,), 3)),
    ],
    workloads=_workloads(),
    differentiable=("query", "keys"),
)

topk_memory = register(
    _topk_memory,
    kernel=lookup(search_op, gather_op),
    reference=lookup(search, gather),
    supports=_BACKENDS["memory"],
    samples=[
        Sample("plain", _inputs(40, 8, (5,), 4, dv=6)),
        Sample("weights", lambda *a: _inputs(40, 8, (5,), 4, dv=6)(*a) | dict(return_weights=True)),
        Sample("one query", _inputs(120, 7, (), 5, dv=11, scale=0.4)),
        Sample("heads", _inputs(30, 12, (2, 3), 7, dv=9, heads=3)),
        Sample("heads that share values", _inputs(30, 12, (4,), 7, dv=9, heads=2, share=True)),
        Sample("ties", _inputs(_MANY, 6, (3 if INTERPRET else 9,), 33, dv=20, draw="grid")),
        Sample("scores of ±1e38", _inputs(40, 8, (5,), 4, dv=6, large=True)),
        Sample("scale of 1e37", _inputs(40, 64, (5,), 4, dv=6, scale=1e37)),
        Sample("no queries", _inputs(9, 4, (0,), 3, dv=5)),
    ],
    workloads=_workloads(dv=256),
    differentiable=("query", "keys", "values"),
)
