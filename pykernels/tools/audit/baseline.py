"""The committed baseline: how the hot loops were built when somebody last looked, so that a change shows in review.

A line is a kernel's configuration; where several launches share it (they differ in an argument's divisibility), the
worst of each figure. Compilers other than the baseline's are not compared with it.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from ...core.declaration import OPS
from . import cuda
from .measure import Row

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bfloat16", "float32", "")  # "": a CUDA kernel of no such type
GROWTH = 1.05  # more instructions per FLOP or byte than that times the baseline's is a failure
COLUMNS = ("op or file", "kernel", "target", "dtype", "configuration")
FIGURES = {  # column → a row's figure; every one the more the worse
    "registers": lambda row: row.registers,
    "spilled": lambda row: row.spilled,
    "stack": lambda row: row.stack,
    "local_bytes": lambda row: row.local_bytes,
    "empty_warps_%": lambda row: 100 * (1 - row.occupancy),
    "slots/kFLOP": lambda row: row.slots_per_kflop or 0,
    "slots/kB": lambda row: row.slots_per_kilobyte or 0,
}
NO_GROWTH = ("spilled", "stack", "local_bytes", "empty_warps_%")
Key = tuple[str, ...]
Lines = dict[Key, list[float]]


def compilers() -> dict[str, str]:
    """What makes the code, by version."""
    import triton

    return {"triton": triton.__version__} | ({} if cuda.unavailable() else {"nvcc": cuda.nvcc_version()})


def is_representative(op: str, label: str) -> bool:
    """Whether the kernels that a workload runs are lines."""
    return any(workload.representative for workload in OPS[op].workloads if workload.label == label)


def of_rows(rows: Iterable[Row]) -> Lines:
    """The lines that rows make, of representative workloads and CUDA's kernels, in DTYPES, on TARGETS, with loops."""
    lines: Lines = {}
    for row in rows:
        counts = row.cuda or any(is_representative(row.op, label) for label in row.inputs)
        if counts and row.in_loop and row.target in TARGETS and row.dtype in DTYPES:
            key = (row.op, row.kernel, row.target, row.dtype or "any", row.configuration)
            figures = [float(f"{figure(row):.4g}") for figure in FIGURES.values()]
            lines[key] = [max(pair) for pair in zip(figures, lines.get(key, figures))]
    return lines


def read(path: str | pathlib.Path) -> tuple[dict[str, str], Lines]:
    """(compilers, lines) of a file; nothing at all of one that does not exist."""
    made, lines = {}, {}
    text = pathlib.Path(path).read_text().splitlines() if pathlib.Path(path).exists() else []
    for line in text:
        if line.startswith("#"):
            made |= dict(word.split("=") for word in line[1:].split())
        elif not line.startswith(COLUMNS[0] + "\t"):
            fields = line.split("\t")
            lines[tuple(fields[: len(COLUMNS)])] = [float(field) for field in fields[len(COLUMNS) :]]
    return made, lines


def update(path: str | pathlib.Path, rows: list[Row]) -> None:
    """Rewrites the lines of what was audited: of the rows' ops, targets and dtypes."""
    made, lines = read(path)
    audited = {(row.op, row.target, row.dtype or "any") for row in rows}
    lines = {key: line for key, line in lines.items() if (key[0], *key[2:4]) not in audited} | of_rows(rows)
    text = ["# " + " ".join(f"{name}={version}" for name, version in sorted((made | compilers()).items()))]
    text.append("\t".join((*COLUMNS, *FIGURES)))
    text += ["\t".join((*key, *(f"{figure:g}" for figure in lines[key]))) for key in sorted(lines)]
    pathlib.Path(path).write_text("\n".join(text) + "\n")


def compare(path: str | pathlib.Path, rows: list[Row], whole: bool = True) -> list[Row]:
    """Adds failures to rows that got worse or are new; returns rows, with a failure, for lines that went missing.

    `whole`: the rows are all that there are of their ops, targets and dtypes.
    """
    made, lines = read(path)
    here = compilers()
    other = {name for name in here if made.get(name) != here[name]}
    if "triton" in other:
        return [
            _missing("", "", "", "", f"made by triton {made.get('triton')}: --update-baseline with {here['triton']}")
        ]
    now = of_rows(rows)
    for row in rows:
        (key,) = of_rows([row]) or [None]
        if key and not (row.cuda and "nvcc" in other):
            what = _worse(now[key], lines[key]) if key in lines else "not in it yet: --update-baseline"
            row.failures += [("baseline", what)] if what else []
    audited = {(row.op, row.target, row.dtype or "any") for row in rows}
    gone = [key for key in lines if whole and (key[0], *key[2:4]) in audited and key not in now]
    return [_missing(*key[:4], f"{key[4]} is no more: --update-baseline") for key in gone]


def _worse(now: list[float], before: list[float]) -> str:
    """What grew, in words; "" if nothing did."""
    grown = [
        f"{name} {b:g} → {n:g}"
        for name, n, b in zip(FIGURES, now, before)
        if name != "registers" and n > b * (1 if name in NO_GROWTH else GROWTH)
    ]
    return ", ".join(grown)


def _missing(op: str, kernel: str, target: str, dtype: str, what: str) -> Row:
    return Row(op, kernel, target, "", dtype, {}, ["the baseline"], failures=[("baseline", what)])
