"""The backends of an op: which of them a machine has, which of them a call gets."""

from __future__ import annotations

import functools
import importlib
import os
import re
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import native

if TYPE_CHECKING:
    from .declaration import Op

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")  # a backend's id, as torch ops receive it, is its place here
AUTO, REFERENCE, CPU, TRITON, CUDA = range(5)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: its kernels then run on CPU tensors
ON_HOST = native.cuda_on_host()  # so do the CUDA kernels, compiled for the CPU

TRITON_NEEDED = "3.6"  # what torch 2.10 pins, and the oldest that compiles every kernel


class BackendDeclined(RuntimeError):
    """A backend that was asked for by name cannot serve this call; the message ends in its reason."""


def constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which imports Dynamo: as long as torch itself. It leaves this mark."""
    function._dynamo_marked_constant = True
    return function


# tools/self_test.py's, which knows the kernels that this machine has tested: both get (op's name, backend, arguments).
verify: Callable[[str, int, tuple], str | None] | None = None  # why not to use it, where the user asked for tests
passed: Callable[[str, int, tuple], bool] = lambda *_: False


class _Level:
    """What was selected outside every `with` (owner None), or within that of one use_backend."""

    def __init__(self, owner: use_backend | None, backend: int):
        self.owner = owner
        self.calls: list[tuple[Callable, int]] = [(lambda: None, backend)]  # (their use_backend or None, backend)

    def add(self, call: use_backend, backend: int) -> None:
        """A call, which a `with` may yet take back. Of calls whose objects are gone only the last still matters."""
        self.calls.append((weakref.ref(call), backend))
        self.calls = [
            one for one, after in zip(self.calls, [*self.calls[1:], self.calls[-1]]) if one[0]() or after[0]()
        ]

    def take_back(self, call: use_backend) -> None:
        self.calls = [one for one in self.calls if one[0]() is not call]


class _Selection(threading.local):
    """Of one thread. torch.compile guards on `override`, read in the thread that calls."""

    def __init__(self):
        self.override = AUTO
        self.levels = [_Level(None, AUTO)]

    def settle(self) -> None:
        self.override = self.levels[-1].calls[-1][1]


_selection = _Selection()


class use_backend:
    """Select a backend by name in this thread: from now on (called), or within `with`. "auto" chooses by device.

    As torch.set_grad_enabled, it is in force from the call on: until the `with` around the call ends, if there is one.
    One object may be entered several times, also at once, and blocks that overlap may end in any order.

    Raises ValueError for an unknown name. A backend that cannot run a call raises RuntimeError at that call.
    Under torch.compile the choice is part of the guard: changing it recompiles. It is made outside of what is compiled.
    """

    def __init__(self, name: str):
        if name not in BACKENDS:
            raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got {name!r}")
        if torch.compiler.is_dynamo_compiling():  # in this thread
            raise RuntimeError("use_backend: expected to be called outside of the function that torch.compile traces")
        self._backend = BACKENDS.index(name)
        _selection.levels[-1].add(self, self._backend)
        _selection.settle()

    def __enter__(self) -> None:
        for level in _selection.levels:
            level.take_back(self)
        _selection.levels.append(_Level(self, self._backend))
        _selection.settle()

    def __exit__(self, *_) -> None:
        levels = _selection.levels
        last = max((place for place, level in enumerate(levels) if level.owner is self), default=None)
        if last is None:
            raise RuntimeError("use_backend: expected to be left in the thread that entered it")
        del levels[last]
        _selection.settle()


@constant
def unavailable(backend: int, device: torch.device | str) -> str | None:
    """Why a backend cannot run on that device, or None if it can. "cuda" is the current one."""
    return _unavailable(backend, native.device(device) if isinstance(device, str) else device)


@functools.cache
def _unavailable(backend: int, device: torch.device) -> str | None:
    if backend == REFERENCE:
        return None
    if backend == CPU:
        return "it runs on CPU tensors" if device.type != "cpu" else native.missing()
    if backend == TRITON:
        try:
            version = importlib.import_module("triton").__version__
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        if _release(version) < _release(TRITON_NEEDED):
            return f"it needs Triton {TRITON_NEEDED} or newer; this is {version}"
        if device.type == "cpu":
            return None if INTERPRET else "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 first"
        if device.type != "cuda" or not torch.cuda.is_available():
            return "torch sees no GPU"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
        return None
    return native.cuda_missing(device)


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def decline(op: Op, backend: int, device: torch.device, arguments: tuple) -> str | None:
    """Why a backend cannot serve a call with these kernel arguments, or None if it can."""
    if backend == REFERENCE:
        return None
    supports = op.supports.get(BACKENDS[backend])
    if supports is None:
        return f"{op.name} has no {BACKENDS[backend]} kernel"
    reason = unavailable(backend, device) or supports(*arguments)
    return verify(op.name, backend, arguments) if reason is None and verify else reason


def choose(op: Op, device: torch.device, arguments: tuple) -> int:
    """The backend for one call: the one asked for by name, else the device's own, else the reference."""
    override = _selection.override
    kind = device.type
    if kind == "meta":
        return REFERENCE if override == REFERENCE else CPU  # shapes alone: the op's fake implementation
    if override != AUTO:
        reason = decline(op, override, device, arguments)
        if reason is not None:
            raise BackendDeclined(f"{op.name}: backend {BACKENDS[override]!r} cannot run this call: {reason}")
        return override
    if kind == "cpu":
        return REFERENCE if decline(op, CPU, device, arguments) else CPU
    for backend in (CUDA, TRITON) if op.cuda_first else (TRITON, CUDA):
        # Our CUDA kernels have run on the CPU alone: a GPU uses those that it has tested.
        if decline(op, backend, device, arguments) is None and (backend == TRITON or passed(op.name, CUDA, arguments)):
            return backend
    return REFERENCE


def triton_declines(first: torch.Tensor, *rest) -> str | None:
    """`supports` of a Triton kernel that takes whatever Triton does; `first` has the dtype of all floats."""
    if first.dtype == torch.float64 and not INTERPRET:
        return "GPUs have no fast fp64 matrix units: it takes fp32, bf16 and fp16"
    if first.dtype == torch.bfloat16 and INTERPRET:
        return "Triton's interpreter has no bf16 arithmetic"
    return None
