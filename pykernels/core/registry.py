"""One declaration per op: tests, check, bench, audit and the README table all follow from it.

An op file declares two things. `torch_op` puts a schema under torch.ops.pykernels with its fake implementation,
its gradient and its GPU implementations (the CPU kernel registers itself when its library is loaded); `register`
describes the public function: reference, samples, workloads, which backends serve which inputs.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from . import native

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")  # a backend's id, as torch ops receive it, is its place here
AUTO, REFERENCE, CPU, TRITON, CUDA = range(5)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: its kernels then run on CPU tensors
ON_HOST = native.cuda_on_host()  # so do the CUDA kernels, compiled for the CPU

TRITON_NEEDED = "3.6"  # what torch 2.10 pins, and the oldest that compiles every kernel

NO_FORWARD_MODE = '{name}: forward-mode differentiation is not supported; within use_backend("reference") it is'

Inputs = dict[str, Any]  # the public function's arguments by name
P = ParamSpec("P")
R = TypeVar("R")


class BackendDeclined(RuntimeError):
    """A backend that was asked for by name cannot serve this call; the message ends in its reason."""


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
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Op:
    """A public function and everything that is known of it."""

    name: str
    function: Callable
    reference: Callable  # the same signature, in pure PyTorch
    body: Callable  # what both are made of, with the function to `run` first
    kernel: Callable  # torch op: (*kernel arguments, backend)
    supports: dict[str, Callable[..., str | None]]  # backend → (kernel arguments → None, or why it declines them)
    samples: tuple[Sample, ...]
    workloads: tuple[Workload, ...]
    differentiable: tuple[str, ...]  # arguments with a gradient; empty: no gradient at all
    random: bool  # draws from torch's generator
    dtypes: tuple[torch.dtype, ...]
    cuda_first: bool  # where a GPU has tested its CUDA kernels, they come before Triton's

    @property
    def summary(self) -> str:
        """The first sentence of the public docstring: the op's row in the README table."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


def constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, which imports Dynamo: as long as torch itself. It leaves this mark."""
    function._dynamo_marked_constant = True
    return function


OPS: dict[str, Op] = {}


def list_ops() -> list[str]:
    """Names of the registered ops, each both `pykernels.<name>` and `pykernels.reference.<name>`."""
    return sorted(OPS)


def register(
    body: Callable[Concatenate[Callable, P], R],
    *,
    kernel: Callable,
    reference: Callable,
    supports: dict[str, Callable[..., str | None]],
    samples: Iterable[Sample],
    workloads: Iterable[Workload] = (),
    differentiable: Iterable[str] = (),
    random: bool = False,
    dtypes: tuple[torch.dtype, ...] = (torch.float64, *FLOATS),
    cuda_first: bool = False,
) -> Callable[P, R]:
    """Declare an op and return its public function.

    `body(run, ...)` is the public function but for its first argument: it checks its arguments and calls
    `run(*kernel arguments)`. In the public function `run` chooses a backend and calls `kernel(*arguments, backend)`;
    in pykernels.reference's it is `reference` itself, so the two share every check and every default.
    """
    name = body.__name__.removeprefix("_")

    def run(*arguments):
        first = arguments[0]
        if not isinstance(first, torch.Tensor):
            first = next(a for a in arguments if isinstance(a, torch.Tensor))
        backend = choose(name, first.device, arguments)
        if backend == REFERENCE:
            return reference(*arguments)
        _refuse_forward_mode(name, arguments)
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
        function.__name__ = function.__qualname__ = name
        function.__module__ = module  # where pickle finds it
        return function

    OPS[name] = Op(
        name=name,
        function=bind(run, "pykernels"),
        reference=bind(reference, "pykernels.reference"),
        body=body,
        kernel=kernel,
        supports=supports,
        samples=tuple(samples),
        workloads=tuple(workloads),
        differentiable=tuple(differentiable),
        random=random,
        dtypes=dtypes,
        cuda_first=cuda_first,
    )
    return OPS[name].function


def _explain_call(name: str, signature: inspect.Signature, args: tuple, kwargs: dict) -> None:
    """TypeError in the caller's words if the arguments do not fit the signature."""
    unknown = [argument for argument in kwargs if argument not in signature.parameters]
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        near = difflib.get_close_matches(unknown[0], signature.parameters, 1, 0.4) if unknown else []
        raise TypeError(f"{name}() {error}{f'; did you mean {near[0]!r}?' if near else ''}") from None


def transforming() -> bool:
    """Whether a transform of torch.func is at work, whose wrappers hide what is inside."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@constant
def _tracing_gradient() -> bool:
    """Whether torch.compile is within a transform of torch.func other than vmap, which loops over what it traced."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


def wants_gradient(*arguments: Any) -> bool:
    """Whether a gradient may be asked of what is made of these."""
    if not torch.compiler.is_compiling() and transforming():
        return True
    if torch.is_grad_enabled():
        for a in arguments:  # a generator would take as long again
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


# ------------------------------------------------------------------------------------------------ backends

# first_use.py's
verify: Callable[[str, int, tuple], str | None] | None = None  # where the user asked for it
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


def decline(name: str, backend: int, device: torch.device, arguments: tuple) -> str | None:
    """Why a backend cannot serve a call with these kernel arguments, or None if it can."""
    if backend == REFERENCE:
        return None
    supports = OPS[name].supports.get(BACKENDS[backend])
    if supports is None:
        return f"{name} has no {BACKENDS[backend]} kernel"
    reason = unavailable(backend, device) or supports(*arguments)
    return verify(name, backend, arguments) if reason is None and verify else reason


def choose(name: str, device: torch.device, arguments: tuple) -> int:
    """The backend for one call: the one asked for by name, else the device's own, else the reference."""
    override = _selection.override
    kind = device.type
    if kind == "meta":
        return REFERENCE if override == REFERENCE else CPU  # shapes alone: the op's fake implementation
    if override != AUTO:
        reason = decline(name, override, device, arguments)
        if reason is not None:
            raise BackendDeclined(f"{name}: backend {BACKENDS[override]!r} cannot run this call: {reason}")
        return override
    if kind == "cpu":
        return REFERENCE if decline(name, CPU, device, arguments) else CPU
    for backend in (CUDA, TRITON) if OPS[name].cuda_first else (TRITON, CUDA):
        # Our CUDA kernels have run on the CPU alone: a GPU that would have them has to have tested them itself.
        if decline(name, backend, device, arguments) is None and (backend == TRITON or passed(name, CUDA, arguments)):
            return backend
    return REFERENCE


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


# ------------------------------------------------------------------------------------------------ torch ops

_library = torch.library.Library("pykernels", "DEF")
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {}  # torch op → backend → its Python implementation


def torch_op(
    schema: str, *, fake: Callable, implementations: dict[str, Callable], setup_context: Callable, backward: Callable
) -> Callable:
    """Define torch.ops.pykernels.<name>, whose last argument is the id of a backend.

    `implementations` are Python functions by backend name with the op's arguments; the CPU kernel is not among them.
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    qualified = f"pykernels::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    IMPLEMENTATIONS[name] = implementations

    def run(*args):  # an op whose backward has no CUDA kernel, or only where it is not faster, goes on in Triton
        named = BACKENDS[args[-1]]
        return on_own_device(implementations[named if named in implementations else "triton"], args)

    if implementations:
        _library.impl(name, run, "CUDA")
        if INTERPRET or ON_HOST:
            _share_cpu_key(name, run)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    op = getattr(torch.ops.pykernels, name).default

    def call(*args):
        if torch.compiler.is_compiling():
            if _tracing_gradient():
                raise NotImplementedError(f"{name}: torch.compile cannot trace its torch.func.grad: call that eagerly")
            return op(*args)
        return transformed.apply(*args) if transforming() else op(*args)

    transformed = _transformed(name, call, setup_context, backward)
    call.op = op
    return call


def _transformed(name: str, call: Callable, save: Callable, gradient: Callable) -> type[torch.autograd.Function]:
    """The op under torch.func: the same gradient, and vmap as a loop over the examples."""

    class Transformed(torch.autograd.Function):
        forward = staticmethod(call)
        setup_context = staticmethod(save)
        backward = staticmethod(gradient)

        @staticmethod
        def jvp(ctx, *_):
            raise NotImplementedError(NO_FORWARD_MODE.format(name=name))

        @staticmethod
        def vmap(info, in_dims, *args):
            def example(b):
                return (a if dim is None else a.select(dim, b) for a, dim in zip(args, in_dims))

            results = [call(*example(b)) for b in range(info.batch_size)]
            if isinstance(results[0], torch.Tensor):
                return torch.stack(results), 0
            stacked = tuple(map(torch.stack, zip(*results)))
            return stacked, (0,) * len(stacked)

    Transformed.__name__ = Transformed.__qualname__ = name
    return Transformed


def on_own_device(implementation: Callable, args: tuple):
    """implementation(*args) with the tensors' GPU as the current one, on which Triton launches wherever they are."""
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return implementation(*args)
    with torch.cuda.device(device):
        return implementation(*args)


def _share_cpu_key(name: str, run: Callable) -> None:
    """Where GPU kernels run on CPU tensors, these go to the Python implementations or to the native kernel as asked."""
    kernel = None if native.missing() else torch.library.get_kernel(f"pykernels::{name}", "CPU")

    def share(keyset, *args):
        return run(*args) if args[-1] in (TRITON, CUDA) or kernel is None else kernel.call_boxed(keyset, *args)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*verrid", category=UserWarning)  # it is meant
        _library.impl(name, share, "CPU", with_keyset=True, allow_override=True)


def second_order(
    function: Callable,
    primals: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """What a backward op's own backward returns, by composition from a function that torch can differentiate.

    The backward op took `grads` of function(*primals) to the gradients of the primals; given the `cotangents` of
    these, here are the gradients of its inputs (*grads, *primals): None for None and for integers.
    """

    def fresh(t):  # an alias of its own: the same tensor passed twice must not count twice
        if t is None or not t.is_floating_point():
            return t
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    def differentiable(t):
        return t is not None and t.is_floating_point()

    if transforming():
        return _transformed_second_order(function, primals, grads, cotangents)
    with torch.enable_grad():
        primals, grads = [*map(fresh, primals)], [*map(fresh, grads)]
        inputs = [*grads, *primals]
        pairs = [(out, grad) for out, grad in zip(function(*primals), grads) if grad is not None and out.requires_grad]
        asked = [(p, c) for p, c in zip(primals, cotangents) if c is not None and differentiable(p)]
        if not pairs or not asked:
            return [None] * len(inputs)
        outputs, seeds = zip(*pairs)
        first = torch.autograd.grad(outputs, [p for p, _ in asked], seeds, create_graph=True, materialize_grads=True)
        first = [(f, c.to(f.dtype)) for f, (_, c) in zip(first, asked) if f.requires_grad]
        if not first:
            return [None] * len(inputs)
        wanted = [t for t in inputs if differentiable(t)]
        second = torch.autograd.grad(
            [f for f, _ in first], wanted, [c for _, c in first], create_graph=True, allow_unused=True
        )
    found = iter(second)
    return [next(found) if differentiable(t) else None for t in inputs]


def _transformed_second_order(function, primals, grads, cotangents):
    """second_order under torch.func, whose levels torch.autograd.grad does not know."""

    def is_float(t):
        return t is not None and t.is_floating_point()

    floats = [place for place, p in enumerate(primals) if is_float(p)]
    given = [place for place, g in enumerate(grads) if g is not None]
    asked = [i for i, place in enumerate(floats) if cotangents[place] is not None]

    def forward(*values):
        outputs = function(*(values[floats.index(i)] if i in floats else p for i, p in enumerate(primals)))
        return tuple(outputs[place] for place in given)

    def first(values, seeds):
        found = torch.func.vjp(forward, *values)[1](seeds)
        return tuple(found[i] for i in asked)

    results = [None] * (len(grads) + len(primals))
    if given and asked:
        seeds = tuple(grads[place] for place in given)
        gradients, pullback = torch.func.vjp(first, tuple(primals[place] for place in floats), seeds)
        directions = tuple(cotangents[floats[i]].to(g.dtype) for i, g in zip(asked, gradients))
        for_values, for_seeds = pullback(directions)
        for place, value in zip(given, for_seeds):
            results[place] = value
        for place, value in zip(floats, for_values):
            results[len(grads) + place] = value
    return results


def triton_declines(first: torch.Tensor, *rest) -> str | None:
    """`supports` of a Triton kernel that takes whatever Triton does; `first` has the dtype of all floats."""
    if first.dtype == torch.float64 and not INTERPRET:
        return "GPUs have no fast fp64 matrix units: it takes fp32, bf16 and fp16"
    if first.dtype == torch.bfloat16 and INTERPRET:
        return "Triton's interpreter has no bf16 arithmetic"
    return None


def autocast(*tensors: Any) -> tuple:
    """Under autocast, an op's floating arguments go to its dtype together, as torch does for its own kernels."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    first = tensors[0]
    if not isinstance(first, torch.Tensor) or not is_autocast_on(first.device.type):
        return tensors
    floats = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if any(t.dtype == torch.float64 for t in floats) or not first.is_floating_point():
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors)


def is_autocast_on(device_type: str) -> bool:
    """torch.is_autocast_enabled, which raises for devices that have none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _refuse_forward_mode(name: str, arguments: tuple) -> None:
    """torch gives custom ops without a rule a zero tangent, silently; we raise instead."""
    if torch.autograd.forward_ad._current_level >= 0:
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    f'{name}: forward-mode differentiation is not supported; within use_backend("reference") it is'
                )
