"""What is peculiar to attention: agreement with torch's own, combinations of options, edges, errors."""

import math
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pykernels as pk
from pykernels.core.backends import CPU, INTERPRET, TRITON, unavailable
from pykernels.core.declaration import OPS
from pykernels.ops.attention import dropout_keep
from pykernels.tools.check import compare

BACKEND = "triton" if INTERPRET else "cpu"
REASON = unavailable(TRITON if INTERPRET else CPU, "cpu")
needs_kernels = pytest.mark.skipif(REASON is not None, reason=f"{BACKEND}: {REASON}")


if INTERPRET:
    import triton
    import triton.language as tl

    from pykernels.kernels import attention_tiles

    @triton.jit
    def exp2_by_fma(x_ptr, y_ptr, N: tl.constexpr):
        i = tl.arange(0, N)
        tl.store(y_ptr + i, attention_tiles.exp2_by_fma(tl.load(x_ptr + i)))


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


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


def both(inputs, **options):
    """Ours and torch's output and gradients."""
    results = []
    for function in (pk.scaled_dot_product_attention, F.scaled_dot_product_attention):
        leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
        out = function(*leaves, **options)
        out.square().sum().backward()
        results.append((out, *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)))
    return results


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
    ours, theirs = both([draw(*shape) for shape in shapes], enable_gqa=bool(enable_gqa), **options)
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (4, 5, 7), (3, 1, 5, 1), (2, 3, 4, 5, 7), (2, 1, 1, 1, 7)], ids=str)
def test_every_mask_that_torch_takes(shape, kind):
    mask = draw(*shape) if kind == "float" else torch.rand(shape) < 0.8
    if kind == "bool":
        mask[..., 0] = True  # torch's output for a row that sees nothing is another
    shapes = ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8))
    ours, theirs = both([*(draw(*sizes) for sizes in shapes), mask])
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


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
@settings(
    max_examples=25 if INTERPRET else 150, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
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
    assert results
    if call["bias"] and shape[3] == 1:  # it shifts whole rows: a gradient of 0, which eager may meet to the last bit
        results = [result for result in results if result.name != "grad bias"]
    assert all(result.ok for result in results), "\n".join(str(r) for r in results if not r.ok)


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
    if REASON is None:
        assert out.transpose(1, 2).is_contiguous()


@needs_kernels
def test_backward_takes_any_cotangent():
    """Expanded cotangents (of a sum), and a loss of lse alone."""
    tensors = [draw(1, 2, 9, 4).requires_grad_() for _ in range(3)]
    for choose in (lambda o: o[0].sum(), lambda o: o[1].sum(), lambda o: o[0][:, :, 0].sum()):
        ours = torch.autograd.grad(choose(pk.attention(*tensors, return_lse=True)), tensors, allow_unused=True)
        exact = torch.autograd.grad(
            choose(pk.reference.attention(*tensors, return_lse=True)), tensors, allow_unused=True
        )
        for got, want in zip(ours, exact):
            torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want)


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


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_training_compiles_and_exports():
    tensors = [draw(1, 2, 33, 8, dtype=torch.float32).requires_grad_() for _ in range(3)]

    def loss(query, key, value):
        return pk.attention(query, key, value, causal=True, softcap=3.0).square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(*tensors), tensors), expected):
        torch.testing.assert_close(got, want)

    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return pk.attention(query, key, value, causal=True)

    plain = [t.detach() for t in tensors]
    program = torch.export.export(Attend(), tuple(plain))
    torch.testing.assert_close(program.module()(*plain), pk.attention(*plain, causal=True))


# ------------------------------------------------------------------------------------------------ compiled

B, H, D = 3, 10, 16  # no length equals another size: torch takes sizes that are equal once for equal ever after


def dense(n, m=None, heads=(H, 5, 5)):
    return [torch.randn(B, h, length, D) for h, length in zip(heads, (n, m or n + 3, m or n + 3))]


def packed(n):
    return [*(torch.randn(2 * n, heads, D) for heads in (H, 5, 5)), torch.tensor([0, n - 1, 2 * n])]


def cached(n, page=None):
    caches = torch.randn(2, B, 5, n, D) if page is None else torch.randn(2, B * n, 5, page, D)
    return [torch.randn(B, H, 1, D), *caches, torch.tensor([n, n - 1, 1])]


class Held(torch.nn.Module):
    """A call whose options are a module's attributes, as in a model."""

    def __init__(self, function, **options):
        super().__init__()
        self.function, self.names = function, list(options)
        for name, value in options.items():
            setattr(self, name, value)

    def forward(self, *inputs):
        return self.function(*inputs, **{name: getattr(self, name) for name in self.names})


sdpa = pk.scaled_dot_product_attention
ANY_LENGTH = {
    "attention": (pk.attention, {}, dense),
    "causal, lse": (pk.attention, dict(causal=True, return_lse=True), dense),
    "scale": (pk.attention, dict(scale=0.3), dense),
    "softcap": (pk.attention, dict(softcap=2.0), dense),
    "window": (pk.attention, dict(window=(3, 2)), dense),
    "dropout": (pk.attention, dict(dropout_p=0.3), dense),
    "window of arguments": (lambda *a: pk.attention(*a[:3], window=a[3:]), {}, lambda n: [*dense(n), n + 1, n + 2]),
    "bias": (lambda *a: pk.attention(*a[:3], bias=a[3]), {}, lambda n: [*dense(n), torch.randn(n, n + 3)]),
    "slopes": (lambda *a: pk.attention(*a[:3], alibi_slopes=a[3]), {}, lambda n: [*dense(n), torch.rand(H)]),
    "lengths": (lambda *a: pk.attention(*a[:3], key_lengths=a[3]), {}, lambda n: [*dense(n), torch.tensor([n, 1, 0])]),
    "sdpa": (sdpa, dict(scale=0.3, enable_gqa=True), dense),
    "sdpa, dropout": (sdpa, dict(dropout_p=0.3, enable_gqa=True), dense),
    "sdpa, mask": (sdpa, dict(enable_gqa=True), lambda n: [*dense(n), torch.randn(n, n + 3)]),
    "sdpa, no heads": (sdpa, {}, lambda n: [t[0, 0] for t in dense(n)]),
    "sdpa, batch dimensions": (sdpa, {}, lambda n: [t.view(B, 2, 5, -1, D) for t in dense(n, heads=(H, H, H))]),
    "sdpa, causal": (sdpa, dict(is_causal=True, enable_gqa=True), lambda n: dense(n, n)),
    "sdpa, causal, fewer queries": (sdpa, dict(is_causal=True, enable_gqa=True), dense),
    "sdpa, causal, more queries": (sdpa, dict(is_causal=True, enable_gqa=True), lambda n: dense(n + 3, n)),
    "varlen": (pk.varlen_attention, dict(scale=0.3, softcap=2.0, causal=True), packed),
    "varlen, other keys": (
        pk.varlen_attention,
        dict(window=(4, 2)),
        lambda n: [*packed(n), torch.tensor([0, n, 2 * n])],
    ),
    "decode": (pk.decode_attention, dict(scale=0.3), cached),
}


def count_graphs(function, inputs):
    """Graphs compiled by the first of the inputs, and by all of them; every result is the eager one."""
    graphs = []

    def backend(module, example):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, example)

    torch._dynamo.reset()
    compiled, first = torch.compile(function, fullgraph=True, dynamic=True, backend=backend), None
    for one in inputs:
        results = []
        for run in (compiled, function):
            torch.manual_seed(3)
            results.append(run(*one))
        torch.testing.assert_close(*results, rtol=0, atol=0)
        first = first or len(graphs)
    return first, len(graphs)


@needs_kernels
@pytest.mark.parametrize(("function", "options", "make"), ANY_LENGTH.values(), ids=ANY_LENGTH)
def test_one_graph_for_every_length(function, options, make):
    """The first call may trace twice: torch takes a float for a symbol until an op needs its value."""
    first, last = count_graphs(Held(function, **options), [make(n) for n in (21, 23, 29, 32, 40)])
    assert first == last <= 2


@needs_kernels
@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_that_grows_never_compiles_again(paged):
    def make(n):
        table = {} if not paged else {"block_table": torch.randperm(B * n).view(B, n)}
        return [*cached(n, 4 if paged else None), *table.values()]

    def step(query, keys, values, lengths, table=None):
        return pk.decode_attention(query, keys, values, lengths, block_table=table)

    first, last = count_graphs(step, [make(n) for n in range(17, 67)])
    assert first == last <= 2


@needs_kernels
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("label", ["causal, lse", "softcap", "sdpa, causal, more queries", "varlen", "decode"])
@pytest.mark.filterwarnings("ignore")
def test_export_of_any_length(label, strict):
    function, options, make = ANY_LENGTH[label]
    module, inputs = Held(function, **options), make(21)
    auto = torch.export.Dim.AUTO
    dynamic = tuple({d: auto for d, n in enumerate(t.shape) if n not in (B, H, 5, D, 1, 2)} for t in inputs)
    program = torch.export.export(module, tuple(inputs), dynamic_shapes=(dynamic,), strict=strict)
    for n in (21, 29, 40):
        given = make(n)
        torch.testing.assert_close(program.module()(*given), module(*given), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ torch.func


@needs_kernels
def test_vmap_of_decode():
    """Also over lengths and pages, which no check can then read."""
    query, keys, values, lengths = cached(12)
    expected = pk.decode_attention(query, keys, values, lengths)
    each = torch.func.vmap(lambda q, k, v, n: pk.decode_attention(q[None], k[None], v[None], n[None])[0])
    torch.testing.assert_close(each(query, keys, values, lengths), expected)
    table, pages = (
        torch.arange(9).view(3, 3),
        [t.unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1) for t in (keys, values)],
    )
    each = torch.func.vmap(lambda q, n, t: pk.decode_attention(q[None], *pages, n[None], block_table=t[None])[0])
    torch.testing.assert_close(each(query, lengths, table), expected)


@needs_kernels
def test_vmap_of_lengths_and_offsets():
    query, key, value = (draw(1, 2, 6, 4) for _ in range(3))
    lengths, offsets = torch.tensor([[6], [2]]), torch.tensor([[0, 2, 6], [0, 5, 5]])
    one = lambda n: pk.attention(query, key, value, key_lengths=n)
    torch.testing.assert_close(torch.func.vmap(one)(lengths), torch.stack([one(n) for n in lengths]))
    rows = [t[0].transpose(0, 1) for t in (query, key, value)]
    one = lambda cu: pk.varlen_attention(*rows, cu, causal=True)
    torch.testing.assert_close(torch.func.vmap(one)(offsets), torch.stack([one(cu) for cu in offsets]))


# ------------------------------------------------------------------------------------------------ what is refused


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


def test_what_cannot_be_differentiated_raises():
    query = draw(1, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: pk.attention(q, query, query), (query,), (query,))


@needs_kernels
def test_decode_refuses_a_gradient():
    query, cache = draw(1, 2, 1, 8).requires_grad_(), draw(1, 2, 9, 8)
    out = pk.decode_attention(query, cache, cache, torch.tensor([9]))
    with pytest.raises(NotImplementedError, match="no gradient"):
        out.sum().backward()


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


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=lambda value: value if isinstance(value, str) else "")
def test_errors_name_argument_expectation_and_value(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_backends_by_name():
    with pytest.raises(RuntimeError, match="attention has no cuda kernel"), pk.use_backend("cuda"):
        pk.attention(Q, K, K)
    with pk.use_backend("reference"):
        assert pk.attention(Q, K, K).shape == (2, 4, 5, 8)
    assert set(pk.available_backends("attention")) == {"reference", "cpu", "triton", "cuda"}
    assert pk.available_backends("attention")["reference"] is None
    assert "attention" in pk.list_ops()
