"""The layouts that kernels ask of tensors. An absent tensor passes through."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def dense(*tensors: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """Each tensor contiguous."""
    return (t if t is None else t.contiguous() for t in tensors)


def rows(*tensors: torch.Tensor | None) -> Iterator[torch.Tensor | None]:
    """Each tensor with the numbers of its last dimension side by side, in whatever strides else."""
    return (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors)
