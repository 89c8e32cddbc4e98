"""The WKVs' CUDA kernels, compiled for the CPU: every way to cut the work, on every sample."""

import pytest
import torch
from cuda_host import build, host

from pykernels.core.backends import BackendDeclined, use_backend
from pykernels.core.declaration import OPS, Sample
from pykernels.launch import linear_recurrence, wkv4
from pykernels.samples import wkv
from pykernels.tools.check import compare_sample

REASON = build.missing() if host.MODE else "the CUDA kernels run on the CPU by tests/cuda_host/run.py"

pytestmark = [pytest.mark.cuda_host, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def in_any_order(name, sample, dtype, change=None):
    host.set_order(f"random:{torch.initial_seed()}")
    results = compare_sample(OPS[name], sample, dtype, "cpu", "cuda", *([change] if change else []))
    assert all(result.ok for result in results), [*map(str, results)]


def sample_of(name, label):
    return next(sample for sample in OPS[name].samples if sample.label == label)


@pytest.mark.parametrize("sample", OPS["wkv4"].samples, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
@pytest.mark.parametrize(
    ("steps", "wide"), [(32, False), (64, True), (1 << 20, True)], ids=("segments of 32", "64, wide", "one, wide")
)
def test_every_schedule(monkeypatch, sample, dtype, steps, wide):
    monkeypatch.setattr(wkv4, "schedule", lambda *_: (steps, wide))
    in_any_order("wkv4", sample, dtype)


WIDE = ("state", "odd sizes", "several chunks", "wide value", "heads of 64", "no steps")


@pytest.mark.parametrize("name", ["wkv6", "wkv7"])
@pytest.mark.parametrize("label", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_lanes_of_four_columns(monkeypatch, name, label, dtype):
    """... and fewer blocks than there is work for, so that each goes on to another."""
    monkeypatch.setattr(linear_recurrence, "is_wide", lambda *_: True)
    monkeypatch.setattr(linear_recurrence, "GRADIENT_BLOCKS", 2)
    in_any_order(name, sample_of(name, label), dtype)


LARGE = {"wkv6": wkv._inputs6, "wkv7": wkv._inputs7}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize(("K", "V"), [(128, 40), (67, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_large_heads(name, K, V, dtype):
    in_any_order(name, Sample("large", LARGE[name](1, 35, 1, K, V, state=True)), dtype)


@pytest.mark.parametrize("name", LARGE)
def test_declines(name):
    inputs = LARGE[name](1, 2, 1, 129, 4)(torch.float32, "cpu")
    with use_backend("cuda"), pytest.raises(BackendDeclined, match="K of at most 128, got 129"):
        OPS[name].function(**inputs)


def test_a_state_that_has_seen_nothing(monkeypatch):
    """Where bb is 0, whatever pp, also joined by segments."""
    monkeypatch.setattr(wkv4, "schedule", lambda *_: (32, False))

    def emptied(inputs):
        aa, bb, pp = inputs["state"].unbind(1)
        return inputs | {"state": torch.stack((0 * aa, torch.where(pp > 0, bb, 0), pp + 50), 1)}

    in_any_order("wkv4", sample_of("wkv4", "several chunks"), torch.float32, emptied)
