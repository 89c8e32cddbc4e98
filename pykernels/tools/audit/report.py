"""The audit's rows as a table for people and as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .measure import Row
from .model import GPUS, KIB

SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
COLUMNS = {  # heading → the checks that turn the cell red
    "kernel": ("compile",),
    "dtype": (),
    "registers/\nspilled B": ("spill",),
    "shared KiB,\noccupancy": ("shared memory",),
    "dots": ("tensor cores",),
    "global memory": ("narrow load", "async copy"),
    "slots/\nMUFU": (),
    "slots per\nkFLOP, kB": (),
    "limited by": (),
    "share over-\nlapped/serial": (),
}


def show(rows: list[Row], console: Console, only_failures: bool = False) -> None:
    """A table for each target, then the failures in words, then one line of summary."""
    for target, gpu in GPUS.items():
        alike: dict[tuple[str, ...], list[str]] = {}  # rows that differ in nothing but an argument's divisibility
        for row in rows:
            if row.target == target and (row.failures or not only_failures):
                alike.setdefault(tuple(_cells(row)), []).extend(row.inputs)
        if alike:
            title = f"{target} ({gpu.name}): one warp's pass of the hot loop. LDGSTS, UTMALDG: asynchronous copies"
            table = Table(title=title, title_justify="left", show_lines=True)
            table.add_column("kernel", min_width=36)
            for heading in list(COLUMNS)[1:]:
                words = heading in ("dtype", "dots", "global memory", "limited by")
                table.add_column(heading, justify="left" if words else "right", no_wrap=heading != "limited by")
            for (first, *cells), inputs in alike.items():
                more = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
                table.add_row(f"{first}\n[dim]{escape(inputs[0])}{more}[/]", *cells)
            console.print(table)
    for row in rows:
        for check, what in row.failures:
            console.print(f"[red]FAIL[/] {name(row)}: {check}: {escape(what)}", soft_wrap=True)
    if unknown := sorted({f"{row.op}.{row.kernel}" for row in rows if not row.shared_known}):
        console.print(f"launches give shared memory beyond what is counted to {', '.join(unknown)}", soft_wrap=True)
    reasons = Counter((row.kernel, check, reason) for row in rows for check, _, reason in row.excused)
    for (kernel, check, reason), times in reasons.items():
        console.print(f"[yellow]excused[/] {kernel}: {check} ({times}×): {escape(reason)}", soft_wrap=True)
    console.print(summary(rows))


def name(row: Row) -> str:
    """Target, kernel, dtype and configuration, and what runs it."""
    return escape(f"{row.target} {row.op}: {row.kernel} {row.dtype} {row.configuration} ({row.inputs[0]})")


def summary(rows: list[Row]) -> str:
    failures, kernels = sum(len(row.failures) for row in rows), len({row.kernel for row in rows if row.kernel})
    colour = "red" if failures else "green"
    return f"{kernels} kernels, {len(rows)} configurations, [{colour}]{failures} failures[/]"


def _cells(row: Row) -> list[str]:
    failed = {check for check, _ in row.failures}
    dots = [*row.dots, *(_counted(row.tensor) or ["multiply-adds"])] if row.dots else []
    if row.repeated and row.repeated > 1:
        dots.append(f"{row.repeated:.2g}× what was asked")
    cells = [
        f"{escape(row.kernel)} [dim]{escape(row.configuration)}[/]",
        SHORT.get(row.dtype, row.dtype),
        f"{row.registers}/{row.spilled}",
        f"{'' if row.shared_known else '≥ '}{row.shared / KIB:.0f} of {row.shared_limit / KIB:.0f}\n"
        f"{'' if row.shared_known else '≤ '}{row.occupancy:.0%}",
        "\n".join(dots),
        "\n".join(_counted(row.memory)) or "none",
        f"{row.slots}/{row.mufu}" if row.in_loop else f"{row.slots}/{row.mufu}\n(no loop)",
        "\n".join("–" if ratio is None else f"{ratio:.3g}" for ratio in (row.slots_per_kflop, row.slots_per_kilobyte)),
        row.limit,
        f"{row.share:.2f}/{row.serial:.2f}",
    ]
    return [f"[bold red]{cell}[/]" if failed & set(checks) else cell for cell, checks in zip(cells, COLUMNS.values())]


def _counted(counts: dict[str, int]) -> list[str]:
    return [f"{count} {what}" for what, count in sorted(counts.items())]


def write(rows: Iterable[Row], path: str) -> None:
    """Everything that is known of each row, as a JSON list."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(path).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1, default=str) + "\n")


def write_markdown(rows: Iterable[Row], path: str) -> None:
    """The hot loops as a table, in the columns in which docs/gpu.md compares them with the public kernels'."""
    lines = [
        "| kernel, configuration | dtype | target | registers / spilled bytes | slots per pass (warp) | work per pass "
        "| slots per kFLOP | MUFU | limited by | share |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.in_loop:
            by_bytes = row.limit == "DRAM" or not row.flops
            work = f"{row.bytes / 1e3:.3g} kB" if by_bytes else f"{row.flops / 1e6:.3g} MFLOP"
            ratio = f"{row.slots_per_kflop:.3g}" if row.slots_per_kflop else "–"
            cells = (
                f"{row.op} `{row.kernel}` {row.configuration}", SHORT.get(row.dtype, row.dtype), row.target,
                f"{row.registers}/{row.spilled}", row.slots, work, ratio, row.mufu, row.limit,
                f"{row.share:.2f}/{row.serial:.2f}",
            )  # fmt: skip
            line = "| " + " | ".join(map(str, cells)) + " |"
            lines += [line] if line not in lines else []
    pathlib.Path(path).write_text("\n".join(lines) + "\n")
