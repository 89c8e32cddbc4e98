"""Weighted gather: samples and workloads."""

from __future__ import annotations

import torch

from ..core.backends import INTERPRET
from ..core.declaration import Sample, Workload, declare
from ..core.dtypes import accumulator_of
from ..ops.weighted_gather import weighted_gather


def _inputs(M, dv, shape, *, hot=False, sparse=False, exact_weights=False, index=torch.int64):
    """make(dtype, device). shape: of the indices. hot: most of them hit the same few rows."""

    def make(dtype, device):
        indices = torch.randint(0, M, shape, device=device)
        if hot:
            indices = torch.where(torch.rand(shape, device=device) < 0.7, indices % 3, indices)
        inputs = dict(
            values=torch.randn(M, dv, dtype=dtype, device=device),
            indices=indices.to(index),
            weights=torch.randn(shape, dtype=accumulator_of(dtype) if exact_weights else dtype, device=device),
        )
        return inputs | dict(sparse_grad=True) if sparse else inputs

    return make


def _traffic(inputs) -> float:
    """Rows are read as often as they are used; nothing of the rest of the table."""
    values, indices = inputs["values"], inputs["indices"]
    rows, bags = indices.numel(), indices.numel() // indices.size(-1)
    row = values.size(1) * values.element_size()
    return float(rows * (row + indices.element_size() + inputs["weights"].element_size()) + bags * row)


def _workloads():
    for M, dv, n, k in ((262144, 256, 1024, 32), (65536, 1024, 256, 32)):
        for train, sparse in ((False, False), (True, False), (True, True)):
            yield Workload(
                f"M{M} dv{dv} n{n} k{k}" + (", sparse gradient" if sparse else ""),
                _inputs(M, dv, (n, k), sparse=sparse),
                bytes=_traffic,
                train=train,
                quick=dv == 256,
                representative=dv == 1024 and not sparse,
            )


declare(
    weighted_gather,
    samples=[
        Sample("plain", _inputs(20, 8, (6, 4))),
        Sample("one of each", _inputs(1, 1, (1,))),
        Sample("repeated rows", _inputs(9, 5, (7, 12), hot=True)),
        Sample("odd sizes, two batch dimensions", _inputs(37, 19, (3, 2, 5))),
        Sample("wide rows", _inputs(70, 259, (5, 9), hot=True)),
        Sample("rows of 1024", _inputs(10 if INTERPRET else 40, 1024, (2, 5 if INTERPRET else 33))),
        Sample("one bag of many", _inputs(200, 24, (1, 300), hot=True)),
        Sample("many bags", _inputs(100 if INTERPRET else 1000, 24, (12 if INTERPRET else 130, 16), hot=True)),
        Sample("weights in fp32, indices in int32", _inputs(50, 16, (8, 8), exact_weights=True, index=torch.int32)),
        Sample("no bags", _inputs(5, 8, (0, 4))),
        Sample("empty bags", _inputs(5, 8, (3, 0))),
        Sample("rows of no elements", _inputs(5, 0, (3, 2))),
    ],
    workloads=_workloads(),
)
