"""How fast a loop could run at best on a named GPU, from its instructions alone.

Per multiprocessor and pass of the loop, all warps of one block: the clocks that each unit is busy. Then
  overlapped = clocks of the useful work at its peak rate / clocks of the busiest unit,
  serial     = the same over the sum of all units, as if none worked beside another; the truth lies between the two.
Useful work is that of the tensor cores where the loop has them, of the multiply-adds of an exact fp32 dot, else (and
where the workload is bound by memory anyway) DRAM traffic without any reuse in a cache.
Where blocks share what they read, L2 stands for global memory; copies run beside everything else, so it is not in the
sum. A launch that needs more shared memory than is known has fewer warps resident than is said here.
Left out: latency, barriers, bank conflicts, hits and misses of caches, partial waves, warp specialisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from .disassembly import Counts

KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """Public figures; rates are per clock and multiprocessor (SM, CU) at the boost clock."""

    name: str
    units: int  # multiprocessors
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


@dataclass(frozen=True)
class Estimate:
    overlapped: float
    serial: float
    limit: str  # the busiest unit
    clocks: dict[str, float]


def ideal_tensor_clocks(loop: Counts, gpu: Gpu) -> float:
    """Clocks of the loop's matrix instructions, by one issuer, at the best rate there is for their operands."""
    return (loop.tensor_work - loop.tensor_full + loop.tensor_full / gpu.full) / gpu.tensor


def estimate(loop: Counts, warps: int, gpu: Gpu, work: str) -> Estimate:
    """The speed of light of one pass of a loop by a block of that many warps; work: "tensor", "FMA" or "DRAM"."""
    issuers = 1 if loop.tensor_by_block else warps  # tcgen05: one thread starts an instruction for the whole block
    slowed = loop.tensor_sync * (1 / gpu.sync - 1) / gpu.tensor
    special = loop["mufu"] + loop["convert"]
    clocks = {
        "tensor": issuers * (ideal_tensor_clocks(loop, gpu) + slowed),
        "shared memory": (warps * loop.shared_bytes + issuers * loop.tensor_shared_bytes) / gpu.shared_rate,
    }
    if work == "DRAM":
        clocks["DRAM"] = warps * loop.global_bytes / gpu.dram
    if gpu.amd:  # one vector pipe: a wave takes a clock of a compute unit, transcendentals four
        vector = loop["fma"] + loop["arithmetic"] + loop["integer"]
        clocks |= {"MUFU": warps * special * 4, "FMA": warps * (vector + 4 * special)}
        issued = loop.slots - loop["uniform"] - loop["wait"]
    else:
        clocks |= {"MUFU": warps * special * 2, "integer": warps * loop["integer"] / 2}
        clocks["FMA"] = warps * ((loop["fma"] + loop["arithmetic"]) * 32 / gpu.fma + loop["imad"] / 2)
        issued = loop.slots
    useful = {
        "tensor": issuers * ideal_tensor_clocks(loop, gpu),
        "FMA": warps * loop["fma"] * (1 if gpu.amd else 32 / gpu.fma),
        "DRAM": clocks.get("DRAM", 0.0),
    }[work]
    busy = sum(clocks.values()) or 1
    clocks["issue"] = warps * issued / 4  # every unit's instructions pass here: no unit of its own in the sum
    if work != "DRAM":
        clocks["L2"] = warps * loop.global_bytes / gpu.l2
    limit = max(clocks, key=clocks.get)
    return Estimate(useful / (clocks[limit] or 1), useful / busy, limit, clocks)


def resident_warps(registers: int, shared: int, warps: int, gpu: Gpu) -> int:
    """Warps that one multiprocessor holds at once; 0 if not even one block fits."""
    registers = max(-(-registers // 8) * 8, 8)
    if gpu.amd:
        return min(4 * min(8, 512 // registers) // warps, gpu.shared_unit // max(shared, 1), gpu.warps // warps) * warps
    by_registers = 65536 // (registers * 32 * warps)
    by_shared = gpu.shared_unit // (shared + KIB)  # the system keeps a kilobyte a block
    return min(gpu.blocks, gpu.warps // warps, by_registers, by_shared) * warps
