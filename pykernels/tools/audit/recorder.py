"""What a real launch would compile, learnt on a machine without a GPU.

The public function runs on CPU tensors with every torch op of ours routed to its Triton implementation. A driver that
only names a target stands in for the GPU, and each launch is noted with the signature, constants and attributes
(divisible by 16, equal to 1) that Triton derives from those very arguments. Nothing is executed.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...core import backends, declaration, torch_op
from .model import GPUS


@dataclass
class Launch:
    """One kernel as Triton would compile it: enough to compile it again, in another process too."""

    module: str
    kernel: str
    target: str
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    options: dict[str, Any]
    op: str = ""
    dtype: str = ""
    inputs: list[str] = field(default_factory=list)  # labels of the samples that reach it
    intensity: float | None = None  # FLOPs a byte of the first of them, if it is a workload
    backward: bool = False  # only the gradient launches it

    @property
    def key(self) -> str:
        """Equal for launches that compile to the same code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return repr((self.module, self.kernel, self.target, *(sorted(part.items()) for part in parts)))

    @property
    def function(self):
        return getattr(importlib.import_module(self.module), self.kernel)

    @property
    def settings(self) -> dict[str, Any]:
        """The kernel's own constexpr arguments by name; arguments that Triton made constant are not among them."""
        declared = [p.name for p in self.function.params if p.is_constexpr]
        names = {(i,): name for i, name in enumerate(self.signature)}
        return {names[at]: value for at, value in self.constants.items() if names.get(at) in declared}

    def compile(self):
        """Triton's compiled kernel, from its cache on disk if it is there."""
        import triton
        from triton.compiler import ASTSource

        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=gpu_target(self.target), options=self.options)


def gpu_target(name: str):
    """Triton's name for sm_90 and the like."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


class Driver:
    """What host code may ask of Triton's active driver, answered for a GPU that is not there."""

    def __init__(self, target: str):
        self.target, self.utils = target, self

    def get_current_target(self):
        return gpu_target(self.target)

    def get_current_device(self):
        return f"{self.target}, not there"  # Triton keeps one kernel cache a device: ours must not meet a real one's

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device=None):
        gpu = GPUS[self.target]
        return dict(max_shared_mem=gpu.shared, multiprocessor_count=gpu.units, warpSize=gpu.lanes)


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Within, a Triton kernel that is launched lands in the list instead of on a GPU."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(function, key, signature, device, constants, options, attributes, warmup):
        where = (function.module, function.fn.__qualname__, target)
        launches.append(Launch(*where, signature, constants, attributes, dict(vars(options))))

    with _replaced(driver, "_active", Driver(target)), _replaced(JITFunction, "_do_compile", note):
        yield launches


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _TritonOnAnyDevice(TorchDispatchMode):
    """Calls the Triton implementation of each of our torch ops, below autograd, whatever the tensors' device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pykernels":
            return torch_op.IMPLEMENTATIONS[function._opname]["triton"](*args)
        return function(*args, **(kwargs or {}))


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def record(op: declaration.Op, sample: declaration.Sample, dtype: torch.dtype, targets: Iterable[str]) -> list[Launch]:
    """The launches of one op on one sample, forward and backward, for each target.

    Raises backends.BackendDeclined where the Triton backend would.
    """
    inputs = sample.make(dtype, "cpu")
    intensity = sample.flops(inputs) / (sample.bytes(inputs) or 1) if isinstance(sample, declaration.Workload) else None
    for name in op.differentiable:
        inputs[name] = tree_map_only(torch.Tensor, _leaf, inputs.get(name))
    leaves = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    noted = []
    for target in targets:
        with recording(target) as launches, contextlib.ExitStack() as stack:
            stack.enter_context(_replaced(backends, "unavailable", lambda backend, device_type: None))
            stack.enter_context(backends.use_backend("triton"))
            stack.enter_context(_TritonOnAnyDevice())
            results = [t for t in tree_leaves(op.function(**inputs)) if t.requires_grad]
            forward = len(launches)
            if results:
                torch.autograd.grad(results, leaves, [torch.empty_like(t) for t in results], allow_unused=True)
        for place, launch in enumerate(launches):
            launch.backward = place >= forward
            launch.op, launch.dtype = op.name, str(dtype).removeprefix("torch.")
            launch.inputs, launch.intensity = [sample.label], intensity
        noted += launches
    return noted
