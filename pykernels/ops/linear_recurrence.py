"""The linear recurrence: a matrix per head whose rows decay, each at its own rate. RWKV-5, -6 and -7 are made of it.

    RWKV-6  S_t = diag(e^{w_t}) S_{t−1} + k_t v_tᵀ;                       y_t = scale · r_tᵀ(S_{t−1} + diag(u) k_t v_tᵀ)
    RWKV-7  S_t = diag(e^{w_t}) S_{t−1} + b_t (a_tᵀ S_{t−1}) + k_t v_tᵀ;  y_t = scale · r_tᵀ S_t

(2404.05892, 2503.14456.) RWKV-5 is the former with a w that does not depend on t. S: [K, V], w ≤ 0 the log decay.
Backward, t descending, with G the gradient of S_t from the steps after, g = scale · gy_t, d = e^{w_t}:

    RWKV-6  gr = S_{t−1} g + u∘k (v·g);  gk = G v + u∘r (v·g);  gv = Gᵀ k + g (r·(u∘k));  gu += r∘k (v·g)
            gw = d∘rowsum(S_{t−1}∘G);  G ← diag(d) G + r gᵀ
    RWKV-7  G += r gᵀ;  gr = S_t g;  gk = G v;  gv = Gᵀ k;  gb = G s;  c = Gᵀ b;  ga = S_{t−1} c   (s = S_{t−1}ᵀ a)
            gw = d∘rowsum(S_{t−1}∘G);  G ← diag(d) G + a cᵀ

Chunked, with E the running sum of w from the chunk's start and L its last step: what reaches step i from step j < i is
damped by e^{E_{i−1}−E_j}, from the chunk's first state by e^{E_{i−1}}, to its last by e^{E_L−E_j}: never a positive
exponent, whereas e^{E_i}·e^{−E_j} overflows. One torch op serves both: with u it is RWKV-6, with a and b RWKV-7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import accumulator_of
from ..core.torch_op import torch_op
from ..launch import linear_recurrence as launch


def reference(
    r: Tensor,  # [B, T, H, K]
    w: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, H, V]
    u: Tensor | None = None,  # [H, K]
    a: Tensor | None = None,  # [B, T, H, K]
    b: Tensor | None = None,  # [B, T, H, K]
    state: Tensor | None = None,  # [B, H, K, V]
    scale: float = 1.0,
    training: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, state) by the equations above, a step at a time."""
    acc, dtype = accumulator_of(r.dtype), r.dtype
    B, T, H, K = r.shape
    r, w, k, v, u, a, b = (t if t is None else t.to(acc) for t in (r, w, k, v, u, a, b))
    S, d = r.new_zeros(B, H, K, v.size(3)) if state is None else state.clone(), w.exp()
    outputs = []
    for t in range(T):
        kv = k[:, t, :, :, None] * v[:, t, :, None]
        before = S
        S = d[:, t, :, :, None] * S + kv
        if u is not None:
            read = before + u[..., None] * kv
        else:
            S = read = S + b[:, t, :, :, None] * (a[:, t, :, None] @ before)
        outputs.append((scale * r[:, t, :, None] @ read)[:, :, 0])
    return torch.stack(outputs, 1).to(dtype) if outputs else v.to(dtype, copy=True), S


# ------------------------------------------------------------------------------------------------ torch ops


linear_recurrence_backward = torch_op(
    "linear_recurrence_backward(Tensor? grad_y, Tensor? grad_final, Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, "
    "Tensor? a, Tensor? b, Tensor? state, Tensor checkpoints, float scale, int backend) "
    "-> (Tensor grad_r, Tensor grad_w, Tensor grad_k, Tensor grad_v, Tensor grad_u, Tensor grad_a, Tensor grad_b, "
    "Tensor grad_state)",
    fake=launch.gradients,
    launchers={"triton": launch.triton_backward, "cuda": launch.cuda_backward},
    reference=reference,
)


linear_recurrence = torch_op(
    "linear_recurrence(Tensor r, Tensor w, Tensor k, Tensor v, Tensor? u, Tensor? a, Tensor? b, Tensor? state, "
    "float scale, bool training, int backend) -> (Tensor y, Tensor final, Tensor checkpoints)",
    fake=launch.outputs,
    launchers={"triton": launch.triton, "cuda": launch.cuda},
    gradient=linear_recurrence_backward,
)
