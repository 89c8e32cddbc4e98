"""What attention refuses, and in which words."""

import math

import numpy as np
import pytest
import torch
from kit import draw, errors, needs_kernels

import pykernels as pk

Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)

ERRORS = [
    (lambda: pk.attention([1], K, K), TypeError, "query: expected a tensor"),
    (lambda: pk.attention(Q[0], K, K), ValueError, r"query: expected rank 4 \[B, H, N, D\], got \[4, 5, 8\]"),
    (lambda: pk.attention(Q.long(), K, K), TypeError, "query: expected torch.float64 or .*got torch.int64"),
    (lambda: pk.attention(Q, K.half(), K), TypeError, "key: expected query's dtype torch.float32, got torch.float16"),
    (lambda: pk.attention(Q, K[..., :7], K), ValueError, r"key: expected last dimension 8.*got \[2, 2, 6, 7\]"),
    (lambda: pk.attention(Q, K[:1], K[:1]), ValueError, "key: expected batch 2"),
    (lambda: pk.attention(Q[:, :3], K, K), ValueError, "key: expected a number of heads that divides query's 3"),
    (
        lambda: pk.attention(Q, K, K[:, :, :5]),
        ValueError,
        r"value: expected \[2, 2, 6, 8\] to match key, got \[2, 2, 5, 8\]",
    ),
    (
        lambda: pk.attention(torch.zeros(1, 1, 1, 257), torch.zeros(1, 1, 1, 257), K),
        ValueError,
        "query: expected a head",
    ),
    (lambda: pk.attention(Q, K.to("meta"), K), ValueError, "key: expected query's device cpu, got meta"),
    (
        lambda: pk.attention(Q, K, K, bias=torch.zeros(5, 7)),
        ValueError,
        r"bias: expected broadcastable to \[2, 4, 5, 6\]",
    ),
    (
        lambda: pk.attention(Q, K, K, bias=torch.zeros(5, 6).long()),
        TypeError,
        "bias: expected torch.bool or torch.float32",
    ),
    (
        lambda: pk.attention(Q, K, K, alibi_slopes=torch.zeros(3)),
        ValueError,
        r"alibi_slopes: expected \[4\] or \[2, 4\]",
    ),
    (
        lambda: pk.attention(Q, K, K, key_lengths=torch.tensor([1, 7])),
        ValueError,
        r"key_lengths: .*0 to 6, got \[1, 7\]",
    ),
    (lambda: pk.attention(Q, K, K, key_lengths=torch.zeros(2)), TypeError, "key_lengths: expected torch.int32 or"),
    (lambda: pk.attention(Q, K, K, window=(-2, 0)), ValueError, r"window: expected sides ≥ 0.*got \(-2, 0\)"),
    (
        lambda: pk.attention(Q, K, K, dropout_p=1.0),
        ValueError,
        r"dropout_p: expected a finite number from 0 to below 1, got 1.0",
    ),
    (lambda: pk.attention(Q, K, K, softcap=-1.0), ValueError, "softcap: expected a finite number ≥ 0"),
    (lambda: pk.attention(Q, K, K, scale=math.inf), ValueError, "scale: expected a finite number"),
    (
        lambda: pk.scaled_dot_product_attention(Q, K, K),
        ValueError,
        r"key: expected leading dimensions that fit \[2, 4\], or enable_gqa=True, got \[2, 2, 6, 8\]",
    ),
    (
        lambda: pk.scaled_dot_product_attention(Q, Q, Q, torch.zeros(5, 5), is_causal=True),
        ValueError,
        "attn_mask: expected None together with is_causal=True",
    ),
    (
        lambda: pk.varlen_attention(Q[0], Q[0, :3], Q[0, :3], torch.tensor([0, 3])),
        ValueError,
        "cu_seqlens_k: expected offsets",
    ),
    (
        lambda: pk.varlen_attention(Q[0], Q[0], Q[0], torch.tensor([0, 3, 2])),
        ValueError,
        r"cu_seqlens_q: expected ascending offsets from 0 to at most 4, got \[0, 3, 2\]",
    ),
    (
        lambda: pk.decode_attention(Q, K, K, torch.tensor([7, 1])),
        ValueError,
        r"cache_lengths: expected lengths from 0 to 6, got \[7, 1\]",
    ),
    (
        lambda: pk.decode_attention(Q, K, K, torch.tensor([7, 1]), block_table=torch.tensor([[0, 2], [1, 0]])),
        ValueError,
        r"block_table: expected page numbers from 0 to 1, got \[2\]",
    ),
    (
        lambda: pk.scaled_dot_product_attention(Q, Q, Q, torch.zeros(5, 7)),
        ValueError,
        r"attn_mask: expected broadcastable to \[2, 4, 5, 5\], got \[5, 7\]",
    ),
    (
        lambda: pk.scaled_dot_product_attention(Q, Q, Q, torch.zeros(5, 5).long()),
        TypeError,
        "attn_mask: expected torch.bool or torch.float32, got torch.int64",
    ),
    (
        lambda: pk.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.5),
        ValueError,
        "dropout_p: expected a probability from 0 to 1, got 1.5",
    ),
    (lambda: pk.scaled_dot_product_attention(Q, Q, Q[:, :, :4]), ValueError, "value: expected length 5 to match key's"),
    (lambda: pk.scaled_dot_product_attention(Q[0, 0, 0], Q, Q), ValueError, "query: expected rank 2 or more"),
    (
        lambda: pk.scaled_dot_product_attention(Q, K[:, :0], K[:, :0], enable_gqa=True),
        ValueError,
        "key: expected a number of heads that divides query's 4",
    ),
    (
        lambda: pk.varlen_attention(Q[0], Q[0], Q[0], torch.tensor([0, 2, 4]), torch.tensor([0, 4])),
        ValueError,
        r"cu_seqlens_k: expected \[3\] to match cu_seqlens_q, got \[2\]",
    ),
    (
        lambda: pk.varlen_attention(Q[0], Q[0], Q[0], torch.tensor([0, 4]), torch.tensor([0, 5])),
        ValueError,
        r"cu_seqlens_k: expected ascending offsets from 0 to at most 4, got \[0, 5\]",
    ),
    (
        lambda: pk.varlen_attention(Q[0], Q[0], Q[0, :3], torch.tensor([0, 4])),
        ValueError,
        r"value: expected \[4, 5, 8\] to match key, got \[3, 5, 8\]",
    ),
    (
        lambda: pk.decode_attention(Q, K, K[:, :1], torch.tensor([1, 1])),
        ValueError,
        r"value_cache: expected \[2, 2, 6, 8\] to match key_cache, got \[2, 1, 6, 8\]",
    ),
    (lambda: pk.decode_attention(Q, K[:1], K[:1], torch.tensor([1, 1])), ValueError, "key_cache: expected batch 2 to"),
    (lambda: pk.use_backend("gpu"), ValueError, "name: expected one of auto, reference, cpu, triton, cuda, got 'gpu'"),
    (lambda: pk.available_backends("atention"), ValueError, "op: expected one of attention, "),
]

test_errors_name_argument_expectation_and_value = errors(ERRORS)


@pytest.mark.parametrize(
    "number", [torch.tensor(0.5), torch.nn.Parameter(torch.tensor(0.5))], ids=("tensor", "parameter")
)
def test_numbers_may_not_be_tensors(number):
    """Their gradient would be lost without a word."""
    offsets, lengths = torch.tensor([0, 2]), torch.tensor([3, 3])
    for name in ("scale", "softcap", "dropout_p"):
        calls = [lambda **options: pk.attention(Q, K, K, **options)]
        if name != "softcap":
            calls.append(lambda **options: pk.scaled_dot_product_attention(Q, Q, Q, **options))
        if name != "dropout_p":
            calls.append(lambda **options: pk.varlen_attention(Q[0], Q[0], Q[0], offsets, **options))
            calls.append(lambda **options: pk.decode_attention(Q, K, K, lengths, **options))
        for call in calls:
            with pytest.raises(TypeError, match=f"{name}: expected a number, which has no gradient"):
                call(**{name: number})


def test_numbers_of_numpy():
    expected = pk.attention(Q + 1, K + 1, K + 1, scale=0.5, window=(2, 1))
    got = pk.attention(Q + 1, K + 1, K + 1, scale=np.float32(0.5), window=(np.int64(2), np.uint8(1)))
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_and_sparse_tensors(layout):
    """In every place that takes a tensor."""
    nested = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)], layout=layout)
    for bad in (nested, torch.eye(3).to_sparse()):
        calls = {
            "query": lambda t: pk.attention(t, K, K),
            "key": lambda t: pk.scaled_dot_product_attention(Q, t, Q),
            "value": lambda t: pk.varlen_attention(Q[0], Q[0], t, torch.tensor([0, 2])),
            "key_cache": lambda t: pk.decode_attention(Q, t, K, torch.tensor([1, 2])),
            "bias": lambda t: pk.attention(Q, K, K, bias=t),
            "attn_mask": lambda t: pk.scaled_dot_product_attention(Q, Q, Q, t),
            "alibi_slopes": lambda t: pk.attention(Q, K, K, alibi_slopes=t),
            "key_lengths": lambda t: pk.attention(Q, K, K, key_lengths=t),
            "cu_seqlens_q": lambda t: pk.varlen_attention(Q[0], Q[0], Q[0], t),
            "cu_seqlens_k": lambda t: pk.varlen_attention(Q[0], Q[0], Q[0], torch.tensor([0, 2]), t),
            "cache_lengths": lambda t: pk.decode_attention(Q, K, K, t),
            "block_table": lambda t: pk.decode_attention(Q, K, K, torch.tensor([1, 2]), block_table=t),
        }
        for name, call in calls.items():
            with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor .*, got a "):
                call(bad)


@needs_kernels
def test_decode_refuses_a_gradient():
    query, cache = draw(1, 2, 1, 8).requires_grad_(), draw(1, 2, 9, 8)
    out = pk.decode_attention(query, cache, cache, torch.tensor([9]))
    with pytest.raises(NotImplementedError, match="no gradient"):
        out.sum().backward()


def test_backends_by_name():
    with pytest.raises(RuntimeError, match="attention has no cuda kernel"), pk.use_backend("cuda"):
        pk.attention(Q, K, K)
    with pk.use_backend("reference"):
        assert pk.attention(Q, K, K).shape == (2, 4, 5, 8)
    assert set(pk.available_backends("attention")) == {"reference", "cpu", "triton", "cuda"}
    assert pk.available_backends("attention")["reference"] is None
    assert "attention" in pk.list_ops()
