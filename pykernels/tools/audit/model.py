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

from ...kernels.target import GPUS, KIB, Gpu
from .disassembly import Counts

__all__ = ["GPUS", "KIB", "Estimate", "Gpu", "estimate", "ideal_tensor_clocks", "resident_warps"]


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
