"""Clocks, memory and the machine's two limits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import pathlib
import re
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]
SETTLED = 3  # rounds before a candidate that is several times slower than the fastest is left out of the rest
HOPELESS = 4.0


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
        return cls(statistics.median(values), low, high)


class Clock:
    """Seconds that calls take on a device; on a GPU between events, after its L2 cache was flushed."""

    def __init__(self, device: str):
        self.device, self.gpu = device, torch.device(device).type == "cuda"
        if self.gpu:
            properties = torch.cuda.get_device_properties(device)
            self.flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.int8, device=device)

    def __call__(self, call: Call, repeats: int = 1) -> float:
        if not self.gpu:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - start) / repeats
        total = 0.0
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end) / 1e3
        return total / repeats

    def probe(self, call: Call) -> tuple[float, float | None]:
        """(seconds, bytes at the peak) of one call."""
        taken: list[float] = []
        memory = peak_memory(lambda: taken.append(self(call)), self.device)
        return taken[0], memory

    def race(self, calls: dict[str, Call], first: dict[str, float], budget: float) -> dict[str, list[float]]:
        """Times of every call, taken in turns A B A B … until the budget (s) is spent: entry i is from round i.

        `first` has a time of each; where that alone is beyond the budget, it is all that is taken.
        """
        racing = {name: call for name, call in calls.items() if first[name] < budget}
        times = {name: [] if name in racing else [first[name]] for name in calls}
        end, rounds = time.perf_counter() + budget, 0
        while racing and (rounds < SETTLED or time.perf_counter() < end):
            for name, call in racing.items():
                times[name].append(self(call, max(1, math.ceil(1e-3 / first[name]))))
            rounds += 1
            if rounds >= SETTLED:
                medians = {name: statistics.median(times[name]) for name in racing}
                racing = {name: racing[name] for name in racing if medians[name] < HOPELESS * min(medians.values())}
        return times


# ------------------------------------------------------------------------------------------------ memory


def _status(key: str, file: str = "/proc/self/status") -> int:
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", pathlib.Path(file).read_text())[1])


def peak_memory(call: Call, device: str) -> float | None:
    """Bytes that a call holds at its peak beyond what was there before: results and scratch, by any allocator."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:  # Linux: the high-water mark of the resident set, reset
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


@contextlib.contextmanager
def memory_limit(device: str):
    """On the CPU, make an allocation beyond what the machine has an exception in here, not the end of the process."""
    if torch.device(device).type != "cpu" or not pathlib.Path("/proc/meminfo").exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = _status("VmSize") + int(0.9 * _status("MemAvailable", "/proc/meminfo"))
    resource.setrlimit(resource.RLIMIT_AS, (room if hard == resource.RLIM_INFINITY else min(room, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ------------------------------------------------------------------------------------------------ limits


@dataclass(frozen=True)
class Limits:
    """What this machine reaches: matrix products (FLOP/s by dtype) and a copy (bytes/s, read and written)."""

    gemm: dict[torch.dtype, float]
    copy: float

    def nearer(self, dtype: torch.dtype, flops: float, traffic: float) -> tuple[float, str]:
        """(least seconds, which limit sets them)."""
        return max((flops / self.gemm[dtype], "compute"), (traffic / self.copy, "memory"))

    def best(self, other: Limits) -> Limits:
        """The better of two measurements: whatever else runs can only slow them down."""
        gemm = {dtype: max(rate, other.gemm[dtype]) for dtype, rate in self.gemm.items()}
        return Limits(gemm, max(self.copy, other.copy))


def measure_limits(device: str, dtypes: list[torch.dtype]) -> Limits:
    clock = Clock(device)

    def best(call: Call, budget: float = 0.4) -> float:
        clock(call)
        times, end = [], time.perf_counter() + budget
        while len(times) < 3 or time.perf_counter() < end:
            times.append(clock(call))
        return min(times)

    return Limits({dtype: max(_gemm_rates(device, dtype, best)) for dtype in dtypes}, _copy_rate(device, best))


def _gemm_rates(device: str, dtype: torch.dtype, best: Callable[[Call], float]):
    """Rates of square products, ascending in size until one takes too long to bother."""
    for n in (2048, 4096, 8192) if torch.device(device).type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        calls = [functools.partial(torch.mm, a, b, out=torch.empty_like(a))]
        if dtype == torch.float32 and device == "cpu" and torch.backends.mkldnn.is_available():
            # torch.mm is MKL's sgemm, on AMD processors at less than half the speed of oneDNN's
            calls.append(functools.partial(torch.nn.functional.linear, a.to_mkldnn(), b.to_mkldnn()))
        seconds = min(best(call) for call in calls)
        yield 2 * n**3 / seconds
        if seconds > 0.1:
            return


def _copy_rate(device: str, best: Callable[[Call], float]) -> float:
    source = torch.ones(2**26, device=device)  # 256 MiB, beyond any cache
    target = torch.empty_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source))
