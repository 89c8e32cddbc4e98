"""One declaration per op: tests, check, bench, audit and the README table all follow from it.

`public` stands on the public function and says what it is made of. `declare` adds samples and workloads, which live in
pykernels/samples/<module>.py and are drawn when they are first read.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from .backends import BACKENDS, CPU, CUDA, REFERENCE, TRITON, choose, unavailable
from .dtypes import DTYPES
from .torch_op import in_order_of, refuse_forward_mode, wants_gradient

Inputs = dict[str, Any]  # the public function's arguments by name
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Sample:
    """Inputs to try an op on: `make(dtype, device)` draws fresh ones from torch's global generator."""

    label: str
    make: Callable[[torch.dtype, str], Inputs]
    slack: float = 1.0  # multiplies the error that check.py allows; any other number has its reason beside it

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Workload(Sample):
    """A sample worth timing, with the least work that any implementation must do."""

    flops: Callable[[Inputs], float] = lambda inputs: 0.0
    bytes: Callable[[Inputs], float] = lambda inputs: 0.0  # least traffic: every input read once, every output written
    train: bool = False  # time forward and backward together
    train_flops: float = 3.5  # ... which cost this many times the forward's FLOPs
    quick: bool = False  # part of `bench --quick`
    representative: bool = False  # part of the audit's baseline
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


class _Stopped(Exception):
    def __init__(self, arguments: tuple):
        self.arguments = arguments


@dataclass(frozen=True)
class Op:
    """A public function and everything that is known of it."""

    name: str
    function: Callable
    reference: Callable  # the same signature, in pure PyTorch
    body: Callable  # the public function before its backend is chosen: its first argument runs the kernel
    kernel: Callable  # of (*kernel arguments, backend): a torch op, or made of several
    in_order: Callable[..., tuple]  # the kernel arguments as a tuple, however they were passed
    supports: dict[str, Callable[..., str | None]]  # backend → (kernel arguments → None, or why it declines them)
    differentiable: tuple[str, ...]  # arguments with a gradient; empty: no gradient at all
    dtypes: tuple[torch.dtype, ...]
    cuda_first: bool  # where a GPU has tested its CUDA kernels, they come before Triton's

    @property
    def summary(self) -> str:
        """The first sentence of the public docstring: the op's row in the README table."""
        return (self.function.__doc__ or "").strip().split("\n")[0]

    def arguments(self, **inputs: Any) -> tuple:
        """The kernel arguments that the public function makes of its own."""

        def stop(*args, **named):
            raise _Stopped(self.in_order(*args, **named))

        try:
            self.body(stop, **inputs)
        except _Stopped as stopped:
            return stopped.arguments
        raise AssertionError(f"{self.name} ran no kernel")

    @property
    def module(self) -> str:
        """The name that the op's file has on every floor."""
        return self.body.__module__.split(".")[-1]

    @property
    def samples(self) -> tuple[Sample, ...]:
        return self._declared[0]

    @property
    def workloads(self) -> tuple[Workload, ...]:
        return self._declared[1]

    @property
    def _declared(self) -> tuple[tuple[Sample, ...], tuple[Workload, ...]]:
        if self.name not in _DECLARED:
            importlib.import_module(f"pykernels.samples.{self.module}")
        return _DECLARED[self.name]


OPS: dict[str, Op] = {}
_DECLARED: dict[str, tuple[tuple[Sample, ...], tuple[Workload, ...]]] = {}


def list_ops() -> list[str]:
    """Names of the registered ops, each both `pykernels.<name>` and `pykernels.reference.<name>`."""
    return sorted(OPS)


def public(
    *,
    kernel: Callable,
    reference: Callable,
    supports: dict[str, Callable[..., str | None]],
    differentiable: Iterable[str] = (),
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    cuda_first: bool = False,
) -> Callable[[Callable[Concatenate[Callable, P], R]], Callable[P, R]]:
    """Make an op's public function of one with `run` as its first argument.

    That function checks its arguments and calls `run` with those of `reference`, whose defaults hold. In the public
    function `run` chooses a backend and calls `kernel(*arguments, backend)`; in pykernels.reference's it is `reference`
    itself, so the two share every check and every default.
    """
    in_order = in_order_of(reference)

    def decorate(body: Callable[Concatenate[Callable, P], R]) -> Callable[P, R]:
        name = body.__name__

        def run(*args, **named):
            arguments = in_order(*args, **named)
            first = arguments[0]
            if not isinstance(first, torch.Tensor):
                first = next(a for a in arguments if isinstance(a, torch.Tensor))
            backend = choose(OPS[name], first.device, arguments)
            if backend == REFERENCE:
                return reference(*arguments)
            refuse_forward_mode(name, arguments)
            if torch.compiler.is_compiling() or wants_gradient(*arguments):
                return kernel(*arguments, backend)
            with torch._C._AutoDispatchBelowAutograd():  # an autograd formula in Python costs 7 µs a call even unused
                return kernel(*arguments, backend)

        signature = inspect.signature(body)
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])

        def bind(runner: Callable, module: str) -> Callable[P, R]:
            @functools.wraps(body)
            def function(*args: P.args, **kwargs: P.kwargs) -> R:
                try:
                    return body(runner, *args, **kwargs)
                except TypeError:
                    _explain_call(name, signature, args, kwargs)
                    raise

            function.__signature__ = signature
            function.__module__ = module  # where pickle finds it
            return function

        function = bind(run, "pykernels")
        OPS[name] = Op(
            name=name,
            function=function,
            reference=bind(reference, "pykernels.reference"),
            body=body,
            kernel=kernel,
            in_order=in_order,
            supports=supports,
            differentiable=tuple(differentiable),
            dtypes=dtypes,
            cuda_first=cuda_first,
        )
        return function

    return decorate


def declare(function: Callable, *, samples: Iterable[Sample], workloads: Iterable[Workload] = ()) -> None:
    """Say on which inputs an op is tried and timed."""
    _DECLARED[function.__name__] = tuple(samples), tuple(workloads)


def reference_of(function: Callable[P, R]) -> Callable[P, R]:
    """The reference of a public function, with its name and signature."""
    return OPS[function.__name__].reference


def _explain_call(name: str, signature: inspect.Signature, args: tuple, kwargs: dict) -> None:
    """TypeError in the caller's words if the arguments do not fit the signature."""
    unknown = [argument for argument in kwargs if argument not in signature.parameters]
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        near = difflib.get_close_matches(unknown[0], signature.parameters, 1, 0.4) if unknown else []
        raise TypeError(f"{name}() {error}{f'; did you mean {near[0]!r}?' if near else ''}") from None


def available_backends(op: str) -> dict[str, str | None]:
    """Backend → None if it can run `op` on this machine, else the reason why not."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {', '.join(list_ops())}, got {op!r}")
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, str | None] = {}
    for backend in (REFERENCE, CPU, TRITON, CUDA):
        name = BACKENDS[backend]
        if backend != REFERENCE and name not in OPS[op].supports:
            report[name] = f"{op} has no {name} kernel"
        else:
            report[name] = unavailable(backend, "cpu" if backend == CPU else gpu)
    return report
