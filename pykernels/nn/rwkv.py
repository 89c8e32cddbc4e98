"""RWKV-4's two layers, time mixing on `pykernels.wkv4` and channel mixing, in the names of the published checkpoints.

Each projection of a layer sees its own mix of a token and the one before it, μ∘x_t + (1 − μ)∘x_{t−1}; the last token of
a call is therefore part of the state. Hugging Face's names (time_mix_key, …) load as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Linear, Parameter

from ..core.dtypes import FLOATS, accumulator_of, is_autocast_on
from ..core.expect import (
    expect,
    expect_alike,
    expect_device,
    expect_dtype,
    expect_integer,
    expect_shape,
    expect_size,
    expect_tensor,
    expect_type,
)
from ..ops.wkv import log_decay
from ..ops.wkv4 import wkv4

_OTHER_NAMES = {"time_mix_key": "time_mix_k", "time_mix_value": "time_mix_v", "time_mix_receptance": "time_mix_r"}


class _Mix(torch.nn.Module):
    """What the two layers share: their place in the model, the view of the token before, the two spellings."""

    def __init__(self, n_embd: int, n_layer: int, layer_id: int) -> None:
        super().__init__()
        n_embd, n_layer = expect_size(n_embd, "n_embd"), expect_size(n_layer, "n_layer")
        layer_id = expect_integer(layer_id, "layer_id")
        last = n_layer - 1
        expect(0 <= layer_id <= last, "layer_id", "0 to {last}", layer_id, last=last)
        self.n_embd, self.n_layer, self.layer_id = n_embd, n_layer, layer_id
        self.register_load_state_dict_pre_hook(_translate)

    def _before(self, x: Tensor, shift: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
        """The token before each one [B, T, C], and the last one [B, C], which is next call's `shift`."""
        expect_tensor(x, "x", "[B, T, C]")
        B, _, C = x.shape
        n_embd, weights = self.n_embd, self.time_mix_k
        expect(n_embd == C, "x", "[B, T, {n_embd}]", x, n_embd=n_embd)
        dtype = weights.dtype
        if dtype in FLOATS and is_autocast_on(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            expect_dtype(x, "x", (torch.float32, low))  # the two that torch.cat takes there
        else:
            expect_type(x.dtype == dtype, "x", "the weights' {dtype}", x, dtype=dtype)
        expect_device(x, "x", weights, "the module")
        if shift is None:
            shift = x.new_zeros(B, C)
        else:
            expect_tensor(shift, name, "[B, C]")
            expect_shape(shift, name, (B, C), "x")
            expect_alike(shift, name, x, "x")
        seen = torch.cat((shift.unsqueeze(1), x), 1)
        return seen[:, :-1], seen[:, -1].clone()  # a view would keep the whole sequence

    def _place(self) -> tuple[float, float, Tensor]:
        """How deep the layer is, from 0 to 1 and from 1 to almost 0, and i/C for each channel."""
        depth = self.layer_id / max(self.n_layer - 1, 1)
        channel = _count(self.n_embd) / self.n_embd
        return depth, 1 - self.layer_id / self.n_layer, channel

    def extra_repr(self) -> str:
        return f"{self.n_embd}, n_layer={self.n_layer}, layer_id={self.layer_id}"


class RWKV4TimeMix(_Mix):
    """RWKV-4's attention: a decaying weighted mean of values over time, gated by a receptance.

    r, k, v = W_r, W_k, W_v of the mixes of x_t and x_{t−1};  out = W_o (σ(r) ∘ wkv4(−e^time_decay, time_first, k, v))

    Args:
        n_embd: width C of x.
        n_layer, layer_id: the model's depth and this layer's place in it, on which the initial decays and mixes depend.
        dim_att: width of k, v and r; n_embd unless given.

    Parameters: time_decay, time_first [dim_att]; time_mix_k, time_mix_v, time_mix_r [1, 1, C]; key, value, receptance,
    output (linear, without bias). Initially as in the authors' code, whose key, receptance and output are zero.

    Inputs: x [B, T, C], any T, in the weights' dtype, or under autocast in fp32 or its dtype; state is (shift [B, C] in
    x's dtype, wkv [B, 3, dim_att] in fp32, fp64 for fp64), or None before the first token.

    Returns (out [B, T, C], state after the last token). A call equals any split of it in time; gradients flow through
    the state. The decay is taken in fp32 (fp64) whatever the weights' dtype.

    Raises ValueError, TypeError: a size, shape, dtype or device other than these.

    Source: Peng et al., 2305.13048; BlinkDL/RWKV-LM, RWKV-v4.
    """

    def __init__(
        self, n_embd: int, n_layer: int = 1, layer_id: int = 0, *, dim_att: int | None = None, device=None, dtype=None
    ) -> None:
        super().__init__(n_embd, n_layer, layer_id)
        n_embd = self.n_embd
        dim_att = n_embd if dim_att is None else expect_size(dim_att, "dim_att")
        options = dict(device=device, dtype=dtype)
        self.time_decay = Parameter(torch.empty(dim_att, **options))
        self.time_first = Parameter(torch.empty(dim_att, **options))
        self.time_mix_k = Parameter(torch.empty(1, 1, n_embd, **options))
        self.time_mix_v = Parameter(torch.empty(1, 1, n_embd, **options))
        self.time_mix_r = Parameter(torch.empty(1, 1, n_embd, **options))
        self.key = Linear(n_embd, dim_att, bias=False, **options)
        self.value = Linear(n_embd, dim_att, bias=False, **options)
        self.receptance = Linear(n_embd, dim_att, bias=False, **options)
        self.output = Linear(dim_att, n_embd, bias=False, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        depth, rest, channel = self._place()
        C = self.time_decay.numel()
        place = _count(C)
        self.time_decay.copy_(8 * (place / max(C - 1, 1)) ** (0.7 + 1.3 * depth) - 5)
        self.time_first.copy_(math.log(0.3) + ((place + 1) % 3 - 1) / 2)
        self.time_mix_k.copy_(channel**rest)
        self.time_mix_v.copy_(channel**rest + 0.3 * depth)
        self.time_mix_r.copy_(channel ** (rest / 2))
        _orthogonal(self.value)
        for zero in (self.key, self.receptance, self.output):
            zero.weight.zero_()

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shift = wkv = None
        if state is not None:
            expect_type(isinstance(state, tuple | list), "state", "a tuple (shift, wkv)", state)
            count = len(state)
            expect(count == 2, "state", "two tensors (shift, wkv)", count)
            shift, wkv = state
        before, shift = self._before(x, shift, "state[0]")
        acc = accumulator_of(x.dtype)
        if wkv is not None:
            B, C = x.size(0), self.time_decay.size(0)
            expect_tensor(wkv, "state[1]", "[B, 3, dim_att]", (acc,))
            expect_shape(wkv, "state[1]", (B, 3, C), "x and dim_att")
            expect_device(wkv, "state[1]", x, "x")
        k = self.key(_mix(x, before, self.time_mix_k))
        v = self.value(_mix(x, before, self.time_mix_v))
        r = self.receptance(_mix(x, before, self.time_mix_r)).sigmoid()
        w = log_decay(self.time_decay.to(acc), "exp")
        y, wkv = wkv4(w=w, u=self.time_first.to(acc), k=k, v=v, state=wkv)
        return self.output(r * y), (shift, wkv)


class RWKV4ChannelMix(_Mix):
    """RWKV-4's feed-forward layer, which sees the token before as well.

    r, k = W_r, W_k of the mixes of x_t and x_{t−1};  out = σ(r) ∘ W_v relu(k)²

    Args:
        n_embd: width C of x.
        n_layer, layer_id: the model's depth and this layer's place in it, on which the initial mixes depend.
        dim_ffn: width of k; 4·n_embd unless given.

    Parameters: time_mix_k, time_mix_r [1, 1, C]; key, receptance, value (linear, without bias). Initially as in the
    authors' code, whose value and receptance are zero.

    Inputs: x [B, T, C], any T, in the weights' dtype, or under autocast in fp32 or its dtype; state is the last token
    before [B, C], in x's dtype, or None.

    Returns (out [B, T, C], state after the last token). A call equals any split of it in time; gradients flow through
    the state.

    Raises ValueError, TypeError: a size, shape, dtype or device other than these.

    Source: Peng et al., 2305.13048; BlinkDL/RWKV-LM, RWKV-v4.
    """

    def __init__(
        self, n_embd: int, n_layer: int = 1, layer_id: int = 0, *, dim_ffn: int | None = None, device=None, dtype=None
    ) -> None:
        super().__init__(n_embd, n_layer, layer_id)
        n_embd = self.n_embd
        dim_ffn = 4 * n_embd if dim_ffn is None else expect_size(dim_ffn, "dim_ffn")
        options = dict(device=device, dtype=dtype)
        self.time_mix_k = Parameter(torch.empty(1, 1, n_embd, **options))
        self.time_mix_r = Parameter(torch.empty(1, 1, n_embd, **options))
        self.key = Linear(n_embd, dim_ffn, bias=False, **options)
        self.receptance = Linear(n_embd, n_embd, bias=False, **options)
        self.value = Linear(dim_ffn, n_embd, bias=False, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        _, rest, channel = self._place()
        self.time_mix_k.copy_(channel**rest)
        self.time_mix_r.copy_(channel**rest)
        _orthogonal(self.key)
        for zero in (self.receptance, self.value):
            zero.weight.zero_()

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before, shift = self._before(x, state, "state")
        k = self.key(_mix(x, before, self.time_mix_k)).relu().square()
        r = self.receptance(_mix(x, before, self.time_mix_r)).sigmoid()
        return r * self.value(k), shift


def _count(n: int) -> Tensor:
    """0 to n − 1, on the CPU whatever the default device."""
    return torch.arange(n, dtype=torch.float64, device="cpu")


def _mix(x: Tensor, before: Tensor, share: Tensor) -> Tensor:
    return x * share + before * (1 - share)


def _orthogonal(linear: Linear) -> None:
    """Of the gain that keeps the size of a vector's entries; by way of fp32, since half precision has no QR."""
    weight = linear.weight
    gain = max(1.0, weight.size(0) / weight.size(1)) ** 0.5
    weight.copy_(torch.nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32), gain))


def _translate(module, state_dict, prefix, *_) -> None:
    for theirs, ours in _OTHER_NAMES.items():
        if prefix + theirs in state_dict and prefix + ours not in state_dict:
            state_dict[prefix + ours] = state_dict.pop(prefix + theirs)
