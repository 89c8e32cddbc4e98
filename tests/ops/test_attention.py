"""What is peculiar to attention: agreement with torch's own, combinations of options, edges."""

import functools
import math
import resource
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import BACKEND, MISSING, agree, draw, holds, hypothesis, needs_kernels, values_and_gradients, with_gradients

import pykernels as pk
from pykernels.core.backends import INTERPRET
from pykernels.core.declaration import OPS
from pykernels.ops.attention import dropout_keep
from pykernels.tools.check import compare

if INTERPRET:
    import triton
    import triton.language as tl

    from pykernels.kernels import attention_tiles

    @triton.jit
    def exp2_by_fma(x_ptr, y_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y_ptr + i, attention_tiles.exp2_by_fma(tl.load(x_ptr + i)))


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("N", "M"), [(7, 7), (5, 9), (9, 5)])
def test_reference_is_torchs_own(N, M, causal):
    """Against a softmax written row by row, so that nothing of ours judges itself."""
    query, key, value = draw(2, 4, N, 6), draw(2, 2, M, 6), draw(2, 2, M, 3)
    bias = draw(1, 4, N, M)
    out, lse = pk.reference.attention(query, key, value, bias=bias, causal=causal, return_lse=True)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(4) for i in range(N)):
        seen = max(0, min(M, i + 1 + M - N)) if causal else M
        scores = key[b, h // 2, :seen] @ query[b, h, i] / math.sqrt(6) + bias[0, h, i, :seen]
        expected = scores.softmax(0) @ value[b, h // 2, :seen] if seen else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(out[b, h, i], expected)
        expected = scores.logsumexp(0) if seen else torch.tensor(-math.inf, dtype=torch.float64)
        torch.testing.assert_close(lse[b, h, i], expected)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
@pytest.mark.parametrize(("N", "M"), [(8, 8), (5, 9), (9, 5)])
def test_drop_in_for_scaled_dot_product_attention(options, N, M):
    heads = 2 if options.get("enable_gqa") else 4
    query, key, value = draw(2, 4, N, 8), draw(2, heads, M, 8), draw(2, heads, M, 8)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(pk.scaled_dot_product_attention(query, key, value, **options), expected)
    if heads == 4:
        got = pk.scaled_dot_product_attention(query[0], key[0], value[0], **options)
        torch.testing.assert_close(got, expected[0])


def same_as_torch(inputs, **options):
    """Ours and torch's output and gradients agree."""
    ours, theirs = (
        functools.partial(f, *with_gradients(inputs), **options)
        for f in (pk.scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    wanted = [t for t in inputs if t.is_floating_point()]
    agree(values_and_gradients(ours, wanted), values_and_gradients(theirs, wanted))


SHAPES = {
    "no heads": ((5, 8), (7, 8), (7, 8)),
    "two batch dimensions": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)),
    "batch dimensions that broadcast": ((2, 1, 3, 4, 5, 8), (2, 5, 1, 4, 7, 8), (2, 1, 1, 4, 7, 8)),
    "one query batch": ((1, 4, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
    "one key batch": ((3, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "one query head": ((1, 1, 5, 8), (3, 4, 7, 8), (3, 4, 7, 8)),
    "one key head": ((1, 4, 5, 8), (3, 1, 7, 8), (3, 1, 7, 8)),
    "one key head, many of value": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 4, 7, 8)),
    "batch of value alone": ((1, 4, 5, 8), (1, 4, 7, 8), (3, 4, 7, 8)),
    "three ranks": ((3, 4, 5, 8), (4, 7, 8), (7, 8)),
    "head dimension 0": ((1, 2, 5, 0), (1, 2, 7, 0), (1, 2, 7, 3)),
    "value of width 0": ((1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 0)),
    "head dimension 300": ((1, 2, 5, 300), (1, 2, 7, 300), (1, 2, 7, 300)),
    "wide value": ((1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 300)),
}

GROUPED = {
    "batches that broadcast": ((3, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8)),
    "two batch dimensions": ((2, 3, 4, 5, 8), (2, 3, 2, 7, 8), (2, 3, 2, 7, 8)),
    "two ranks": ((2, 3, 4, 5, 8), (2, 7, 8), (2, 7, 8)),
    "heads of key": ((1, 4, 5, 8), (1, 2, 7, 8), (1, 1, 7, 8)),
    "heads of value": ((1, 4, 5, 8), (1, 2, 7, 8), (1, 4, 7, 8)),
}


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"dropout_p": 1.0}], ids=str)
@pytest.mark.parametrize(
    ("shapes", "enable_gqa"),
    [
        pytest.param(shapes, gqa, id=label)
        for gqa, table in enumerate((SHAPES, GROUPED))
        for label, shapes in table.items()
    ],
)
def test_every_shape_that_torch_takes(shapes, enable_gqa, options):
    same_as_torch([draw(*shape) for shape in shapes], enable_gqa=bool(enable_gqa), **options)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (4, 5, 7), (3, 1, 5, 1), (2, 3, 4, 5, 7), (2, 1, 1, 1, 7)], ids=str)
def test_every_mask_that_torch_takes(shape, kind):
    mask = draw(*shape) if kind == "float" else torch.rand(shape) < 0.8
    if kind == "bool":
        mask[..., 0] = True  # torch's output for a row that sees nothing is another
    shapes = ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8))
    same_as_torch([*(draw(*sizes) for sizes in shapes), mask])


def test_dropout_is_philox():
    """Known answers of Philox4x32-10 from the authors' test vectors: an all-zero counter and key."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for j, word in enumerate(words):
        for p in ((word - 1) / 2**32, (word + 1) / 2**32):
            keep = dropout_keep(torch.tensor(0), p, torch.Size((1, 1, 1, 4)))[0, 0, 0, j]
            assert keep == (word >= round(p * 2**32))


@needs_kernels
def test_dropout_keeps_its_share_and_its_expectation():
    value = torch.ones(2, 4, 512, 1)
    query, key = draw(2, 4, 512, 8, dtype=torch.float32), draw(2, 4, 512, 8, dtype=torch.float32)
    out = pk.attention(query, key, value, dropout_p=0.25)
    assert abs(out.mean() - 1) < 0.01
    torch.manual_seed(5)
    first = pk.attention(query, key, value, dropout_p=0.25)
    assert not torch.equal(first, pk.attention(query, key, value, dropout_p=0.25))
    torch.manual_seed(5)
    assert torch.equal(first, pk.attention(query, key, value, dropout_p=0.25))


# ------------------------------------------------------------------------------------------------ combinations


@st.composite
def calls(draw_):
    """Any combination of attention's options over small, mostly odd sizes."""
    length = st.integers(0, 40) if INTERPRET else st.one_of(st.integers(0, 40), st.integers(60, 300))
    B, Hk, groups = draw_(st.integers(1, 2)), draw_(st.integers(1, 2)), draw_(st.integers(1, 3))
    N, M, D, Dv = draw_(length), draw_(length), draw_(st.integers(1, 70)), draw_(st.integers(1, 70))
    H, side = Hk * groups, st.one_of(st.none(), st.integers(0, 50))
    bias = draw_(st.sampled_from([None, "bool", "float", "fp32", "inf"]))
    shape = tuple(n if keep else 1 for n, keep in zip((B, H, N, M), draw_(st.tuples(*[st.booleans()] * 4))))
    return dict(
        sizes=(B, H, Hk, N, M, D, Dv),
        bias=bias and (bias, shape),
        alibi=draw_(st.booleans()),
        lengths=draw_(st.one_of(st.none(), st.lists(st.integers(0, M), min_size=B, max_size=B))),
        dtype=draw_(st.sampled_from([torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRET))),
        options=dict(
            causal=draw_(st.booleans()),
            window=draw_(st.one_of(st.none(), st.tuples(side, side))),
            softcap=draw_(st.sampled_from([None, 2.0])),
            dropout_p=draw_(st.sampled_from([0.0, 0.0, 0.4])),
            return_lse=draw_(st.booleans()),
        ),
        seed=draw_(st.integers(0, 2**31)),
    )


@needs_kernels
@pytest.mark.triton
@settings(hypothesis, max_examples=25 if INTERPRET else 150)
@given(calls())
def test_any_combination_of_options(call):
    torch.manual_seed(call["seed"])
    (B, H, Hk, N, M, D, Dv), dtype = call["sizes"], call["dtype"]
    inputs = dict(query=draw(B, H, N, D), key=draw(B, Hk, M, D), value=draw(B, Hk, M, Dv))
    inputs = {name: value.to(dtype) for name, value in inputs.items()} | call["options"]
    if call["bias"]:
        kind, shape = call["bias"]
        bias = draw(*shape).to(torch.float32 if kind == "fp32" else dtype)
        inputs["bias"] = bias > -0.5 if kind == "bool" else bias
        if kind == "inf":
            bias.masked_fill_(torch.rand(shape) < 0.3, -math.inf)
    if call["alibi"]:
        inputs["alibi_slopes"] = torch.rand(H)
    if call["lengths"]:
        inputs["key_lengths"] = torch.tensor(call["lengths"])
    # Hundreds of draws find those where eager is lucky; gradients that are sums over a broadcast dimension more so.
    slack = 16 if call["alibi"] or call["bias"] else 3
    results = compare(OPS["attention"], inputs, BACKEND, slack=slack)
    if call["bias"] and shape[3] == 1:  # it shifts whole rows: a gradient of 0, which eager may meet to the last bit
        results = [result for result in results if result.name != "grad bias"]
    if call["alibi"] and H == 1:  # one number, which eager may meet to the last bit
        results = [result for result in results if result.name != "grad alibi_slopes"]
    holds(results)


# ------------------------------------------------------------------------------------------------ edges


@needs_kernels
def test_element_offsets_past_two_to_the_31():
    """Views whose batches lie 2^31 elements apart; only the touched pages of the storage exist."""
    far, B, H, N, D = 2**31 + 64, 2, 2, 20, 16

    def place(start):
        view = storage.as_strided((B, H, N, D), (far, N * D, D, 1), start)
        return view.copy_(torch.randn(B, H, N, D))

    storage = torch.empty(far + 3 * H * N * D, dtype=torch.float16)
    query, key, value = (place(which * H * N * D) for which in range(3))
    got = pk.attention(query, key, value, causal=True)
    near = (t.clone(memory_format=torch.contiguous_format) for t in (query, key, value))
    assert torch.equal(got, pk.attention(*near, causal=True))


@needs_kernels
@pytest.mark.triton
@pytest.mark.skipif(not INTERPRET, reason="a device function, run in Triton's interpreter")
def test_exponentials_by_multiply_adds():
    edges = [
        -math.inf,
        -3e38,
        -1e38,
        -127.5,
        -127,
        -126.75,
        -126.5,
        -126.25,
        -126,
        -1.5,
        -0.5,
        -1e-30,
        -0.0,
        0,
        math.nan,
    ]
    x = torch.cat([torch.tensor(edges), -130 * torch.rand(4096 - len(edges))])
    x[-1000:] /= 130  # where probabilities are worth something
    y = torch.empty_like(x)
    exp2_by_fma[(1,)](x, y, len(x))
    expected = x.double().exp2()
    assert torch.equal(y.isnan(), x.isnan())
    assert (y[x <= -127] == 0).all()
    assert (y[x == 0] == 1).all()
    error = (y.double() - expected).abs().nan_to_num()
    assert (error <= 1.02e-4 * expected.nan_to_num() + 2.0**-126).all()


@pytest.mark.triton
def test_what_lies_past_the_lengths_is_never_read():
    """NaN there and zeros there give the same bits, outputs and gradients."""

    def run(filler, packed):
        torch.manual_seed(0)
        tensors = [draw(2, 2, 45, 16, dtype=torch.float32) for _ in range(3)]
        for t in tensors[0 if packed else 1 :]:
            t[1, :, 20:] = filler
        if packed:
            tensors = [t.transpose(1, 2).flatten(0, 1).requires_grad_() for t in tensors]
            out = pk.varlen_attention(*tensors, torch.tensor([0, 30, 65]), causal=True)
            grad_out = torch.ones_like(out).index_fill(0, torch.arange(65, 90), filler)
        else:
            tensors = [t.requires_grad_() for t in tensors]
            out = pk.attention(*tensors, key_lengths=torch.tensor([45, 20]), window=(30, 7))
            grad_out = torch.ones_like(out)
        return out, *torch.autograd.grad(out, tensors, grad_out)

    with pk.use_backend(BACKEND):
        for packed in (False, True):
            for clean, dirty in zip(run(0.0, packed), run(math.nan, packed)):
                assert torch.equal(clean, dirty)


@needs_kernels
def test_more_keys_than_are_packed_at_once():
    query, key, value = draw(1, 3, 200, 64), draw(1, 3, 32768, 64), draw(1, 3, 32768, 64)
    query, key, value = query.float(), key.float(), value.float()
    expected = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(pk.attention(query, key, value), expected)


@needs_kernels
def test_one_nan_reaches_its_row_alone():
    query, key, value = (draw(1, 1, 70, 8, dtype=torch.float32) for _ in range(3))
    query[0, 0, 33, 2] = math.nan
    out = pk.attention(query, key, value)
    assert out[0, 0, 33].isnan().all()
    assert out.isnan().sum() == 8


@needs_kernels
def test_memory_grows_linearly():
    """Forward and backward at N = 16384, where one head's score matrix alone would take 1 GB."""
    code = """
import resource, torch, pykernels as pk
def peak(N):
    t = [torch.randn(1, 1, N, 16, requires_grad=True) for _ in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pk.attention(*t, causal=True).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
peak(64)
print(peak(16384))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) * (1 if sys.platform == "darwin" else 1024) < 64 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_output_is_laid_out_like_the_query():
    """A model's transpose(1, 2).reshape after attention costs no copy."""
    query, key, value = (draw(2, 5, 3, 8, dtype=torch.float32).transpose(1, 2) for _ in range(3))
    out = pk.attention(query, key, value)
    assert out.shape == (2, 3, 5, 8)
    if MISSING is None:
        assert out.transpose(1, 2).is_contiguous()


@needs_kernels
def test_backward_takes_any_cotangent():
    """Expanded cotangents (of a sum), and a loss of lse alone."""
    tensors = with_gradients([draw(1, 2, 9, 4) for _ in range(3)])
    for choose in (lambda o: o[0].sum(), lambda o: o[1].sum(), lambda o: o[0][:, :, 0].sum()):
        gradients = [
            torch.autograd.grad(choose(f(*tensors, return_lse=True)), tensors, materialize_grads=True)
            for f in (pk.attention, pk.reference.attention)
        ]
        agree(*gradients)


@needs_kernels
def test_one_tensor_in_three_places():
    """Self-attention without projections: first and second derivatives count each use once."""
    x = draw(1, 1, 6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: pk.attention(x, x, x), x)
    assert torch.autograd.gradgradcheck(lambda x: pk.attention(x, x, x), x)
    assert torch.autograd.gradgradcheck(
        lambda x: torch.autograd.grad(pk.attention(x, x, x).square().sum(), x, create_graph=True)[0], x
    )


@needs_kernels
def test_autocast_casts_as_torch_does():
    tensors = [draw(1, 2, 9, 4, dtype=torch.float32).requires_grad_() for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = pk.attention(*tensors, return_lse=True)
        assert out.dtype == F.scaled_dot_product_attention(*tensors).dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)
