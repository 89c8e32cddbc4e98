"""Product-key search and memory: samples and workloads."""

from __future__ import annotations

import torch

from ..core.backends import INTERPRET
from ..core.declaration import Sample, Workload, declare
from ..ops.product_key import product_key_memory, product_key_search, search
from .topk import apart, enlarged, grid


def _inputs(n, d, shape, k, *, heads=1, dv=None, draw="normal", large=False):
    """make(dtype, device). shape: of the queries, without heads and d. draw: "grid" ties, "normal" nowhere nearly.
    large: scores are of ±1e38."""

    def make(dtype, device):
        options = dict(dtype=dtype, device=device)
        if draw == "grid":
            query, keys = grid(*shape, heads, d, **options), grid(heads, 2, n, d // 2, **options)
        else:
            keys = torch.randn(heads, 2, n, d // 2, **options)
            exact = keys.double()
            query = apart(
                lambda count: torch.randn(count, heads, d, **options),
                lambda query: search(query.double(), exact, min(k + 1, n))[0],
                shape.numel(),
            ).view(*shape, heads, d)
            if large:
                query, keys = enlarged(query), enlarged(keys)
        inputs = dict(query=query, sub_keys=keys)
        if dv is not None:
            inputs["values"] = torch.randn(n * n, dv, **options)
        return inputs | dict(k=k)

    shape = torch.Size(shape)
    return make


def _flops(inputs) -> float:
    return 2.0 * inputs["query"].numel() * inputs["sub_keys"].size(2)


def _traffic(inputs) -> float:
    query, sub_keys, k = inputs["query"], inputs["sub_keys"], inputs["k"]
    H, d = query.shape[-2:]
    n, size = query.numel() // d, query.element_size()
    if "values" in inputs:
        results = (n * k + n // H) * inputs["values"].size(1) * size
    else:
        results = n * k * (size + 8)
    return float((query.numel() + sub_keys.numel()) * size + results)


def _workloads(dv=None):
    for N, H, n, d, k in ((1, 4, 512, 256, 32), (1024, 4, 512, 256, 32)):
        for train in (False,) if dv is None else (False, True):
            yield Workload(
                f"N{N} H{H} n{n} d{d} k{k}" + ("" if dv is None else f" dv{dv}"),
                _inputs(n, d, (N,), k, heads=H, dv=dv, draw="normal"),
                flops=_flops,
                bytes=_traffic,
                train=train,
                train_flops=1.0,  # backward touches the k selected rows alone
                representative=dv is None and N == 1024,
                quick=True,
            )


declare(
    product_key_search,
    samples=[
        Sample("plain", _inputs(8, 6, (5,), 4)),
        Sample("one sub-key", _inputs(1, 2, (3,), 1)),
        Sample("one query", _inputs(20, 14, (), 9, heads=3)),
        Sample("all sub-keys", _inputs(11, 8, (4,), 11, heads=2)),
        Sample("odd sizes, two batch dimensions", _inputs(37, 26, (2, 3), 13, heads=2)),
        Sample("ties", _inputs(130 if INTERPRET else 600, 12, (3 if INTERPRET else 7,), 32, draw="grid")),
        Sample(
            "ties, heads, many queries",
            _inputs(*((20, 10, (9,), 12) if INTERPRET else (40, 40, (70,), 32)), heads=4, draw="grid"),
        ),
        Sample("scores of ±1e38", _inputs(20, 10, (5,), 4, large=True)),
        Sample("no queries", _inputs(6, 4, (0,), 3, draw="grid")),
    ],
    workloads=_workloads(),
)

declare(
    product_key_memory,
    samples=[
        Sample("plain", _inputs(8, 6, (5,), 4, dv=7)),
        Sample("weights", lambda *a: _inputs(8, 6, (5,), 4, heads=2, dv=7)(*a) | dict(return_weights=True)),
        Sample("heads, two batch dimensions", _inputs(15, 12, (2, 3), 9, heads=3, dv=10)),
        Sample("ties", _inputs(30, 12, (3 if INTERPRET else 9,), 30, heads=2, dv=33, draw="grid")),
        Sample("scores of ±1e38", _inputs(20, 10, (5,), 4, dv=6, large=True)),
        Sample("no queries", _inputs(6, 4, (0,), 3, dv=5, draw="grid")),
    ],
    workloads=_workloads(dv=512),
)
