"""Reading machine code: instructions, their loops, and what a pass of a loop asks of each unit.

SASS comes from nvdisasm, which Triton brings along; AMD code is the assembler text that Triton keeps. Both have labels,
and both say which source line an instruction is from.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str = ""
    predicated: bool = False
    lines: tuple[int, ...] = ()  # source line, then the line of each call that it was inlined from


@dataclass
class Listing:
    instructions: list[Instruction]
    labels: dict[str, int]  # → place of the next instruction


@dataclass(frozen=True)
class Usage:
    """What cuobjdump reports of a kernel."""

    registers: int
    stack: int  # bytes a thread
    shared: int  # bytes a block, without what is asked for at the launch; from sm_90 on, with the system's kilobyte


# ------------------------------------------------------------------------------------------------ parsing

_LABEL = re.compile(r"(\.?[\w$]+):")
_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_SASS_LINE = re.compile(r'\s*//## File "(.*?)", line (\d+)')
_GCN = re.compile(r"\s+([svdbgf]\w*_\w+)\s*([^;]*)")
_GCN_LINE = re.compile(r"\s+\.loc\s.*; (.*)")


def sass(cubin: bytes, load_lines: dict[tuple[int, int | None, int], int]) -> tuple[Listing, Usage]:
    """The code of a cubin that holds one kernel, and what it needs; load_lines: from ir.load_lines."""
    listing = parse_sass(_tool("nvdisasm", "-gi", "-c", cubin=cubin))
    for place, instruction in enumerate(listing.instructions):
        if instruction.opcode.startswith("LDG") and (lines := instruction.lines):
            shown = (lines[0], lines[1] if len(lines) > 1 else None, width(instruction.opcode))
            lines = (load_lines.get(shown, lines[0]), *lines[1:])
            listing.instructions[place] = replace(instruction, lines=lines)
    (needs,) = usage(cubin).values()
    return listing, needs


def sass_by_kernel(cubin: bytes, file: str) -> dict[str, Listing]:
    """Mangled name → code, for a cubin of many kernels; lines are those of that source file alone."""
    text = _tool("nvdisasm", "-gi", "-c", cubin=cubin)
    sections = re.split(r"^//-+ \.text\.(\S+) -+$", text, flags=re.MULTILINE)[1:]
    return {name: parse_sass(code, file) for name, code in zip(sections[::2], sections[1::2])}


def usage(cubin: bytes) -> dict[str, Usage]:
    """Mangled name → what a kernel needs, for each of a cubin."""
    report = _tool("cuobjdump", "-res-usage", cubin=cubin)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    return {name: Usage(*map(int, numbers)) for name, *numbers in found}


def _tool(name: str, *options: str, cubin: bytes) -> str:
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def parse_sass(text: str, file: str | None = None) -> Listing:
    """The listing that nvdisasm prints, with or without line numbers; file: the only one whose lines count."""
    listing, lines, fresh = Listing([], {}), (), True
    for line in text.splitlines():
        if found := _SASS_LINE.match(line):  # one such line for each call on the way, innermost first
            lines, fresh = ((), True) if not fresh else (lines, True)
            lines += (int(found[2]),) if file in (None, os.path.basename(found[1])) else ()
        elif found := _SASS.match(line):
            fresh = False
            predicate, opcode, operands = found.groups(default="")
            if opcode != "NOP" and "@!PT" not in predicate:  # never executed
                listing.instructions.append(Instruction(opcode, operands, bool(predicate), lines))
        elif found := _LABEL.match(line):
            listing.labels[found[1]] = len(listing.instructions)
    return listing


def parse_gcn(text: str) -> Listing:
    """AMD assembler text, as LLVM prints it."""
    listing, lines = Listing([], {}), ()
    for line in text.splitlines():
        if found := _GCN_LINE.match(line):  # file.py:18:12 @[ file.py:24:9 ]
            lines = tuple(int(number) for number in re.findall(r":(\d+):\d+", found[1]))
        elif found := _LABEL.match(line):
            listing.labels[found[1]] = len(listing.instructions)
        elif found := _GCN.match(line):
            opcode, operands = found.groups()
            listing.instructions.append(Instruction(opcode, operands.strip(), opcode.startswith("s_cbranch"), lines))
        elif ".end_amdhsa_kernel" in line or line.startswith("\t.section\t.debug"):
            break
    return listing


# ------------------------------------------------------------------------------------------------ loops


def _successors(listing: Listing) -> list[list[int]]:
    """Where control may go from each instruction."""
    barriers: dict[str, str] = {}  # BSYNC goes where its barrier's BSSY said
    result = []
    for place, instruction in enumerate(listing.instructions):
        base, operands = instruction.opcode.split(".")[0], instruction.operands
        following = [place + 1] if place + 1 < len(listing.instructions) else []
        name = operands.split(",")[0].strip()
        if base == "BSSY":
            barriers[name] = operands
        if base in ("BRA", "BRX", "JMP", "BSYNC", "CALL") or "branch" in base:  # ptxas leaves loops by CALL, too
            labels = re.findall(r"[.$][\w.$]+|(?<=\()[\w$]+", barriers.get(name, "") if base == "BSYNC" else operands)
            targets = [listing.labels[label] for label in labels if label in listing.labels]
            targets = [target for target in targets if target < len(listing.instructions)]
            plain = instruction.opcode == "BRA" and re.fullmatch(r"`\(\S+\)", operands)
            certain = base == "s_branch" or base in ("BRX", "JMP") or (plain and not instruction.predicated)
            result.append(targets if certain else following + targets)
        elif base in ("EXIT", "RET", "s_endpgm", "s_setpc_b64") and not instruction.predicated:
            result.append([])
        else:
            result.append(following)
    return result


def loops(listing: Listing) -> list[frozenset[int]]:
    """The natural loops, as places of instructions.

    By dominators: compilers put wait loops and cold blocks elsewhere, so that a jump backwards is not yet a loop.
    """
    follows = _successors(listing)
    heads = {0} | {target for place, targets in enumerate(follows) for target in targets if target != place + 1}
    heads |= {place + 1 for place, targets in enumerate(follows[:-1]) if targets != [place + 1]}
    starts = sorted(heads) if follows else []
    ends = [*starts[1:], len(follows)]
    block_at = {start: block for block, start in enumerate(starts)}
    successors = [[block_at[target] for target in follows[end - 1]] for end in ends[: len(starts)]]
    predecessors: list[list[int]] = [[] for _ in starts]
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(block)

    everything = (1 << len(starts)) - 1  # sets of blocks as bits; blocks that nothing leads to are roots
    dominators = [everything if before and block else 1 << block for block, before in enumerate(predecessors)]
    changed = True
    while changed:
        changed = False
        for block, before in enumerate(predecessors):
            if block and before:
                common = everything
                for other in before:
                    common &= dominators[other]
                common |= 1 << block
                changed |= common != dominators[block]
                dominators[block] = common

    members: dict[int, set[int]] = {}
    for block, targets in enumerate(successors):
        for head in targets:
            if dominators[block] >> head & 1:  # an edge back to a block that always came before
                loop, todo = members.setdefault(head, {head}), [block]
                while todo:
                    if (other := todo.pop()) not in loop:
                        loop.add(other)
                        todo += predecessors[other]
    return [frozenset(place for b in loop for place in range(starts[b], ends[b])) for loop in members.values()]


# ------------------------------------------------------------------------------------------------ counting

_FMA = re.compile(r"FFMA|FFMA2|HFMA2|v_(pk_)?(fma|fmac|mac|mad)_(f|mix)")
_ARITHMETIC = re.compile(r"F(MUL|ADD)2?$|H(MUL|ADD)2|FSWZADD|v_(pk_)?(mul|add|sub)_f")
_CONVERT = ("I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "I2FP", "F2IP")
_MEMORY = re.compile(r"(LDGSTS|LDG(?!DEP)|STG|RED|ATOMG|LDL|STL)|(global|buffer|flat|scratch)_(load|store|atomic)")
_GCN_MEMORY = {"load": "LDG", "store": "STG", "atomic": "RED"}


@dataclass
class Counts:
    """What some instructions ask of the units; everything is per warp but where tensor_by_block says otherwise."""

    slots: int = 0
    kinds: Counter = field(default_factory=Counter)  # mufu, convert, fma, arithmetic, imad, integer, uniform, wait, …
    tensor: Counter = field(default_factory=Counter)  # tensor-core instructions by opcode
    memory: Counter = field(default_factory=Counter)  # "LDG.128" → instructions; LDGSTS copies to shared memory
    copies: int = 0  # asynchronous copies to shared memory, bulk ones included
    flops: float = 0.0  # of tensor-core instructions …
    tensor_work: float = 0.0  # … scaled by their rate against half precision
    tensor_sync: float = 0.0  # … of which mma.sync
    tensor_full: float = 0.0  # … of which fp32 operands, unscaled
    tensor_by_block: bool = False  # one instruction serves the block
    vector_flops: float = 0.0  # of fp32 multiply-adds
    shared_bytes: float = 0.0
    tensor_shared_bytes: float = 0.0
    global_bytes: float = 0.0
    loaded_bytes: float = 0.0
    local_bytes: float = 0.0  # spilled registers and stack
    bulk: set[tuple[int, ...]] = field(default_factory=set)  # lines of bulk copies, whose size SASS does not tell
    loads: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # (bytes a lane, source lines) from global

    def __getitem__(self, kind: str) -> int:
        return self.kinds[kind]


def width(opcode: str) -> int:
    """Bytes a lane that a memory instruction moves."""
    if found := re.search(r"dwordx(\d)", opcode):
        return 4 * int(found[1])
    if found := re.search(r"_[bu](\d+)", opcode):
        return int(found[1]) // 8 * (2 if re.search(r"(read|write)2", opcode) else 1)
    if opcode.startswith(("LDSM", "STSM")):
        return 4 * int(opcode[-1]) if opcode[-1] in "124" else 4
    if found := re.search(r"\.(64|128|256)(?=\.|$)", opcode):
        return int(found[1]) // 8
    return 1 if re.search(r"\.[US]8|byte", opcode) else 2 if re.search(r"\.[US]16|short", opcode) else 4


def count(instructions: Iterable[Instruction], lanes: int, shapes: Iterable[tuple[int, int]] = ()) -> Counts:
    """Counts of the instructions; shapes: (M, N) of the kernel's tcgen05 instructions, which SASS does not tell."""
    shapes = list(shapes)
    counts = Counts()
    for instruction in instructions:
        counts.slots += 1
        opcode, operands = instruction.opcode, instruction.operands
        base = opcode.split(".")[0]
        if _count_tensor(counts, opcode, operands, shapes):
            continue
        if base.startswith(("UTMALDG", "UBLKCP")):
            counts.copies += 1
            counts.memory[base] += 1
            counts.bulk.add(instruction.lines)
        elif base in ("SHFL", "LDS", "STS", "LDSM", "STSM") or base.startswith("ds_"):
            counts.kinds["shared memory"] += 1
            broadcast = base == "LDS" and not re.search(r"(?<![UZ])R\d", operands.split("[")[-1])
            counts.shared_bytes += lanes * (4 if base == "SHFL" or broadcast else width(opcode))
        elif found := _MEMORY.match(opcode):
            _count_memory(counts, instruction, found, lanes)
        elif base == "MUFU" or re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", opcode):
            counts.kinds["mufu"] += 1
        elif base in _CONVERT:
            counts.kinds["convert"] += 1
        elif base == "HFMA2" and operands.replace("-", "").split(", ")[1:3] == ["RZ", "RZ"]:  # a constant's move
            counts.kinds["arithmetic"] += 1
        elif _FMA.match(base):
            counts.kinds["fma"] += 1
            counts.vector_flops += lanes * (4 if base == "FFMA2" or "_pk_" in base else 2)
        elif _ARITHMETIC.match(base):
            counts.kinds["arithmetic"] += 1
        elif base == "IMAD":
            counts.kinds["imad"] += 1
        elif base in ("BAR", "s_barrier"):
            counts.kinds["barrier"] += 1
        elif base in ("DEPBAR", "LDGDEPBAR", "WARPGROUP", "SYNCS", "s_waitcnt", "s_nop"):
            counts.kinds["wait"] += 1
        else:
            counts.kinds["uniform" if base.startswith(("U", "s_", "R2UR")) else "integer"] += 1
    return counts


def _count_tensor(counts: Counts, opcode: str, operands: str, shapes: list[tuple[int, int]]) -> bool:
    """Adds a tensor-core instruction; False if it is none."""
    flops = shared = 0.0
    if found := re.match(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)", opcode):  # four warps share one
        M, N, K = map(int, found.groups())
        flops, from_shared = 2 * M * N * K / 4, "gdesc" in operands.split(",")[1]
        shared = (32 * N + 32 * M * from_shared) / 4
    elif found := re.match(r"[HIQOD]MMA\.(168|88)(\d+)", opcode):
        flops = 2 * (16 if found[1] == "168" else 8) * 8 * int(found[2])
    elif re.match(r"UTC\w*MMA", opcode):
        M, N = (sum(sizes) / len(shapes) for sizes in zip(*shapes)) if shapes else (0, 0)
        flops, shared = 2 * M * N * 16, 32 * (N + M * operands.startswith("gdesc"))
        counts.tensor_by_block = True
    elif found := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", opcode):
        blocks = re.search(r"_(\d+)b_", opcode)  # independent products; gfx90a does not name the 16 of its smallest
        flops = 2 * math.prod(map(int, found.groups())) * (int(blocks[1]) if blocks else 16 if "4x4x4" in opcode else 1)
    else:
        return False
    eight_bit = opcode[:2] in ("IM", "IG", "QM", "QG") or re.search(r"mfma\w+(fp8|bf8|i8)", opcode)
    work = flops / (0.5 if "TF32" in opcode or "xf32" in opcode else 2 if eight_bit else 1)
    counts.tensor[re.sub(r"\.(F32|gsb0|T[AB]|tnsp\w*)(?=\.|$)", "", opcode)] += 1
    counts.flops += flops
    counts.tensor_work += work
    counts.tensor_shared_bytes += shared
    counts.tensor_sync += work if re.match(r"[HIQO]MMA", opcode) else 0
    counts.tensor_full += flops if re.search(r"x\d+_?f32", opcode) else 0
    return True


def _count_memory(counts: Counts, instruction: Instruction, found: re.Match, lanes: int) -> None:
    opcode, size = instruction.opcode, width(instruction.opcode)
    kind = found[1] or ("LDL" if found[2] == "scratch" else _GCN_MEMORY[found[3]])
    if found[2] == "scratch" and found[3] == "store":
        kind = "STL"
    if kind == "LDG" and re.search(r"_lds\b|\blds\b", f"{opcode} {instruction.operands}"):
        kind = "LDGSTS"
    counts.memory[f"{kind}.{8 * size}"] += 1
    counts.kinds["memory"] += 1
    counts.shared_bytes += lanes * max(size, 4)  # the same pipe
    if kind in ("LDL", "STL"):
        counts.local_bytes += lanes * size
        return
    counts.global_bytes += lanes * size
    if kind in ("LDG", "LDGSTS"):
        counts.loaded_bytes += lanes * size
        counts.copies += kind == "LDGSTS"
        counts.loads.append((size, instruction.lines))
