"""RWKV: arguments of the WKVs that keep a state bounded, and RWKV-4's sums as the paper has them."""

import torch
import torch.nn.functional as F
from kit import draw

from pykernels.core.dtypes import accumulator_of

ALL = ("wkv4", "wkv6", "wkv7")

TIMED = {"wkv4": "kv", "wkv6": "rkvw", "wkv7": "rwkvab"}  # arguments with a time dimension


def arguments(name, B=2, T=5, dtype=torch.float64, state=True, low=-5.0, high=-1e-3):
    """Of an op, by name, in the order of its signature; log decays evenly between low and high."""
    exact = accumulator_of(dtype)
    if name == "wkv4":
        C = 6
        shapes = dict(w=(C,), u=(C,), k=(B, T, C), v=(B, T, C), state=(B, 3, C))
    else:
        H, K, V = 2, 5, 3
        shapes = {letter: (B, T, H, V if letter == "v" else K) for letter in TIMED[name]}
        shapes |= (dict(u=(H, K)) if name == "wkv6" else {}) | dict(state=(B, H, K, V))
    inputs = {key: draw(*shape, dtype=exact if key in ("w", "u", "state") else dtype) for key, shape in shapes.items()}
    inputs["w"] = torch.empty_like(inputs["w"]).uniform_(low, high)
    if name == "wkv7":  # of unit length and half of it, as in the model: the state stays bounded
        inputs["a"] = F.normalize(inputs["a"], dim=-1)
        inputs["b"] = -inputs["a"] / 2
    if not state:
        inputs["state"] = None
    elif name == "wkv4":
        inputs["state"][:, 1].abs_()
    return inputs


def naive(w, u, k, v, num=0.0, den=0.0):
    """The paper's sums as they stand, after sums `num` and `den` over what came before: (y, num, den)."""
    T = k.size(1)
    outputs = []
    for t in range(T + 1):
        age = torch.arange(t - 1, -1, -1, dtype=w.dtype)[:, None]
        weight = (age * w + k[:, :t]).exp()
        past = (t * w).exp()
        above, below = past * num + (weight * v[:, :t]).sum(1), past * den + weight.sum(1)
        if t == T:
            return torch.stack(outputs, 1), above, below
        present = (u + k[:, t]).exp()
        outputs.append((above + present * v[:, t]) / (below + present))
