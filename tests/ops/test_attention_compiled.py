"""Attention compiled, exported and transformed: one graph for every length."""

import pytest
import torch
from kit import agree, draw, needs_kernels, one_graph, with_gradients

import pykernels as pk

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


@needs_kernels
@pytest.mark.parametrize(("function", "options", "make"), ANY_LENGTH.values(), ids=ANY_LENGTH)
def test_one_graph_for_every_length(function, options, make):
    one_graph(Held(function, **options), [make(n) for n in (21, 23, 29, 32, 40)], rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_that_grows_never_compiles_again(paged):
    def make(n):
        table = {} if not paged else {"block_table": torch.randperm(B * n).view(B, n)}
        return [*cached(n, 4 if paged else None), *table.values()]

    def step(query, keys, values, lengths, table=None):
        return pk.decode_attention(query, keys, values, lengths, block_table=table)

    one_graph(step, [make(n) for n in range(17, 67)], rtol=0, atol=0)


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


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_training_compiles_and_exports():
    tensors = with_gradients([draw(1, 2, 33, 8, dtype=torch.float32) for _ in range(3)])

    def loss(query, key, value):
        return pk.attention(query, key, value, causal=True, softcap=3.0).square().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    agree(torch.autograd.grad(compiled(*tensors), tensors), expected)

    class Attend(torch.nn.Module):
        def forward(self, query, key, value):
            return pk.attention(query, key, value, causal=True)

    plain = [t.detach() for t in tensors]
    program = torch.export.export(Attend(), tuple(plain))
    torch.testing.assert_close(program.module()(*plain), pk.attention(*plain, causal=True))


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
