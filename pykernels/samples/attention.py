"""Attention: samples and workloads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.backends import INTERPRET
from ..core.declaration import Sample, Workload, declare
from ..core.dtypes import accumulator_of
from ..ops.attention import attention, decode_attention, scaled_dot_product_attention, varlen_attention


def _dense(
    B, H, N, M, D, *, Hk=None, Dv=None, bias=None, slopes=None, lengths=None, layout="bhnd", size=1.0, shift=None,
    coarse=False, **options,
):  # fmt: skip
    """make(dtype, device) for `attention`. bias: (kind, shape); slopes: shape; size: multiplies the query.

    shift: (by row, by key): what their product adds to the scores, up to the dtype's largest number. coarse: numbers
    of few bits, so that products are the same in any order of summation: a row that sees one key has dP = Δ, and in
    the gradients a huge score is what it was in the output.
    """

    def make(dtype, device):
        def draw(heads, length, width):
            if layout == "bnhd":  # as a projection leaves it: heads inside
                return torch.randn(B, length, heads, width, dtype=dtype, device=device).transpose(1, 2)
            if layout == "expanded":  # one sequence for the whole batch
                return torch.randn(1, heads, length, width, dtype=dtype, device=device).expand(B, -1, -1, -1)
            if layout == "dmajor":  # the last dimension is the strided one
                return torch.randn(B, heads, width, length, dtype=dtype, device=device).mT
            return torch.randn(B, heads, length, width, dtype=dtype, device=device)

        inputs = dict(query=size * draw(H, N, D), key=draw(Hk or H, M, D), value=draw(Hk or H, M, Dv or D), **options)
        if coarse:
            inputs |= {name: _round_coarsely(inputs[name]) for name in ("query", "key", "value")}
        if shift is not None:
            most = 0.9 * torch.finfo(dtype).max ** 0.5
            inputs["query"][..., 0], inputs["key"][..., 0] = (f.double().clamp(-most, most).to(device) for f in shift)
        statistics = accumulator_of(dtype)
        if bias is not None:
            kind, shape = bias
            if kind == "bool":
                inputs["bias"] = torch.rand(shape, device=device) < 0.7
            elif isinstance(kind, float):  # a mask that is not -inf: all but the last third of the keys
                masked = torch.arange(shape[-1], device=device) < shape[-1] * 2 // 3
                inputs["bias"] = masked.expand(shape).to(dtype) * max(kind, torch.finfo(dtype).min)
            elif kind == "lowest":  # some keys of all rows, and all keys of some rows
                inputs["bias"] = torch.zeros(shape, dtype=dtype, device=device)
                inputs["bias"][..., shape[-1] // 2 :] = inputs["bias"][..., ::3, :] = torch.finfo(dtype).min
            else:
                inputs["bias"] = torch.randn(shape, dtype=statistics if kind == "fp32" else dtype, device=device)
            if kind == "inf":
                inputs["bias"].masked_fill_(torch.rand(shape, device=device) < 0.3, -math.inf)
        if slopes is not None:
            inputs["alibi_slopes"] = torch.rand(slopes, dtype=statistics, device=device)
        if lengths is not None:
            inputs["key_lengths"] = torch.tensor(lengths, device=device)
            _spoil_beyond(inputs["key"], inputs["value"], lengths)
        return inputs

    return make


def _spoil_beyond(key: Tensor, value: Tensor, lengths) -> None:
    """Unused memory may hold anything, NaN and infinities too."""
    for b, length in enumerate(lengths):
        key[b, :, length:], value[b, :, length:] = math.nan, math.inf


def _round_coarsely(t: Tensor) -> Tensor:
    return (4 * t).round() / 4


def _packed(lengths_q, lengths_k, H, D, *, Hk=None, Dv=None, spare=0, coarse=False, **options):
    """make(dtype, device) for `varlen_attention`; `spare` rows at the end belong to no sequence, and hold NaN."""

    def make(dtype, device):
        def offsets(lengths):
            return torch.tensor([0, *lengths]).cumsum(0).int().to(device)

        def draw(lengths, heads, width):
            rows = torch.randn(sum(lengths) + spare, heads, width, dtype=dtype, device=device)
            rows[sum(lengths) :] = math.nan
            return rows

        inputs = dict(query=draw(lengths_q, H, D))
        other = lengths_q if lengths_k is None else lengths_k
        inputs |= dict(key=draw(other, Hk or H, D), value=draw(other, Hk or H, Dv or D))
        if coarse:
            inputs = {name: _round_coarsely(value) for name, value in inputs.items()}
        inputs |= dict(cu_seqlens_q=offsets(lengths_q), cu_seqlens_k=lengths_k and offsets(lengths_k))
        return inputs | options

    return make


def _cached(B, H, n, S, D, lengths, *, Hk=None, Dv=None, page=None, **options):
    """make(dtype, device) for `decode_attention`; with `page` the cache is cut into shuffled pages of that size."""

    def make(dtype, device):
        block_table = None
        caches = [torch.randn(B, Hk or H, S, width, dtype=dtype, device=device) for width in (D, Dv or D)]
        _spoil_beyond(*caches, lengths if len(lengths) == B else lengths * B)
        if page is not None:
            pages = B * S // page
            order = torch.randperm(pages, device=device)
            block_table = order.view(B, S // page).int()
            for which, cache in enumerate(caches):
                cut = cache.unflatten(2, (S // page, page)).transpose(1, 2).flatten(0, 1)  # [B · pages, Hk, page, D]
                caches[which] = torch.empty_like(cut)
                caches[which][order] = cut
        query = torch.randn(B, H, n, D, dtype=dtype, device=device)
        cache_lengths = torch.tensor(lengths, device=device) if len(lengths) == B else torch.full((B,), *lengths)
        inputs = dict(query=query, key_cache=caches[0], value_cache=caches[1], cache_lengths=cache_lengths.to(device))
        return inputs | dict(block_table=block_table) | options

    return make


# The gradient of a bias that shifts whole rows is the row sum of dS: 0, but for lse. Eager sums its own dS to 0;
# ours, like every FlashAttention, takes Δ from the output as it was stored, and the sum over rows keeps that rounding.
_ROW_SUMS = 16.0
# The slopes' gradients are a handful of numbers, each a sum of thousands: eager's error there is a matter of luck.
_FEW_SUMS = 4.0
# Where a row sees one key, dP − Δ is 0: ours leaves the rounding of both, eager's softmax exactly nothing.
_ONE_KEY = 4.0
# Triton's interpreter has no fused multiply-add: it rounds a large exponent twice where a GPU and the CPU do once.
_NO_FMA = 4.0 if INTERPRET else 1.0

_LARGE = (1e4 * (-1.0) ** torch.arange(40), torch.ones(70))
_HUGE = (1e19 * (-1.0) ** torch.arange(40), 1e19 * torch.linspace(-1, 1, 150))
_HUGE_EQUAL = (1e19 * (-1.0) ** torch.arange(40), torch.full((150,), 1e19))
_GROWING = (torch.full((20,), 35.0), torch.linspace(0, 1, 300))  # the running maximum rises with every tile

# Where softmax cannot move (one key, a bias that shifts whole rows) the exact gradient is 0 and any rounding error is
# infinitely large beside it: those samples take lse along, whose gradient is not.
_attention_samples = [
    Sample("plain", _dense(2, 2, 64, 64, 32)),
    Sample("causal", _dense(1, 2, 128, 128, 64, causal=True)),
    Sample("several tiles", _dense(1, 2, 193, 321, 64)),
    Sample("several tiles, causal", _dense(1, 1, 321, 257, 48, causal=True)),
    Sample("many queries", _dense(1, 1, 385, 70, 16)),
    Sample("many heads", _dense(*((2, 2, 40, 70) if INTERPRET else (4, 4, 70, 130)), 8, causal=True)),
    Sample("odd sizes", _dense(2, 3, 37, 53, 17)),
    Sample("one", _dense(1, 1, 1, 1, 1, return_lse=True), _ONE_KEY),
    Sample("one query", _dense(2, 4, 1, 77, 40, Hk=2)),
    Sample("few queries, long keys", _dense(1, 2, 3, 1031, 24, causal=True)),
    Sample("one key", _dense(2, 2, 19, 1, 8, return_lse=True), _ONE_KEY),
    Sample("more queries than keys, causal", _dense(1, 2, 41, 23, 16, causal=True)),
    Sample("grouped heads, causal", _dense(2, 6, 45, 61, 33, Hk=2, causal=True)),
    Sample("one key head", _dense(1, 5, 20, 34, 20, Hk=1)),
    Sample("narrow value", _dense(1, 2, 33, 47, 64, Dv=5)),
    Sample("wide value", _dense(1, 2, 33, 47, 12, Dv=130)),
    Sample("widest head", _dense(1, 1, 35, 70, 256)),
    Sample("widest odd head", _dense(1, 1, 18, 40, 255, causal=True)),
    Sample("bool mask", _dense(2, 2, 33, 47, 16, bias=("bool", (2, 1, 33, 47)))),
    Sample("bool mask over keys", _dense(2, 2, 33, 47, 16, bias=("bool", (2, 1, 1, 47)))),
    Sample("rows that see nothing", _dense(2, 2, 9, 3, 16, bias=("bool", (9, 3)), causal=True)),
    Sample("bias", _dense(2, 2, 34, 50, 16, bias=("float", (2, 2, 34, 50)))),
    Sample("bias of a head", _dense(2, 2, 34, 50, 16, bias=("float", (2, 34, 50)))),
    Sample("bias over keys, fp32", _dense(2, 2, 34, 50, 16, bias=("fp32", (2, 1, 1, 50)))),
    Sample("bias over queries", _dense(2, 2, 34, 50, 16, bias=("float", (2, 34, 1)), return_lse=True), _ROW_SUMS),
    Sample("bias of one number", _dense(2, 2, 34, 50, 16, bias=("fp32", ()), return_lse=True), _ROW_SUMS),
    Sample("bias of all heads, many queries", _dense(1, 3, 150, 70, 16, Hk=1, bias=("float", (150, 70)))),
    Sample("bias with -inf", _dense(1, 2, 34, 5, 16, bias=("inf", (2, 34, 5)))),
    Sample("window", _dense(1, 2, 97, 97, 16, window=(20, 5))),
    Sample("causal window", _dense(1, 2, 150, 190, 16, window=(40, None), causal=True)),
    Sample("window of one", _dense(1, 2, 45, 60, 16, window=(0, 0), return_lse=True, size=0.3), _ONE_KEY),
    Sample("softcap", _dense(1, 2, 40, 70, 16, softcap=3.0, size=4.0)),
    Sample("softcap and bias, causal", _dense(1, 2, 40, 70, 16, softcap=3.0, causal=True, bias=("inf", (40, 70)))),
    Sample("alibi", _dense(2, 4, 40, 60, 16, slopes=(4,), causal=True), _FEW_SUMS),
    Sample("alibi of a batch", _dense(2, 4, 40, 30, 16, slopes=(2, 4)), _FEW_SUMS),
    Sample("alibi, more queries than keys, lse", _dense(2, 4, 40, 30, 16, slopes=(4,), return_lse=True), _FEW_SUMS),
    Sample("key lengths", _dense(3, 2, 40, 60, 16, lengths=(60, 0, 31))),
    Sample("key lengths, causal window", _dense(3, 2, 40, 60, 16, lengths=(1, 17, 59), causal=True, window=(9, None))),
    Sample("scale", _dense(1, 2, 33, 40, 16, scale=-0.3)),
    Sample("lse", _dense(2, 2, 40, 60, 24, return_lse=True, causal=True)),
    Sample("lse of masked rows", _dense(2, 2, 40, 30, 24, return_lse=True, causal=True, lengths=(0, 12))),
    Sample("dropout", _dense(2, 2, 45, 70, 16, dropout_p=0.3)),
    Sample("dropout, grouped, causal", _dense(1, 4, 45, 70, 16, Hk=2, dropout_p=0.1, causal=True, return_lse=True)),
    Sample("scores of ±1e4", _dense(1, 2, 40, 70, 16, shift=_LARGE, scale=1.0), _NO_FMA),
    Sample("scores that grow along the keys", _dense(1, 2, 20, 300, 16, shift=_GROWING, scale=1.0), _NO_FMA),
    Sample("scores of ±1e38, one key a row", _dense(1, 2, 40, 150, 16, shift=_HUGE, scale=1.0, coarse=True)),
    Sample("scores of ±1e38 and a mask", _dense(1, 1, 40, 150, 8, shift=_HUGE, bias=("bool", (40, 150)), coarse=True)),
    Sample("scale of 1e-30", _dense(1, 2, 20, 50, 16, scale=1e-30, return_lse=True)),
    Sample("mask of -1e10", _dense(1, 2, 40, 200, 16, bias=(-1e10, (40, 200)), return_lse=True)),
    Sample("mask of -1e38, one query", _dense(2, 2, 1, 300, 16, bias=(-1e38, (1, 300)), return_lse=True)),
    Sample("mask of -1e38 over keys, causal", _dense(1, 2, 70, 150, 16, bias=(-1e38, (1, 150)), causal=True)),
    Sample("mask of the lowest number", _dense(2, 2, 34, 150, 16, bias=("lowest", (2, 1, 34, 150)))),
    # Of more numbers than finite differences are asked for, which vanish beside a huge one.
    Sample("mask of the lowest number, lse", _dense(1, 2, 34, 90, 16, bias=("lowest", (34, 90)), return_lse=True)),
    Sample("softcap of 1e30", _dense(1, 2, 20, 50, 16, softcap=1e30)),
    Sample("softcap of 1e-30", _dense(1, 2, 20, 50, 16, softcap=1e-30, return_lse=True)),
    Sample("heads inside", _dense(2, 3, 40, 70, 16, layout="bnhd", causal=True)),
    Sample("expanded", _dense(3, 2, 40, 70, 16, layout="expanded")),
    Sample("strided head dim", _dense(2, 2, 40, 70, 16, layout="dmajor", causal=True)),
    Sample("scores of ±1e38, equal", _dense(1, 2, 40, 150, 16, shift=_HUGE_EQUAL, scale=1.0)),
    Sample("scale of 2^30", _dense(1, 2, 40, 150, 16, scale=2.0**30, coarse=True)),
    Sample("scale of -2^30", _dense(1, 2, 40, 150, 16, scale=-(2.0**30), coarse=True)),
    Sample("no queries", _dense(2, 2, 0, 5, 8, return_lse=True)),
    Sample("no keys", _dense(2, 2, 5, 0, 8, return_lse=True)),
    Sample("no batch", _dense(0, 2, 5, 6, 8, causal=True)),
]


def _pairs(N: int, M: int, causal: bool) -> float:
    """Query-key pairs that a head must score."""
    return sum(max(0, min(M, i + 1 + M - N)) for i in range(N)) if causal else float(N * M)


def _dense_flops(inputs) -> float:
    (B, H, N, D), (_, _, M, Dv) = inputs["query"].shape, inputs["value"].shape
    return 2 * B * H * _pairs(N, M, inputs.get("causal") or inputs.get("is_causal")) * (D + Dv)


def _traffic(inputs) -> float:
    """Every tensor read once and an output like the query written."""
    tensors = [t for t in inputs.values() if isinstance(t, Tensor)]
    return float(sum(t.numel() * t.element_size() for t in [*tensors, inputs["query"]]))


def _job(label, make, flops=_dense_flops, **more) -> Workload:
    return Workload(label, make, flops=flops, bytes=_traffic, **more)


_attention_workloads = [
    _job("B1 H8 N16 D64", _dense(1, 8, 16, 16, 64), quick=True),
    _job("B1 H8 N512 D64 causal", _dense(1, 8, 512, 512, 64, causal=True), quick=True),
    _job("B1 H8 N2048 D64 causal", _dense(1, 8, 2048, 2048, 64, causal=True), quick=True),
    _job("B1 H8 N1024 D64 causal", _dense(1, 8, 1024, 1024, 64, causal=True), quick=True, representative=True),
    _job("B1 H8 N4096 D64 causal", _dense(1, 8, 4096, 4096, 64, causal=True)),
    _job("B1 H8 N2048 D64", _dense(1, 8, 2048, 2048, 64), quick=True),
    _job("B8 H8 N256 D64", _dense(8, 8, 256, 256, 64), quick=True),
    _job("B1 H8 N1024 D128 causal", _dense(1, 8, 1024, 1024, 128, causal=True), quick=True, representative=True),
    _job("B1 H4 N1024 D256", _dense(1, 4, 1024, 1024, 256)),
    _job("B2 H16 Hk4 N512 D64 causal", _dense(2, 16, 512, 512, 64, Hk=4, causal=True)),
    _job("B4 H12 N197 D80 heads inside", _dense(4, 12, 197, 197, 80, layout="bnhd"), quick=True),
    _job("B2 H8 N1024 D64 bias", _dense(2, 8, 1024, 1024, 64, bias=("float", (8, 1024, 1024)))),
    _job(
        "B1 H8 N1024 D64 causal", _dense(1, 8, 1024, 1024, 64, causal=True), train=True, quick=True, representative=True
    ),
    _job("B4 H8 N256 D64", _dense(4, 8, 256, 256, 64), train=True),
    _job("B1 H8 N1024 D128 causal", _dense(1, 8, 1024, 1024, 128, causal=True), train=True, representative=True),
]


def _sdpa(*sizes, is_causal=False, enable_gqa=False, unbatched=False, **options):
    """make(dtype, device) for `scaled_dot_product_attention`, from `attention`'s."""
    dense = _dense(*sizes, **options)

    def make(dtype, device):
        inputs = dense(dtype, device)
        if "bias" in inputs:
            inputs["attn_mask"] = inputs.pop("bias")
        if unbatched:
            inputs |= {name: inputs[name][0] for name in ("query", "key", "value")}
        return inputs | dict(is_causal=is_causal, enable_gqa=enable_gqa)

    return make


_sdpa_samples = [
    Sample("plain", _sdpa(2, 2, 33, 47, 16)),
    Sample("causal", _sdpa(2, 2, 40, 40, 16, is_causal=True)),
    Sample("causal, fewer queries", _sdpa(2, 2, 21, 40, 16, is_causal=True)),
    Sample("causal, more queries", _sdpa(2, 2, 40, 21, 16, is_causal=True)),
    Sample("bool mask", _sdpa(2, 2, 33, 47, 16, bias=("bool", (33, 47)))),
    Sample("float mask", _sdpa(2, 2, 33, 47, 16, bias=("float", (2, 1, 33, 47)))),
    Sample("grouped heads", _sdpa(2, 4, 33, 47, 16, Hk=2, enable_gqa=True, scale=0.2)),
    Sample("unbatched", _sdpa(1, 3, 20, 30, 16, unbatched=True, is_causal=True)),
]
_sdpa_workloads = [
    _job("B2 H8 N512 D64 causal", _sdpa(2, 8, 512, 512, 64, is_causal=True), quick=True),
    _job("B2 H8 N384 D64 bool mask", _sdpa(2, 8, 384, 384, 64, bias=("bool", (2, 1, 384, 384)))),
]


def _ragged_flops(inputs) -> float:
    H, D, Dv = inputs["query"].size(1), inputs["query"].size(2), inputs["value"].size(2)
    cu_k = inputs["cu_seqlens_k"] if inputs["cu_seqlens_k"] is not None else inputs["cu_seqlens_q"]
    lengths = zip(inputs["cu_seqlens_q"].diff().tolist(), cu_k.diff().tolist())
    return 2 * H * (D + Dv) * sum(_pairs(n, m, inputs.get("causal")) for n, m in lengths)


_varlen_samples = [
    Sample("plain", _packed((33, 1, 70), None, 2, 16)),
    Sample("causal", _packed((33, 1, 70), (40, 12, 70), 4, 24, Hk=2, causal=True, return_lse=True)),
    Sample("empty sequences", _packed((0, 20, 0, 17, 0), (3, 30, 0, 0, 0), 2, 16, return_lse=True)),
    Sample("rows of no sequence", _packed((12, 20), (30, 21), 2, 16, spare=7, return_lse=True)),
    Sample("window and softcap", _packed((50, 64), (70, 40), 2, 16, Dv=10, window=(9, 4), softcap=2.0)),
    Sample("scale of 2^30", _packed((50, 64), (70, 40), 2, 16, scale=2.0**30, coarse=True)),
    Sample("no sequences", _packed((), None, 2, 16)),
]
_ragged = (31, 500, 77, 210, 4, 333, 128, 65, 17, 402, 96, 250)
_varlen_workloads = [
    _job("12 sequences of 4–500, H8 D64", _packed(_ragged, None, 8, 64), _ragged_flops, quick=True),
    _job("12 sequences of 4–500, H8 D64 causal", _packed(_ragged, None, 8, 64, causal=True), _ragged_flops),
    _job("12 sequences of 4–500, H8 D64 causal", _packed(_ragged, None, 8, 64, causal=True), _ragged_flops, train=True),
]


def _decode_flops(inputs) -> float:
    (_, H, n, D), Dv = inputs["query"].shape, inputs["value_cache"].size(3)
    return 2.0 * H * n * (D + Dv) * int(inputs["cache_lengths"].sum())


_decode_samples = [
    Sample("one token", _cached(3, 4, 1, 90, 24, (90, 1, 40), Hk=2)),
    Sample("three tokens", _cached(2, 2, 3, 64, 16, (64, 20))),
    Sample("more tokens than entries", _cached(2, 2, 5, 64, 16, (3, 0))),
    Sample("not causal", _cached(2, 2, 3, 64, 16, (50, 20), causal=False)),
    Sample("window, softcap", _cached(2, 4, 2, 200, 16, (150, 20), Hk=1, window=(30, None), softcap=2.0)),
    Sample("pages", _cached(2, 4, 2, 96, 16, (96, 37), Hk=2, page=16)),
    Sample("odd pages", _cached(2, 2, 1, 91, 20, (80, 0), page=7, Dv=9)),
    Sample("long cache", _cached(1, 4, 1, 1500, 64, (1499,), Hk=2)),
    Sample("long cache, scale of 1e9", _cached(1, 4, 1, 1500, 64, (1499,), Hk=2, scale=1e9)),
    Sample("pages, scale of 1e9", _cached(2, 4, 2, 160, 16, (160, 37), Hk=2, page=16, scale=1e9)),
]
_decode_workloads = [
    _job("B1 H32 Hk8 S4096 D128", _cached(1, 32, 1, 4096, 128, (4096,), Hk=8), _decode_flops, quick=True),
    _job(
        "B8 H32 Hk8 S2048 D128",
        _cached(8, 32, 1, 2048, 128, (2048,), Hk=8),
        _decode_flops,
        quick=True,
        representative=True,
    ),
    _job("B4 H16 S1024 D64", _cached(4, 16, 1, 1024, 64, (1024,)), _decode_flops),
    _job("B8 H32 Hk8 S2048 D128 pages of 16", _cached(8, 32, 1, 2048, 128, (2048,), Hk=8, page=16), _decode_flops),
]

declare(attention, samples=_attention_samples, workloads=_attention_workloads)
declare(scaled_dot_product_attention, samples=_sdpa_samples, workloads=_sdpa_workloads)
declare(varlen_attention, samples=_varlen_samples, workloads=_varlen_workloads)
declare(decode_attention, samples=_decode_samples, workloads=_decode_workloads)
