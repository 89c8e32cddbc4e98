"""The arguments of the attention functions: what they are held to, and the form in which the op takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import DTYPES, accumulator_of
from ..core.expect import (
    can_read,
    expect,
    expect_alike,
    expect_device,
    expect_dtype,
    expect_integer,
    expect_lengths,
    expect_number,
    expect_shape,
    expect_tensor,
    expect_type,
)

UNBOUNDED = -1  # a window's side without a limit
MAX_HEAD_DIM = 256
DENSE = ("[B, H, N, D]", "[B, Hk, M, D]", "[B, Hk, M, Dv]")
PACKED = ("[total_q, H, D]", "[total_k, Hk, D]", "[total_k, Hk, Dv]")
CACHE = ("[B, H, n, D]", "[B, Hk, S, D]", "[B, Hk, S, Dv]")
PAGES = ("[B, H, n, D]", "[P, Hk, page, D]", "[P, Hk, page, Dv]")


def check_qkv(query, key, value, layouts, key_name="key", value_name="value") -> None:
    """All but the batch. In every layout the heads come second and the head dimension last."""
    query_layout, key_layout, value_layout = layouts
    expect_tensor(query, "query", query_layout, DTYPES)
    for t, name, layout in ((key, key_name, key_layout), (value, value_name, value_layout)):
        expect_tensor(t, name, layout)
        expect_alike(t, name, query, "query")
    shape, key_shape, value_shape, limit = query.shape, key.shape, value.shape, MAX_HEAD_DIM
    H, Hk, D, Dv = shape[1], key_shape[1], shape[-1], value_shape[-1]
    expect(1 <= D <= limit, "query", "a head dimension from 1 to {limit}", query, limit=limit)
    expect(key_shape[-1] == D, key_name, "last dimension {D} to match query's", key, D=D)
    expect(Hk == H or (Hk > 0 and H % Hk == 0), key_name, "a number of heads that divides query's {H}", key, H=H)
    if value_shape[:-1] != key_shape[:-1]:
        expect_shape(value, value_name, (*key_shape[:-1], Dv), key_name)
    expect(1 <= Dv <= limit, value_name, "a head dimension from 1 to {limit}", value, limit=limit)


def check_leading(query, key, value, enable_gqa) -> tuple[int, ...]:
    """[..., H], to which the dimensions before the last two broadcast; with enable_gqa the heads divide instead."""
    named = ((query, "query", "[..., H, N, D]"), (key, "key", "[..., Hk, M, D]"), (value, "value", "[..., Hk, M, Dv]"))
    rank = 3 if enable_gqa else 2
    for t, name, layout in named:
        check_dense(t, name, layout)
        if t.dim() < rank:
            expect(False, name, "rank {rank} or more {layout}", t, rank=rank, layout=layout)
    expect_dtype(query, "query", DTYPES)
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    H, M, D, lead = shape[-rank], key_shape[-2], shape[-1], shape[:-rank]
    for t, name, sizes in ((key, "key", key_shape), (value, "value", value_shape)):
        expect_alike(t, name, query, "query")
        if enable_gqa:
            good = sizes[-3] > 0 and H % sizes[-3] == 0
            expect(good, name, "a number of heads that divides query's {H}", t, H=H)
        other = sizes[:-rank]
        if other != lead:
            if not all(have == want or have == 1 or want == 1 for have, want in zip(other[::-1], lead[::-1])):
                wanted = list(lead)
                expect(False, name, "leading dimensions that fit {wanted}, or enable_gqa=True", t, wanted=wanted)
            lead = torch.broadcast_shapes(lead, other)
    expect(key_shape[-1] == D, "key", "last dimension {D} to match query's", key, D=D)
    expect(value_shape[-2] == M, "value", "length {M} to match key's", value, M=M)
    return (*lead, H) if enable_gqa else tuple(lead)


def fold(query, key, value, bias, lead) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Everything as the op takes it, [B, H, N, D]: leading dimensions broadcast where they must, batches in one."""
    if all([t.dim() == 4 and t.shape[:2] == lead for t in (query, key, value)]):
        return query, key, value, bias
    *batch, H = (1, 1, *lead)[-max(len(lead), 2) :]

    def fold(t, heads):
        return t.expand(*batch, heads, -1, -1).flatten(0, -4)

    heads, heads_v = (t.size(-3) if t.dim() > 2 else 1 for t in (key, value))
    if heads != heads_v:
        key, value = (
            t if n in (1, H) else t.repeat_interleave(H // n, -3) for t, n in ((key, heads), (value, heads_v))
        )
        heads = H
    if bias is not None and len(batch) > 1:
        wide = any(n != 1 for n in bias.shape[:-3])
        bias = (bias.expand(*batch, -1, -1, -1) if wide else bias).flatten(0, -4)
    return fold(query, H), fold(key, heads), fold(value, heads), bias


def check_dense(t, name, layout) -> None:
    """A dense tensor of any rank."""
    if not isinstance(t, Tensor) or t.layout is not torch.strided or t.is_nested:
        expect_tensor(t, name, layout)


def check_bias(bias, name, query, full) -> Tensor:
    """The bias with dimensions of its own for all of `full`, and four at least."""
    check_dense(bias, name, "[B, H, N, M]")
    expect_device(bias, name, query, "query")
    dtypes = (torch.bool, query.dtype, accumulator_of(query.dtype))
    expect_dtype(bias, name, dtypes)
    fits = all(have in (1, want) for have, want in zip(reversed(bias.shape), reversed(full)))
    if not fits or bias.dim() > len(full):
        expect(False, name, "broadcastable to {full}", bias, full=list(full))
    return bias[(None,) * (max(len(full), 4) - bias.dim())]


def check_lengths(lengths, name, query, B, M) -> Tensor:
    expect_lengths(lengths, name, "[B]", query, "query")
    expect(lengths.size(0) == B, name, "[{B}] to match query's batch", lengths, B=B)
    if can_read(lengths):
        values = lengths.tolist()
        expect(all(0 <= value <= M for value in values), name, "lengths from 0 to {M}", values, M=M)
    return lengths.long()


def check_offsets(offsets, name, query, rows) -> Tensor:
    expect_lengths(offsets, name, "[S + 1]", query, "query")
    expect(offsets.size(0) > 0, name, "[S + 1]", offsets)
    if can_read(offsets):
        values = offsets.tolist()
        good = values[0] == 0 and values[-1] <= rows and values == sorted(values)
        expect(good, name, "ascending offsets from 0 to at most {rows}", values, rows=rows)
    return offsets.long()


def check_window(window, causal) -> tuple[int, int]:
    left = right = UNBOUNDED
    if window is not None:
        expect_type(isinstance(window, tuple | list), "window", "a tuple (left, right)", window)
        expect(len(window) == 2, "window", "two sides (left, right)", window)
        left, right = (UNBOUNDED if side is None else expect_integer(side, "window") for side in window)
        expect(left >= UNBOUNDED and right >= UNBOUNDED, "window", "sides ≥ 0, or None or -1 for unbounded", window)
    return left, 0 if causal else right


def check_scale(scale, D) -> float:
    if scale is None:
        return D**-0.5 if D else 1.0
    return float(expect_number(scale, "scale"))


def check_softcap(softcap) -> float:
    return 0.0 if softcap is None else float(expect_number(softcap, "softcap", 0))


def draw_seed(dropout_p, query) -> Tensor | None:
    """Drawn as a tensor: tracing and graph capture stay whole."""
    return torch.randint(2**63 - 1, (), device=query.device) if dropout_p > 0 else None
