"""Eager PyTorch: the op's own reference. It serves every op."""

from pykernels.core.declaration import OPS

NAME = "eager"


def missing() -> str | None:
    return None


def __getattr__(op: str):
    if op not in OPS:
        raise AttributeError(op)
    return OPS[op].reference
