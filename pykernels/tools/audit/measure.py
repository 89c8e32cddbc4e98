"""One Triton kernel under the lens: compile it, find its hot loop, and say what is wrong with it.

cuda.py finds CUDA kernels' facts elsewhere, and has them measured and judged here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from . import ir
from .disassembly import Counts, Instruction, Listing, count, loops, parse_gcn, sass
from .model import GPUS, KIB, Gpu, estimate, ideal_tensor_clocks, resident_warps
from .recorder import Launch

WIDE = 8  # bytes a lane that a load in a loop should have
TENSOR_MEMORY = 512  # columns of a multiprocessor on sm_100
NARROW = 0.25  # share of a loop's bytes that narrow loads may bring, where the source's tiles are not known
CHECKS = ("compile", "spill", "shared memory", "tensor cores", "narrow load", "async copy")
_OWN_SOURCE = [file.read_text() for file in sorted(pathlib.Path(__file__).parent.glob("*.py"))]


@dataclass
class Row:
    """One kernel, target and configuration. Counts are of one pass of the hot loop, or of the kernel if it has none."""

    op: str
    kernel: str
    target: str
    gpu: str
    dtype: str
    settings: dict[str, Any]
    inputs: list[str]
    backward: bool = False  # only the gradient launches it
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spilled: int = 0  # bytes a thread, stored
    stack: int = 0  # bytes a thread
    shared: int = 0  # bytes a block
    shared_known: bool = True  # False: a launch asks for more, and nobody declares how much
    shared_limit: int = 0
    occupancy: float = 0.0  # resident warps over the most there can be
    dots: list[str] = field(default_factory=list)  # operand dtype and precision of the source's dots
    loops: int = 0
    in_loop: bool = False
    slots: int = 0
    mufu: int = 0
    barriers: int = 0
    tensor: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    copies: int = 0  # asynchronous
    flops: float = 0.0  # of a block: tensor cores', or multiply-adds'
    repeated: float | None = None  # … over what the source's dots ask for: above 1 if warps do the same work
    bytes: float = 0.0  # of a block: global loads and stores
    local_bytes: float = 0.0  # of a block: spills and stack
    in_flight: float = 0.0  # bytes that a multiprocessor has requested if every warp runs one pass ahead
    slots_per_kflop: float | None = None  # warp instructions
    slots_per_kilobyte: float | None = None
    clocks: dict[str, float] = field(default_factory=dict)
    limit: str = ""
    share: float = 0.0  # of the peak that goes into work not repeated, if all units overlap
    serial: float = 0.0  # if none do
    failures: list[tuple[str, str]] = field(default_factory=list)  # (check, what is wrong)
    excused: list[tuple[str, str, str]] = field(default_factory=list)  # … and the kernel's reason why it may be

    @property
    def cuda(self) -> bool:
        """Whether this is a CUDA kernel: all of them that were compiled have a file for an input."""
        return self.inputs[0].endswith(".cu")

    @property
    def configuration(self) -> str:
        """Settings in a few words."""
        if not self.warps:
            return "(not compiled)"
        values = {**self.settings, "warps": self.warps, "stages": self.stages or False}  # CUDA has no stages
        shown = {str(name): value for name, value in values.items() if value is not False}
        return " ".join(name if value is True else f"{name}={value}" for name, value in shown.items())


def inspect(launch: Launch) -> Row:
    """Compiles a launch and audits the code; what fails to compile is a row with that failure."""
    from triton.runtime.cache import get_cache_manager

    gpu, row = GPUS[launch.target], blank(launch)
    try:
        compiled = launch.compile()
        key = f"{compiled.hash} {launch.intensity} {_OWN_SOURCE}"  # disassembling takes longer than Triton's cache hit
        cache, name = get_cache_manager(hashlib.sha256(key.encode()).hexdigest()), "audit.json"
        if stored := cache.get_file(name):
            measured = json.loads(pathlib.Path(stored).read_text())
        else:
            listing, facts = _facts(compiled, gpu)
            measured = measure(listing, facts, gpu, launch.intensity)
            cache.put(json.dumps(measured), name, binary=False)
    except Exception:
        row.failures.append(("compile", traceback.format_exc(limit=0).strip()))
        return row
    if launch.intensity is None:  # no workload but a test's sample, whose odd sizes leave no choice
        measured["failures"] = [failure for failure in measured["failures"] if failure[0] != "narrow load"]
    row = dataclasses.replace(row, **measured)
    for exception in getattr(sys.modules[launch.module], "AUDIT_EXCEPTIONS", []):
        excuse(row, **exception)
    return row


def blank(launch: Launch) -> Row:
    """The row of a launch of which nothing is known yet."""
    gpu, stages = GPUS[launch.target], launch.options.get("num_stages", 0)
    row = Row(launch.op, launch.kernel, launch.target, gpu.name, launch.dtype, launch.settings, launch.inputs)
    return dataclasses.replace(row, backward=launch.backward, stages=stages, shared_limit=gpu.shared)


# ------------------------------------------------------------------------------------------------ facts


@dataclass
class Facts:
    """What the compiler reports beside the code."""

    dots: list[ir.Dot]
    missed_dots: int
    tiles: dict[tuple[int, ...], ir.Tile] | None  # None: the source does not name any
    warps: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    shapes: list[tuple[int, int]]  # (M, N) of tcgen05 instructions


def _facts(compiled, gpu: Gpu) -> tuple[Listing, Facts]:
    meta, asm = compiled.metadata, compiled.asm
    if gpu.amd:
        text, warps, shapes = asm["amdgcn"], meta.num_warps, []
        listing = parse_gcn(text)
        registers, stack = (_field(text, name) for name in ("vgpr_count", "private_segment_fixed_size"))
    else:
        ptx = asm["ptx"]
        listing, needs = sass(asm["cubin"], ir.load_lines(ptx))
        registers, stack = needs.registers, needs.stack
        threads = re.search(r"\.reqntid (\d+)", ptx)  # more than num_warps where warps specialise
        warps = int(threads[1]) // 32 if threads else meta.num_warps
        shapes = ir.tcgen05_shapes(ptx)
    tensor_memory = getattr(meta, "tmem_size", None) or 0
    ttir, ttgir = asm["ttir"], asm["ttgir"]
    source = (ir.dots(ttir), ir.missed_dots(ttgir), ir.tiles(ttir, ttgir))
    return listing, Facts(*source, warps, registers, stack, meta.shared, tensor_memory, shapes)


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(found[1]) if found else 0


# ------------------------------------------------------------------------------------------------ measures and checks


def measure(listing: Listing, facts: Facts, gpu: Gpu, intensity: float | None) -> dict[str, Any]:
    """The fields of a row that follow from the code; intensity: see Launch."""
    code, warps, dots, tiles = listing.instructions, facts.warps, facts.dots, facts.tiles

    def counts_of(places: Iterable[int]) -> Counts:
        counts = count((code[place] for place in sorted(places)), gpu.lanes, facts.shapes)
        bulk = sum(tile.bytes for lines in counts.bulk if (tile := ir.tile_at(tiles or {}, lines))) / warps
        counts.global_bytes, counts.loaded_bytes = counts.global_bytes + bulk, counts.loaded_bytes + bulk
        return counts

    nests = list(loops(listing))
    found = [(places, counts_of(places)) for places in nests]
    inner = counts_of(frozenset().union(*(places for places, _ in found)))
    whole = counts_of(range(len(code)))
    by_fma = bool(dots) if tiles is not None else bool(whole.vector_flops)
    # A CUDA kernel's unrolled loop may hold the one of its remainder: there a loop is what is in no loop within it.
    bodies = found if tiles is not None else [(own, counts_of(own)) for own in (_own(p, nests) for p in nests)]
    innermost, (hot, in_loop) = _hottest(found, whole, by_fma)[0], _hottest(bodies, whole, by_fma)
    if tiles is None:  # the source does not tell what its work is: what takes longer
        by_fma = hot.vector_flops / (2 * gpu.fma) >= hot.global_bytes / gpu.dram

    peak = hot.flops / ideal_tensor_clocks(hot, gpu) if hot.flops else 2 * gpu.fma
    starved = intensity is not None and intensity < peak / gpu.dram / 4  # no tiling could make such work compute-bound
    work = "DRAM" if starved else "tensor" if hot.flops else "FMA" if by_fma else "DRAM"
    model = estimate(hot, warps, gpu, work)
    flops = hot.flops * (1 if hot.tensor_by_block else warps) if hot.flops else hot.vector_flops * warps
    asked = Counter()
    for dot in dots:
        asked[dot.loop] += dot.flops
    countable = in_loop and hot.flops and not hot.tensor_by_block  # tcgen05's shapes are known on average only
    most = max((total for loop, total in asked.items() if loop is not None), default=0)
    repeated = flops / most if countable and most else None
    useful = 1 / max(repeated or 1, 1) if work == "tensor" else 1
    resident = resident_warps(facts.registers, facts.shared, warps, gpu)
    return dict(
        warps=warps,
        registers=facts.registers,
        spilled=sum(int(kind[4:]) // 8 * n for kind, n in whole.memory.items() if kind.startswith("STL")),
        stack=facts.stack,
        shared=facts.shared,
        occupancy=resident / gpu.warps,
        dots=sorted({f"{dot.dtype} {dot.precision}".strip() for dot in dots}),
        loops=len(found),
        in_loop=in_loop,
        slots=hot.slots,
        mufu=hot["mufu"],
        barriers=hot["barrier"],
        tensor=dict(hot.tensor),
        memory=dict(hot.memory),
        copies=hot.copies,
        flops=flops,
        repeated=repeated,
        bytes=hot.global_bytes * warps,
        local_bytes=hot.local_bytes * warps,
        in_flight=hot.loaded_bytes * resident,
        slots_per_kflop=hot.slots * warps / flops * 1000 if flops else None,
        slots_per_kilobyte=hot.slots / hot.global_bytes * 1000 if hot.global_bytes else None,
        clocks={unit: round(clocks, 1) for unit, clocks in model.clocks.items()},
        limit=model.limit,
        share=round(model.overlapped * useful, 3),
        serial=round(model.serial * useful, 3),
        failures=[
            # Copies are asked for in innermost loops: one over steps, with loops in it, waits for other blocks anyway.
            *_failures(facts, gpu, whole, inner, innermost),
            *(_narrow_loads(facts, gpu, inner) if tiles is not None else _narrow_loops(code, found)),
        ],
    )


def _own(places: frozenset[int], nests: list[frozenset[int]]) -> frozenset[int]:
    """A loop without the loops inside it."""
    return places.difference(*(other for other in nests if other < places))


def _hottest(found: list[tuple[frozenset[int], Counts]], whole: Counts, by_fma: bool) -> tuple[Counts, bool]:
    """The innermost loop with the most useful work, of equal ones the tighter; the whole kernel if it has no loop."""

    def work(counts: Counts) -> float:
        return counts.flops if whole.flops else counts.vector_flops if by_fma else counts.global_bytes

    inner = [
        counts
        for places, counts in found
        if work(counts) and not any(other < places and work(nested) for other, nested in found)
    ]
    return (max(inner, key=lambda counts: (work(counts), -counts.slots)), True) if inner else (whole, False)


def _failures(facts: Facts, gpu: Gpu, whole: Counts, inner: Counts, hot: Counts) -> Iterable[tuple[str, str]]:
    """(check, what is wrong). `inner` counts the instructions that are in any loop."""
    if whole.local_bytes or facts.stack:
        moved = f"a block's pass of the loops moves {inner.local_bytes * facts.warps / KIB:.1f} KiB of it"
        yield (
            "spill",
            f"{facts.stack} bytes of stack a thread; {moved if inner.local_bytes else 'none of it in a loop'}",
        )
    if facts.shared > gpu.shared:
        yield "shared memory", f"{facts.shared} bytes of shared memory, {gpu.shared} is the limit"
    if facts.tensor_memory > TENSOR_MEMORY:
        yield "shared memory", f"{facts.tensor_memory} columns of tensor memory, {TENSOR_MEMORY} is the limit"

    half = sum(dot.dtype in ir.HALF for dot in facts.dots)
    if half and not whole.flops:
        yield "tensor cores", f"all of {half} half-precision dots became multiply-adds"
    elif half == len(facts.dots) and facts.missed_dots:  # exact fp32 dots are missed by right
        yield "tensor cores", f"{facts.missed_dots} half-precision dots became multiply-adds"

    waiting = sum(_is_tile(facts, gpu, lines) for _, lines in hot.loads)
    if not gpu.amd and hot is not whole and hot.flops and waiting and not inner.copies:
        yield "async copy", f"{waiting} loads of the loop go through registers, and their latency is exposed"


# One load of 16 bytes a lane does what 2-byte loads need eight for; below 8 bytes it shows.


def _is_tile(facts: Facts, gpu: Gpu, lines: tuple[int, ...]) -> bool:
    """False for loads of a tile too small to give each lane WIDE bytes (a row of lse, the number of a page)."""
    tile = ir.tile_at(facts.tiles or {}, lines)
    return tile is None or tile.lane_bytes(facts.warps * gpu.lanes) >= WIDE


def _narrow_loads(facts: Facts, gpu: Gpu, inner: Counts) -> Iterable[tuple[str, str]]:
    """Narrow loads in loops, of tiles that allow wide ones."""
    narrow: dict[tuple[int, ...], int] = {}
    for size, lines in inner.loads:
        if size < WIDE and _is_tile(facts, gpu, lines):
            narrow[lines] = min(size, narrow.get(lines, WIDE))
    for lines, size in sorted(narrow.items()):
        tile = ir.tile_at(facts.tiles, lines)
        shape = f"a tile of {'×'.join(map(str, tile.shape))}" if tile else "a tile"
        yield "narrow load", f"{shape} is loaded {size} bytes a lane in a loop ({_place(lines)})"


def _narrow_loops(code: list[Instruction], found: list[tuple[frozenset[int], Counts]]) -> Iterable[tuple[str, str]]:
    """Where tiles are not known: loops of which narrow loads bring a good part, but for a wide loop's remainder."""
    wide = {lines[:1] for _, counts in found for size, lines in counts.loads if size >= WIDE}
    narrow: dict[tuple[int, ...], int] = {}
    for places, _ in found:
        own = _own(places, [other for other, _ in found])
        loads = count((code[place] for place in sorted(own)), 32).loads
        small = [(size, lines[:1]) for size, lines in loads if size < WIDE]
        if sum(size for size, _ in small) > NARROW * sum(size for size, _ in loads):
            for size, line in small:
                if line not in wide:
                    narrow[line] = min(size, narrow.get(line, WIDE))
    for line, size in sorted(narrow.items()):
        yield "narrow load", f"a loop lives on loads of {size} bytes a lane ({_place(line)})"


def _place(lines: tuple[int, ...]) -> str:
    return ", from ".join(f"line {line}" for line in lines) or "of unknown place"


# ------------------------------------------------------------------------------------------------ exceptions


def excuse(row: Row, kernel: str, check: str, reason: str, where: dict[str, Any] | None = None) -> bool:
    """Moves the failures that an exception declares to be right; whether there are any.

    `AUDIT_EXCEPTIONS` in a Triton kernel's file is a list of such arguments; `where` gives values, or tuples of them,
    to the kernel's constexpr arguments, "target" and "dtype". A CUDA kernel's are comments: see cuda.py.
    """
    if check not in CHECKS:
        raise ValueError(f"audit exceptions: check: expected one of {', '.join(CHECKS)}, got {check!r}")
    if kernel != row.kernel or not holds(row, where or {}):
        return False
    matching = [failure for failure in row.failures if failure[0] == check]
    row.excused += [(*failure, reason) for failure in matching]
    row.failures = [failure for failure in row.failures if failure not in matching]
    return bool(matching)


def holds(row: Row, where: dict[str, Any]) -> bool:
    """Whether a row has the values named."""
    values = {**row.settings, "target": row.target, "dtype": row.dtype}
    return all(values.get(name) in (v if isinstance(v, tuple) else (v,)) for name, v in where.items())
