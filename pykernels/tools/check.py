"""The one rule of correctness, and `python -m pykernels check`, which applies it to every op on this machine.

For every output and every gradient, in the largest absolute difference from the exact value,

    error(ours)  ≤  2 · error(eager)  +  ULPS · eps · max |exact|

exact is the reference on the same inputs in fp64, eager the reference on them as they are.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch.utils import _pytree as pytree

from ..core.backends import BACKENDS, BackendDeclined, unavailable, use_backend
from ..core.declaration import OPS, Inputs, Op, Sample, available_backends
from ..core.dtypes import FLOATS

# Where eager happens to be exact ours still rounds: a score, the normaliser and the store, once each, and the argument
# of an exponential, whose rounding is worth as many units as the argument is large.
ULPS = 8
FLUKE = 3.0  # times the allowance: what one draw may exceed it by before its redraws are not even asked
REDRAWS = 3  # each of which must then keep to the rule

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Result:
    """One output ("out", "out[1]") or gradient ("grad query") held against the rule."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        return self.error / self.allowed if self.allowed else (math.inf if self.error else 0.0)

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, allowed {self.allowed:.3g}"


def is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def float_leaves(tree) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(tree) if is_float(value)]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return pytree.tree_map(lambda value: value.to(dtype) if is_float(value) else value, inputs)


def bind_gradient(function: Callable, inputs: Inputs, differentiable: tuple[str, ...]) -> tuple[Callable, dict]:
    """(a call without arguments, the leaves by name) with fresh leaves for every floating tensor to differentiate."""
    inputs, leaves = dict(inputs), {}
    for name in [name for name in differentiable if name in inputs]:

        def leaf(path, value, name=name):
            if not is_float(value):
                return value
            return leaves.setdefault(name + pytree.keystr(path), value.detach().requires_grad_())

        inputs[name] = pytree.tree_map_with_path(leaf, inputs[name])
    return functools.partial(function, **inputs), leaves


def cotangents(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Random multiples of 1/4 up to 2: exact in every dtype, so that each run differentiates the same function."""
    generator = torch.Generator().manual_seed(len(outputs))
    return [(torch.randint(-8, 9, out.shape, generator=generator) / 4).to(out.device, out.dtype) for out in outputs]


def differentiate(outputs: list[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients for the cotangents of these outputs: zero where an output does not depend on a leaf."""
    pairs = [(out, given) for out, given in zip(outputs, cotangents(outputs)) if out.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, given = zip(*pairs)
    return [*torch.autograd.grad(outputs, leaves, given, materialize_grads=True)]


def evaluate(function: Callable, inputs: Inputs, differentiable: tuple[str, ...] = (), seed: int = 0) -> Values:
    """The outputs of function(**inputs) and its gradients, by name."""
    call, leaves = bind_gradient(function, inputs, differentiable)
    torch.manual_seed(seed)  # ops that draw random numbers draw the same ones in every run
    with torch.set_grad_enabled(bool(leaves)):
        paths = pytree.tree_flatten_with_path(call())[0]
    values = {"out" + pytree.keystr(path): out for path, out in paths}
    if leaves:
        gradients = differentiate([out for out in values.values() if is_float(out)], list(leaves.values()))
        values |= {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: (value.to_dense() if value.is_sparse else value).detach() for name, value in values.items()}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch fills uninitialised memory with NaN (or the largest integer), so that an unwritten output shows."""
    mode = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
            yield
    finally:
        torch.set_deterministic_debug_mode(mode[0])
        torch.utils.deterministic.fill_uninitialized_memory = mode[1]


def errors(value: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """|value − exact| by entry: 0 for equal infinities and for two NaNs, inf for any other that is not finite."""
    rounded = exact.to(value.dtype).double()  # beyond the dtype's range the exact value is an infinity
    exact = torch.where(rounded.isinf(), rounded, exact.double())
    value = value.double()
    same = (value == exact) | (value.isnan() & exact.isnan())
    return torch.where(same, 0.0, (value - exact).abs().nan_to_num(math.inf, math.inf))


def largest(values: torch.Tensor) -> float:
    """The largest absolute finite value, 0 when there is none."""
    values = values[values.isfinite()].abs()
    return float(values.max()) if values.numel() else 0.0


class Expected:
    """What an op must give for some inputs. The references run once, when the first result is judged."""

    def __init__(self, op: Op, inputs: Inputs, backward: bool = True, slack: float = 1.0):
        self.op, self.inputs, self.slack = op, inputs, slack
        self.differentiable = op.differentiable if backward else ()
        self.double = any(value.dtype == torch.float64 for value in float_leaves(inputs))

    def reference(self, inputs: Inputs) -> Values:
        return evaluate(self.op.reference, inputs, self.differentiable)

    @functools.cached_property
    def exact(self) -> Values:
        return self.reference(cast(self.inputs, torch.float64))

    @functools.cached_property
    def eager(self) -> Values:
        return self.reference(self.inputs)

    @functools.cached_property
    def allowed(self) -> dict[str, float]:
        eager, exact, scale = self.eager, self.exact, 1.0
        if self.double:  # nothing is more exact than fp64 itself: its error is that of fp32 in proportion
            single = cast(self.inputs, torch.float32)
            eager, exact = self.reference(single), self.reference(cast(single, torch.float64))
            scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            scale *= 1.5  # and "exact" is off by as much itself: one more share beside the rule's two
        largest_gradient = max(
            (largest(value) for name, value in self.exact.items() if name.startswith("grad ")), default=0
        )
        allowed = {}
        for name, value in self.exact.items():
            if not is_float(value):
                allowed[name] = 0.0
                continue
            size, eps = largest(value), torch.finfo(self.eager[name].dtype).eps  # fp32 beside bf16 is held to fp32
            if name.startswith("grad "):
                size = size or largest_gradient  # one that cancels to zero everywhere rounds as its terms do
            # largest() leaves out the entries where eager itself overflows: they allow nothing.
            rule = 2 * scale * largest(errors(eager[name], exact[name])) + ULPS * eps * size
            allowed[name] = self.slack * rule
        return allowed

    def judge(self, function: Callable, poison: bool = True) -> list[Result]:
        """Hold another implementation of the op to the rule."""
        with poisoned() if poison else contextlib.nullcontext():
            values = evaluate(function, self.inputs, self.differentiable)
        assert values.keys() == self.exact.keys(), f"{self.op.name} returned {[*values]}, expected {[*self.exact]}"
        return [Result(name, self._error(name, value), self.allowed[name]) for name, value in values.items()]

    def _error(self, name: str, value: torch.Tensor) -> float:
        exact, eager = self.exact[name], self.eager[name]
        if (value.shape, value.dtype) != (eager.shape, eager.dtype):
            return math.inf
        if not is_float(value):  # the number of wrong entries; near ties, fp64 orders differently
            return float(((value != exact) & (value != eager)).sum())
        return float(errors(value, exact).max()) if value.numel() else 0.0


def compare(
    op: Op, inputs: Inputs, backend: str, backward: bool = True, poison: bool = True, slack: float = 1.0
) -> list[Result]:
    """Run one backend of an op and hold every output and gradient to the rule; raises BackendDeclined."""
    with use_backend(backend):
        return Expected(op, inputs, backward, slack).judge(op.function, poison)


def compare_sample(
    op: Op,
    sample: Sample,
    dtype: torch.dtype,
    device: str,
    backend: str,
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> list[Result]:
    """compare() on the sample as drawn now and then changed. A small excess is a finding if fresh draws repeat it.

    Both sides of the rule are one draw of rounding: in about one case of a thousand eager's is lucky enough, where the
    exact values cancel, for ours to look wrong by a third. A wrong kernel is wrong on the next draw as well.
    """
    seed = torch.initial_seed()

    def draw(attempt: int) -> tuple[list[Result], float]:
        torch.manual_seed(seed + attempt)
        results = compare(op, change(sample.make(dtype, device)), backend, slack=sample.slack)
        return results, max((result.share for result in results), default=0.0)

    results, worst = draw(0)
    if 1 < worst <= FLUKE:
        for attempt in range(1, 1 + REDRAWS):
            results, worst = draw(attempt)
            if worst > 1:
                break
    return results


# ------------------------------------------------------------------------------------------------ command line


def op_argument(name: str) -> str:
    if name not in OPS:
        raise argparse.ArgumentTypeError(f"no op is named {name!r}; there are {', '.join(sorted(OPS))}")
    return name


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def dtype_argument(name: str) -> torch.dtype:
    for dtype in (*FLOATS, torch.float64):
        if name in (dtype_name(dtype), str(dtype).removeprefix("torch.")):
            return dtype
    raise argparse.ArgumentTypeError(f"expected fp32, bf16, fp16 or fp64, got {name!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ops", nargs="*", type=op_argument, metavar="OP", help="ops to check (default: all)")
    parser.add_argument("--backend", choices=BACKENDS[1:], help="only this one (default: all kernels that run here)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: the CPU, and the GPU if there is one)")
    parser.add_argument("--dtype", type=dtype_argument, help="fp32, bf16, fp16 or fp64 (default: each op's own)")
    parser.add_argument("--seed", type=int, help="of the random inputs (default: a new one, which is printed)")
    parser.add_argument("--json", metavar="F", help="write every single result to this file")


@dataclass
class Tally:
    """A row of the table: one op, device, backend and dtype."""

    passed: int = 0
    tried: int = 0
    worst: dict[str, float] = field(default_factory=lambda: {"out": math.nan, "grad": math.nan})

    def add(self, results: list[Result]) -> None:
        self.tried += 1
        self.passed += all(result.ok for result in results)
        for result in results:
            kind = "grad" if result.name.startswith("grad ") else "out"
            self.worst[kind] = max(result.share, self.worst[kind]) if self.worst[kind] >= 0 else result.share


def main(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    console.width = max(console.width, 100)
    seed = torch.seed() % 2**31 if args.seed is None else args.seed
    devices = [args.device] if args.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    plan = []
    skips: collections.Counter[str] = collections.Counter()
    for op in (OPS[name] for name in args.ops or sorted(OPS)):
        wanted = [args.backend] if args.backend else list(op.supports)
        for backend in wanted:
            here = [device for device in devices if can_run(op, backend, device)]
            plan += [(op, device, backend) for device in here]
            if not here:
                reason = available_backends(op.name)[backend] or unavailable(BACKENDS.index(backend), devices[0])
                skips[f"{op.name}, {backend}: {reason}"] += 1

    tallies: dict[tuple, Tally] = collections.defaultdict(Tally)
    records, failures = [], []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(len(op.samples) for op, *_ in plan))
        for op, device, backend in plan:
            for sample in op.samples:
                progress.update(task, advance=1, description=f"{op.name} {backend} {sample}")
                for dtype in op.dtypes if args.dtype is None else {args.dtype} & {*op.dtypes}:
                    where = {"op": op.name, "device": device, "backend": backend, "dtype": dtype_name(dtype)}
                    torch.manual_seed(seed)
                    try:
                        results = compare_sample(op, sample, dtype, device, backend)
                    except BackendDeclined as declined:
                        skips[f"{dtype_name(dtype)}: {declined}"] += 1
                        records.append({**where, "sample": str(sample), "skipped": str(declined)})
                        continue
                    except Exception as error:
                        raise RuntimeError(
                            f"{', '.join(where.values())}, sample {str(sample)!r}, seed {seed}"
                        ) from error
                    tallies[tuple(where.values())].add(results)
                    failures += [(*where.values(), str(sample), result) for result in results if not result.ok]
                    records.append(
                        {**where, "sample": str(sample), "results": [{**asdict(r), "ok": r.ok} for r in results]}
                    )

    report(console, tallies, skips, failures)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"seed": seed, "samples": records}, file, indent=1)
    if not tallies:
        console.print("[red]Nothing could be checked[/]: no kernel runs here for what was asked.")
        return 1
    verdict = f"[red]{len(failures)} results are wrong[/]" if failures else "[green]All is right[/]"
    console.print(f"{verdict} (seed {seed}).")
    return int(bool(failures))


def can_run(op: Op, backend: str, device: str) -> bool:
    known = backend == "reference" or backend in op.supports
    return known and unavailable(BACKENDS.index(backend), device) is None


def report(console, tallies: dict[tuple, Tally], skips: collections.Counter, failures: list) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    columns = ("op", "device", "backend", "dtype")
    table = Table(*columns, title="error / allowed, the worst over the samples", box=box.SIMPLE_HEAD)
    for header in ("passed", "forward", "backward"):
        table.add_column(header, justify="right")
    for key, tally in sorted(tallies.items()):
        style = None if tally.passed == tally.tried else "red"
        shares = ["–" if math.isnan(share) else f"{share:.2f}" for share in tally.worst.values()]
        table.add_row(*key, f"{tally.passed}/{tally.tried}", *shares, style=style)
    if tallies:
        console.print(table)
    for reason, count in sorted(skips.items()):
        console.print(f"[yellow]skipped[/] {f'{count} × ' if count > 1 else ''}{escape(reason)}", highlight=False)
    for *where, sample, result in failures:
        console.print(f"[red]wrong[/] {', '.join(where)}, {escape(sample)}: {escape(str(result))}", highlight=False)
