"""The compiled kernels: shared libraries of which this machine loads what it can run.

`pykernels._C` is a tiny module that knows the processor; `_C_<level>` holds every CPU kernel compiled for that
instruction-set level and registers them under torch.ops.pykernels when it is loaded. `_cuda` holds the CUDA kernels,
as entries under torch.ops.pykernels_cuda that write into tensors made here; it is loaded where torch sees a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import json
import pathlib
import warnings

import torch

LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")  # ascending; Arm has its NEON in the baseline
HERE = pathlib.Path(__file__).parents[1]  # the package, where setup.py puts the libraries


@functools.cache
def left_out() -> dict[str, str]:
    """What the build went without, "cpu" or "cuda", and why, as setup.py wrote it."""
    record = HERE / "left_out.json"
    return json.loads(record.read_text()) if record.exists() else {}


def _absent(kernels: str) -> str:
    why = left_out().get(kernels.lower())
    return f"the {kernels} kernels are left out: {why}" if why else f"the {kernels} kernels were not built in {HERE}"


@functools.cache
def load() -> tuple[str | None, str | None]:
    """(level that was loaded, None), or (None, why there is none)."""
    if not any(HERE.glob("_C.abi3.*")):
        return None, _absent("CPU")
    try:
        supported = importlib.import_module("pykernels._C").cpu_level()
    except ImportError as error:
        return None, f"the CPU kernels do not load: {error}"
    for level in LEVELS[LEVELS.index(supported) :: -1]:
        for library in HERE.glob(f"_C_{level}.abi3.*"):
            try:
                torch.ops.load_library(str(library))
            except OSError as error:
                return None, f"{library.name} does not load: {error}"
            return level, None
    return None, f"no library for {supported} or below in {HERE}"


def level() -> str | None:
    """The instruction-set level in use, or None without compiled kernels."""
    return load()[0]


@functools.cache
def missing() -> str | None:
    """Why there are no CPU kernels, or None; warns once."""
    reason = load()[1]
    if reason:
        warnings.warn(f"pykernels: {reason}. CPU tensors use the PyTorch reference, which is slow.", stacklevel=2)
    return reason


# ------------------------------------------------------------------------------------------------ CUDA


def cuda_on_host() -> bool:
    """Whether the CUDA kernels were compiled for the CPU and loaded before this package, as its tests do."""
    names = torch._C._dispatch_get_all_op_names()
    return any(
        n.startswith("pykernels_cuda::") and torch._C._dispatch_has_kernel_for_dispatch_key(n, "CPU") for n in names
    )


def cuda_library() -> pathlib.Path | None:
    """The library of CUDA kernels, if it was built."""
    return next(HERE.glob("_cuda.abi3.*"), None)


@functools.cache
def _cuda_opened() -> tuple[ctypes.CDLL | None, str | None]:
    """(the loaded library, None), or (None, why there is none). Loading it takes no GPU."""
    library = cuda_library()
    if library is None:
        return None, _absent("CUDA")
    try:
        torch.ops.load_library(str(library))
        return ctypes.CDLL(str(library)), None
    except OSError as error:
        return None, f"{library.name} does not load: {error}"


def cuda_architectures() -> list[int]:
    """The compute capabilities that the CUDA kernels were compiled for, 800 for 8.0; none without their library."""
    library = _cuda_opened()[0]
    if library is None:
        return []
    first = ctypes.addressof(ctypes.c_int.in_dll(library, "pykernels_cuda_architectures"))
    return [*itertools.takewhile(bool, ctypes.cast(first, ctypes.POINTER(ctypes.c_int)))]


def device(name: str) -> torch.device:
    """With an index, as tensors have it: GPUs of one machine differ."""
    named = torch.device(name)
    if named.type == "cuda" and named.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return named


def cuda_missing(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on tensors of that device, or None. Loads them if they can."""
    if device.type == "cpu":
        return None if cuda_on_host() else "it runs on CUDA tensors"
    if cuda_library() is None:
        return _cuda_opened()[1]
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU of compute capability 8.0 or newer"
    library, reason = _cuda_opened()
    if library is None:
        return reason
    library.pykernels_cuda_missing.restype = ctypes.c_char_p
    reason = library.pykernels_cuda_missing(device.index)
    return f"the CUDA kernels do not run on this GPU: {reason.decode()}" if reason else None


def cuda(entry: str, *arguments) -> None:
    """Call torch.ops.pykernels_cuda.<entry>(*arguments, stream) on the current stream of the first tensor's device."""
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    getattr(torch.ops.pykernels_cuda, entry)(*arguments, stream)
