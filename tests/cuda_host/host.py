"""The CUDA kernels compiled for the CPU, in a process that asks for them: CUDA_ON_HOST=1, or =sanitize by run.py."""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from . import build

MODE = os.environ.get("CUDA_ON_HOST")


@functools.cache
def load() -> ctypes.CDLL:
    """Build the library if need be and register its entries, which must happen before pykernels is imported."""
    path = str(build.build(sanitize=MODE == "sanitize"))
    torch.ops.load_library(path)
    return ctypes.CDLL(path)


def set_order(order: str) -> None:
    """In which the kernels' threads run from now on: "forward", "reverse" or "random:<seed>"."""
    if not load().cuda_host_order(order.encode()):
        raise ValueError(f"order: expected forward, reverse or random:<seed>, got {order!r}")
