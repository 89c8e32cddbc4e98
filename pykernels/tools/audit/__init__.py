"""`python -m pykernels audit`: what the compilers make of every kernel for every GPU, known without a GPU.

recorder.py learns what real launches of Triton kernels would compile, measure.py compiles it and finds the hot loop
with disassembly.py and ir.py, cuda.py does the same for csrc/cuda/*.cu, model.py says how fast that loop could be,
baseline.py compares with what was committed, report.py prints, environment.py has it all done by another Triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...core.backends import INTERPRET, BackendDeclined
from ...core.declaration import OPS, list_ops
from . import baseline, cuda, environment, report
from .measure import Row, blank, inspect
from .model import GPUS
from .recorder import Launch, record

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

FATAL = ("compile", "shared memory")  # without these a kernel cannot run: what any Triton is held to

Track = Callable[..., Iterable]  # (label, items, how many there are unless they know) shows progress over them


def audit(
    ops: Iterable[str] | None = None,
    targets: Iterable[str] | None = None,
    *,
    dtypes: Iterable[torch.dtype] = DTYPES,
    samples: bool = False,
    representative: bool = False,
    jobs: int | None = None,
    track: Track = lambda label, items, total=None: items,
) -> list[Row]:
    """Compile and inspect every launch that the ops' workloads reach, in each dtype, for each target.

    Beside them every CUDA kernel of theirs, unless cuda.unavailable().

    Args:
        ops: names; all unless given.
        targets: sm_90 and the like; all of GPUS unless given.
        samples: also the launches of the ops' test samples: every option, odd sizes. Takes several times as long.
        representative: only the workloads that the baseline is about, and its targets and dtypes.
        jobs: processes that compile; as many as there are cores unless given, 0 for this one alone.
        track: wraps the sequences that take time.
    """
    if INTERPRET:
        raise RuntimeError("the audit compiles kernels, which TRITON_INTERPRET=1 prevents: unset it")
    names, targets = list(list_ops() if ops is None else ops), list(GPUS if targets is None else targets)
    if representative:
        targets = [target for target in targets if target in baseline.TARGETS]
        dtypes = [dtype for dtype in dtypes if _name(dtype) in baseline.DTYPES]
    for what, asked, known in (("op", names, list_ops()), ("target", targets, list(GPUS))):
        if unknown := [name for name in asked if name not in known]:
            raise ValueError(f"{what}: expected one of {', '.join(known)}, got {unknown[0]!r}")
    triton = [name for name in names if "triton" in OPS[name].supports]
    launches, rows = _record_all(triton, targets, dtypes, samples, representative, track)
    jobs = os.cpu_count() if jobs is None else jobs
    rows += _inspect_all(launches, jobs, track)
    if cuda.unavailable() is None:
        shown = [_name(dtype) for dtype in dtypes]
        found = _inspect_cuda(names, targets, jobs, track)
        rows += [row for row in found if row.dtype in ("", *shown)]
    order = {target: place for place, target in enumerate(GPUS)}
    return sorted(rows, key=lambda row: (order[row.target], row.op, row.kernel, row.dtype, str(row.settings)))


def _record_all(
    names: list[str],
    targets: list[str],
    dtypes: Iterable[torch.dtype],
    samples: bool,
    representative: bool,
    track: Track,
) -> tuple[list[Launch], list[Row]]:
    """(the distinct launches, a row for each input whose launches could not be recorded)."""
    plan = [
        (OPS[name], sample, dtype)
        for name in names
        for sample in (*OPS[name].workloads, *(OPS[name].samples if samples else ()))
        for dtype in dtypes
        if dtype in OPS[name].dtypes and (not representative or baseline.is_representative(name, sample.label))
    ]
    launches: dict[tuple[str, str, str], Launch] = {}  # each op and dtype has its own rows, of the same code too
    rows = []
    for op, sample, dtype in track("recording", plan):
        try:
            for launch in record(op, sample, dtype, targets):
                first = launches.setdefault((op.name, launch.dtype, launch.key), launch)
                first.intensity = launch.intensity if first.intensity is None else first.intensity
                first.backward = first.backward and launch.backward
                if sample.label not in first.inputs:
                    first.inputs.append(sample.label)
        except BackendDeclined:
            continue  # the reference serves these inputs
        except Exception:
            reason = ("compile", f"no launch was recorded: {traceback.format_exc(limit=-1).strip()}")
            rows += [
                Row(op.name, "", target, GPUS[target].name, _name(dtype), {}, [sample.label], failures=[reason])
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


def _inspect_cuda(names: list[str], targets: list[str], jobs: int, track: Track) -> list[Row]:
    """The rows of the CUDA kernels that are those ops'."""
    stems = {OPS[name].body.__module__.split(".")[-1] for name in names}
    stems |= {OPS[name].kernel.op.name().split("::")[1] for name in names if hasattr(OPS[name].kernel, "op")}
    files = cuda.sources(stems)
    plan = [(file, target) for file in files for target in targets if target in cuda.ARCHITECTURES]
    with ThreadPoolExecutor(jobs or 1) as threads:
        done = list(track("nvcc", threads.map(lambda task: cuda.inspect_file(*task), plan), len(plan)))
    rows = [row for found, _ in done for row in found]
    for file in files:
        used = {target: lines for (tried, target), (_, lines) in zip(plan, done) if tried == file}
        for target in list(used)[:1]:
            wrong = cuda.complaints(file, set().union(*used.values()) if len(used) == len(cuda.ARCHITECTURES) else None)
            blank = Row(file.stem, "", target, GPUS[target].name, "", {}, [file.name])
            rows += [dataclasses.replace(blank, failures=[("directive", what)]) for what in wrong]
    return rows


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m pykernels audit`."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to audit; all unless given")
    parser.add_argument("--target", nargs="+", choices=list(GPUS), metavar="T", help=f"among {', '.join(GPUS)}")
    parser.add_argument("--dtype", nargs="+", choices=[_name(dtype) for dtype in DTYPES], help="all three unless given")
    parser.add_argument("--samples", action="store_true", help="also every option and odd size that the tests try")
    parser.add_argument("--representative", action="store_true", help="only the workloads that the baseline is about")
    parser.add_argument("--jobs", type=int, help="compiling processes; one a core unless given")
    parser.add_argument("--triton", metavar="VERSION", help="by that one, in its own environment; all must compile")
    parser.add_argument("--failures", action="store_true", help="tabulate only what fails")
    parser.add_argument("--json", metavar="FILE", help="write everything there is to know to a file")
    parser.add_argument("--markdown", metavar="FILE", help="write the hot loops as a table for a document")
    parser.add_argument("--baseline", metavar="FILE", help="fail what got worse, or changed unnoticed, against a file")
    parser.add_argument("--update-baseline", action="store_true", help="rewrite that file instead of comparing")


def main(args: argparse.Namespace) -> int:
    """Runs the audit and prints it; 1 if anything failed, 2 if it cannot run."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    if args.triton:
        try:
            python = environment.python(args.triton)
        except RuntimeError as error:
            console.print(f"[red]{error}[/]")
            return 2
        if python != sys.executable:
            return subprocess.call([python, "-m", "pykernels", *sys.argv[1:]])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    dtypes = [dtype for dtype in DTYPES if args.dtype is None or _name(dtype) in args.dtype]
    if (args.baseline and args.samples) or (args.update_baseline and not args.baseline):
        console.print(
            "[red]--baseline is about workloads, without --samples, and says what --update-baseline updates[/]"
        )
        return 2
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            rows = audit(
                args.ops or None, args.target, dtypes=dtypes,
                samples=args.samples, representative=args.representative, jobs=args.jobs,
                track=lambda label, items, total=None: progress.track(
                    items, len(items) if total is None else total, description=label
                ),
            )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        console.print(f"[red]{error}[/]")
        return 2
    if args.update_baseline:
        baseline.update(args.baseline, rows)
    elif args.baseline:
        rows += baseline.compare(args.baseline, rows)
    report.show(rows, console, args.failures)
    if reason := cuda.unavailable():
        console.print(f"CUDA kernels were not audited: {reason}")
    if args.json:
        report.write(rows, args.json)
    if args.markdown:
        report.write_markdown(rows, args.markdown)
    checks = {check for row in rows for check, _ in row.failures}
    if args.triton:
        console.print(f"of another Triton than the baseline's only these checks count: {', '.join(FATAL)}")
        checks &= {*FATAL}
    return int(bool(checks))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
