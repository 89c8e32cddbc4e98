"""WKV-4's CUDA kernels, compiled for the CPU: every way to cut the work, on every sample."""

import pytest
import torch
from cuda_host import build, host

from pykernels.check import compare_sample
from pykernels.ops import wkv4
from pykernels.registry import OPS

REASON = build.missing() if host.MODE else "the CUDA kernels run on the CPU by tests/cuda_host/run.py"

pytestmark = [pytest.mark.cuda_host, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


@pytest.mark.parametrize("sample", OPS["wkv4"].samples, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
@pytest.mark.parametrize(
    ("steps", "wide"), [(32, False), (64, True), (1 << 20, True)], ids=("segments of 32", "64, wide", "one, wide")
)
def test_every_schedule(monkeypatch, sample, dtype, steps, wide):
    monkeypatch.setattr(wkv4, "_schedule", lambda *_: (steps, wide))
    host.set_order(f"random:{torch.initial_seed()}")
    results = compare_sample(OPS["wkv4"], sample, dtype, "cpu", "cuda")
    assert all(result.ok for result in results), [*map(str, results)]


def test_a_state_that_has_seen_nothing(monkeypatch):
    """Where bb is 0, whatever pp, also joined by segments."""
    monkeypatch.setattr(wkv4, "_schedule", lambda *_: (32, False))

    def emptied(inputs):
        aa, bb, pp = inputs["state"].unbind(1)
        return inputs | {"state": torch.stack((0 * aa, torch.where(pp > 0, bb, 0), pp + 50), 1)}

    sample = next(sample for sample in OPS["wkv4"].samples if sample.label == "several chunks")
    results = compare_sample(OPS["wkv4"], sample, torch.float32, "cpu", "cuda", emptied)
    assert all(result.ok for result in results), [*map(str, results)]
