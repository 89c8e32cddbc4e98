"""The one vocabulary of argument errors: the argument's name, what was expected, what came.

A message is made when its check has failed and not before: formatting a size would fix it under torch.compile, and a
call at batch 1 takes 20 µs. So `expected` is a template, and the sizes it names come beside it:

    expect(keys.size(1) == d, "keys", "[M, {d}] to match query's last dimension", keys, d=d)
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch

NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def describe(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else repr(value)


def expect(condition: bool, name: str, expected: str, value: Any, **sizes: Any) -> None:
    """ValueError `name: expected …, got …` unless the condition holds; a tensor is shown by its shape."""
    if not condition:
        raise ValueError(f"{name}: expected {expected.format(**sizes)}, got {describe(value)}")


def expect_type(condition: bool, name: str, expected: str, value: Any, **sizes: Any) -> None:
    """TypeError `name: expected …, got …` unless the condition holds; a tensor is shown by its dtype."""
    if not condition:
        got = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected {expected.format(**sizes)}, got {got}")


def expect_tensor(value: Any, name: str, layout: str, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """A tensor of the layout's rank, written as "[B, H, N, D]", of one of the dtypes."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected a dense tensor {layout}, got {_kind(value)}")
    rank = layout.count(",") + 1
    if value.dim() != rank:
        raise ValueError(f"{name}: expected rank {rank} {layout}, got {describe(value)}")
    if dtypes is not None:
        expect_dtype(value, name, dtypes)


def expect_dtype(value: torch.Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {value.dtype}")


def expect_shape(value: Any, name: str, shape: tuple, other: str) -> None:
    """A tensor of exactly this shape, which follows from the other arguments."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)} to match {other}, got {describe(value)}")


def expect_alike(value: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    """The same device and dtype as another tensor."""
    expect_device(value, name, other, other_name)
    if value.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {other.dtype}, got {value.dtype}")


def expect_device(value: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected {other_name}'s device {other.device}, got {value.device}")


def expect_number(value: Any, name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite real number from low up to, not including, high. A tensor would lose its gradient without a word."""
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a number, which has no gradient, got a tensor: multiply by it outside")
    if not isinstance(value, NUMBERS):
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        value = float(value)  # of numpy's scalars, of fractions
    # Comparisons, because math.isfinite cannot be traced; -inf is the one number below every bound that < lets through.
    if not (low <= value < high) or value == -math.inf:
        bounds = "" if low == -math.inf else f" ≥ {low:g}" if high == math.inf else f" from {low:g} to below {high:g}"
        raise ValueError(f"{name}: expected a finite number{bounds}, got {value!r}")
    return value


def expect_integer(value: Any, name: str) -> int:
    """An integer of any kind (numpy's too), as an int."""
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return value
    if isinstance(value, bool | torch.Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    return operator.index(value)


def expect_size(value: Any, name: str) -> int:
    """An integer of at least 1."""
    value = expect_integer(value, name)
    expect(value >= 1, name, "at least 1", value)
    return value


def expect_lengths(value: Any, name: str, layout: str, like: torch.Tensor, like_name: str) -> None:
    """Integers, on the device of another argument."""
    expect_tensor(value, name, layout, (torch.int32, torch.int64))
    expect_device(value, name, like, like_name)


def can_read(tensor: torch.Tensor) -> bool:
    """Whether a check may look at the data: where that needs no device, and where there is data to look at.

    There is none while torch traces, in fake and functional tensors, and none of one's own under torch.func.
    """
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
    )


def _kind(tensor: torch.Tensor) -> str:
    return "a nested one" if tensor.is_nested else f"a {str(tensor.layout).removeprefix('torch.')} one"
