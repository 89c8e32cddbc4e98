"""The one vocabulary of argument errors: the argument's name, what was expected, what came."""

from __future__ import annotations

from typing import Any

import torch


def describe(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else repr(value)


def expect(condition: bool, name: str, expected: str, value: Any) -> None:
    """ValueError `name: expected …, got …` unless the condition holds; a tensor is shown by its shape."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}")


def expect_type(condition: bool, name: str, expected: str, value: Any) -> None:
    """TypeError `name: expected …, got …` unless the condition holds."""
    if not condition:
        got = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected {expected}, got {got}")


def expect_tensor(value: Any, name: str, layout: str, dtypes: tuple[torch.dtype, ...] | None = None) -> None:
    """A tensor of the layout's rank, written as "[B, H, N, D]", of one of the dtypes."""
    if not isinstance(value, torch.Tensor):  # messages are made when they are needed: a call at batch 1 takes 20 µs
        expect_type(False, name, f"a tensor {layout}", value)
    rank = layout.count(",") + 1
    if value.dim() != rank:
        expect(False, name, f"rank {rank} {layout}", value)
    if dtypes is not None and value.dtype not in dtypes:
        expect_type(False, name, " or ".join(str(dtype) for dtype in dtypes), value)


def expect_alike(value: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    """The same device and dtype as another tensor."""
    expect_device(value, name, other, other_name)
    if value.dtype != other.dtype:
        expect_type(False, name, f"{other_name}'s dtype {other.dtype}", value)


def expect_device(value: torch.Tensor, name: str, other: torch.Tensor, other_name: str) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected {other_name}'s device {other.device}, got {value.device}")


def can_read(tensor: torch.Tensor) -> bool:
    """Whether a check may look at the data: not while tracing, and not where it would wait for a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is torch.Tensor
