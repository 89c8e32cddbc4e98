"""What test files share: the kernels under test, draws, comparisons, gradients, graphs that are counted, refusals."""

import contextlib
import functools
import re

import pytest
import torch
from cuda_host import build, host
from hypothesis import HealthCheck, settings
from torch.nn.utils.rnn import PackedSequence

from pykernels.core.backends import BACKENDS, CPU, CUDA, INTERPRET, TRITON, unavailable
from pykernels.core.dtypes import DTYPES, accumulator_of
from pykernels.tools.check import differentiate

# In the ordinary process the CPU kernels are under test; with TRITON_INTERPRET=1 Triton's, in its interpreter; by
# tests/cuda_host/run.py the CUDA kernels, compiled for the CPU.
ON_HOST = bool(host.MODE)
BACKEND_ID = TRITON if INTERPRET else CUDA if ON_HOST else CPU
BACKEND = BACKENDS[BACKEND_ID]
MISSING = (build.missing() if ON_HOST else None) or unavailable(BACKEND_ID, "cpu")
NO_HOST = MISSING if ON_HOST else "the CUDA kernels run on the CPU by tests/cuda_host/run.py"

needs_kernels = pytest.mark.skipif(MISSING is not None, reason=f"{BACKEND}: {MISSING}")
needs_cuda_host = pytest.mark.skipif(NO_HOST is not None, reason=f"cuda: {NO_HOST}")
hypothesis = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)

NAMES = dict(zip(("fp64", "fp32", "bf16", "fp16"), DTYPES))

# ------------------------------------------------------------------------------------------------ tensors


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def accumulated(*shape, dtype=torch.float64):
    """Drawn in the dtype of sums and states of another."""
    return draw(*shape, dtype=accumulator_of(dtype))


def tensors(tree):
    """Every tensor in nested containers; of a PackedSequence its data, of a module its parameters."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, PackedSequence):
        return [tree.data]
    if isinstance(tree, torch.nn.Module):
        return [*tree.parameters()]
    if tree is None or isinstance(tree, bool | int | float | str):
        return []
    return [t for part in (tree.values() if isinstance(tree, dict) else tree) for t in tensors(part)]


def with_gradients(tree):
    """The same tree, of whose floating tensors gradients can be asked."""
    for t in tensors(tree):
        if t.is_floating_point():
            t.requires_grad_()
    return tree


def values_and_gradients(call, *wanted):
    """What call() returns, flat, and the gradients of a random function of all of it by every tensor wanted."""
    outputs, wanted = tensors(call()), tensors(wanted)
    floats = [out for out in outputs if out.is_floating_point()]
    return [out.detach() for out in outputs] + (differentiate(floats, wanted) if wanted else [])


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ comparisons


def agree(got, want, **tolerance):
    for g, w in zip(tensors(got), tensors(want), strict=True):
        torch.testing.assert_close(g.to_dense(), w.to_dense(), **tolerance)


def equal(got, want):
    """To the bit; NaN equals NaN."""
    agree(got, want, rtol=0, atol=0, equal_nan=True)


def holds(results):
    """No result of the check is off by more than its allowance, and there was something to compare."""
    assert results
    wrong = [str(result) for result in results if not result.ok]
    assert not wrong, "\n".join(wrong)


def errors(table, literal=False):
    """A test that each call raises its kind of error with its message, a pattern unless literal."""

    @pytest.mark.parametrize(("call", "kind", "message"), table, ids=[message for _, _, message in table])
    def test(call, kind, message):
        with pytest.raises(kind, match=re.escape(message) if literal else message):
            call()

    return test


# ------------------------------------------------------------------------------------------------ graphs


def one_graph(function, calls, wanted=lambda arguments: (), **tolerance):
    """Compiled whole, a function is traced for the first call's sizes and never again.

    For each call's arguments it gives what it gives otherwise, and the gradients by wanted(arguments). The first call
    may be traced twice: torch takes a float for a symbol until an op needs its value. No two sizes of a call may be
    equal: torch takes sizes that are equal once for equal ever after.
    """
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    torch._dynamo.reset()
    compiled, first = torch.compile(function, fullgraph=True, dynamic=True, backend=count), None
    for arguments in calls:
        results = []
        for run in (compiled, function):
            torch.manual_seed(3)
            results.append(values_and_gradients(functools.partial(run, *arguments), wanted(arguments)))
        agree(*results, **tolerance)
        first = first or len(graphs)
    assert first == len(graphs) <= 2


def exports(module, example, dynamic, others, *, strict=False, wanted=lambda module: ()):
    """Exported with dynamic sizes, a module gives what it gives otherwise, with the gradients by wanted(module)."""
    program = torch.export.export(module, example, dynamic_shapes=dynamic, strict=strict).module()
    for arguments in others:
        agree(
            *(values_and_gradients(functools.partial(m, *arguments), wanted(m)) for m in (program, module)),
        )
