"""What is peculiar to RWKV-4's WKV: the paper's sums, transformers' loop, extremes, segments of time."""

import math

import pytest
import torch
from kit import agree, draw, needs_kernels, threads, values_and_gradients, with_gradients
from rwkv import arguments, naive

import pykernels as pk
from pykernels.ops.wkv4 import EMPTY


@pytest.mark.parametrize("T", [1, 5, 70])
def test_is_the_papers_sum(T):
    """The public function against the paper's sums as they stand, state and all gradients included."""
    inputs = arguments("wkv4", T=T)
    wanted = with_gradients(inputs)
    w, u, k, v, state = inputs.values()

    def ours():
        y, (aa, bb, pp) = (lambda y, s: (y, s.unbind(1)))(*pk.wkv4(w, u, k, v, state))
        return y, aa * pp.exp(), bb * pp.exp()

    def sums():
        aa, bb, pp = state.unbind(1)
        return naive(w, u, k, v, aa * pp.exp(), bb * pp.exp())

    agree(values_and_gradients(ours, wanted), values_and_gradients(sums, wanted), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("T", [1, 7, 80])
def test_largest_exponent_has_its_gradient(T):
    """pp' is the largest of pp + T·w and k_i + (T − 1 − i)·w: its gradient goes to that one, and to w as often."""
    inputs = arguments("wkv4", 3, T, low=-0.3, high=-1e-3)
    w, _, k, _, state = with_gradients(inputs).values()
    pp = pk.wkv4(**inputs)[1][:, 2]
    candidates = torch.cat((state[:, 2:], k), 1)  # [B, 1 + T, C]
    age = torch.arange(T, -1, -1, dtype=torch.float64)
    age[1:] = torch.arange(T - 1, -1, -1, dtype=torch.float64)
    value, place = (candidates + age[:, None] * w).detach().max(1)
    agree([pp], [value])
    given = torch.randn_like(pp)
    gw, gk, gstate = torch.autograd.grad(pp, (w, k, state), given)
    want = torch.zeros_like(candidates).scatter_(1, place[:, None], given[:, None])
    agree([gk, gstate[:, 2], gw], [want[:, 1:], want[:, 0], (given * age[place]).sum(0)], rtol=1e-9, atol=1e-9)
    assert gstate[:, :2].count_nonzero() == 0


@pytest.mark.parametrize("decay", [-1e-6, -1e-2, -1.0, -20.0])
def test_with_keys_of_60(decay):
    """fp32, where e^60 squared overflows and e^−60 squared vanishes, against the plain sum in fp64."""
    inputs = arguments("wkv4", 2, 70, torch.float32, state=False, low=decay, high=decay)
    inputs["k"] = torch.where(torch.rand_like(inputs["k"]) < 0.5, -60.0, 60.0) + inputs["k"]
    inputs.pop("state")
    exact = {key: t.double() for key, t in inputs.items()}
    got = values_and_gradients(lambda: pk.wkv4(**inputs)[:1], with_gradients(inputs))
    want = values_and_gradients(lambda: naive(**exact)[:1], with_gradients(exact))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-3, atol=1e-4 * max(1.0, w.abs().max().item()))


def test_ignores_keys_of_minus_infinity():
    """Weight 0, at the present and after; the state decays on. In the first place it would be 0/0, as for anyone."""
    inputs = arguments("wkv4", 2, 70, state=False)
    inputs.pop("state")
    inputs["k"][:, 1::3] = -math.inf
    inputs["k"][:, 40:60] = -math.inf
    got, want = (values_and_gradients(lambda f=f: f(**inputs)[:1], with_gradients(inputs)) for f in (pk.wkv4, naive))
    agree(got, want, rtol=1e-9, atol=1e-9)
    assert pk.wkv4(**inputs)[1].isfinite().all()


@pytest.mark.parametrize("pp", [0.0, 1e4, EMPTY])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_state_of_zeros_has_seen_nothing(dtype, pp):
    """Whatever its pp says, and however small the keys: no 0/0."""
    inputs = arguments("wkv4", 2, 40, dtype, state=False)
    inputs["k"] -= 200
    state = torch.zeros(2, 3, 6, dtype=dtype)
    state[:, 2] = pp
    wanted = with_gradients(inputs)
    want = values_and_gradients(lambda: pk.wkv4(**inputs), wanted)
    got = values_and_gradients(lambda: pk.wkv4(**inputs | dict(state=state)), wanted)
    assert all(t.isfinite().all() for t in got)
    agree(got, want)
    inputs["state"] = state.requires_grad_()
    y, last = pk.wkv4(**inputs)
    assert torch.autograd.grad(y.sum() + last[:, :2].sum(), state)[0].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("count", [2, 7])
@pytest.mark.parametrize("T", [129, 1000])
def test_segments_of_time_side_by_side_give_what_one_pass_gives(T, count):
    """Few channels and many threads: the sequence is cut. Gradients too, the final exponent's among them."""
    inputs = with_gradients(arguments("wkv4", 1, T, low=-0.1, high=-1e-6))
    inputs["k"] = (5 * inputs["k"].detach()).requires_grad_()
    with threads(1):
        want = values_and_gradients(lambda: pk.wkv4(**inputs), inputs)
    with threads(count):
        got = values_and_gradients(lambda: pk.wkv4(**inputs), inputs)
    assert any(not torch.equal(g, w) for g, w in zip(got, want)), "the sequence was not cut"
    agree(got, want)


@pytest.mark.parametrize("with_state", [False, True])
def test_agrees_with_transformers_loop(with_state):
    """Output, state and the gradients of every argument, the raw decay's through log_decay."""
    theirs = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    inputs = arguments("wkv4", 2, 40, torch.float32, state=with_state)
    inputs["w"] = draw(6, dtype=torch.float32)
    wanted = with_gradients(inputs)
    state = inputs.pop("state")

    def ours():
        return pk.wkv4(pk.log_decay(inputs["w"], "exp"), *list(inputs.values())[1:], state)

    def loop():
        given = None if state is None else state.unbind(1)
        y, last = theirs.rwkv_linear_attention_cpu(*inputs.values(), given, return_state=True)
        return y, torch.stack(last, 1)

    agree(values_and_gradients(ours, wanted), values_and_gradients(loop, wanted), rtol=1e-4, atol=1e-4)
