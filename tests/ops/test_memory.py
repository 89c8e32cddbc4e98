"""What is peculiar to the memory ops: ties, NaN, what is kept and what is not, sparse gradients, errors."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from cuda_host import build, host
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pykernels as pk
from pykernels.bench.measure import peak_memory
from pykernels.core.backends import CPU, CUDA, unavailable
from pykernels.ops.weighted_gather import gather_backward_op, gather_op
from pykernels.samples.topk import grid
from pykernels.tools.check import differentiate, float_leaves

needs_kernels = pytest.mark.skipif(unavailable(CPU, "cpu") is not None, reason=f"cpu: {unavailable(CPU, 'cpu')}")
NO_CUDA = (build.missing() if host.MODE else "run by tests/cuda_host/run.py") or unavailable(CUDA, "cpu")
needs_cuda = pytest.mark.skipif(NO_CUDA is not None, reason=f"cuda: {NO_CUDA}")
hypothesis = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference")
INF, NAN = float("inf"), float("nan")


def by_sorting(query, keys, k, scale=1.0):
    """The definition: all scores in fp64, a stable sort."""
    if keys.dim() == 3:
        scores = scale * torch.einsum("...hd,hmd->...hm", query.double(), keys.double())
    else:
        scores = scale * query.double() @ keys.double().T
    scores, indices = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :k].to(query.dtype), indices[..., :k]


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def equal(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------ search


@needs_kernels
@hypothesis
@given(st.data())
def test_search_is_a_stable_sort_of_exact_scores(data):
    """Few distinct scores, so that most tie; any sizes, heads, k, dtype, strides and number of threads."""
    M, d = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 70) | st.integers(129, 300))
    heads = data.draw(st.sampled_from([None, None, 1, 3]))
    shape = data.draw(st.sampled_from([(), (1,), (5,), (7,), (17,), (70,), (2, 3), (300,)]))
    k = data.draw(st.integers(1, M))
    dtype = data.draw(st.sampled_from(DTYPES))
    scale = data.draw(st.sampled_from([1.0, 0.5, -2.0, 0.0]))
    tables = () if heads is None else (heads,)
    query, keys = grid(*shape, *tables, d, dtype=dtype, device="cpu"), grid(*tables, M, d, dtype=dtype, device="cpu")
    keys = keys[..., torch.randint(0, 1 + M // 3, (M,)), :]
    if data.draw(st.booleans()):
        keys = keys.transpose(-1, -2).contiguous().transpose(-1, -2)
    with threads(data.draw(st.integers(1, 3))):
        found = pk.topk_search(query, keys, k, scale=scale)
    equal(found, by_sorting(query, keys, k, scale))


@needs_cuda
@pytest.mark.cuda_host
@hypothesis
@given(st.data())
def test_cuda_search_is_a_stable_sort_of_exact_scores(data):
    """In any order of the threads; NaN of either sign, infinities and zeros of either sign among the scores."""
    M = data.draw(st.integers(1, 900) | st.integers(3000, 6000))
    d = data.draw(st.integers(1, 20) | st.sampled_from([64, 136, 300]))
    heads = data.draw(st.sampled_from([None, None, 1, 2]))
    shape = data.draw(st.sampled_from([(), (2,), (5,), (17,), (2, 3), (70,)]))
    k = data.draw(st.integers(1, min(M, 60)) | st.integers(1, M))
    dtype = data.draw(st.sampled_from(DTYPES[1:]))
    draw = data.draw(st.sampled_from(["grid", "few", "equal", "rising", "special"]))
    scale = data.draw(st.sampled_from([1.0, 0.5, -2.0, 0.0] if draw != "special" else [1.0, -2.0]))
    host.set_order(data.draw(st.sampled_from(["forward", "reverse"]) | st.integers(0, 99).map("random:{}".format)))
    tables = () if heads is None else (heads,)
    query, keys = grid(*shape, *tables, d, dtype=dtype, device="cpu"), grid(*tables, M, d, dtype=dtype, device="cpu")
    if draw == "few":
        keys = keys[..., torch.randint(0, 1 + M // 9, (M,)), :]
    elif draw == "equal":
        keys = torch.ones_like(keys)
    elif draw == "rising":
        query, keys = query.abs() + 0.25, (torch.arange(M) / 4).clamp(max=60).to(dtype)[:, None].expand_as(keys)
    elif draw == "special":
        query, keys = torch.where(query[..., :1] < 0, -1, 1).to(dtype), keys[..., :1] / 2
        values = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0], dtype=dtype)
        keys = torch.where(torch.rand(keys.shape) < 0.5, keys, values[torch.randint(0, 6, keys.shape)])
    if data.draw(st.booleans()):  # rows that are not aligned, in memory that they do not fill
        keys = F.pad(keys, (1, 2), value=NAN)[..., 1:-2]
    with pk.use_backend("cuda"):
        found = pk.topk_search(query, keys, k, scale=scale)
    equal(found, by_sorting(query, keys, k, scale))


@needs_kernels
@pytest.mark.cuda_host
@needs_cuda
@pytest.mark.parametrize("dv", [7, 8])
def test_cuda_takes_an_index_out_of_range_for_a_row_of_zeros(dv):
    table = torch.full((11, dv + 1), NAN)  # what is beside the values must not be read; not all rows are aligned
    values, indices = table[1:10, :dv].normal_()[None], torch.tensor([[[0, 9, -1, 8]], [[9, 9, -1, 3]]])
    weights, grad = torch.randn(2, 1, 4), torch.randn(2, 1, dv)
    inside = (indices >= 0) & (indices < 9)
    rows = torch.where(inside[..., None], values[0][indices.clamp(0, 8)], 0)  # [2, 1, 4, dv]
    torch.testing.assert_close(gather_op(values, indices, weights, CUDA), (weights[..., None] * rows).sum(2))
    grad_values, grad_weights = gather_backward_op(grad, values, indices, weights, True, True, CUDA)
    torch.testing.assert_close(grad_weights, (rows * grad[:, :, None]).sum(3))
    each = (weights[..., None] * grad[:, :, None])[inside]
    torch.testing.assert_close(grad_values[0], torch.zeros(9, dv).index_add_(0, indices[inside], each))


@pytest.mark.parametrize("n", [1, 5, 40, 300])
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "saw"])
def test_any_order_of_the_scores(n, order):
    M, k = 20_000, 50
    place = torch.arange(M)
    scores = {"rising": place, "falling": -place, "equal": 0 * place, "saw": place % 997}[order].float()
    query = torch.ones(n, 1) * torch.arange(1, n + 1)[:, None]
    equal(pk.topk_search(query, scores[:, None], k), by_sorting(query, scores[:, None], k))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 40])
def test_nan_is_above_all_and_infinities_are_scores(n, dtype):
    """As in torch.topk, and as a stable sort has it; k NaN or more must not let anything else in."""
    for special in (
        [NAN, INF, -INF],
        [NAN] * 12 + [INF] * 5,
        [-INF] * 300,
        [INF] * 300,
        [NAN] * 300,
        [-0.0, 0.0] * 100,
    ):
        scores = torch.randn(400, dtype=dtype)
        values = torch.tensor(special, dtype=dtype)
        values = torch.where(values.isnan(), values.copysign(torch.randn_like(values)), values)  # NaN of either sign
        scores[torch.randperm(400)[: len(special)]] = values
        query = torch.ones(n, 1, dtype=dtype)
        for k in (1, 9, 40, 400):
            got = pk.topk_search(query, scores[:, None], k)
            equal(got, by_sorting(query, scores[:, None], k))
            equal(got[:1], (scores.expand(n, -1).topk(k).values,))


def test_agrees_with_faiss():
    faiss = pytest.importorskip("faiss")
    query, keys = torch.randn(40, 24), torch.randn(5000, 24)
    index = faiss.IndexFlatIP(24)
    index.add(keys.numpy())
    scores, indices = map(torch.from_numpy, index.search(query.numpy(), 10))
    got = pk.topk_search(query, keys, 10)
    torch.testing.assert_close(got[0], scores)
    assert (got[1] == indices).float().mean() > 0.99  # near ties are rounded otherwise


@needs_kernels
@pytest.mark.parametrize("name", ["topk_search", "topk_memory"])
def test_memory_does_not_grow_with_the_number_of_keys(name):
    n, d = 64, 8
    peaks = []
    for M in (50_000, 400_000):  # all scores would be 100 MB more
        query, keys, values = torch.randn(n, d), torch.randn(M, d), torch.randn(1, 4).expand(M, 4)
        inputs = (query, keys) if name == "topk_search" else (query, keys, values)
        getattr(pk, name)(*inputs, 32)
        peaks.append(peak_memory(lambda inputs=inputs: getattr(pk, name)(*inputs, 32), "cpu"))
    if None in peaks:
        pytest.skip("this system does not tell a process its peak memory")
    assert max(peaks) < 8 * 2**20


@pytest.mark.parametrize("backend", ["cpu"])
@needs_kernels
def test_nothing_of_the_scores_is_kept_for_backward(backend):
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    n, M, d, k = 50, 3000, 4, 5
    query, keys = torch.randn(n, d, requires_grad=True), torch.randn(M, d, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pk.topk_search(query, keys, k)
    assert kept
    assert max(kept) == M * d * 4  # the keys


@pytest.mark.parametrize("backend", BACKENDS[:1])
@needs_kernels
def test_keys_that_lost_have_no_part_in_the_gradient(backend):
    query, keys = torch.rand(6, 3), torch.rand(40, 3)
    keys[7] = -INF
    keys[11] = -1e30
    query.requires_grad_()
    keys.requires_grad_()
    scores, indices = pk.topk_search(query, keys, 4)
    scores.sum().backward()
    used = torch.zeros(40, dtype=torch.bool).index_fill_(0, indices.unique(), True)
    assert not used[7]
    assert query.grad.isfinite().all()
    assert (keys.grad[~used] == 0).all()
    want = torch.zeros(40, 3).index_add_(0, indices.flatten(), query.detach().repeat_interleave(4, 0))
    torch.testing.assert_close(keys.grad, want)


@needs_kernels
def test_rows_beyond_two_billion_elements():
    """Of tables that are mostly never touched, so that they take no memory."""
    step = 2**30 + 7
    table = torch.empty(3 * step, dtype=torch.float16).as_strided((3, 5), (step, 1))
    rows = grid(3, 5, dtype=torch.float16, device="cpu")
    table.copy_(rows)
    query = grid(4, 5, dtype=torch.float16, device="cpu")
    equal(pk.topk_search(query, table, 3), by_sorting(query, rows, 3))
    indices, weights = torch.randint(0, 3, (6, 4)), grid(6, 4, dtype=torch.float16, device="cpu")
    equal([pk.weighted_gather(table, indices, weights)], [pk.reference.weighted_gather(rows, indices, weights)])


# ------------------------------------------------------------------------------------------------ product keys


@needs_kernels
@hypothesis
@given(st.data())
def test_product_keys_find_the_best_of_all_pairs(data):
    """Of all k² pairs in the order of their ranks, not only of those that can win."""
    n, half, H = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    N, k = data.draw(st.integers(1, 80)), data.draw(st.integers(1, n))
    dtype = data.draw(st.sampled_from(DTYPES))
    query, keys = (grid(*s, dtype=dtype, device="cpu") for s in ((N, H, 2 * half), (H, 2, n, half)))
    exact = query.double().view(N, H, 2, half)
    lists = torch.einsum("NHsd,Hsnd->NHsn", exact, keys.double()).sort(dim=-1, descending=True, stable=True)
    scores, places = (part[..., :k] for part in lists)
    sums = (scores[:, :, 0, :, None] + scores[:, :, 1, None]).flatten(2)
    ids = (places[:, :, 0, :, None] * n + places[:, :, 1, None]).flatten(2)
    sums, winners = (part[..., :k] for part in sums.sort(dim=-1, descending=True, stable=True))
    equal(pk.product_key_search(query, keys, k), (sums.to(dtype), ids.gather(-1, winners)))


def test_product_keys_are_a_search_of_their_sums():
    n, H, k = 12, 2, 5
    query, keys = torch.randn(7, H, 6, dtype=torch.float64), torch.randn(H, 2, n, 3, dtype=torch.float64)
    both = torch.cat((keys[:, 0].repeat_interleave(n, 1), keys[:, 1].repeat(1, n, 1)), -1)
    got, want = pk.product_key_search(query, keys, k), pk.topk_search(query, both, k)
    torch.testing.assert_close(got[0], want[0])
    assert torch.equal(got[1], want[1])


@needs_kernels
def test_product_keys_with_infinities():
    """∞ − ∞ is NaN, which is above all: no bound on the candidates holds then."""
    for _ in range(20):
        keys = torch.randn(1, 2, 30, 1)
        for half in range(2):
            keys[0, half, torch.randperm(30)[:4], 0] = torch.tensor([INF, -INF, NAN, 1e38])[torch.randperm(4)]
        query = torch.ones(3, 1, 2)
        equal(pk.product_key_search(query, keys, 30), pk.reference.product_key_search(query, keys, 30))


# ------------------------------------------------------------------------------------------------ gather


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


def test_what_a_sparse_gradient_cannot_do():
    values = torch.randn(5, 3, requires_grad=True)
    indices, weights = torch.tensor([[1, 2]]), torch.ones(1, 2, requires_grad=True)
    compiled = torch.compile(pk.weighted_gather, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"torch\.compile has no sparse gradients"):
        compiled(values, indices, weights, sparse_grad=True)
    out = pk.weighted_gather(values, indices, weights, sparse_grad=True)
    with pytest.raises(NotImplementedError, match="a sparse gradient has no gradient of its own"):
        torch.autograd.grad(out.sum(), weights, create_graph=True)


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", ["topk_memory", "product_key_memory"])
def test_a_lookup_is_its_search_and_gather(name):
    if name == "topk_memory":
        query, keys, values = torch.randn(6, 4), torch.randn(30, 4), torch.randn(30, 9)
        scores, indices = pk.topk_search(query, keys, 5)
    else:
        query, keys, values = torch.randn(6, 2, 4), torch.randn(2, 2, 7, 2), torch.randn(49, 9)
        scores, indices = pk.product_key_search(query, keys, 5)
    output, weights, at = getattr(pk, name)(query, keys, values, 5, return_weights=True)
    assert torch.equal(at, indices)
    torch.testing.assert_close(weights, scores.softmax(-1))
    bags = (at.flatten(1), weights.flatten(1))
    torch.testing.assert_close(output, pk.weighted_gather(values, *bags))
    torch.testing.assert_close(output, getattr(pk, name)(query, keys, values, 5))


def calls(n=6):
    """Of every op a function and its arguments, n queries among them."""
    k, draw = 4, torch.randn
    return {
        "topk_search": (lambda q, keys: pk.topk_search(q, keys, k), [draw(n, 5), draw(20, 5)]),
        "topk_memory": (lambda q, keys, v: pk.topk_memory(q, keys, v, k), [draw(n, 5), draw(20, 5), draw(20, 3)]),
        "product_key_search": (lambda q, s: pk.product_key_search(q, s, k), [draw(n, 2, 10), draw(2, 2, 8, 5)]),
        "product_key_memory": (
            lambda q, s, v: pk.product_key_memory(q, s, v, k),
            [draw(n, 2, 10), draw(2, 2, 8, 5), draw(64, 3)],
        ),
        "weighted_gather": (
            lambda v, w, ids: pk.weighted_gather(v, ids, w),
            [draw(20, 3), draw(n, 3), torch.randint(0, 20, (n, 3))],
        ),
    }


@pytest.mark.parametrize("name", calls())
def test_autocast_takes_all_arguments_along(name):
    function, tensors = calls()[name]
    with torch.autocast("cpu", torch.bfloat16):
        out = float_leaves(function(*tensors))[0]
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("name", calls())
def test_forward_mode_is_refused(name):
    function, (first, *rest) = calls()[name]
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
        function(torch.autograd.forward_ad.make_dual(first, torch.ones_like(first)), *rest)


@needs_kernels
@pytest.mark.parametrize("name", calls())
@pytest.mark.filterwarnings("ignore")
def test_compiles_whole_once_for_every_number_of_queries(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(calls()[name][0], fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (6, 7, 30):
        function, tensors = calls(n)[name]
        leaves = [t.requires_grad_() for t in float_leaves(tensors)]
        results = []
        for f in (compiled, function):
            outputs = float_leaves(f(*tensors))
            results.append([*outputs, *differentiate(outputs, leaves)])
        equal(*results)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


q, K, V = torch.zeros(6, 4), torch.zeros(9, 4), torch.zeros(9, 3)
Q2, S2, V2 = torch.zeros(6, 2, 4), torch.zeros(2, 2, 5, 2), torch.zeros(25, 3)
ids, w = torch.zeros(6, 3, dtype=torch.int64), torch.zeros(6, 3)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: pk.topk_search([1.0], K, 2), TypeError, "query: expected a tensor [..., d], got list"),
        (
            lambda: pk.topk_search(q.long(), K, 2),
            TypeError,
            "query: expected torch.float64 or torch.float32 or torch.bfloat16 or torch.float16, got torch.int64",
        ),
        (lambda: pk.topk_search(q[0, 0], K, 2), ValueError, "query: expected rank 1 or more [..., d], got []"),
        (lambda: pk.topk_search(q[:, :0], K[:, :0], 2), ValueError, "query: expected d of 1 or more"),
        (lambda: pk.topk_search(q, K[:, :3], 2), ValueError, "keys: expected [M, 4] to match query's last dimension"),
        (lambda: pk.topk_search(q, K[0], 2), ValueError, "keys: expected [M, d] or [H, M, d], got [4]"),
        (lambda: pk.topk_search(q, K.double(), 2), TypeError, "keys: expected query's dtype torch.float32"),
        (lambda: pk.topk_search(q, K.to("meta"), 2), ValueError, "keys: expected query's device cpu, got meta"),
        (lambda: pk.topk_search(q, K, 10), ValueError, "k: expected from 1 to the number of keys, 9, got 10"),
        (lambda: pk.topk_search(q, K, 0), ValueError, "k: expected from 1 to the number of keys, 9, got 0"),
        (lambda: pk.topk_search(q, K, 2.0), TypeError, "k: expected an integer, got float"),
        (lambda: pk.topk_search(q, K, 2, scale=torch.ones(())), TypeError, "scale: expected a number, which has no"),
        (lambda: pk.topk_memory(q, K, V, 2, scale=math.inf), ValueError, "scale: expected a finite number, got inf"),
        (lambda: pk.topk_search(q, K.to_sparse(), 2), TypeError, "keys: expected a dense tensor [M, d]"),
        (lambda: pk.topk_search(q, K.expand(2, 9, 4), 2), ValueError, "query: expected [..., 2, 4] to match the heads"),
        (lambda: pk.topk_memory(q, K, V[:8], 2), ValueError, "values: expected [9] rows to match keys, got [8, 3]"),
        (lambda: pk.topk_memory(q, K, V.half(), 2), TypeError, "values: expected query's dtype torch.float32"),
        (
            lambda: pk.topk_memory(q, K, None, 2),
            TypeError,
            "values: expected a tensor [M, dv] or [H, M, dv], got NoneType",
        ),
        (lambda: pk.product_key_search(q, S2, 2), ValueError, "sub_keys: expected [6, 2, n, 2] to match query"),
        (lambda: pk.product_key_search(Q2[..., :3], S2, 2), ValueError, "query: expected an even d in [..., H, d]"),
        (lambda: pk.product_key_search(Q2, S2[0], 2), ValueError, "sub_keys: expected rank 4 [H, 2, n, d/2]"),
        (
            lambda: pk.product_key_search(Q2, S2, 6),
            ValueError,
            "k: expected from 1 to the number of sub-keys, 5, got 6",
        ),
        (
            lambda: pk.product_key_memory(Q2, S2, V2[1:], 2),
            ValueError,
            "values: expected [25, dv], a row for each pair",
        ),
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
    ],
)
def test_errors_name_argument_expectation_and_value(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


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


def test_sparse_gradients_refuse_transforms():
    V, ids, w = torch.randn(9, 5), torch.randint(9, (6, 3)), torch.rand(6, 3)
    with pytest.raises(NotImplementedError, match=r"torch\.func has no sparse gradients: use sparse_grad=False"):
        torch.func.grad(lambda V: pk.weighted_gather(V, ids, w, sparse_grad=True).sum())(V)


def fixed(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


ANY_LENGTH = {
    "topk_search": lambda N: pk.topk_search(fixed(N, 6), fixed(20, 6), 3, scale=0.5),
    "topk_memory": lambda N: pk.topk_memory(fixed(N, 6), fixed(20, 6), fixed(20, 5), 3),
    "product_key_search": lambda N: pk.product_key_search(fixed(N, 2, 6), fixed(2, 2, 10, 3), 3),
    "product_key_memory": lambda N: pk.product_key_memory(fixed(N, 2, 6), fixed(2, 2, 10, 3), fixed(100, 5), 3),
    "weighted_gather": lambda N: pk.weighted_gather(fixed(20, 5), (fixed(N, 3).abs() * 5).long(), fixed(N, 3)),
}


@pytest.mark.parametrize("name", ANY_LENGTH)
def test_any_length_in_one_graph(name):
    graphs, seen = [], []
    op = getattr(pk, name)

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(*args, **options):
        seen.append((args, options))
        return op(*args, **options)

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pk, name, call)
        expected = [ANY_LENGTH[name](N) for N in (7, 4, 8, 9, 13)]
    for (args, options), wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(compiled(*args, **options), wanted)
    assert len(graphs) == 1
