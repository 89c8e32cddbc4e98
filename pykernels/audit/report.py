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

COLUMNS = {  # heading → the check that turns the cell red
    "kernel": "compile",
    "dtype": None,
    "registers/\nspilled B": "spill",
    "shared KiB": "shared memory",
    "occu-\npancy": None,
    "dots": "tensor cores",
    "global memory": "narrow load",
    "async\ncopies": "async copy",
    "slots": None,
    "MUFU": None,
    "slots per\nkFLOP, kB": None,
    "limited by": None,
    "share over-\nlapped/serial": None,
}


def show(rows: list[Row], console: Console) -> None:
    """A table for each target, then the failures in words, then one line of summary."""
    for target, gpu in GPUS.items():
        alike: dict[tuple[str, ...], list[str]] = {}  # rows that differ in nothing but an argument's divisibility
        for row in rows:
            if row.target == target:
                alike.setdefault(tuple(_cells(row)), []).extend(row.inputs)
        if alike:
            table = Table(title=f"{target} ({gpu.name}): one warp's pass of the hot loop", title_justify="left")
            for heading in COLUMNS:
                words = heading in ("kernel", "dtype", "limited by")
                table.add_column(heading, justify="left" if words else "right")
            table.columns[0].min_width = 40
            for (first, *cells), inputs in alike.items():
                more = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
                table.add_row(f"{first}\n[dim]{escape(inputs[0])}{more}[/]", *cells)
            console.print(table)
    for row in rows:
        for check, what in row.failures:
            console.print(f"[red]FAIL[/] {name(row)}: {check}: {escape(what)}", soft_wrap=True)
    reasons = Counter((row.kernel, check, reason) for row in rows for check, _, reason in row.excused)
    for (kernel, check, reason), times in reasons.items():
        console.print(f"[yellow]excused[/] {kernel}: {check} ({times}×): {escape(reason)}", soft_wrap=True)
    console.print(summary(rows))


def name(row: Row) -> str:
    """Target, kernel, dtype and configuration, and what runs it."""
    return escape(f"{row.target} {row.op}: {row.kernel} {row.dtype} {_settings(row)} ({row.inputs[0]})")


def summary(rows: list[Row]) -> str:
    failures, kernels = sum(len(row.failures) for row in rows), len({row.kernel for row in rows})
    colour = "red" if failures else "green"
    return f"{kernels} kernels, {len(rows)} configurations, [{colour}]{failures} failures[/]"


def _settings(row: Row) -> str:
    values = {**row.settings, "warps": row.warps, "stages": row.stages}
    return " ".join(key if value is True else f"{key}={value}" for key, value in values.items() if value is not False)


def _cells(row: Row) -> list[str]:
    failed = {check for check, _ in row.failures}
    units = ", ".join(f"{count} {opcode}" for opcode, count in row.tensor.items()) or "multiply-adds"
    ratios = (row.slots_per_kflop, row.slots_per_kilobyte)
    cells = [
        f"{escape(row.kernel)} [dim]{escape(_settings(row))}[/]",
        row.dtype,
        f"{row.registers}/{row.spilled}",
        f"{row.shared / KIB:.0f} of {row.shared_limit / KIB:.0f}",
        f"{row.occupancy:.0%}",
        escape(f"{', '.join(row.dots)}: {units}" if row.dots else ""),
        ", ".join(f"{count} {kind}" for kind, count in sorted(row.memory.items())) or "none",
        str(row.copies or ""),
        f"{row.slots}" if row.in_loop else f"{row.slots}\n(no loop)",
        str(row.mufu),
        ", ".join("–" if ratio is None else f"{ratio:.3g}" for ratio in ratios),
        row.limit,
        f"{row.share:.2f}/{row.serial:.2f}",
    ]
    return [f"[bold red]{cell}[/]" if check in failed else cell for cell, check in zip(cells, COLUMNS.values())]


def write(rows: Iterable[Row], path: str) -> None:
    """Everything that is known of each row, as a JSON list."""
    pathlib.Path(path).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1, default=str) + "\n")
