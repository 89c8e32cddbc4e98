"""Every op on every backend, from its declaration alone: values, gradients, second order, compile, layouts.

In the ordinary process the CPU kernels are under test; with TRITON_INTERPRET=1 Triton's, in its interpreter.
"""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import pykernels as pk
from pykernels.check import compare, evaluate
from pykernels.registry import CPU, INTERPRET, OPS, TRITON, BackendDeclined, unavailable

BACKEND = "triton" if INTERPRET else "cpu"
REASON = unavailable(TRITON if INTERPRET else CPU, "cpu")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = [pytest.mark.skipif(REASON is not None, reason=f"{BACKEND}: {REASON}"), pytest.mark.triton]


def over(dtypes=DTYPES, samples=lambda op: op.samples):
    cases = [
        pytest.param(op, dtype, sample, id=f"{op.name}-{name}-{sample.label}")
        for op in OPS.values()
        for name, dtype in DTYPES.items()
        if name in dtypes and dtype in op.dtypes and not (INTERPRET and name == "bf16")
        for sample in samples(op)
    ]
    return pytest.mark.parametrize(("op", "dtype", "sample"), cases)


def small(op):
    """Samples that finite differences can afford: every option, few numbers."""
    return [s for s in op.samples if size(s) <= (1500 if INTERPRET else 6000)]


def size(sample):
    return sum(t.numel() for t in sample.make(torch.float32, "cpu").values() if isinstance(t, torch.Tensor))


def holds(results):
    """No result is off by more than its allowance, and there was something to compare."""
    assert results
    wrong = [str(result) for result in results if not result.ok]
    assert not wrong, "\n".join(wrong)


def compare_or_skip(*args, **kwargs):
    try:
        return compare(*args, **kwargs)
    except BackendDeclined as declined:
        pytest.skip(str(declined))


@over()
def test_values_and_gradients(op, dtype, sample):
    holds(compare_or_skip(op, sample.make(dtype, "cpu"), BACKEND, slack=sample.slack))


def restride(tensor):
    """The same values behind other strides: every other element of a larger, transposed tensor."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor
    larger = torch.full([2 * n for n in reversed(tensor.shape)], torch.nan, dtype=tensor.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
    view.copy_(tensor)
    return view


@over(dtypes=("fp32", "bf16"), samples=lambda op: op.samples[:: 5 if INTERPRET else 1])
def test_strided_inputs(op, dtype, sample):
    inputs = {name: restride(value) for name, value in sample.make(dtype, "cpu").items()}
    holds(compare_or_skip(op, inputs, BACKEND, slack=sample.slack))


def differentiable(op, sample):
    """(function of the floating inputs alone, those inputs), for gradcheck."""
    inputs = sample.make(torch.float64, "cpu")
    names = [n for n in op.differentiable if isinstance(inputs.get(n), torch.Tensor) and inputs[n].is_floating_point()]

    def function(*tensors):
        torch.manual_seed(1)  # random ops draw the same seed at every evaluation
        with pk.use_backend(BACKEND):
            outputs = op.function(**inputs | dict(zip(names, tensors)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(out.masked_fill(out.isinf(), 0) for out in outputs)  # inf − inf has no finite difference

    return function, [inputs[name].contiguous().requires_grad_() for name in names]


@over(dtypes=("fp64",), samples=lambda op: small(op) if op.differentiable else [])
def test_gradcheck(op, dtype, sample):
    function, tensors = differentiable(op, sample)
    try:
        assert gradcheck(function, tensors, fast_mode=True)
    except BackendDeclined as declined:
        pytest.skip(str(declined))


@over(dtypes=("fp64",), samples=lambda op: small(op)[:: 6 if INTERPRET else 1] if op.differentiable else [])
def test_gradgradcheck(op, dtype, sample):
    function, tensors = differentiable(op, sample)
    try:
        assert gradgradcheck(function, tensors, fast_mode=True)
    except BackendDeclined as declined:
        pytest.skip(str(declined))


@over(dtypes=("fp32", "bf16"))
@pytest.mark.skipif(
    INTERPRET, reason="values are run twice bitwise on the native kernel; the interpreter is one thread"
)
def test_same_bits_from_run_to_run(op, dtype, sample):
    inputs = sample.make(dtype, "cpu")
    cotangents = {}

    def run():
        torch.manual_seed(3)
        leaves = {
            n: inputs[n].detach().requires_grad_()
            for n in op.differentiable
            if isinstance(inputs.get(n), torch.Tensor) and inputs[n].is_floating_point()
        }
        outputs = op.function(**inputs | leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not leaves:
            return outputs
        for i, o in enumerate(outputs):
            cotangents.setdefault(i, torch.randn_like(o))
        grads = torch.autograd.grad(outputs, list(leaves.values()), [cotangents[i] for i in range(len(outputs))])
        return (*outputs, *grads)

    for first, second in zip(run(), run()):
        assert torch.equal(first.nan_to_num(1e30), second.nan_to_num(1e30))


@over(dtypes=("fp32", "bf16"))
@pytest.mark.skipif(INTERPRET, reason="the fake implementation does not depend on the backend")
def test_opcheck(op, dtype, sample):
    arguments = []

    def capture(*args):
        arguments.extend(args)
        raise StopIteration

    inputs = sample.make(dtype, "cpu")
    for name in op.differentiable:
        if isinstance(inputs.get(name), torch.Tensor) and inputs[name].is_floating_point():
            inputs[name] = inputs[name].detach().requires_grad_()
    with pytest.raises(StopIteration):
        op.body(capture, **inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.library.opcheck(op.kernel, (*arguments, CPU))


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of ours: (op, arguments, results)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **kwargs or {})
        if func.namespace == "pykernels":
            self.calls.append((func, args, results))
        return results


@over(dtypes=("fp32", "bf16"))
@pytest.mark.skipif(INTERPRET, reason="the fake implementation does not depend on the backend")
def test_fakes_foretell_shapes_strides_and_dtypes(op, dtype, sample):
    """Of the backward op too, which opcheck does not reach."""
    with Recorder() as recorder:
        evaluate(op.function, sample.make(dtype, "cpu"), op.differentiable)
    assert recorder.calls
    for func, args, results in recorder.calls:
        mode = FakeTensorMode()
        faked = [mode.from_tensor(a.detach()) if isinstance(a, torch.Tensor) else a for a in args]
        with mode:
            fakes = func(*faked)
        for fake, real in zip(fakes, results, strict=True):
            assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


@over(dtypes=("fp32",), samples=lambda op: op.samples[::6])
@pytest.mark.skipif(INTERPRET, reason="compiled graphs hold the same torch op for every backend")
def test_compile_without_graph_breaks(op, dtype, sample):
    inputs = sample.make(dtype, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = op.function(**inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(**inputs), expected, rtol=0, atol=0, equal_nan=True)
