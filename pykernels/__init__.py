"""pykernels: fused kernels for recurrent and memory-augmented networks, as PyTorch ops."""

from . import nn, ops, reference
from .core import native
from .core.backends import use_backend
from .core.declaration import available_backends, list_ops
from .ops.attention import attention, decode_attention, scaled_dot_product_attention, varlen_attention
from .ops.product_key import product_key_memory, product_key_search
from .ops.rnn import gru, gru_step, lstm, lstm_step, rnn, rnn_step
from .ops.topk import topk_memory, topk_search
from .ops.weighted_gather import weighted_gather
from .ops.wkv import log_decay, wkv6, wkv7
from .ops.wkv4 import wkv4
from .tools.self_test import verify_on_first_use

__version__ = "0.1.0"

native.load()  # so that torch.ops.pykernels has its CPU kernels from here on

__all__ = [
    "attention",
    "available_backends",
    "decode_attention",
    "gru",
    "gru_step",
    "list_ops",
    "log_decay",
    "lstm",
    "lstm_step",
    "nn",
    "ops",
    "product_key_memory",
    "product_key_search",
    "reference",
    "rnn",
    "rnn_step",
    "scaled_dot_product_attention",
    "topk_memory",
    "topk_search",
    "use_backend",
    "varlen_attention",
    "verify_on_first_use",
    "weighted_gather",
    "wkv4",
    "wkv6",
    "wkv7",
]
