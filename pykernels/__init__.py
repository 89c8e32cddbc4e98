"""pykernels: fused kernels for recurrent and memory-augmented networks, as PyTorch ops."""

from . import nn, ops, reference
from .core import native
from .core.registry import OPS, available_backends, list_ops, use_backend
from .ops.wkv4 import log_decay
from .tools.self_test import verify_on_first_use

__version__ = "0.1.0"

native.load()  # so that torch.ops.pykernels has its CPU kernels from here on

for _op in OPS.values():
    globals()[_op.name] = _op.function

__all__ = [
    "available_backends",
    "list_ops",
    "log_decay",
    "nn",
    "ops",
    "reference",
    "use_backend",
    "verify_on_first_use",
    *OPS,
]
