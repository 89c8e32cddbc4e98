"""The references: pure PyTorch, any floating dtype, differentiable, each under its op's own name and signature."""

from . import ops  # noqa: F401 - declares the ops
from .core.registry import OPS

for _op in OPS.values():
    globals()[_op.name] = _op.reference

__all__ = list(OPS)
