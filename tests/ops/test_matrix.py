"""Every op on every backend, from its declaration alone: values, gradients, second order, compile, layouts.

In the ordinary process the CPU kernels are under test; with TRITON_INTERPRET=1 Triton's, in its interpreter; by
tests/cuda_host/run.py the CUDA kernels, compiled for the CPU. There a sample's values are held to the rule in one
order of the threads, a new one on every run, and must be the same, to the bit, in the others.
"""

import functools
import os
import threading
import warnings

import pytest
import torch
import torch.utils.checkpoint
from cuda_host import build, host
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import pykernels as pk
from pykernels.core.backends import BACKENDS, CPU, CUDA, INTERPRET, TRITON, BackendDeclined, unavailable
from pykernels.core.declaration import OPS
from pykernels.tools.check import (
    bind_gradient,
    compare_sample,
    cotangents,
    differentiate,
    evaluate,
    float_leaves,
    is_float,
)

ON_HOST = bool(host.MODE)
ID = TRITON if INTERPRET else CUDA if ON_HOST else CPU
BACKEND = BACKENDS[ID]
REASON = (build.missing() if ON_HOST else None) or unavailable(ID, "cpu")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

pytestmark = [pytest.mark.skipif(REASON is not None, reason=f"{BACKEND}: {REASON}"), pytest.mark.triton]


def is_tested(op, dtype):
    if ON_HOST:
        return BACKEND in op.supports and dtype != "fp64"
    return not (INTERPRET and dtype == "bf16")


def over(dtypes=DTYPES, samples=lambda op: op.samples, thin=1, share=None):
    """thin: the interpreter, which takes seconds a sample, has every so manyth of them alone in fp64 and fp16.

    share: of each op's cases, those that a run draws; conftest.py says how.
    """
    cases = [
        pytest.param(
            op,
            dtype,
            sample,
            id=f"{op.name}-{name}-{sample.label}",
            marks=[pytest.mark.drawn(share, of=op.name)] if share else [],
        )
        for op in OPS.values()
        for name, dtype in DTYPES.items()
        if name in dtypes and dtype in op.dtypes and is_tested(op, name)
        for sample in samples(op)[:: thin if INTERPRET and name != "fp32" else 1]
    ]
    return pytest.mark.parametrize(("op", "dtype", "sample"), cases)


def small(op):
    """Samples that finite differences can afford: every option, few numbers, none that swallows a small difference."""
    most = 800 if INTERPRET else 6000
    return [s for s in op.samples if size(s) <= most and largest(s) < 1e5][:: 2 if INTERPRET else 1]


def tensors_of(sample):
    return [t for t in pytree.tree_leaves(sample.make(torch.float32, "cpu")) if isinstance(t, torch.Tensor)]


def size(sample):
    return sum(t.numel() for t in tensors_of(sample))


def largest(sample):
    return max((float(t.abs().max()) for t in tensors_of(sample) if t.is_floating_point() and t.numel()), default=0)


def holds(results):
    """No result is off by more than its allowance, and there was something to compare."""
    assert results
    wrong = [str(result) for result in results if not result.ok]
    assert not wrong, "\n".join(wrong)


def compare_or_skip(*args):
    try:
        return compare_sample(*args)
    except BackendDeclined as declined:
        pytest.skip(str(declined))


def random_order():
    return f"random:{torch.initial_seed()}"


@over(thin=4)
@pytest.mark.cuda_host
def test_values_and_gradients(op, dtype, sample):
    if ON_HOST:
        host.set_order(random_order())
    holds(compare_or_skip(op, sample, dtype, "cpu", BACKEND))


def restride(tensor):
    """The same values behind other strides: every other element of a larger, transposed tensor."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor
    larger = torch.full([2 * n for n in reversed(tensor.shape)], torch.nan, dtype=tensor.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
    view.copy_(tensor)
    return view


@over(dtypes=("fp32", "bf16"), samples=lambda op: op.samples[:: 7 if INTERPRET else 1])
@pytest.mark.cuda_host
def test_strided_inputs(op, dtype, sample):
    holds(compare_or_skip(op, sample, dtype, "cpu", BACKEND, functools.partial(pytree.tree_map, restride)))


def differentiable(op, sample):
    """(function of the floating inputs alone, those inputs), for gradcheck."""
    inputs = sample.make(torch.float64, "cpu")
    leaves, spec = pytree.tree_flatten({name: inputs[name] for name in op.differentiable if name in inputs})
    places = [place for place, leaf in enumerate(leaves) if is_float(leaf)]

    def function(*tensors):
        torch.manual_seed(1)  # random ops draw the same seed at every evaluation
        values = [*leaves]
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        with pk.use_backend(BACKEND):
            outputs = op.function(**inputs | pytree.tree_unflatten(values, spec))
        return tuple(out.masked_fill(out.isinf(), 0) for out in float_leaves(outputs))  # inf − inf is NaN

    return function, [leaves[place].contiguous().requires_grad_() for place in places]


@over(dtypes=("fp64",), samples=lambda op: small(op) if op.differentiable else [])
def test_gradcheck(op, dtype, sample):
    function, tensors = differentiable(op, sample)
    try:
        assert gradcheck(function, tensors, fast_mode=True)
    except BackendDeclined as declined:
        pytest.skip(str(declined))


@over(dtypes=("fp64",), samples=lambda op: small(op)[:: 2 if INTERPRET else 1] if op.differentiable else [], share=0.5)
def test_gradgradcheck(op, dtype, sample):
    function, tensors = differentiable(op, sample)
    sizes = [t.shape for t in tensors]

    def flat(vector):  # one argument and one result: the check's cost grows with their numbers' product
        parts = vector.split([size.numel() for size in sizes])
        return torch.cat([out.flatten() for out in function(*(p.view(s) for p, s in zip(parts, sizes)))])

    vector = torch.cat([t.detach().flatten() for t in tensors]).requires_grad_()
    try:
        assert gradgradcheck(flat, [vector], fast_mode=True)
    except BackendDeclined as declined:
        pytest.skip(str(declined))


@over(dtypes=("fp32", "bf16"))
@pytest.mark.cuda_host
@pytest.mark.skipif(
    INTERPRET, reason="values are run twice bitwise on the native kernel; the interpreter is one thread"
)
def test_same_bits_from_run_to_run(op, dtype, sample):
    """... and in every order of a CUDA kernel's threads."""
    call, leaves = bind_gradient(op.function, sample.make(dtype, "cpu"), op.differentiable)

    def run(order=None):
        if order:
            host.set_order(order)
        torch.manual_seed(3)
        with pk.use_backend(BACKEND):
            values = pytree.tree_leaves(call())
            values += differentiate(float_leaves(values), list(leaves.values()))
        return [value.nan_to_num(1e30) for value in values]

    orders = ("forward", "reverse", random_order()) if ON_HOST else (None, None)
    try:
        first, *others = [run(order) for order in orders]
    except BackendDeclined as declined:
        pytest.skip(str(declined))
    for other in others:
        assert all(map(torch.equal, first, other))


@over(dtypes=("fp32", "bf16"), samples=lambda op: [s for s in op.samples if s.label == "no steps"])
@pytest.mark.parametrize("backend", ["reference", BACKEND])
@pytest.mark.cuda_host
def test_results_of_no_steps_are_not_the_arguments(op, dtype, sample, backend):
    """Whoever writes into a result leaves what he passed as it was."""
    inputs = sample.make(dtype, "cpu")
    given = float_leaves(inputs)
    before = [tensor.clone() for tensor in given]
    with pk.use_backend(backend), torch.no_grad():
        for result in float_leaves(op.function(**inputs)):
            result.add_(1)
    assert all(map(torch.equal, given, before))


# Their sums depend on how many parts a sequence is cut into, and that on the threads.
CUT_BY_THREADS = {"attention", "scaled_dot_product_attention", "varlen_attention", "decode_attention", "wkv4"}
CUT_BY_THREADS |= {"topk_memory", "product_key_memory"}  # so does the gradient of torch's softmax


@over(dtypes=("fp32", "bf16"), samples=lambda op: () if op.name in CUT_BY_THREADS else op.samples[::2])
@pytest.mark.skipif(INTERPRET, reason="it is about the native kernels' threads")
def test_same_bits_for_any_number_of_threads(op, dtype, sample):
    inputs = sample.make(dtype, "cpu")

    def run(threads):
        torch.set_num_threads(threads)
        return [value.nan_to_num(1e30) for value in evaluate(op.function, inputs, op.differentiable).values()]

    try:
        assert all(map(torch.equal, run(1), run(3)))
    finally:
        torch.set_num_threads(2)


@pytest.mark.skipif(INTERPRET, reason="it is about the native kernels' threads")
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list a process's threads")
def test_little_work_wakes_no_thread(least_work):
    default, variable = least_work

    def woken(op):
        """Threads that a call started. torch's are a pool of each thread that calls: a new one has none."""
        inputs = op.samples[0].make(torch.float32, "cpu")

        def call():
            torch.set_num_threads(2)
            before = {*os.listdir("/proc/self/task")}
            with torch.no_grad():
                op.function(**inputs)
            counts.append(len({*os.listdir("/proc/self/task")} - before))

        counts = []
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return counts[0]

    ops = [op for op in OPS.values() if not op.name.endswith("_memory")]  # torch's softmax wakes one for two rows
    assert any(woken(op) for op in ops)
    variable.value = default
    try:
        assert not [op.name for op in ops if woken(op)]
    finally:
        variable.value = 0


@over(dtypes=("fp32", "bf16"), share=0.5)
@pytest.mark.skipif(INTERPRET, reason="the fake implementation does not depend on the backend")
def test_opcheck(op, dtype, sample):
    inputs = sample.make(dtype, "cpu")
    inputs |= {name: pytree.tree_map(leaf_again, inputs[name]) for name in op.differentiable if name in inputs}
    arguments = op.arguments(**inputs)
    calls = [(getattr(op.kernel, "op", None), (*arguments, CPU))]
    if not hasattr(op.kernel, "op"):  # it is made of several
        with Recorder() as recorder, torch.no_grad():
            op.kernel(*arguments, CPU)
        calls = [(kernel, pytree.tree_map(leaf_again, args)) for kernel, args, _ in recorder.calls]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kernel, args in calls:
            torch.library.opcheck(kernel, args)


def leaf_again(value):
    return value.detach().requires_grad_() if is_float(value) else value


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


@over(dtypes=("fp32", "bf16"), share=0.5)
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
        for fake, real in zip(pytree.tree_leaves(fakes), pytree.tree_leaves(results), strict=True):
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


# ------------------------------------------------------------------------------------------------ what surrounds a call


def few(op):
    """Every ninth sample with gradients and numbers in it."""
    samples = [s for s in op.samples if op.differentiable and 0 < size(s) <= 20000]
    return samples[::9]


def checkpointed(how, call):
    """call() with nothing kept between its passes, or kept elsewhere."""
    checkpoint = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    if how == "reentrant":
        trigger = torch.ones((), requires_grad=True)  # which reentrant checkpointing looks for among the arguments
        return torch.utils.checkpoint.checkpoint(lambda _: call(), trigger, use_reentrant=True)
    if how == "nested":
        return checkpoint(lambda: checkpoint(call))
    if how == "selective":
        found = [getattr(torch.ops.pykernels, name) for name in dir(torch.ops.pykernels)]
        keep = [packet.default for packet in found if isinstance(packet, torch._ops.OpOverloadPacket)]
        contexts = torch.utils.checkpoint.create_selective_checkpoint_contexts
        return checkpoint(call, context_fn=functools.partial(contexts, keep))
    if how == "on the CPU":
        with torch.autograd.graph.save_on_cpu():
            return call()
    return checkpoint(call)


@over(dtypes=("fp32", "bf16"), samples=few)
@pytest.mark.skipif(INTERPRET, reason="the gradient's formula does not depend on the backend")
def test_checkpointing_gives_the_same_bits(op, dtype, sample):
    function, leaves = bind_gradient(op.function, sample.make(dtype, "cpu"), op.differentiable)

    def call():
        return tuple(float_leaves(function()))

    def run(how=None):
        torch.manual_seed(3)
        for leaf in leaves.values():
            leaf.grad = None
        outputs = checkpointed(how, call) if how else call()
        pairs = [(out, given) for out, given in zip(outputs, cotangents(outputs)) if out.requires_grad]
        torch.autograd.backward(*zip(*pairs))
        return [*outputs, *(leaf.grad for leaf in leaves.values())]

    expected = run()
    for how in ("reentrant", "non-reentrant", "nested", "selective", "on the CPU"):
        for value, wanted in zip(run(how), expected, strict=True):
            if wanted is not None:
                assert torch.equal(value.nan_to_num(1e30), wanted.nan_to_num(1e30)), how


def arguments_by_sample(op):
    """(sample, argument) for each differentiable argument of an op, in the first sample that has it."""
    found = {}
    for sample in op.samples:
        inputs = sample.make(torch.float32, "cpu")
        for name in op.differentiable:
            if any(leaf.numel() for leaf in float_leaves(inputs.get(name))):
                found.setdefault(name, sample)
    return [(sample, name) for name, sample in found.items()]


@pytest.mark.parametrize(
    ("op", "sample", "name"),
    [
        pytest.param(op, sample, name, id=f"{op.name}-{name}")
        for op in OPS.values()
        for sample, name in arguments_by_sample(op)
    ],
)
@pytest.mark.skipif(INTERPRET, reason="the refusal does not depend on the backend")
def test_forward_mode_is_refused_or_right(op, sample, name):
    """A zero tangent would be silence: the kernels raise for every argument, the reference has the derivative."""
    inputs = sample.make(torch.float64, "cpu")
    leaves, spec = pytree.tree_flatten(inputs[name])

    def function(run, *values):
        torch.manual_seed(1)
        outputs = float_leaves(run(**inputs | {name: pytree.tree_unflatten(values, spec)}))
        return tuple(out for out in outputs if not out.isinf().any())

    given = tuple(torch.randn_like(leaf) for leaf in leaves)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation is not supported"):
        torch.func.jvp(functools.partial(function, op.function), tuple(leaves), given)
    reference = functools.partial(function, op.reference)
    _, tangents = torch.func.jvp(reference, tuple(leaves), given)
    expected = torch.autograd.functional.jvp(reference, tuple(leaves), given)[1]
    for tangent, other in zip(tangents, expected, strict=True):
        torch.testing.assert_close(tangent, other, atol=1e-8, rtol=1e-6)
    assert any(tangent.count_nonzero() for tangent in tangents)


@over(dtypes=("fp32", "bf16"), share=0.5)
@pytest.mark.skipif(INTERPRET, reason="shapes do not depend on the backend")
def test_meta_tensors(op, dtype, sample):
    """They give the shapes and dtypes of real ones, and a default device of theirs does not harm real ones."""
    inputs = sample.make(dtype, "cpu")
    on_meta = lambda value: value.to("meta") if isinstance(value, torch.Tensor) else value
    expected = pytree.tree_leaves(op.function(**inputs))
    with torch.device("meta"):
        real = pytree.tree_leaves(op.function(**inputs))
    for got, wanted in zip(real, expected, strict=True):
        assert got.device == wanted.device
        assert got.shape == wanted.shape
    for got, wanted in zip(pytree.tree_leaves(op.function(**kept(inputs, on_meta))), expected, strict=True):
        assert got.device.type == "meta"
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


def kept(inputs, change):
    """All inputs changed but those that are on the CPU by contract."""
    return {name: value if name == "batch_sizes" else pytree.tree_map(change, value) for name, value in inputs.items()}


@over(dtypes=("fp64",), samples=lambda op: [s for s in few(op) if size(s) <= 3000], share=0.5)
@pytest.mark.skipif(INTERPRET, reason="vmap calls the op as often as it is called here")
def test_transforms_of_torch_func(op, dtype, sample):
    """grad, vmap of grad, jacrev and grad of grad, against the reference under the same transforms."""
    inputs = sample.make(torch.float64, "cpu")
    if any(isinstance(value, float) and value for name, value in inputs.items() if name == "dropout_p"):
        pytest.skip("vmap refuses random numbers unless told how to draw them")
    names = [name for name in op.differentiable if float_leaves(inputs.get(name))]
    given = {name: inputs[name] for name in names}

    seeds = cotangents(float_leaves(op.reference(**inputs)))

    def loss(run, given):
        outputs = float_leaves(run(**inputs | given))
        return sum((out.masked_fill(out.isinf(), 0) * seed).sum() for out, seed in zip(outputs, seeds, strict=True))

    def slope(f):  # of the gradient, along the point itself: the second order
        dot = lambda gradient: sum(
            (g * v).sum() for g, v in zip(pytree.tree_leaves(gradient), pytree.tree_leaves(given))
        )
        return torch.func.grad(lambda point: dot(torch.func.grad(f)(point)))(given)

    ours, theirs = functools.partial(loss, op.function), functools.partial(loss, op.reference)
    stacked = pytree.tree_map(lambda leaf: torch.stack([leaf, 0.5 * leaf]), given)
    for transform in (
        lambda f: torch.func.grad(f)(given),
        lambda f: torch.func.vmap(torch.func.grad(f))(stacked),
        lambda f: torch.func.jacrev(f)(given),
        slope,
    ):
        results = [pytree.tree_leaves(transform(f)) for f in (ours, theirs)]
        for value, expected in zip(*results, strict=True):
            torch.testing.assert_close(value, expected, atol=1e-9, rtol=1e-7)


# What autocast casts: all floats of an op but these, which stay in the dtype of sums or are a whole table.
KEPT_BY_AUTOCAST = {
    "attention": ("bias", "alibi_slopes"),
    "scaled_dot_product_attention": ("attn_mask",),
    "wkv4": ("w", "u", "state"),
    "wkv6": ("w", "u", "state"),
    "wkv7": ("w", "state"),
}


@over(dtypes=("fp32",), samples=lambda op: [] if op.name == "weighted_gather" else few(op))
@pytest.mark.skipif(INTERPRET, reason="the interpreter has no bf16 arithmetic")
def test_autocast_is_a_cast_of_the_arguments(op, dtype, sample):
    """To the bit, in results and gradients; weighted_gather, whose table it leaves, has a test of its own."""
    inputs = sample.make(dtype, "cpu")
    kept = {name: inputs[name] for name in KEPT_BY_AUTOCAST.get(op.name, ()) if name in inputs}

    def call(cast):
        given, leaves = dict(inputs), []
        for name in [name for name in op.differentiable if name in given]:
            given[name] = pytree.tree_map(leaf_again, given[name])
            leaves += [t for t in pytree.tree_leaves(given[name]) if is_float(t)]
        if cast:
            half = lambda t: t.bfloat16() if is_float(t) else t
            given = {name: t if name in kept else pytree.tree_map(half, t) for name, t in given.items()}
            results = op.function(**given)
        else:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                results = op.function(**given)
        asked = [t for t in pytree.tree_leaves(results) if t.requires_grad]
        seeds = [torch.linspace(-1, 1, t.numel()).view(t.shape).to(t.dtype) for t in asked]
        grads = torch.autograd.grad(asked, leaves, seeds) if asked else ()
        return [*pytree.tree_leaves(results), *grads]

    for got, want in zip(call(False), call(True), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
