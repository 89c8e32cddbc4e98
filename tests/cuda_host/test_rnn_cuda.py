"""LSTM's and GRU's CUDA kernels, compiled for the CPU: both ways to exchange h, and what other devices make them do."""

import pytest
import torch
from cuda_host import build, host

import pykernels as pk
from pykernels.core import backends
from pykernels.core.backends import CUDA, TRITON, choose
from pykernels.core.declaration import OPS, Sample
from pykernels.launch import rnn as rnn_gpu
from pykernels.samples import rnn
from pykernels.tools import self_test as first_use
from pykernels.tools.check import compare, compare_sample

REASON = build.missing() if host.MODE else "the CUDA kernels run on the CPU by tests/cuda_host/run.py"

pytestmark = [pytest.mark.cuda_host, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GATES = {"lstm": 4, "gru": 3}


@pytest.fixture
def become():
    """become(multiprocessors, compute capability): the device that launches go to, until the test is over."""

    def become(multiprocessors, capability):
        host.load().cuda_host_device(multiprocessors, capability)
        rnn_gpu._measured.cache_clear()

    yield become
    become(8, 90)


def holds(results):
    assert all(result.ok for result in results), [*map(str, results)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "sample"),
    [pytest.param(n, s, id=f"{n}-{s}") for n in GATES for s in OPS[n].samples if "projection" not in s.label],
)
def test_exchange_through_global_memory(become, name, sample, dtype):
    become(8, 80)
    host.set_order(f"random:{torch.initial_seed()}")
    holds(compare_sample(OPS[name], sample, DTYPES[dtype], "cpu", "cuda"))


# T, B, I, H; the device; what they need on it, and no sample does
WIDE = [
    ("lstm", (2, 9, 3, 520), "fp32", (132, 80), "4 and 16 k-blocks a warp"),
    ("gru", (3, 9, 3, 520), "bf16", (132, 80), "4 and 16 k-blocks a warp"),
    ("lstm", (2, 3, 3, 390), "fp32", (16, 90), "a cluster of 16"),
    ("lstm", (2, 150, 3, 70), "fp32", (1, 80), "more tiles than a pass has room for"),
    ("lstm", (2, 41, 3, 200), "bf16", (1, 90), "two passes of several tiles"),
]


@pytest.mark.parametrize(("name", "sizes", "dtype", "device"), [case[:4] for case in WIDE], ids=[c[4] for c in WIDE])
def test_other_devices(become, name, sizes, dtype, device):
    become(*device)
    host.set_order(f"random:{torch.initial_seed()}")
    holds(compare_sample(OPS[name], Sample("wide", rnn._layer(GATES[name], *sizes)), DTYPES[dtype], "cpu", "cuda"))


def test_widest(become):
    """What only forward has room for: 8 k-blocks a warp."""
    become(132, 80)
    holds(compare(OPS["gru"], rnn._layer(GATES["gru"], 2, 3, 3, 1030)(torch.bfloat16, "cpu"), "cuda", backward=False))


@pytest.mark.parametrize("name", GATES)
def test_they_come_first_once_they_passed_their_test(name, monkeypatch, tmp_path):
    """But for what they do not take."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "unavailable", lambda backend, device: None)
    monkeypatch.setattr(first_use, "_verdicts", {})

    def arguments(*sizes, **options):
        return OPS[name].arguments(**rnn._layer(GATES[name], *sizes, **options)(torch.float32, "cpu"))

    taken, wide = arguments(5, 3, 4, 6), arguments(0, 3, 4, 4000)
    gpu = torch.device("cuda", 0)
    assert choose(OPS[name], gpu, taken) == TRITON
    monkeypatch.setattr(backends, "verify", first_use.failure)
    assert choose(OPS[name], gpu, taken) == CUDA
    monkeypatch.setattr(backends, "verify", None)
    assert choose(OPS[name], gpu, taken) == CUDA
    assert choose(OPS[name], gpu, wide) == TRITON


@pytest.mark.filterwarnings("ignore")
def test_compiled_whole():
    """With what the device has room for as a constant."""
    inputs = rnn._layer(4, 5, 3, 4, 6)(torch.float32, "cpu")
    torch._dynamo.reset()
    with pk.use_backend("cuda"):
        compiled = torch.compile(pk.lstm, fullgraph=True, backend="aot_eager")
        got, want = compiled(**inputs), pk.lstm(**inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
