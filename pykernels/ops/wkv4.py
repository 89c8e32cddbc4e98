"""RWKV-4's WKV: per channel, an exponentially decaying weighted mean of all values before, and the present one.

    y_t = (Σ_{i<t} e^{(t−1−i)w + k_i} v_i + e^{u+k_t} v_t) / (Σ_{i<t} e^{(t−1−i)w + k_i} + e^{u+k_t})

(Peng et al., 2305.13048; w ≤ 0 is the log decay of a step.) In a form that cannot overflow, the state is
(aa, bb, pp): numerator aa·e^pp, denominator bb·e^pp, pp the largest exponent so far:

    q = max(pp, u + k);  y = (e^{pp−q}·aa + e^{u+k−q}·v) / (e^{pp−q}·bb + e^{u+k−q})
    q = max(pp + w, k);  aa' = e^{pp+w−q}·aa + e^{k−q}·v;  bb' = e^{pp+w−q}·bb + e^{k−q};  pp' = q

Backward, t descending, with ga, gb, r the gradients of aa', bb' and of what pp' holds beyond them:

    s = gy·e^{u+k}/D,  z = gy·e^{pp}/D  (D the denominator of y);  f = e^{pp+w−q},  e = e^{k−q}
    gv = s + e·ga;  gk = s(v − y) + e(ga·v + gb) [+ r if k is the maximum];  gu += s(v − y)
    gw += f(ga·aa + gb·bb) [+ r if pp + w is];  ga, gb = z + f·ga, f·gb − z·y

Segments compose: n steps take (aa, bb, pp) to the sum of (aa, bb, pp + n·w) and what they make of an empty state, so
that a sequence may be cut into chunks that run side by side. Backward composes as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import native
from ..core.expect import can_read, expect, expect_alike, expect_device, expect_shape, expect_tensor, expect_type
from ..core.registry import (
    FLOATS,
    Sample,
    Workload,
    autocast,
    register,
    second_order,
    torch_op,
    triton_declines,
    wants_gradient,
)

CHUNK = 32  # steps from one saved state to the next
EMPTY = -1e38  # pp of a state that has seen nothing, as in the public code; inside it is the dtype's lowest number
_DTYPES = (torch.float64, *FLOATS)


def exact_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_exact(t: Tensor, exact: torch.dtype) -> Tensor:
    """t.to(exact), without the call into torch where there is nothing to do."""
    return t if t.dtype == exact else t.to(exact)


def reference(
    w: Tensor,  # [C]
    u: Tensor,  # [C]
    k: Tensor,  # [B, T, C]
    v: Tensor,  # [B, T, C]
    state: Tensor | None,  # [B, 3, C]
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, state) by the stable recurrence above, a step at a time."""
    exact, dtype = exact_of(k.dtype), k.dtype
    w, u, k, v = (t.to(exact) for t in (w, u, k, v))
    lowest = torch.finfo(exact).min
    if state is None:
        aa = bb = pp = k.new_zeros(k.size(0), k.size(2))
    else:
        aa, bb, pp = state.unbind(1)
    pp = torch.where(bb == 0, lowest, pp)  # nothing was seen, whatever pp says
    outputs = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1)):
        past, present, _ = weigh(pp, (u + k_t).clamp(min=lowest))
        outputs.append((past * aa + present * v_t) / (past * bb + present))
        past, present, pp = weigh((pp + w).clamp(min=lowest), k_t)
        aa, bb = past * aa + present * v_t, past * bb + present
    y = torch.stack(outputs, 1).to(dtype) if outputs else k.to(dtype, copy=True)
    return y, torch.stack((aa, bb, torch.where(bb == 0, EMPTY, pp)), 1)


def weigh(past: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(e^{past−q}, e^{present−q}, q = max(past, present)). One exponential is 1; no difference is ∞ − ∞, for the past
    is finite."""
    d = past - present
    wins = d < 0
    return torch.where(wins, d, 0).exp(), torch.where(wins, 0, -d).exp(), torch.where(wins, present, past)


# ------------------------------------------------------------------------------------------------ torch ops


def _outputs(w, u, k, v, state, training, backend):
    B, T, C = k.shape
    chunks = -(-T // CHUNK) if training else 0
    y, final = torch.empty_like(k, memory_format=torch.contiguous_format), w.new_empty(B, 3, C)
    # The saved states are flat: torch asks of every size whether it is 1, and of `chunks` that would fix T's range.
    return y, final, w.new_empty(chunks * B * 3 * C)


def _gradients(grad_y, grad_state, w, u, k, v, state, checkpoints, backend):
    return tuple(w.new_empty(0) if t is None else t.new_empty(t.shape) for t in (w, u, k, v, state))


def _save(ctx, inputs, output):
    *primals, ctx.training, ctx.backend = inputs
    ctx.save_for_backward(*primals, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_state, _):
    if not ctx.training:
        raise RuntimeError("pykernels::wkv4: a gradient was asked of a call with training=False")
    saved = ctx.saved_tensors  # once: checkpointing gives them no second time
    *grads, grad_initial = _backward_op(grad_y, grad_state, *saved, ctx.backend)
    return *grads, grad_initial if saved[4] is not None else None, None, None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *cotangents):
    saved = ctx.saved_tensors
    return *second_order(reference, saved[2:], saved[:2], cotangents), None, None


def _triton(w, u, k, v, state, training, backend):
    from ..kernels import wkv4 as kernels

    k, v = k.contiguous(), v.contiguous()
    results = _outputs(w, u, k, v, state, training, backend)
    kernels.forward(w.contiguous(), u.contiguous(), k, v, None if state is None else state.contiguous(), *results)
    return results


def _triton_backward(grad_y, grad_state, w, u, k, v, state, checkpoints, backend):
    from ..kernels import wkv4 as kernels

    tensors = [t if t is None else t.contiguous() for t in (grad_y, grad_state, w, u, k, v, state, checkpoints)]
    results = _gradients(*tensors, backend)
    kernels.backward(*tensors, *results[2:4], results[4] if state is not None else None, results[0], results[1])
    return results


# Segments of T run side by side where fewer warps than ENOUGH would go through all of it, for 5/3 of the traffic: as
# many as make WANTED warps. From MANY lanes of 8 bytes on, these take fewer instructions than lanes of one channel.
ENOUGH, WANTED, MANY = 264, 1024, 1 << 15
SHORTEST = 64  # steps of a segment at least


def _schedule(B: int, T: int, C: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Steps of a segment, a multiple of 32, and whether a lane takes 8 bytes of a row."""
    steps, warps = max(T, 1), B * -(-C // 32)
    if warps < ENOUGH and T >= 2 * SHORTEST:
        steps = max(SHORTEST, -(-T * warps // WANTED))
    return -(-steps // CHUNK) * CHUNK, B * C * dtype.itemsize >= 8 * MANY


def _cuda(w, u, k, v, state, training, backend):
    k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (k, v))
    results = _outputs(w, u, k, v, state, training, backend)
    B, T, C = k.shape
    steps, wide = _schedule(B, T, C, k.dtype)
    found = w.new_empty(max(-(-T // steps), 1) - 1, B, 3, C)
    state = None if state is None else state.contiguous()
    y, final, checkpoints = results
    checkpoints = checkpoints.view(-(-T // CHUNK) if training else 0, B, 3, C)
    native.cuda("wkv4", w.contiguous(), u.contiguous(), k, v, state, y, final, checkpoints, found, steps, wide)
    return results


def _cuda_backward(grad_y, grad_state, w, u, k, v, state, checkpoints, backend):
    rows = (t if t is None or t.stride(2) == 1 else t.contiguous() for t in (grad_y, k, v))
    grad_y, k, v = rows
    grad_state, w, u, state, checkpoints = (
        t if t is None else t.contiguous() for t in (grad_state, w, u, state, checkpoints)
    )
    B, T, C = k.shape
    results = (*(torch.empty_like(t) for t in (w, u)), *(k.new_empty(B, T, C) for _ in "kv"))
    results += (w.new_empty(0 if state is None else (B, 3, C)),)
    checkpoints = checkpoints.view(-(-T // CHUNK), B, 3, C)
    steps, _ = _schedule(B, T, C, k.dtype)
    segments = max(-(-T // steps), 1)
    local, sums = w.new_empty(segments - 1, B, 4, C), w.new_empty(segments, B, 2, C)
    initial = None if state is None else results[4]
    native.cuda(
        "wkv4_backward", grad_y, grad_state, w, u, k, v, state, checkpoints, *results[:4], initial, local, sums, steps
    )
    return results


_backward_op = torch_op(
    "wkv4_backward(Tensor? grad_y, Tensor? grad_state, Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, "
    "Tensor checkpoints, int backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_gradients,
    implementations={"triton": _triton_backward, "cuda": _cuda_backward},
    setup_context=_save_backward,
    backward=_double_backward,
)

_op = torch_op(
    "wkv4(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, bool training, int backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_outputs,
    implementations={"triton": _triton, "cuda": _cuda},
    setup_context=_save,
    backward=_backward,
)


# ------------------------------------------------------------------------------------------------ public function


def _wkv4(run, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RWKV-4's WKV: an exponentially decaying, exponentially weighted mean over time, per channel.

    Args:
        w: [C], the log decay of one step, ≤ 0 (`log_decay` converts from the forms in public code); −inf forgets all.
        u: [C], added to the present token's key ("time_first").
        k: [B, T, C], keys: logarithms of weights; any T, any strides; fp32, bf16, fp16 (and fp64 on the CPU). Of −inf
            it adds nothing to the state, and y is v where nothing was seen before.
        v: [B, T, C], values, in k's dtype. w and u may be fp32 beside half-precision k and v.
        state: [B, 3, C], (aa, bb, pp) after the steps before, in fp32 (fp64 for fp64); None has seen nothing. Where
            bb is 0 nothing was seen either, whatever pp.

    Returns:
        y [B, T, C] in k's dtype and the state after the last step [B, 3, C]. All sums are fp32 (fp64). Differentiable,
        twice too, in every argument, through y and through the state. A call equals any split of it in time.

    Raises:
        ValueError, TypeError: a shape, dtype, device or value other than the above, before anything is computed.

    Source: Peng et al., 2305.13048, in the notation of the public kernels.
    """
    k, v = autocast(k, v)
    expect_tensor(k, "k", "[B, T, C]", _DTYPES)
    shape, dtype, exact = k.shape, k.dtype, exact_of(k.dtype)
    B, _, C = shape
    expect_tensor(v, "v", "[B, T, C]")
    expect_shape(v, "v", shape, "k")
    expect_alike(v, "v", k, "k")
    for value, name in ((w, "w"), (u, "u")):
        expect_tensor(value, name, "[C]", (exact, dtype))
        expect_shape(value, name, (C,), "k")
        expect_device(value, name, k, "k")
    check_decay(w, "w")
    if state is not None:
        expect_tensor(state, "state", "[B, 3, C]", (exact,))
        expect_shape(state, "state", (B, 3, C), "k")
        expect_device(state, "state", k, "k")
    w, u = in_exact(w, exact), in_exact(u, exact)
    return run(w, u, k, v, state, wants_gradient(w, u, k, v, state))[:2]


def log_decay(decay: Tensor, convention: str) -> Tensor:
    """The log decay (≤ 0, what `wkv4`, `wkv6` and `wkv7` take as w) from what public code calls w or time_decay.

    Args:
        decay: any shape, any floating dtype.
        convention: "log": it is the log decay; "exp": a step multiplies by e^{−e^decay} (time_decay of RWKV-4 to -6, w
            of RWKV-7's kernels); "sigmoid": by e^{−e^{−½}·σ(decay)}, which is e^{−0.60653·σ(decay)} (RWKV-7's paper).

    Raises:
        ValueError, TypeError: another convention, dtype; a positive log decay.
    """
    expect_type(isinstance(decay, Tensor) and decay.is_floating_point(), "decay", "a floating tensor", decay)
    if convention == "exp":
        return -decay.exp()
    if convention == "sigmoid":
        return -(math.exp(-0.5) * decay.sigmoid())
    expect(convention == "log", "convention", "'log', 'exp' or 'sigmoid'", convention)
    check_decay(decay, "decay")
    return decay


def check_decay(w: Tensor, name: str) -> None:
    if can_read(w) and w.numel():
        largest = (w.detach() if w.requires_grad else w).max().item()
        expect(not largest > 0, name, "log decays ≤ 0 (log_decay converts other forms)", largest)


# ------------------------------------------------------------------------------------------------ declaration


def _inputs(B, T, C, *, w=(-5.0, -1e-2), state=False, size=1.0, order="btc", extreme=None):
    """make(dtype, device). w: (lowest, highest) log decay; size: of the keys. extreme: of "w" every third number is
    −1e38 and every fourth −inf, of "k" and "u" all are as large as the dtype holds, "padding" is keys of −inf."""

    def make(dtype, device):
        def draw(*shape):
            return torch.randn(shape, dtype=dtype, device=device)

        exact = exact_of(dtype)
        k, v = size * draw(B, T, C), draw(B, T, C)
        if order == "tbc":  # time first, seen through a transpose
            k, v = (draw(T, B, C).transpose(0, 1) for _ in range(2))
        low, high = w or (-5.0, -1e-2)
        decay = -torch.exp(
            torch.empty(C, dtype=exact, device=device).uniform_(*torch.tensor([-high, -low]).log().tolist())
        )
        inputs = dict(w=decay, u=draw(C), k=k, v=v)
        if state:
            aa, bb, pp = torch.randn(3, B, C, dtype=exact, device=device).unbind()
            inputs["state"] = torch.stack((aa, bb.abs() + 0.5, 0.9 * large(pp) if extreme in ("k", "u") else pp), 1)
        if extreme == "w":
            decay[::3], decay[::4] = -1e38, -torch.inf
        elif extreme == "padding":
            k[:, : T // 3] = k[:, T // 2] = -torch.inf
        elif extreme:
            inputs |= {name: large(inputs[name]) for name in {"k", extreme}}
        return inputs

    def large(t):  # every sum of two may overflow
        most = min(torch.finfo(t.dtype).max, torch.finfo(torch.float32).max)
        return (t.double() * most).clamp(-most, most).to(t.dtype)

    return make


def _traffic(inputs) -> float:
    k = inputs["k"]
    return float(3 * k.numel() * k.element_size())


def _workloads():
    for train in (False, True):
        for B, T, C in ((1, 1024, 768), (8, 256, 768), (1, 8192, 2048), (1, 1, 2048)):
            yield Workload(
                f"B{B} T{T} C{C}",
                _inputs(B, T, C, state=T == 1),
                bytes=_traffic,
                train=train,
                quick=T <= 1024,
            )


# An exponent of 100 rounds by as many units, and again at every step that it decays.
_LARGE = 4.0
# Over many steps of slow decay each rounding of pp + w is the same, and w's gradient is as far off as that is, in eager
# and here alike: of a few channels one draw of luck against another. "slow decay" has enough of them.
_FORGETTING = (-5.0, -0.5)
_FEW = 4.0  # where a result is a handful of numbers, eager's error is a matter of luck

wkv4 = register(
    _wkv4,
    kernel=_op,
    reference=reference,
    supports={
        "cpu": lambda *_: None,
        "triton": lambda w, u, k, *_: triton_declines(k),
        "cuda": lambda w, u, k, *_: None if k.dtype in FLOATS else "it takes fp32, bf16 and fp16",
    },
    samples=[
        Sample("plain", _inputs(2, 9, 5), _FEW),
        Sample("state", _inputs(2, 9, 5, state=True), _FEW),
        Sample("one", _inputs(1, 1, 1), _FEW),
        Sample("one step, state", _inputs(3, 1, 20, state=True)),
        Sample("odd sizes", _inputs(3, 37, 19, state=True)),
        Sample("several chunks", _inputs(2, 100, 33, w=_FORGETTING, state=True)),
        Sample("several chunks, few channels", _inputs(1, 150, 3, w=_FORGETTING, state=True)),
        Sample("long, one channel", _inputs(1, 170, 1), _FEW),
        Sample("many channels", _inputs(1, 40, 300)),
        Sample("many sequences", _inputs(9, 35, 16, state=True)),
        Sample("time first", _inputs(2, 12, 40, order="tbc")),
        Sample("slow decay", _inputs(1, 70, 33, w=(-1e-5, -1e-6), state=True)),
        Sample("fast decay", _inputs(2, 70, 33, w=(-20.0, -10.0), state=True)),
        Sample("keys of ±60", _inputs(2, 70, 33, size=30.0, state=True), _LARGE),
        Sample("keys of ±60, slow decay", _inputs(1, 130, 3, size=30.0, w=(-1e-5, -1e-6)), _LARGE),
        Sample("keys of ±1e38", _inputs(2, 40, 19, extreme="k"), _LARGE),
        Sample("keys, u and state of ±1e38", _inputs(1, 150, 19, w=_FORGETTING, state=True, extreme="u"), _LARGE),
        Sample("w of −1e38 and −inf", _inputs(1, 150, 19, state=True, extreme="w")),
        Sample("keys of −inf", _inputs(1, 150, 19, w=_FORGETTING, extreme="padding")),
        Sample("no steps", _inputs(2, 0, 5, state=True)),
        Sample("no sequences", _inputs(0, 4, 5, state=True)),
    ],
    workloads=_workloads(),
    differentiable=("w", "u", "k", "v", "state"),
)
