"""pykernels: fused kernels for recurrent and memory-augmented networks, as PyTorch ops."""

from . import ops, reference
from .registry import OPS, available_backends, list_ops, use_backend

__version__ = "0.1.0"

for _op in OPS.values():
    globals()[_op.name] = _op.function

__all__ = ["available_backends", "list_ops", "ops", "reference", "use_backend", *OPS]
