"""The compiled CPU kernels: one shared library per instruction-set level, of which this machine loads the best.

`pykernels._C` is a tiny module that knows the processor; `_C_<level>` holds every kernel compiled for that level
against torch's stable ABI and registers them under torch.ops.pykernels when it is loaded.
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import warnings

import torch

LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")  # ascending; Arm has its NEON in the baseline


@functools.cache
def load() -> tuple[str | None, str | None]:
    """(level that was loaded, None), or (None, why there is none)."""
    try:
        supported = importlib.import_module("pykernels._C").cpu_level()
    except ImportError as error:
        return None, f"the CPU kernels were not built (no C++ compiler at install?): {error}"
    here = pathlib.Path(__file__).parent
    for level in LEVELS[LEVELS.index(supported) :: -1]:
        for library in here.glob(f"_C_{level}.abi3.*"):
            try:
                torch.ops.load_library(str(library))
            except OSError as error:
                return None, f"{library.name} does not load: {error}"
            return level, None
    return None, f"no library for {supported} or below beside {here.name}/native.py"


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
