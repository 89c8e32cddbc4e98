"""Weighted sums of a table's rows, chosen by index: an embedding bag with a weight for each of its entries.

    y_n = Σ_j w_nj V[i_nj]
    dw_nj = dy_n · V[i_nj];   dV[m] = Σ_{n, j: i_nj = m} w_nj dy_n

A row's gradient is summed over the places that hit it in their order (n, then j), found by a stable sort of the
indices, so its bits do not depend on how the work was shared out. G tables can be read at once: table g by the indices
[:, g].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import native
from ..core.expect import (
    can_read,
    expect,
    expect_alike,
    expect_device,
    expect_dtype,
    expect_shape,
    expect_tensor,
    expect_type,
)
from ..core.registry import (
    CPU,
    CUDA,
    FLOATS,
    INTERPRET,
    REFERENCE,
    Sample,
    Workload,
    autocast,
    is_autocast_on,
    register,
    second_order,
    torch_op,
    transforming,
    triton_declines,
)
from .wkv4 import exact_of

_DTYPES = (torch.float64, *FLOATS)


def gather(
    values: Tensor,  # [G, M, dv]
    indices: Tensor,  # [N, G, k]
    weights: Tensor,  # [N, G, k], exact
) -> Tensor:
    """y [N, G, dv] in values' dtype, in plain PyTorch."""
    tables = torch.arange(values.size(0), device=values.device)[:, None]
    rows = values[tables, indices].to(weights.dtype)  # [N, G, k, dv]
    return torch.einsum("ngk,ngkd->ngd", weights, rows).to(values.dtype)


def gather_rows(grad: Tensor, indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(the rows that are used, ascending [U], their gradients [U, dv]) for one table, in plain PyTorch."""
    rows, place = indices.flatten().unique(return_inverse=True)
    each = weights[..., None] * grad[:, :, None].to(weights.dtype)  # [N, 1, k, dv]
    sums = each.new_zeros(rows.numel(), grad.size(2)).index_add_(0, place, each.flatten(0, 2))
    return rows, sums.to(grad.dtype)


class _SparseGather(torch.autograd.Function):
    """The gather from one table, [M, dv], whose gradient of it is sparse. Once differentiable."""

    @staticmethod
    def forward(ctx, values, indices, weights, backend):
        ctx.save_for_backward(values, indices, weights)
        ctx.backend = backend
        if backend == REFERENCE:
            return gather(values[None], indices, weights)
        return gather_op(values[None], indices, weights, backend)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            _refuse()
        values, indices, weights = ctx.saved_tensors
        grad_values = grad_weights = None
        if ctx.backend == REFERENCE:
            if ctx.needs_input_grad[0]:
                grad_values = gather_rows(grad, indices, weights)
            if ctx.needs_input_grad[2]:
                exact = weights.dtype
                grad_weights = torch.einsum("ngd,ngkd->ngk", grad.to(exact), values[indices].to(exact))
        else:
            if ctx.needs_input_grad[0]:
                grad_values = _rows_op(grad, indices, weights, values.size(0), ctx.backend)
            if ctx.needs_input_grad[2]:
                grad_weights = gather_backward_op(grad, values[None], indices, weights, False, True, ctx.backend)[1]
        if grad_values is not None:
            rows, sums = grad_values
            grad_values = torch.sparse_coo_tensor(
                rows[None], sums, values.shape, is_coalesced=True, check_invariants=False
            )
        return grad_values, None, grad_weights, None


def sparse_gather(values: Tensor, indices: Tensor, weights: Tensor, backend: int) -> Tensor:
    """The gather from one table, [M, dv], whose gradient of it is sparse."""
    return _SparseGather.apply(values, indices, weights, backend)


def check_sparse(name: str) -> None:
    if torch.compiler.is_compiling() or transforming():
        what = "torch.compile" if torch.compiler.is_compiling() else "torch.func"
        raise NotImplementedError(f"{name}: {what} has no sparse gradients: use sparse_grad=False")


def _reference(values: Tensor, indices: Tensor, weights: Tensor, sparse: bool) -> Tensor:
    _check_range(indices, values.size(0))
    if sparse:
        return sparse_gather(values, indices, weights, REFERENCE)
    return gather(values[None], indices, weights)


def _kernel(values: Tensor, indices: Tensor, weights: Tensor, sparse: bool, backend: int) -> Tensor:
    if backend != CPU:  # whose kernel looks itself
        _check_range(indices, values.size(0))
    try:
        if sparse:
            return sparse_gather(values, indices, weights, backend)
        return gather_op(values[None], indices, weights, backend)
    except RuntimeError:
        _check_range(indices, values.size(0))
        raise


def _check_range(indices: Tensor, rows: int) -> None:
    if can_read(indices) and indices.numel():
        low, high = (bound.item() for bound in indices.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(f"indices: expected 0 to {rows - 1}, got {low if low < 0 else high}")


# ------------------------------------------------------------------------------------------------ torch ops


def _output(values, indices, weights, backend):
    return values.new_empty(indices.size(0), indices.size(1), values.size(2))


def _gradients(grad, values, indices, weights, for_values, for_weights, backend):
    return (
        values.new_empty(values.shape if for_values else 0),
        weights.new_empty(weights.shape if for_weights else 0),
    )


def _used_rows(grad, indices, weights, table_rows, backend):
    used = torch.library.get_ctx().new_dynamic_size()
    return indices.new_empty(used), grad.new_empty(used, grad.size(2))


def _save(ctx, inputs, output):
    *primals, ctx.backend = inputs
    ctx.save_for_backward(*primals)


def _backward(ctx, grad):
    for_values, _, for_weights, _ = ctx.needs_input_grad
    grads = gather_backward_op(grad, *ctx.saved_tensors, for_values, for_weights, ctx.backend)
    return grads[0] if for_values else None, None, grads[1] if for_weights else None, None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.set_materialize_grads(False)


def _double_backward(ctx, cotangent_values, cotangent_weights):
    grad, *primals = ctx.saved_tensors

    def forward(*primals):
        return (gather(*primals),)

    return *second_order(forward, primals, (grad,), (cotangent_values, None, cotangent_weights)), None, None, None


def _refuse(*_):
    raise NotImplementedError("weighted_gather: a sparse gradient has no gradient of its own: use sparse_grad=False")


def _kernels(backend):
    """Functions that write sums and their gradients: kernels/weighted_gather.py describes them."""
    if backend == CUDA:
        return _Cuda
    from ..kernels import weighted_gather

    return weighted_gather


class _Cuda:
    @staticmethod
    def forward(values, indices, weights, out):
        native.cuda("gather_sum_rows", values, indices, weights, out)

    @staticmethod
    def dot_rows(grad, values, indices, grad_weights):
        native.cuda("gather_dot_rows", grad, values, indices, grad_weights)

    @staticmethod
    def sum_rows(grad, weights, rows, order, out):
        cut = weights.new_empty(-(-rows.numel() // 32), 2, grad.size(1))
        native.cuda("gather_sum_hits", grad, weights, rows, order, cut, out)


def _gpu(values, indices, weights, backend):
    out = _output(values, indices, weights, backend)
    _kernels(backend).forward(_rows_contiguous(values), indices.contiguous(), weights.contiguous(), out)
    return out


def _gpu_backward(grad, values, indices, weights, for_values, for_weights, backend):
    kernels = _kernels(backend)
    grad, indices, weights = grad.contiguous(), indices.contiguous(), weights.contiguous()
    grad_values, grad_weights = _gradients(grad, values, indices, weights, for_values, for_weights, backend)
    if for_values:
        hits = _sorted_hits(indices, values.size(1))
        kernels.sum_rows(grad.flatten(0, 1), weights.flatten(0, 1), *hits, grad_values.zero_().flatten(0, 1))
    if for_weights:
        kernels.dot_rows(grad, _rows_contiguous(values), indices, grad_weights)
    return grad_values, grad_weights


def _gpu_rows(grad, indices, weights, table_rows, backend):
    rows, order = _sorted_hits(indices, table_rows)
    inside = rows < table_rows
    used, place = rows[inside].unique_consecutive(return_inverse=True)
    sums = grad.new_empty(used.size(0), grad.size(2))
    grad, weights = grad.flatten(0, 1).contiguous(), weights.flatten(0, 1).contiguous()
    _kernels(backend).sum_rows(grad, weights, place.to(order.dtype), order[inside], sums)
    return used.long(), sums


def _sorted_hits(indices: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """(rows of all tables, one after the other, ascending, the flat positions of their indices, ascending in a row).

    Indices out of range come last, as row G·M. In 32 bits where these are enough: half the passes of a radix sort.
    """
    G = indices.size(1)
    tables = torch.arange(G, device=indices.device)[:, None]
    rows = torch.where((indices >= 0) & (indices < M), tables * M + indices, G * M).flatten()
    dtype = torch.int32 if max(G * M, rows.numel()) < 2**31 - 64 else torch.int64  # a lot's last hit may not be there
    rows, order = rows.to(dtype).sort(stable=True)
    return rows, order.to(dtype)


def _rows_contiguous(values: Tensor) -> Tensor:
    return values if values.stride(2) == 1 else values.contiguous()


gather_backward_op = torch_op(
    "weighted_gather_backward(Tensor grad, Tensor values, Tensor indices, Tensor weights, bool for_values, "
    "bool for_weights, int backend) -> (Tensor, Tensor)",
    fake=_gradients,
    implementations={"triton": _gpu_backward, "cuda": _gpu_backward},
    setup_context=_save_backward,
    backward=_double_backward,
)

gather_op = torch_op(
    "weighted_gather(Tensor values, Tensor indices, Tensor weights, int backend) -> Tensor",
    fake=_output,
    implementations={"triton": _gpu, "cuda": _gpu},
    setup_context=_save,
    backward=_backward,
)

_rows_op = torch_op(
    "weighted_gather_rows(Tensor grad, Tensor indices, Tensor weights, int table_rows, int backend) "
    "-> (Tensor, Tensor)",
    fake=_used_rows,
    implementations={"triton": _gpu_rows, "cuda": _gpu_rows},
    setup_context=lambda ctx, inputs, output: None,
    backward=_refuse,
)


# ------------------------------------------------------------------------------------------------ public function


def _weighted_gather(run, values: Tensor, indices: Tensor, weights: Tensor, *, sparse_grad: bool = False) -> Tensor:
    """Weighted sums of a table's rows: Σ_j weights[..., j] · values[indices[..., j]].

    Args:
        values: [M, dv], any strides; fp32, bf16, fp16 (and fp64 on the CPU).
        indices: [..., k], int32 or int64, from 0 to M − 1; repeated ones count as often as they occur.
        weights: [..., k], in values' dtype or fp32.
        sparse_grad: the gradient of values is a sparse COO tensor with only the rows that were used, each once, in
            ascending order (coalesced), as torch.optim.SparseAdam takes it. It cannot be differentiated again, and not
            be had under torch.compile.

    Returns:
        [..., dv] in values' dtype, summed in fp32 (fp64); under autocast rounded to its dtype, whereas the table is
        not, which would be to read all of it. Differentiable, twice too, in values and weights. The
        gradient of a row is summed in the order of the indices that hit it: the same bits in every run.

    Raises:
        ValueError, TypeError: a shape, dtype or device other than the above, before anything is computed.
        IndexError: an index out of range, on the CPU. (On a GPU such an index counts as a row of zeros.)

    The namesake in torch is `F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")`.
    """
    expect_tensor(values, "values", "[M, dv]", _DTYPES)
    _check_bags(indices, weights, values)
    if sparse_grad:
        check_sparse("weighted_gather")
    *bags, k = indices.shape
    flat = (math.prod(bags), 1, k)
    weights = weights.reshape(flat).to(exact_of(values.dtype))
    out = run(values, indices.reshape(flat).long(), weights, bool(sparse_grad)).view(*bags, values.size(1))
    return autocast(out)[0]


def _check_bags(indices: Tensor, weights: Tensor, values: Tensor) -> None:
    expect_type(isinstance(indices, Tensor), "indices", "a tensor [..., k]", indices)
    expect_dtype(indices, "indices", (torch.int32, torch.int64))
    expect(indices.dim() >= 1, "indices", "rank 1 or more [..., k]", indices)
    expect_device(indices, "indices", values, "values")
    expect_shape(weights, "weights", indices.shape, "indices")
    expect_device(weights, "weights", values, "values")
    if weights.dtype != exact_of(values.dtype) and not (
        weights.is_floating_point() and is_autocast_on(values.device.type)
    ):
        expect_alike(weights, "weights", values, "values")


# ------------------------------------------------------------------------------------------------ declaration


def _inputs(M, dv, shape, *, hot=False, sparse=False, exact_weights=False, index=torch.int64):
    """make(dtype, device). shape: of the indices. hot: most of them hit the same few rows."""

    def make(dtype, device):
        indices = torch.randint(0, M, shape, device=device)
        if hot:
            indices = torch.where(torch.rand(shape, device=device) < 0.7, indices % 3, indices)
        inputs = dict(
            values=torch.randn(M, dv, dtype=dtype, device=device),
            indices=indices.to(index),
            weights=torch.randn(shape, dtype=exact_of(dtype) if exact_weights else dtype, device=device),
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
            )


weighted_gather = register(
    _weighted_gather,
    kernel=_kernel,
    reference=_reference,
    supports={
        "cpu": lambda *_: None,
        "triton": lambda values, *_: triton_declines(values),
        "cuda": lambda values, *_: "it takes fp32, bf16 and fp16" if values.dtype == torch.float64 else None,
    },
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
    differentiable=("values", "weights"),
)
