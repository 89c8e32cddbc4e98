"""Top-k search and memory: samples and workloads, and the draws that those of product keys share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.backends import INTERPRET
from ..core.declaration import Sample, Workload, declare
from ..ops.topk import topk_memory, topk_search


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
                representative=dv is None and n == 256,
                quick=M < 100_000,
            )


_MANY = 260 if INTERPRET else 900  # keys: the interpreter takes milliseconds for each block of them


declare(
    topk_search,
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
)

declare(
    topk_memory,
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
)
