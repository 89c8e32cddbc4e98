"""A toy op with a kernel of one's own choice, to test what is built on the declarations."""

import contextlib

import pytest
import torch

from pykernels.core import backends, declaration
from pykernels.core.declaration import Sample, Workload


def softmax_scale(x, w):
    return x.softmax(-1) * w, x.argmax(-1)


def make(dtype, device):
    x = torch.randn(5, 7, dtype=dtype, device=device)
    x[0, 3] = -torch.inf
    return dict(x=x, w=torch.randn(7, dtype=dtype, device=device))


@contextlib.contextmanager
def declared(kernel, declines=None):
    """Within, OPS holds the op `toy` whose "cpu" backend is kernel(x, w)."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends.native, "missing", lambda: None)
        backends._unavailable.cache_clear()

        @declaration.public(
            kernel=lambda x, w, backend: kernel(x, w),
            reference=softmax_scale,
            supports={"cpu": lambda x, w: declines},
            differentiable=("x", "w"),
        )
        def toy(run, x: torch.Tensor, w: torch.Tensor):
            """softmax(x) · w, and where x is largest."""
            return run(x, w)

        workloads = [Workload(f"N{n}", make, bytes=lambda inputs: 1e3, quick=True) for n in (1, 2)]
        declaration.declare(toy, samples=[Sample("small", make)], workloads=workloads)
        try:
            yield declaration.OPS["toy"]
        finally:
            del declaration.OPS["toy"]
    backends._unavailable.cache_clear()
