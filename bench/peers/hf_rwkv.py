"""transformers' RWKV-4 loop over time, which is what its model runs on the CPU and wherever its CUDA kernel is missing.

It takes the logarithm of −w, as the checkpoints store it, and computes in fp32.
"""

import importlib.util

import torch

NAME = "transformers"


def missing() -> str | None:
    if importlib.util.find_spec("transformers") is None:  # not imported yet: that takes seconds
        return "transformers is not installed: pip install transformers"
    return None


def wkv4(w, u, k, v, state=None):
    from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

    if k.dtype == torch.float64:
        raise NotImplementedError("it computes in fp32")
    state = None if state is None else state.unbind(1)
    y, state = rwkv_linear_attention_cpu((-w).log(), u, k, v, state, return_state=True)
    return y, torch.stack(state, 1)
