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

import torch
from torch import Tensor

from ..core.backends import triton_declines
from ..core.declaration import public
from ..core.dtypes import DTYPES, FLOATS, accumulator_of, autocast, cast
from ..core.expect import expect_alike, expect_device, expect_shape, expect_tensor
from ..core.torch_op import torch_op, wants_gradient
from ..launch import wkv4 as launch
from .wkv import check_decay

EMPTY = -1e38  # pp of a state that has seen nothing, as in the public code; inside it is the dtype's lowest number


def reference(
    w: Tensor,  # [C]
    u: Tensor,  # [C]
    k: Tensor,  # [B, T, C]
    v: Tensor,  # [B, T, C]
    state: Tensor | None = None,  # [B, 3, C]
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, state) by the stable recurrence above, a step at a time."""
    acc, dtype = accumulator_of(k.dtype), k.dtype
    w, u, k, v = (t.to(acc) for t in (w, u, k, v))
    lowest = torch.finfo(acc).min
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


wkv4_backward_op = torch_op(
    "wkv4_backward(Tensor? grad_y, Tensor? grad_final, Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, "
    "Tensor checkpoints, int backend) "
    "-> (Tensor grad_w, Tensor grad_u, Tensor grad_k, Tensor grad_v, Tensor grad_state)",
    fake=launch.gradients,
    launchers={"triton": launch.triton_backward, "cuda": launch.cuda_backward},
    reference=reference,
)


wkv4_op = torch_op(
    "wkv4(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? state, bool training, int backend) "
    "-> (Tensor y, Tensor final, Tensor checkpoints)",
    fake=launch.outputs,
    launchers={"triton": launch.triton, "cuda": launch.cuda},
    gradient=wkv4_backward_op,
)


# ------------------------------------------------------------------------------------------------ public function


@public(
    kernel=wkv4_op,
    reference=reference,
    supports={
        "cpu": lambda *_: None,
        "triton": lambda w, u, k, *_: triton_declines(k),
        "cuda": lambda w, u, k, *_: None if k.dtype in FLOATS else "it takes fp32, bf16 and fp16",
    },
    differentiable=("w", "u", "k", "v", "state"),
)
def wkv4(run, w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
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
    expect_tensor(k, "k", "[B, T, C]", DTYPES)
    shape, dtype, acc = k.shape, k.dtype, accumulator_of(k.dtype)
    B, _, C = shape
    expect_tensor(v, "v", "[B, T, C]")
    expect_shape(v, "v", shape, "k")
    expect_alike(v, "v", k, "k")
    for value, name in ((w, "w"), (u, "u")):
        expect_tensor(value, name, "[C]", (acc, dtype))
        expect_shape(value, name, (C,), "k")
        expect_device(value, name, k, "k")
    check_decay(w, "w")
    if state is not None:
        expect_tensor(state, "state", "[B, 3, C]", (acc,))
        expect_shape(state, "state", (B, 3, C), "k")
        expect_device(state, "state", k, "k")
    w, u = cast(w, acc), cast(u, acc)
    return run(w, u, k, v, state, wants_gradient(w, u, k, v, state))[:2]
