"""`python -m pykernels audit`: what the compilers make of every Triton kernel for every GPU, known without a GPU.

recorder.py learns what real launches would compile, measure.py compiles it and finds the hot loop with disassembly.py
and ir.py, model.py says how fast that loop could be, report.py prints.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..registry import INTERPRET, OPS, BackendDeclined, list_ops
from . import report
from .measure import Row, blank, inspect
from .model import GPUS
from .recorder import Launch, record

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Track = Callable[[str, Sequence], Iterable]  # shows progress over a sequence


def audit(
    ops: Iterable[str] | None = None,
    targets: Iterable[str] | None = None,
    *,
    dtypes: Iterable[torch.dtype] = DTYPES,
    samples: bool = False,
    jobs: int | None = None,
    track: Track = lambda label, items: items,
) -> list[Row]:
    """Compile and inspect every launch that the ops' workloads reach, in each dtype, for each target.

    Args:
        ops: names; all that have a Triton kernel unless given.
        targets: sm_90 and the like; all of GPUS unless given.
        samples: also the launches of the ops' test samples: every option, odd sizes. Takes several times as long.
        jobs: processes that compile; as many as there are cores unless given, 0 for this one alone.
        track: wraps the sequences that take time.
    """
    if INTERPRET:
        raise RuntimeError("the audit compiles kernels, which TRITON_INTERPRET=1 prevents: unset it")
    names, targets = list(list_ops() if ops is None else ops), list(GPUS if targets is None else targets)
    for what, asked, known in (("op", names, list_ops()), ("target", targets, list(GPUS))):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"{what}: expected one of {', '.join(known)}, got {unknown[0]!r}")
    names = [name for name in names if "triton" in OPS[name].supports]
    launches, rows = _record_all(names, targets, dtypes, samples, track)
    rows += _inspect_all(launches, os.cpu_count() if jobs is None else jobs, track)
    order = {target: place for place, target in enumerate(GPUS)}
    return sorted(rows, key=lambda row: (order[row.target], row.op, row.kernel, row.dtype, str(row.settings)))


def _record_all(
    names: list[str], targets: list[str], dtypes: Iterable[torch.dtype], samples: bool, track: Track
) -> tuple[list[Launch], list[Row]]:
    """(the distinct launches, a row for each input whose launches could not be recorded)."""
    plan = [
        (OPS[name], sample, dtype)
        for name in names
        for sample in (*OPS[name].workloads, *(OPS[name].samples if samples else ()))
        for dtype in dtypes
        if dtype in OPS[name].dtypes
    ]
    launches: dict[str, Launch] = {}
    rows = []
    for op, sample, dtype in track("recording", plan):
        try:
            for launch in record(op, sample, dtype, targets):
                first = launches.setdefault(launch.key, launch)
                first.intensity = launch.intensity if first.intensity is None else first.intensity
                if sample.label not in first.inputs:
                    first.inputs.append(sample.label)
        except BackendDeclined:
            continue  # the reference serves these inputs
        except Exception:
            reason = ("compile", f"no launch was recorded: {traceback.format_exc(limit=-1).strip()}")
            shown = str(dtype).removeprefix("torch.")
            rows += [
                Row(op.name, "", target, GPUS[target].name, shown, {}, [sample.label], failures=[reason])
                for target in targets
            ]
    return list(launches.values()), rows


def _inspect_all(launches: list[Launch], jobs: int, track: Track) -> list[Row]:
    """One row a launch. Each worker has one launch at a time, so that a compiler that dies names its victim."""
    if not jobs:
        return [inspect(launch) for launch in track("compiling", launches)]
    own, pools = threading.local(), []

    def remote(launch: Launch) -> Row:
        if not hasattr(own, "pool"):
            own.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            pools.append(own.pool)
        try:
            return own.pool.submit(inspect, launch).result()
        except BrokenProcessPool:
            del own.pool
            return dataclasses.replace(blank(launch), failures=[("compile", "the compiler took its process down")])

    with ThreadPoolExecutor(jobs) as threads:
        done = threads.map(remote, launches)
        rows = [row for _, row in zip(track("compiling", launches), done)]
    for pool in pools:
        pool.shutdown()
    return rows


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m pykernels audit`."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to audit; all unless given")
    parser.add_argument("--target", nargs="+", choices=list(GPUS), metavar="T", help=f"among {', '.join(GPUS)}")
    parser.add_argument("--dtype", nargs="+", choices=[_name(dtype) for dtype in DTYPES], help="all three unless given")
    parser.add_argument("--samples", action="store_true", help="also every option and odd size that the tests try")
    parser.add_argument("--jobs", type=int, help="compiling processes; one a core unless given")
    parser.add_argument("--failures", action="store_true", help="tabulate only what fails")
    parser.add_argument("--json", metavar="FILE", help="write everything there is to know to a file")


def main(args: argparse.Namespace) -> int:
    """Runs the audit and prints it; 1 if anything failed, 2 if it cannot run."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    dtypes = [dtype for dtype in DTYPES if args.dtype is None or _name(dtype) in args.dtype]
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            rows = audit(
                args.ops or None, args.target, dtypes=dtypes, samples=args.samples, jobs=args.jobs,
                track=lambda label, items: progress.track(items, description=label, total=len(items)),
            )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]{error}[/]")
        return 2
    report.show(rows, console, args.failures)
    if args.json:
        report.write(rows, args.json)
    return int(any(row.failures for row in rows))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
