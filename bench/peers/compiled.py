"""torch.compile of the op's reference, for the shapes at hand. It serves every op; compiling is not timed."""

import torch

from pykernels.core.declaration import OPS

NAME = "torch.compile"
UNROLLED = ("lstm", "gru", "rnn", "wkv4", "wkv6", "wkv7")
SLOW_TO_START = True  # left out of --quick


def missing() -> str | None:
    return None


def __getattr__(op: str):
    if op not in OPS:
        raise AttributeError(op)
    if op in UNROLLED:
        return _decline
    torch.compiler.reset()  # else the number of shapes seen so far would turn this one dynamic, or eager
    return torch.compile(OPS[op].reference, dynamic=False)


def _decline(*_, **__):
    raise NotImplementedError("it unrolls the loop over the steps, which takes it minutes a shape")
