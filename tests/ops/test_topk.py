"""What is peculiar to search by sorting: ties, NaN, what is kept and what is not, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from cuda_host import host
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import (
    agree,
    draw,
    equal,
    errors,
    hypothesis,
    needs_cuda_host,
    needs_kernels,
    one_graph,
    threads,
    with_gradients,
)

import pykernels as pk
from pykernels.bench.measure import peak_memory
from pykernels.core.dtypes import DTYPES, FLOATS
from pykernels.samples.topk import grid

INF, NAN = float("inf"), float("nan")


def by_sorting(query, keys, k, scale=1.0):
    """The definition: all scores in fp64, a stable sort."""
    if keys.dim() == 3:
        scores = scale * torch.einsum("...hd,hmd->...hm", query.double(), keys.double())
    else:
        scores = scale * query.double() @ keys.double().T
    scores, indices = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :k].to(query.dtype), indices[..., :k]


@needs_kernels
@settings(hypothesis, max_examples=40)
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


@needs_cuda_host
@pytest.mark.cuda_host
@settings(hypothesis, max_examples=40)
@given(st.data())
def test_cuda_search_is_a_stable_sort_of_exact_scores(data):
    """In any order of the threads; NaN of either sign, infinities and zeros of either sign among the scores."""
    M = data.draw(st.integers(1, 900) | st.integers(3000, 6000))
    d = data.draw(st.integers(1, 20) | st.sampled_from([64, 136, 300]))
    heads = data.draw(st.sampled_from([None, None, 1, 2]))
    shape = data.draw(st.sampled_from([(), (2,), (5,), (17,), (2, 3), (70,)]))
    k = data.draw(st.integers(1, min(M, 60)) | st.integers(1, M))
    dtype = data.draw(st.sampled_from(FLOATS))
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


@needs_kernels
def test_nothing_of_the_scores_is_kept_for_backward():
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


@needs_kernels
def test_keys_that_lost_have_no_part_in_the_gradient():
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


def test_a_lookup_is_its_search_and_gather():
    query, keys, values = torch.randn(6, 4), torch.randn(30, 4), torch.randn(30, 9)
    scores, indices = pk.topk_search(query, keys, 5)
    output, weights, at = pk.topk_memory(query, keys, values, 5, return_weights=True)
    equal(at, indices)
    agree(weights, scores.softmax(-1))
    agree(output, pk.weighted_gather(values, at, weights))
    agree(output, pk.topk_memory(query, keys, values, 5))


@needs_kernels
@pytest.mark.parametrize("name", ["topk_search", "topk_memory"])
@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_every_number_of_queries(name):
    function, rest = getattr(pk, name), [draw(20, 5)] + [draw(20, 3)] * (name == "topk_memory")

    def call(*tensors):
        return function(*tensors, 4, scale=0.5)

    calls = [with_gradients([draw(n, 5), *rest]) for n in (6, 7, 30, 8, 13)]
    one_graph(call, calls, list, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what is refused


q, K, V = torch.zeros(6, 4), torch.zeros(9, 4), torch.zeros(9, 3)

ERRORS = [
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
]

test_errors_name_argument_expectation_and_value = errors(ERRORS, literal=True)
