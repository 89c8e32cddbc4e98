"""The GPUs that the kernels are launched and audited for, and what a launch asks of the one at hand."""
import os
from dataclasses import dataclass

KIB = 1024
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # any block size is right then: small ones meet more edges


@dataclass(frozen=True)
class Gpu:
    """Public figures; rates are per clock and multiprocessor (SM, CU) at the boost clock."""

    name: str
    units: int  # multiprocessors: launches cut their work for so many
    tensor: int  # dense FLOPs, half precision with fp32 accumulation
    fma: int  # fp32 lanes
    dram: float  # bytes
    shared: int  # bytes that one block may have
    shared_unit: int  # bytes that a multiprocessor has for its blocks
    warps: int  # resident at most
    blocks: int = 32
    lanes: int = 32
    sync: float = 1.0  # share of the tensor rate that mma.sync reaches, where a newer instruction exists
    full: float = 0.125  # rate of fp32 matrix instructions against half precision
    shared_rate: int = 128  # bytes
    l2: int = 64  # bytes from the second-level cache

    @property
    def amd(self) -> bool:
        return self.lanes == 64


# sync on sm_90: published microbenchmarks; on sm_100: a guess. l2 is the width of a multiprocessor's port: that all of
# them together get it from L2 is too good to be true (A100: 5120 bytes a clock for 108), so "L2" is named late.
GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 108, 2048, 64, 13.4, 163 * KIB, 164 * KIB, 64),
    "sm_86": Gpu("A10", 72, 1024, 128, 4.9, 99 * KIB, 100 * KIB, 48, blocks=16),
    "sm_89": Gpu("L40S", 142, 1024, 128, 2.4, 99 * KIB, 100 * KIB, 48, blocks=24),
    "sm_90": Gpu("H100 SXM", 132, 4096, 128, 13.9, 227 * KIB, 228 * KIB, 64, sync=0.62),
    "sm_100": Gpu("B200", 148, 8192, 128, 29.2, 227 * KIB, 228 * KIB, 64, sync=0.30),
    "sm_120": Gpu("RTX PRO 6000 Blackwell", 188, 1024, 128, 3.6, 99 * KIB, 100 * KIB, 48, blocks=24),
    "gfx90a": Gpu("MI250X, one die", 110, 1024, 64, 8.8, 64 * KIB, 64 * KIB, 32, lanes=64, full=0.25),
    "gfx942": Gpu("MI300X", 304, 2048, 64, 8.3, 64 * KIB, 64 * KIB, 32, lanes=64),
    "gfx950": Gpu("MI355X", 256, 4096, 64, 13.0, 160 * KIB, 160 * KIB, 32, lanes=64, full=0.0625, shared_rate=256),
}
INTERPRETED_UNITS = 4  # few enough that small inputs are split, too


def _current():
    from triton.runtime import driver  # here: the table is read where there is no Triton, too

    return driver.active.get_current_target()


def target():
    """sm_90, gfx942, …, or interpreter."""
    if INTERPRETED:
        return "interpreter"
    found = _current()
    return f"sm_{found.arch}" if found.backend == "cuda" else found.arch.split(":")[0]


def is_amd():
    return not INTERPRETED and _current().backend == "hip"


def lanes():
    """Of a warp."""
    return 64 if is_amd() else 32


def units():
    """Multiprocessors of the usual part of the target at hand."""
    gpu = GPUS.get(target())
    return gpu.units if gpu else INTERPRETED_UNITS


def padded(width):
    """The block that holds a row of so many numbers, which matrix units take: a power of two, 16 at least."""
    return max(16, 1 << max(width - 1, 0).bit_length())
