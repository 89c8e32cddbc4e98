"""What is peculiar to product keys: the best of all pairs, infinities, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import agree, draw, equal, errors, hypothesis, needs_kernels, one_graph, with_gradients

import pykernels as pk
from pykernels.core.dtypes import DTYPES
from pykernels.samples.topk import grid

INF, NAN = float("inf"), float("nan")


@needs_kernels
@settings(hypothesis, max_examples=40)
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


def test_a_lookup_is_its_search_and_gather():
    query, keys, values = torch.randn(6, 2, 4), torch.randn(2, 2, 7, 2), torch.randn(49, 9)
    scores, indices = pk.product_key_search(query, keys, 5)
    output, weights, at = pk.product_key_memory(query, keys, values, 5, return_weights=True)
    equal(at, indices)
    agree(weights, scores.softmax(-1))
    agree(output, pk.weighted_gather(values, at.flatten(1), weights.flatten(1)))
    agree(output, pk.product_key_memory(query, keys, values, 5))


@needs_kernels
@pytest.mark.parametrize("name", ["product_key_search", "product_key_memory"])
@pytest.mark.filterwarnings("ignore")
def test_one_graph_for_every_number_of_queries(name):
    function, rest = getattr(pk, name), [draw(2, 2, 10, 5)] + [draw(100, 3)] * (name == "product_key_memory")

    def call(*tensors):
        return function(*tensors, 4)

    calls = [with_gradients([draw(n, 2, 10), *rest]) for n in (6, 7, 30, 8, 13)]
    one_graph(call, calls, list, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ what is refused


Q2, S2, V2 = torch.zeros(6, 2, 4), torch.zeros(2, 2, 5, 2), torch.zeros(25, 3)

ERRORS = [
    (lambda: pk.product_key_search(Q2[:, 0], S2, 2), ValueError, "sub_keys: expected [6, 2, n, 2] to match query"),
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
]

test_errors_name_argument_expectation_and_value = errors(ERRORS, literal=True)
