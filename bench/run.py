"""`python -m pykernels bench`: this package's kernels against eager PyTorch, torch.compile and each installed peer.

Every candidate is first held to the rule of pykernels/check.py on the very inputs that are then timed; a wrong one is
reported, not timed. The others are timed in turns, A B A B …, so that what disturbs one disturbs all; ratios are taken
within a turn.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import json
import pathlib
import pkgutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from pykernels import bench as _bridge
from pykernels.core.backends import BACKENDS, BackendDeclined, unavailable, use_backend
from pykernels.core.declaration import OPS, Inputs, Op, Workload
from pykernels.tools.check import (
    Expected,
    bind_gradient,
    cotangents,
    dtype_argument,
    dtype_name,
    float_leaves,
    op_argument,
)
from pykernels.tools.machine import machine

from . import measure
from .measure import Clock, Limits, Spread

WRONG = "WRONG, so not timed"
TRAIN_BYTES = 2  # least traffic of forward and backward: gradients of all that the forward reads and writes


@dataclass
class Timing:
    """One candidate on one workload."""

    seconds: Spread
    memory: float | None  # bytes at the peak, beyond the inputs
    share: float = 0.0  # of the nearer limit


@dataclass
class Race:
    """One workload in one dtype: who was right, and how fast."""

    op: str
    workload: str
    dtype: str
    train: bool
    flops: float
    bytes: float
    limit: str = ""  # the nearer one, compute or memory
    timings: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # candidate → why it was not timed
    first_call: dict[str, float] = field(default_factory=dict)  # s, with compilation
    ours: str | None = None  # our fastest backend
    peer: str | None = None  # the fastest peer
    ratio: Spread | None = None  # how many times faster ours is than that peer

    def __str__(self) -> str:
        return f"{self.op} {self.workload}{', forward + backward' if self.train else ''}, {self.dtype}"


@dataclass(frozen=True)
class Candidate:
    name: str
    function: Callable
    backend: str | None = None  # of this package; None for a peer


def candidates(op: Op, device: str, quick: bool) -> tuple[list[Candidate], dict[str, str]]:
    """Ours and the peers for an op; and why the others are not there."""
    found, absent = [], {}
    for backend in op.supports:
        reason = unavailable(BACKENDS.index(backend), device)
        if reason or (backend == "triton" and device == "cpu"):
            absent[backend] = reason or "Triton's interpreter is there to test, not to be timed"
        else:
            found.append(Candidate(backend, op.function, backend))
    for module in pkgutil.iter_modules([f"{path}/peers" for path in _bridge.__path__]):
        peer = importlib.import_module(f"pykernels.bench.peers.{module.name}")
        reason = peer.missing()
        if quick and getattr(peer, "SLOW_TO_START", False):
            reason = "left out of --quick: it takes longer to compile than to measure"
        if reason is None:
            try:
                found.append(Candidate(peer.NAME, getattr(peer, op.name)))
                continue
            except AttributeError:
                reason = f"it has no {op.name}"
        absent[peer.NAME] = reason
    return found, absent


def timed_call(function: Callable, inputs: Inputs, op: Op, train: bool) -> Callable:
    """What is timed: the call alone, or the call and its gradient for prepared cotangents."""
    if not train:

        def forward():
            with torch.no_grad():
                return function(**inputs)

        return forward
    call, leaves = bind_gradient(function, inputs, op.differentiable)
    wanted = list(leaves.values())

    def outputs():
        return float_leaves(call())

    given = cotangents(outputs())
    return lambda: torch.autograd.grad(outputs(), wanted, given, materialize_grads=True)


def run(op: Op, work: Workload, dtype: torch.dtype, device: str, entrants: list[Candidate], budget: float) -> Race:
    """Check every candidate on the workload, then time those that are right."""
    torch.manual_seed(0)
    inputs = work.make(dtype, device)
    flops = work.flops(inputs) * (work.train_flops if work.train else 1)
    traffic = work.bytes(inputs) * (TRAIN_BYTES if work.train else 1)
    race = Race(op.name, work.label, dtype_name(dtype), work.train, flops, traffic)
    expected, calls = Expected(op, inputs, backward=work.train, slack=work.slack), {}
    try:
        expected.allowed  # noqa: B018 - runs the references
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        race.left_out = dict.fromkeys(
            [one.name for one in entrants], "the reference does not fit in memory to check it"
        )
        return race
    for one in entrants:
        try:
            reason = None if one.function is op.reference else gate(one, expected, race)
        except (BackendDeclined, NotImplementedError) as declined:
            reason = str(declined)
        except Exception as error:  # a peer's own failure is a result too; ours ends the run
            if one.backend:
                raise
            reason = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if reason:
            race.left_out[one.name] = reason
            continue
        calls[one.name] = using(one, timed_call(one.function, inputs, op, work.train))
    del expected
    clock = Clock(device)
    probes = {name: clock.probe(call) for name, call in calls.items()}
    times = clock.race(calls, {name: first for name, (first, _) in probes.items()}, budget)
    for name, taken in times.items():
        race.timings[name] = Timing(Spread.of(taken), probes[name][1])
    settle(race, times, {one.name for one in entrants if one.backend})
    return race


def gate(one: Candidate, expected: Expected, race: Race) -> str | None:
    """Why a candidate's results are wrong, or None."""

    start = time.perf_counter()
    results = using(one, expected.judge)(one.function, poison=bool(one.backend))
    race.first_call[one.name] = time.perf_counter() - start  # the references ran before
    wrong = [result for result in results if not result.ok]
    return f"{WRONG}: {'; '.join(map(str, wrong))}" if wrong else None


def using(one: Candidate, call: Callable) -> Callable:
    if one.backend is None:
        return call

    @functools.wraps(call)
    def chosen(*args, **kwargs):
        with use_backend(one.backend):
            return call(*args, **kwargs)

    return chosen


def settle(race: Race, times: dict[str, list[float]], ours: set[str]) -> None:
    """Name the fastest of ours and of the peers, and their ratio, turn by turn."""

    def fastest(names):
        return min(names, key=lambda name: race.timings[name].seconds.median, default=None)

    race.ours, race.peer = fastest(times.keys() & ours), fastest(times.keys() - ours)
    if race.ours and race.peer:
        race.ratio = Spread.of([b / a for a, b in zip(times[race.ours], times[race.peer])])


# ------------------------------------------------------------------------------------------------ tables


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def volume(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:.{0 if value >= 10 * 2**20 else 1}f}"


def result_table(op: str, races: list[Race]):
    from rich import box
    from rich.table import Table

    peers = list(dict.fromkeys(name for race in races for name in race.timings if name != race.ours))
    table = Table("workload", "dtype", title=f"[bold]{op}[/]", title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("ours", *peers, "× best peer", "of limit", "MiB ours", "MiB peer"):
        table.add_column(header, justify="right", no_wrap=True)

    def cell(race, name):
        if name not in race.timings:
            return "[red]wrong[/]" if WRONG in race.left_out.get(name, "") else "–"
        spread = race.timings[name].seconds
        deviation = f" [dim]±{50 * (spread.high - spread.low) / spread.median:.0f}%[/]" if name == race.ours else ""
        return seconds(spread.median) + deviation

    for race in races:
        ours, peer = race.timings.get(race.ours), race.timings.get(race.peer)
        ratio = "–"
        if race.ratio:
            color = "green" if race.ratio.median >= 1 else "red"
            ratio = f"[{color}]{race.ratio.median:.2f}[/] [dim]{race.ratio.low:.2f}–{race.ratio.high:.2f}[/]"
        table.add_row(
            race.workload + (" [dim]fwd+bwd[/]" if race.train else ""),
            race.dtype,
            cell(race, race.ours) if race.ours else cell(race, next(iter(race.left_out), "")),
            *(cell(race, name) for name in peers),
            ratio,
            f"{ours.share:.0%} {race.limit}" if ours else "–",
            volume(ours and ours.memory),
            volume(peer and peer.memory),
        )
    return table


def summary(races: list[Race]) -> list[str]:
    """Geometric means, then every shape where a peer is faster."""
    lines = []
    groups: dict[tuple, list[Race]] = collections.defaultdict(list)
    for race in races:
        if race.ratio:
            groups[race.op, race.dtype, race.train].append(race)
    for (op, dtype, train), group in groups.items():
        mean = statistics.geometric_mean(race.ratio.median for race in group)
        wins = sum(race.ratio.median >= 1 for race in group)
        kind = "forward + backward" if train else "forward"
        means = f"[bold]{mean:.2f}×[/] the best peer (geometric mean)"
        lines.append(f"{op}, {dtype}, {kind}: {means}, faster on {wins} of {len(group)}")
    raced = sorted((race for race in races if race.ratio), key=lambda race: race.ratio.median)
    if losses := [race for race in raced if race.ratio.median < 1]:
        lines.append("[red]Slower than the best peer[/] on")
        lines += [f"  {race}: {race.ratio.median:.2f}× {race.peer}" for race in losses]
    elif raced:
        lines.append("[green]Nowhere slower than the best peer.[/]")
    return lines


def notes(races: list[Race], absent: dict[str, str]) -> list[str]:
    """One line for everything that was not timed, and for what compiling took."""
    from rich.markup import escape

    where: dict[tuple, list[str]] = collections.defaultdict(list)
    for race in races:
        for name, reason in race.left_out.items():
            where[name, reason].append(str(race))
    lines = [f"[yellow]{name}[/]: {escape(reason)}" for name, reason in absent.items()]
    lines += [
        f"[yellow]{name}[/]: {escape(reason)} ({'; '.join(sorted(set(on)))})" for (name, reason), on in where.items()
    ]
    compiled = [race.first_call["torch.compile"] for race in races if "torch.compile" in race.first_call]
    if compiled:
        lines.append(f"torch.compile: {statistics.median(compiled):.1f} s a shape to compile, not in the times")
    return lines


# ------------------------------------------------------------------------------------------------ command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", type=op_argument, metavar="OP", help="ops to time (default: all)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", type=dtype_argument, help="only this one (default: each workload's own)")
    parser.add_argument("--quick", action="store_true", help="fewer workloads, about two minutes")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds a workload (default: 5; 1.5 with --quick)")
    parser.add_argument("--json", type=pathlib.Path, metavar="F", help="write everything measured to this file")
    parser.add_argument("--plot", type=pathlib.Path, metavar="DIR", help="draw the results into this folder")


def main(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if args.plot:
        from . import plots  # matplotlib missing is better said before than after
    console = Console()
    console.width = max(console.width, 140)  # of a table that loses its numbers when it is squeezed
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    budget = args.budget or (1.5 if args.quick else 5.0)
    plan = [
        (OPS[name], work, dtype)
        for name in args.ops or sorted(OPS)
        for work in OPS[name].workloads
        if work.quick or not args.quick
        for dtype in ((args.dtype,) if args.dtype else work.dtypes)
    ]
    if not plan:
        console.print("[red]Nothing to time[/]: these ops declare no such workloads.")
        return 1
    facts = machine()
    dtypes = list(dict.fromkeys(dtype for *_, dtype in plan))
    limits = measure.measure_limits(device, dtypes)
    processor = f"{facts['processor']}, {facts['threads']} threads" if device == "cpu" else facts["GPU 0"]
    console.print(f"{processor}; {limit_line(limits)}", highlight=False)

    races: list[Race] = []
    absent: dict[str, str] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress, measure.memory_limit(device):
        task = progress.add_task("", total=len(plan))
        for op, work, dtype in plan:
            progress.update(task, description=f"{op.name} {escape(work.label)} {dtype_name(dtype)}")
            found, missing = candidates(op, device, args.quick)
            absent |= missing
            races.append(run(op, work, dtype, device, found, budget))
            progress.advance(task)

    limits = limits.best(measure.measure_limits(device, dtypes))
    console.print(f"measured before and after; the better {limit_line(limits)}", highlight=False)
    for race in races:
        least, race.limit = limits.nearer(dtype_argument(race.dtype), race.flops, race.bytes)
        for timing in race.timings.values():
            timing.share = least / timing.seconds.median
    for name in dict.fromkeys(race.op for race in races):
        console.print(result_table(name, [race for race in races if race.op == name]))
    console.print("Median ± half the interquartile range; the ratio with its quartiles, above 1 where ours is faster.")
    for line in [*summary(races), *notes(races, absent)]:
        console.print(line, highlight=False)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report(facts, device, limits, races, absent), indent=1))
        console.print(f"wrote {args.json}")
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        for path in plots.draw(races, args.plot, processor):
            console.print(f"wrote {path}")
    return int(any(WRONG in race.left_out.get(name, "") for race in races for name in OPS[race.op].supports))


def limit_line(limits: Limits) -> str:
    rates = ", ".join(f"{dtype_name(dtype)} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in limits.gemm.items())
    return f"limits: matrix product {rates}; copy {limits.copy / 1e9:.1f} GB/s"


def report(facts: dict, device: str, limits: Limits, races: list[Race], absent: dict[str, str]) -> dict:
    gemm = {dtype_name(dtype): rate for dtype, rate in limits.gemm.items()}
    return {
        "machine": {**facts, "device": device},
        "limits": {"gemm_flops_per_s": gemm, "copy_bytes_per_s": limits.copy},
        "absent": absent,
        "results": [asdict(race) for race in races],
    }
