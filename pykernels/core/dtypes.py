"""Which dtypes the ops take, what they accumulate in, and what autocast makes of their arguments."""

from __future__ import annotations

from typing import Any

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float64, *FLOATS)
INTEGERS = (torch.int32, torch.int64)


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and states: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """t.to(dtype), without the call into torch where there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


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
