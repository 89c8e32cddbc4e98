"""What is peculiar to the weighted gather: sparse gradients, the order of sums, indices out of range, errors."""

import pytest
import torch
import torch.nn.functional as F
from kit import (
    draw,
    equal,
    errors,
    needs_cuda_host,
    needs_kernels,
    one_graph,
    threads,
    with_gradients,
)

import pykernels as pk
from pykernels.core.backends import CPU, CUDA
from pykernels.ops.weighted_gather import gather_backward_op, gather_op

BACKENDS = ("cpu", "reference")


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gather_is_an_embedding_bag(dtype, sparse):
    values = torch.randn(50, 12, dtype=dtype, requires_grad=True)
    weights = torch.randn(9, 6, dtype=dtype, requires_grad=True)
    indices = torch.randint(0, 50, (9, 6))
    ours = pk.weighted_gather(values, indices, weights, sparse_grad=sparse)
    theirs = F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum", sparse=sparse)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for got, want in zip(*(torch.autograd.grad(out, (values, weights), grad) for out in (ours, theirs)), strict=True):
        assert got.is_sparse == want.is_sparse
        torch.testing.assert_close(got.to_dense(), want.to_dense())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0,)])
def test_sparse_gradients_hold_the_used_rows_once_in_order(shape, backend):
    with pk.use_backend(backend):
        values = torch.randn(40, 7, requires_grad=True)
        indices = torch.randint(0, 13, (*shape, 8)).mul_(3)
        weights = torch.randn(*shape, 8, requires_grad=True)
        out = pk.weighted_gather(values, indices, weights, sparse_grad=True)
        grad = torch.randn_like(out)
        sparse, of_weights = torch.autograd.grad(out, (values, weights), grad)
        dense = torch.autograd.grad(pk.weighted_gather(values, indices, weights), (values, weights), grad)
    assert sparse.is_coalesced()
    assert torch.equal(sparse.indices()[0], indices.unique())
    torch.testing.assert_close(sparse.to_dense(), dense[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_weights, dense[1])
    sparse.check_invariants = True


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_adam_steps_the_used_rows_as_adam_does(backend):
    start, indices = torch.randn(30, 4), torch.tensor([[3, 9, 3], [20, 9, 1]])
    used = indices.unique()
    results = []
    for sparse, optimizer in ((True, torch.optim.SparseAdam), (False, torch.optim.Adam)):
        values = torch.nn.Parameter(start.clone())
        step = optimizer([values], lr=0.1)
        with pk.use_backend(backend):
            for _ in range(3):
                step.zero_grad()
                out = pk.weighted_gather(values, indices, torch.ones(2, 3), sparse_grad=sparse)
                out.square().sum().backward()
                step.step()
        results.append(values.detach())
    torch.testing.assert_close(results[0][used], results[1][used])
    unused = torch.ones(30, dtype=torch.bool).index_fill_(0, used, False)
    assert torch.equal(results[0][unused], start[unused])


@needs_kernels
def test_the_order_of_a_rows_sum_is_that_of_its_hits():
    """So that every number of threads gives the same bits, even where most hits are of one row."""
    values = torch.randn(500, 33, requires_grad=True)
    indices = torch.where(torch.rand(700, 16) < 0.7, 5, torch.randint(0, 500, (700, 16)))
    weights = torch.randn(700, 16, requires_grad=True)
    grad = torch.randn(700, 33)

    def run(count, sparse):
        with threads(count):
            out = pk.weighted_gather(values, indices, weights, sparse_grad=sparse)
            gradients = torch.autograd.grad(out, (values, weights), grad)
            return [out, *(g.to_dense() for g in gradients)]

    first = run(1, False)
    for count in (1, 2, 3):
        for sparse in (False, True):
            equal(run(count, sparse), first)


@needs_kernels
@pytest.mark.parametrize("wrong", [-1, 20, 2**40, -(2**62)])
def test_an_index_out_of_range_is_an_error_and_never_a_stray_read(wrong):
    values, weights = torch.randn(20, 5), torch.ones(6, 3)
    indices = torch.randint(0, 20, (6, 3))
    indices[4, 1] = wrong
    with pytest.raises(IndexError, match=f"indices: expected 0 to 19, got {wrong}"):
        pk.weighted_gather(values, indices, weights)
    ops, one = torch.ops.pykernels, indices[:, None]
    with pytest.raises(RuntimeError, match="indices: expected 0 to 19"):
        ops.weighted_gather(values[None], one, weights[:, None], CPU)
    with pytest.raises(RuntimeError, match="indices: expected 0 to 19"):
        ops.weighted_gather_backward(torch.ones(6, 1, 5), values[None], one, weights[:, None], True, True, CPU)
    with pytest.raises(RuntimeError, match="indices: expected 0 to 19"):
        ops.weighted_gather_rows(torch.ones(6, 1, 5), one, weights[:, None], 20, CPU)


@needs_kernels
@pytest.mark.cuda_host
@needs_cuda_host
@pytest.mark.parametrize("dv", [7, 8])
def test_cuda_takes_an_index_out_of_range_for_a_row_of_zeros(dv):
    table = torch.full((11, dv + 1), torch.nan)  # what is beside the values must not be read; not all rows are aligned
    values, indices = table[1:10, :dv].normal_()[None], torch.tensor([[[0, 9, -1, 8]], [[9, 9, -1, 3]]])
    weights, grad = torch.randn(2, 1, 4), torch.randn(2, 1, dv)
    inside = (indices >= 0) & (indices < 9)
    rows = torch.where(inside[..., None], values[0][indices.clamp(0, 8)], 0)  # [2, 1, 4, dv]
    torch.testing.assert_close(gather_op(values, indices, weights, CUDA), (weights[..., None] * rows).sum(2))
    grad_values, grad_weights = gather_backward_op(grad, values, indices, weights, True, True, CUDA)
    torch.testing.assert_close(grad_weights, (rows * grad[:, :, None]).sum(3))
    each = (weights[..., None] * grad[:, :, None])[inside]
    torch.testing.assert_close(grad_values[0], torch.zeros(9, dv).index_add_(0, indices[inside], each))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_gather_under_autocast_reads_the_table_as_it_is(weights):
    """Dense or sparse, the same result of autocast's dtype, and a gradient of the table's."""
    V, ids = torch.randn(9, 5), torch.randint(9, (6, 3))
    w = torch.rand(6, 3).to(weights)
    results = []
    for sparse in (False, True):
        table = V.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = pk.weighted_gather(table, ids, w, sparse_grad=sparse)
        out.float().square().sum().backward()
        assert (out.dtype, table.grad.dtype, table.grad.is_sparse) == (torch.bfloat16, torch.float32, sparse)
        results.append((out, table.grad.to_dense()))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert torch.equal(results[0][0], pk.weighted_gather(V, ids, w.float()).bfloat16())


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_every_number_of_queries():
    def call(values, weights, indices):
        return pk.weighted_gather(values, indices, weights)

    table = draw(20, 5)
    calls = [with_gradients([table, draw(n, 3), torch.randint(0, 20, (n, 3))]) for n in (6, 7, 30, 8, 13)]
    one_graph(call, calls, lambda given: given[:2], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what is refused


def test_what_a_sparse_gradient_cannot_do():
    values = torch.randn(5, 3, requires_grad=True)
    indices, weights = torch.tensor([[1, 2]]), torch.ones(1, 2, requires_grad=True)
    compiled = torch.compile(pk.weighted_gather, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compile has no sparse gradients"):
        compiled(values, indices, weights, sparse_grad=True)
    out = pk.weighted_gather(values, indices, weights, sparse_grad=True)
    with pytest.raises(NotImplementedError, match="a sparse gradient has no gradient of its own"):
        torch.autograd.grad(out.sum(), weights, create_graph=True)


def test_sparse_gradients_refuse_transforms():
    V, V, ids, w = torch.zeros(9, 3), torch.randn(9, 5), torch.randint(9, (6, 3)), torch.rand(6, 3)
    with pytest.raises(NotImplementedError, match=r"torch\.func has no sparse gradients: use sparse_grad=False"):
        torch.func.grad(lambda V: pk.weighted_gather(V, ids, w, sparse_grad=True).sum())(V)


V, ids, w = torch.zeros(9, 3), torch.zeros(6, 3, dtype=torch.int64), torch.zeros(6, 3)

ERRORS = [
    (lambda: pk.weighted_gather(V[0], ids, w), ValueError, "values: expected rank 2 [M, dv], got [3]"),
    (lambda: pk.weighted_gather(V.long(), ids, w), TypeError, "values: expected torch.float64 or torch.float32"),
    (
        lambda: pk.weighted_gather(V, w, w),
        TypeError,
        "indices: expected torch.int32 or torch.int64, got torch.float32",
    ),
    (lambda: pk.weighted_gather(V, ids, w[0]), ValueError, "weights: expected [6, 3] to match indices, got [3]"),
    (lambda: pk.weighted_gather(V, ids, w.half()), TypeError, "weights: expected values's dtype torch.float32"),
    (lambda: pk.weighted_gather(V, ids + 9, w), IndexError, "indices: expected 0 to 8, got 9"),
]

test_errors_name_argument_expectation_and_value = errors(ERRORS, literal=True)
