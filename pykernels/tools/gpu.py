"""`python -m pykernels gpu`: what there is to learn from a GPU, in one command and one JSON file for an issue.

For each op: the first-use self-test and `check` of each GPU backend, then `bench`; for all, the audit of this GPU's
architecture, whose predictions stand beside the measurements. Each part runs in a process of its own, so that a kernel
that takes its process (or the driver's context) down takes nothing else with it.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..core.declaration import OPS
from .check import can_run, op_argument
from .machine import machine
from .self_test import architecture

STEPS = {  # name → (the module to run, seconds that one of its parts may take)
    "self-test": ("pykernels.tools.self_test", 900),
    "check": ("pykernels check", 1800),
    "bench": ("pykernels bench", 1800),
    "audit": ("pykernels audit", 7200),
}
BACKENDS = ("triton", "cuda")
NO_DEVICE = "no device"


@dataclass
class Part:
    """One process: a step, for one op and backend where it is about these."""

    step: str
    op: str | None = None
    backend: str | None = None
    status: str = NO_DEVICE  # or passed; failed: it ran to the end and found something; crashed, timed out: it did not
    seconds: float = 0.0
    said: str = ""  # the end of what it printed, unless it passed
    result: Any = None  # what it wrote to its JSON file

    def run(self, options: Iterable[str]) -> None:
        module, limit = STEPS[self.step]
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "result.json"
            command = [sys.executable, "-m", *module.split(), *filter(None, [self.op]), *options, "--json", str(file)]
            environment = {**os.environ, "COLUMNS": "160"}
            if self.step == "audit":
                environment.pop("TRITON_INTERPRET", None)  # it compiles
            start = time.perf_counter()
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
                self.said = f"{done.stdout}\n{done.stderr}"
                written = file.exists()
                self.status = "crashed" if not written else "failed" if done.returncode else "passed"
                self.result = json.loads(file.read_text()) if written else None
            except subprocess.TimeoutExpired:
                self.status = "timed out"
            self.seconds = time.perf_counter() - start
        self.said = "" if self.status == "passed" else self.said[-4000:].strip()

    def __str__(self) -> str:
        return " ".join(filter(None, (self.step, self.op, self.backend)))


@dataclass
class Prediction:
    """What the audit foresaw for the kernels of one timed workload, and what was measured."""

    op: str
    workload: str
    dtype: str
    train: bool
    kernel: str
    limit: str  # the unit that the audit names
    overlapped: float  # share of the peak if all units work side by side
    serial: float  # ... if none does
    measured: float | None  # share of the nearer of the rates that products and copies reach on this GPU
    measured_limit: str


def target_of(device: str) -> str | None:
    """The audit's target nearest to a GPU: its own, or the newest before it of the same generation."""
    from .audit.model import GPUS

    name = architecture(device)
    if not name.startswith(("sm_", "gfx")):
        return None
    known = [target for target in GPUS if target[:-1] == name[:-1] and target <= name]
    return max(known, default=None)


def plan(ops: list[str], device: str | None) -> list[Part]:
    """Every part there is; without a device those that would need one are single lines that say so."""
    if device is None:
        return [Part(step) for step in STEPS]
    pairs = [(op, backend) for op in ops for backend in BACKENDS if can_run(OPS[op], backend, device)]
    parts = [Part(step, *pair) for pair in pairs for step in ("self-test", "check")]
    return [*parts, *(Part("bench", op) for op in ops if OPS[op].workloads), Part("audit")]


def predict(races: list[dict], rows: list[dict]) -> list[Prediction]:
    """The audit's rows of each timed workload beside the time; the kernels of a forward pass, or of both passes."""
    from .audit.report import SHORT

    found = []
    for race in races:
        timing = race["timings"].get("triton", {})
        for row in rows:
            same = row["op"] == race["op"] and SHORT.get(row["dtype"]) == race["dtype"]
            if same and race["workload"] in row["inputs"] and (race["train"] or not row["backward"]) and row["in_loop"]:
                foreseen = row["kernel"], row["limit"], row["share"], row["serial"]
                where = race["op"], race["workload"], race["dtype"], race["train"]
                found.append(Prediction(*where, *foreseen, timing.get("share"), race["limit"]))
    return found


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", type=op_argument, metavar="OP", help="only these (default: all)")
    parser.add_argument("--device", help="cuda:1, … (default: the first GPU; cpu rehearses what can run there)")
    parser.add_argument("--target", help="what to audit for: sm_90, gfx942, … (default: what the device is)")
    parser.add_argument("--full", action="store_true", help="every workload; minutes become an hour")
    parser.add_argument(
        "--json", metavar="F", default="pykernels-gpu.json", help="where all goes (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    console.width = max(console.width, 120)
    device = args.device or ("cuda:0" if torch.cuda.is_available() else None)
    target = args.target or (device and target_of(device))
    ops = args.ops or sorted(OPS)
    report: dict[str, Any] = {"machine": machine(), "device": device, "target": target}
    options = {
        "self-test": ["--device", device],
        "check": ["--device", device],
        "bench": ["--device", device, *([] if args.full else ["--quick"])],
        "audit": [*ops, "--target", target, "--dtype", "float32", "bfloat16"],
    }
    parts = plan(ops, device)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(parts))
        for part in parts:
            progress.update(task, description=str(part))
            if part.step == "audit" and device and target is None:
                part.said = f"{architecture(device)} is none of the audit's targets"
            elif device:
                part.run([*options[part.step], *(["--backend", part.backend] if part.backend else [])])
            progress.advance(task)
            report["parts"] = [asdict(part) for part in parts]
            write(args.json, report)  # after each: what is there is kept, whatever happens next

    races = [race for part in parts if part.step == "bench" and part.result for race in part.result["results"]]
    rows = [row for part in parts if part.step == "audit" and part.result for row in part.result]
    foreseen = predict(races, rows)
    write(args.json, {**report, "predictions": [asdict(one) for one in foreseen]})
    show(console, parts, races, foreseen)
    console.print(f"wrote {args.json}: attach it to an issue" if device else f"wrote {args.json}")
    return int(any(part.status not in ("passed", NO_DEVICE) for part in parts))


def write(path: str, report: dict) -> None:
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1, default=str) + "\n")


def show(console, parts: list[Part], races: list[dict], foreseen: list[Prediction]) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    colors = {"passed": "green", NO_DEVICE: "yellow"}
    by_op: dict[tuple, dict[str, Part]] = collections.defaultdict(dict)
    for part in parts:
        by_op[part.op or "all ops", part.backend or ""][part.step] = part
    table = Table("op", "backend", *STEPS, box=box.SIMPLE_HEAD, title="what ran", title_justify="left")
    for (op, backend), steps in by_op.items():
        cells = []
        for step in STEPS:
            part = steps.get(step)
            status = part.status if part else "–"
            cells.append(f"[{colors.get(status, 'red')}]{status}[/] {part.seconds:.0f} s" if part else "–")
        table.add_row(op, backend, *cells)
    console.print(table)

    both = [race for race in races if {*BACKENDS} <= race["timings"].keys()]
    if both:
        table = Table("op", "workload", "dtype", box=box.SIMPLE_HEAD, title="Triton / CUDA", title_justify="left")
        table.add_column("times as fast in CUDA", justify="right")
        for race in both:
            triton, cuda = (race["timings"][backend]["seconds"]["median"] for backend in BACKENDS)
            workload = race["workload"] + (" fwd+bwd" if race["train"] else "")
            table.add_row(race["op"], workload, race["dtype"], f"{triton / cuda:.2f}")
        console.print(table)

    if foreseen:
        headers = ("op", "workload", "dtype", "kernel", "limited by", "foreseen", "measured")
        title = "share of the peak: foreseen if all units overlap / if none does; measured, of the whole op"
        table = Table(*headers, box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for one in foreseen:
            workload = one.workload + (" fwd+bwd" if one.train else "")
            measured = "–" if one.measured is None else f"{one.measured:.2f} of {one.measured_limit}"
            expected = f"{one.overlapped:.2f}/{one.serial:.2f}"
            table.add_row(one.op, workload, one.dtype, one.kernel, one.limit, expected, measured)
        console.print(table)
    for part in parts:
        if part.status not in ("passed", NO_DEVICE):
            last = part.said.splitlines()[-1] if part.said else ""
            console.print(f"[red]{part.status}[/] {part}: {escape(last)}", highlight=False)
