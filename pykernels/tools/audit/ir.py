"""Reading what Triton writes on its way to machine code: the source's dots, the tiles it loads, tcgen05's shapes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

HALF = ("f16", "bf16")
_BYTES = {"i1": 1, "i8": 1, "f8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}
_LOAD = re.compile(
    r"(?:tt\.load|async_copy_global_to_local) .*?: (?:tensor<((?:\d+x)+))?!tt\.ptr<(\w+).* loc\((.*)\)$"
    r"|tt\.descriptor_load .*-> tensor<((?:\d+x)+)(\w+).* loc\((.*)\)$"
)


@dataclass(frozen=True)
class Dot:
    dtype: str  # of the operands
    precision: str  # "ieee", "tf32", …; "" for half precision
    flops: int  # of the block
    loop: int | None  # place of the innermost loop around it


@dataclass(frozen=True)
class Tile:
    """What one tl.load reads."""

    shape: tuple[int, ...]  # () for a scalar
    itemsize: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def lane_bytes(self, threads: int) -> float:
        """The widest load a lane that the tile allows: its share of the bytes, or its longest side if that is less."""
        if not self.shape:
            return self.itemsize
        return min(self.bytes / threads, max(self.shape) * self.itemsize)


def dots(ttir: str) -> list[Dot]:
    """Every tl.dot of the source."""
    found: list[Dot] = []
    loops: list[tuple[str, int]] = []  # (closing line's beginning, place) of those around the present line
    for place, line in enumerate(ttir.splitlines()):
        if loops and line.startswith(loops[-1][0]):
            loops.pop()
        if "scf.for" in line or "scf.while" in line:
            loops.append((" " * (len(line) - len(line.lstrip())) + "} loc", place))
        if operands := re.search(r"tt\.dot .*: tensor<([\dx]+)x(\w+)> \* tensor<([\dx]+)x\w+>", line):
            left, dtype, right = operands.groups()
            precision = re.search(r"inputPrecision = (\w+)", line)
            named = "" if dtype in HALF else precision[1] if precision else "ieee"
            flops = 2 * math.prod(map(int, left.split("x"))) * int(right.split("x")[-1])
            found.append(Dot(dtype, named, flops, loops[-1][1] if loops else None))
    return found


def missed_dots(ttgir: str) -> int:
    """Dots that were lowered to multiply-adds: their result lies in an ordinary layout, not in a matrix unit's."""
    ordinary = set(re.findall(r"^(#\w+) = #ttg\.blocked", ttgir, re.MULTILINE))
    results = re.findall(r"tt\.dot .*-> tensor<[^,>]*, (#\w+)", ttgir)
    return sum(result in ordinary for result in results)


def tiles(*texts: str) -> dict[tuple[int, ...], Tile]:
    """Loads by where they stand: their source line, then the line of each call on the way.

    From the TTIR, and from the TTGIR too, where a load that was moved stands at its use.
    """
    result: dict[tuple[int, ...], Tile] = {}
    for text in texts:
        aliases = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
        for line in text.splitlines():
            if found := _LOAD.search(line):
                sizes, dtype, place = found.groups()[3:] if found[4] else found.groups()[:3]
                shape = tuple(int(size) for size in (sizes or "").split("x") if size)
                at, tile = _lines(place, aliases), Tile(shape, _BYTES.get(dtype, 1))
                if at not in result or tile.bytes > result[at].bytes:
                    result[at] = tile
    return result


def _lines(place: str, aliases: dict[str, str]) -> tuple[int, ...]:
    """Source lines of a place such as callsite(#loc1 at #loc2), "name"(#loc3) or "file.py":18:12."""
    if place in aliases:
        return _lines(aliases[place], aliases)
    if found := re.fullmatch(r"callsite\((#loc\d*) at (#loc\d*)\)", place):
        return _lines(found[1], aliases) + _lines(found[2], aliases)
    if found := re.fullmatch(r'".*"\((#loc\d*)\)', place):
        return _lines(found[1], aliases)
    found = re.fullmatch(r'".*":(\d+):\d+', place)
    return (int(found[1]),) if found else ()


def tile_at(tiles: dict[tuple[int, ...], Tile], lines: tuple[int, ...]) -> Tile | None:
    """The tile loaded there; the largest of that source line where a compiler lost the calls."""
    same = [tile for at, tile in tiles.items() if lines and at[:1] == lines[:1]]
    return tiles.get(lines) or max(same, key=lambda tile: tile.bytes, default=None)


def load_lines(ptx: str) -> dict[tuple[int, int | None, int], int]:
    """(line that SASS shows for a load, its caller's line, bytes) → the load's true line.

    Loads are inline assembly, and LLVM takes each line of it for one more line of the source.
    """
    result: dict[tuple[int, int | None, int], int] = {}
    first = shown = caller = None
    for line in ptx.splitlines():
        if "// begin inline asm" in line:
            first = None
        elif found := re.match(r"\s*\.loc\s+\d+ (\d+) \d+(?:.*inlined_at \d+ (\d+))?", line):
            shown, caller = int(found[1]), int(found[2]) if found[2] else None
            first = first or shown
        elif (found := re.search(r"ld\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\b", line)) and first:
            result[shown, caller, int(found[1] or 1) * int(found[2]) // 8] = first
    return result


def tcgen05_shapes(ptx: str) -> list[tuple[int, int]]:
    """(M, N) from the instruction descriptors, which are constants (PTX ISA, tcgen05 instruction descriptor)."""
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (0x[0-9a-f]+|\d+);", ptx))
    descriptors = re.findall(r"tcgen05\.mma\.\S+ \[[^]]+\], [^,]+, [^,]+, (%?\w+),", ptx)
    values = [int(constants.get(descriptor, "0"), 0) for descriptor in descriptors]
    return [((value >> 24 & 31) * 16, (value >> 17 & 63) * 8) for value in values if value]
