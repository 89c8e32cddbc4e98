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

from ..core.backends import CPU, REFERENCE, triton_declines
from ..core.declaration import public
from ..core.dtypes import DTYPES, INTEGERS, accumulator_of, autocast, is_autocast_on
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
from ..core.torch_op import torch_op, transforming
from ..launch import weighted_gather as launch


def gather(
    values: Tensor,  # [G, M, dv]
    indices: Tensor,  # [N, G, k]
    weights: Tensor,  # [N, G, k], in the accumulators' dtype
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


# ------------------------------------------------------------------------------------------------ checks


def check_sparse(name: str) -> None:
    if torch.compiler.is_compiling() or transforming():
        what = "torch.compile" if torch.compiler.is_compiling() else "torch.func"
        raise NotImplementedError(f"{name}: {what} has no sparse gradients: use sparse_grad=False")


def _check_range(indices: Tensor, rows: int) -> None:
    if can_read(indices) and indices.numel():
        low, high = (bound.item() for bound in indices.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(f"indices: expected 0 to {rows - 1}, got {low if low < 0 else high}")


def _check_bags(indices: Tensor, weights: Tensor, values: Tensor) -> None:
    expect_type(isinstance(indices, Tensor), "indices", "a tensor [..., k]", indices)
    expect_dtype(indices, "indices", INTEGERS)
    expect(indices.dim() >= 1, "indices", "rank 1 or more [..., k]", indices)
    expect_device(indices, "indices", values, "values")
    expect_shape(weights, "weights", indices.shape, "indices")
    expect_device(weights, "weights", values, "values")
    if weights.dtype != accumulator_of(values.dtype) and not (
        weights.is_floating_point() and is_autocast_on(values.device.type)
    ):
        expect_alike(weights, "weights", values, "values")


# ------------------------------------------------------------------------------------------------ torch ops


def _refuse(grad_sums):
    raise NotImplementedError("weighted_gather: a sparse gradient has no gradient of its own: use sparse_grad=False")


gather_backward_op = torch_op(
    "weighted_gather_backward(Tensor grad_y, Tensor values, Tensor indices, Tensor weights, bool for_values, "
    "bool for_weights, int backend) -> (Tensor grad_values, Tensor grad_weights)",
    fake=launch.gradients,
    launchers={"triton": launch.gpu_backward, "cuda": launch.gpu_backward},
    reference=gather,
)


def _gradient(grad_y, values, indices, weights, needs, backend):
    return gather_backward_op.gradients(
        grad_y=grad_y,
        values=values,
        indices=indices,
        weights=weights,
        for_values="values" in needs,
        for_weights="weights" in needs,
        backend=backend,
    )


gather_op = torch_op(
    "weighted_gather(Tensor values, Tensor indices, Tensor weights, int backend) -> Tensor y",
    fake=launch.output,
    launchers={"triton": launch.gpu, "cuda": launch.gpu},
    gradient=_gradient,
)

rows_op = torch_op(
    "weighted_gather_rows(Tensor grad_y, Tensor indices, Tensor weights, int table_rows, int backend) "
    "-> (Tensor rows, Tensor sums)",
    fake=launch.used_rows,
    launchers={"triton": launch.gpu_rows, "cuda": launch.gpu_rows},
    gradient=_refuse,
)


# ------------------------------------------------------------------------------------------------ sparse gradients


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
            _refuse(grad)
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
                grad_values = rows_op(grad, indices, weights, values.size(0), ctx.backend)
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


# ------------------------------------------------------------------------------------------------ public function


@public(
    kernel=_kernel,
    reference=_reference,
    supports={
        "cpu": lambda *_: None,
        "triton": lambda values, *_: triton_declines(values),
        "cuda": lambda values, *_: "it takes fp32, bf16 and fp16" if values.dtype == torch.float64 else None,
    },
    differentiable=("values", "weights"),
)
def weighted_gather(run, values: Tensor, indices: Tensor, weights: Tensor, *, sparse_grad: bool = False) -> Tensor:
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
    expect_tensor(values, "values", "[M, dv]", DTYPES)
    _check_bags(indices, weights, values)
    if sparse_grad:
        check_sparse("weighted_gather")
    *bags, k = indices.shape
    flat = (math.prod(bags), 1, k)
    weights = weights.reshape(flat).to(accumulator_of(values.dtype))
    out = run(values, indices.reshape(flat).long(), weights, bool(sparse_grad)).view(*bags, values.size(1))
    return autocast(out)[0]
