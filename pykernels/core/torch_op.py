"""Torch ops of a schema whose functions are given their arguments by name.

A fake, a launcher, a gradient or a reference names in its signature those of the schema's arguments that it reads, and
is given these. Nothing is passed by its place, and a gradient that is not returned is None.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import native
from .backends import BACKENDS, CUDA, INTERPRET, ON_HOST, TRITON, constant

NO_FORWARD_MODE = '{name}: forward-mode differentiation is not supported; within use_backend("reference") it is'

_library = torch.library.Library("pykernels", "DEF")
IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {}  # torch op → backend → its launcher, of the op's arguments


def torch_op(
    schema: str,
    *,
    fake: Callable,
    launchers: dict[str, Callable] | None = None,
    gradient: Callable | None = None,
    reference: Callable | None = None,
) -> Callable:
    """Define torch.ops.pykernels.<name>, whose last argument is the id of a backend; return the function to call.

    fake: its results, uninitialised. launchers: the GPU implementations, by backend; the CPU kernel registers itself.

    gradient: names, beside arguments and results of the op, grad_<result> for each result that has a gradient and, if
    it likes, `needs`, the set of arguments whose gradient is asked for; returns the gradients by argument. What it
    names is kept for it. Or it is the op itself that computes the gradient, if that asks for nothing else. Where the op
    has an argument `training`, a call without it has no gradient.

    reference: instead of that, for an op which computes a gradient: the function that it is the gradient of. The op's
    results are grad_<argument>, its arguments grad_<…> belong to the function's results in their order.
    """
    parsed = torch._C.parse_schema(f"pykernels::{schema}")
    name = parsed.name.partition("::")[2]
    arguments, results = [a.name for a in parsed.arguments], [r.name for r in parsed.returns]
    if twice := {*arguments} & {*results}:
        raise ValueError(f"{name}: expected results and arguments to differ in name, got {', '.join(twice)} twice")
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    torch.library.register_fake(f"pykernels::{name}", by_name(fake, arguments), lib=_library)
    IMPLEMENTATIONS[name] = {key: by_name(launcher, arguments) for key, launcher in (launchers or {}).items()}
    if launchers:
        _launch(name, IMPLEMENTATIONS[name])
    if reference is not None:
        asks, gradient = _gradient_of_gradient(arguments, results, reference)
    elif hasattr(gradient, "gradients"):
        asks, gradient = {*gradient.arguments}, gradient.gradients
    else:
        asks = _asked(gradient, arguments)
    save, backward = _autograd(parsed, arguments, results, asks, gradient)
    op = getattr(torch.ops.pykernels, name).default
    _library.impl(name, _with_gradient(op, save, backward), "Autograd", with_keyset=True)
    in_order = _in_order(arguments)

    def call(*args, **named):
        if named:
            args = in_order(*args, **named)
        if torch.compiler.is_compiling():
            if _tracing_gradient():
                raise NotImplementedError(f"{name}: torch.compile cannot trace its torch.func.grad: call that eagerly")
            return op(*args)
        return transformed.apply(*args) if transforming() else op(*args)

    transformed = _transformed(name, call, save, backward)

    def gradients(**named):
        """Of an op that computes a gradient, its results by the arguments that they are gradients of."""
        return dict(zip(call.primals, call(**named)))

    call.op, call.arguments, call.gradients = op, arguments, gradients
    call.primals = [name.removeprefix("grad_") for name in results]
    return call


def by_name(function: Callable, names: Sequence[str]) -> Callable:
    """The function of all arguments in order, which is given those that it names: all, if it takes **others."""
    asks = _asked(function, names)
    picks = [(place, name) for place, name in enumerate(names) if name in asks]
    return lambda *args: function(**{name: args[place] for place, name in picks})


def _asked(function: Callable, names: Sequence[str]) -> set[str]:
    parameters = inspect.signature(function).parameters
    return {*parameters, *(names if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else ())}


def in_order_of(function: Callable) -> Callable[..., tuple]:
    """The function's arguments as a tuple in its order, defaults filled in, however they were passed."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    order = _in_order([p.name for p in parameters])
    order.__defaults__ = tuple(p.default for p in parameters if p.default is not p.empty)
    return order


def _in_order(names: Sequence[str]) -> Callable[..., tuple]:
    return eval(f"lambda {', '.join(names)}: ({', '.join(names)},)")


def _launch(name: str, launchers: dict[str, Callable]) -> None:
    def run(*args):
        chosen = BACKENDS[args[-1]]  # a backend without its own gradient falls back to Triton's
        return on_own_device(launchers[chosen if chosen in launchers else "triton"], args)

    _library.impl(name, run, "CUDA")
    if INTERPRET or ON_HOST:
        _share_cpu_key(name, run)


def _autograd(parsed, arguments, results, asks, gradient) -> tuple[Callable, Callable]:
    """(setup_context, backward) which keep what the gradient asks for and hand it over by name."""
    is_tensor = {a.name: "Tensor" in str(a.type) for a in parsed.arguments}
    tensors = [(i, name) for i, name in enumerate(arguments) if name in asks and is_tensor[name]]
    numbers = [(i, name) for i, name in enumerate(arguments) if name in asks and not is_tensor[name]]
    kept = [(i, name) for i, name in enumerate(results) if name in asks]
    incoming = [(i, f"grad_{name}") for i, name in enumerate(results) if f"grad_{name}" in asks]
    constants = [i for i, name in enumerate(results) if f"grad_{name}" not in asks]
    saved, needs = [name for _, name in (*tensors, *kept)], "needs" in asks
    training = arguments.index("training") if "training" in arguments else None

    def save(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*(inputs[i] for i, _ in tensors), *(outputs[i] for i, _ in kept))
        ctx.numbers = {name: inputs[i] for i, name in numbers}
        ctx.training = training is None or inputs[training]
        ctx.mark_non_differentiable(*(outputs[i] for i in constants))
        ctx.set_materialize_grads(False)

    def backward(ctx, *grads):
        if not ctx.training:
            raise RuntimeError(f"{parsed.name}: a gradient was asked of a call with training=False")
        wanted = ctx.needs_input_grad
        given = {name: grads[i] for i, name in incoming}
        if all(grad is None for grad in given.values()):
            return (None,) * len(arguments)
        given.update(zip(saved, ctx.saved_tensors), **ctx.numbers)
        if needs:
            given["needs"] = {name for name, need in zip(arguments, wanted) if need}
        found = gradient(**given)
        return tuple(found.get(name) if need else None for name, need in zip(arguments, wanted))

    return save, backward


def _with_gradient(op, save: Callable, gradient: Callable) -> Callable:
    """The op's Autograd kernel. torch.library.register_autograd's takes 35 µs more, on Zen 5: it looks for defaults."""

    class WithGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *args, keyset = args
            result = below(keyset, args)
            save(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx, *grads):
            return *gradient(ctx, *grads), None

    def below(keyset, args):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def run(keyset, *args):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return WithGradient.apply(*args, keyset)
        return below(keyset, args)

    return run


def _gradient_of_gradient(arguments, results, reference) -> tuple[set[str], Callable]:
    """(what it asks for, the gradient) of an op that computes the gradient of the reference, by composition."""
    grads = [name for name in arguments if name.startswith("grad_")]
    primals = [name.removeprefix("grad_") for name in results]
    constants = [name for name in arguments if name in inspect.signature(reference).parameters and name not in primals]
    cotangents = [f"grad_{name}" for name in results]

    def gradient(**given):
        fixed = {name: given[name] for name in constants}

        def function(*values):
            found = reference(**fixed, **dict(zip(primals, values)))
            return found if isinstance(found, tuple) else (found,)

        found = second_order(function, *([given[name] for name in names] for names in (primals, grads, cotangents)))
        return dict(zip((*grads, *primals), found))

    return {*cotangents, *grads, *primals, *constants}, gradient


def _transformed(name: str, call: Callable, save: Callable, gradient: Callable) -> type[torch.autograd.Function]:
    """The op under torch.func: the same gradient, and vmap as a loop over the examples."""

    class Transformed(torch.autograd.Function):
        forward = staticmethod(call)
        setup_context = staticmethod(save)
        backward = staticmethod(gradient)

        @staticmethod
        def jvp(ctx, *_):
            raise NotImplementedError(NO_FORWARD_MODE.format(name=name))

        @staticmethod
        def vmap(info, in_dims, *args):
            def example(b):
                return (a if dim is None else a.select(dim, b) for a, dim in zip(args, in_dims))

            results = [call(*example(b)) for b in range(info.batch_size)]
            if isinstance(results[0], torch.Tensor):
                return torch.stack(results), 0
            stacked = tuple(map(torch.stack, zip(*results)))
            return stacked, (0,) * len(stacked)

    Transformed.__name__ = Transformed.__qualname__ = name
    return Transformed


def on_own_device(implementation: Callable, args: tuple):
    """implementation(*args) with the tensors' GPU as the current one, on which Triton launches wherever they are."""
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return implementation(*args)
    with torch.cuda.device(device):
        return implementation(*args)


def _share_cpu_key(name: str, run: Callable) -> None:
    """Where GPU kernels run on CPU tensors, these go to the Python implementations or to the native kernel as asked."""
    kernel = None if native.missing() else torch.library.get_kernel(f"pykernels::{name}", "CPU")

    def share(keyset, *args):
        return run(*args) if args[-1] in (TRITON, CUDA) or kernel is None else kernel.call_boxed(keyset, *args)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*verrid", category=UserWarning)  # it is meant
        _library.impl(name, share, "CPU", with_keyset=True, allow_override=True)


def second_order(
    function: Callable,
    primals: Sequence[torch.Tensor | None],
    grads: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """What a backward op's own backward returns, by composition from a function that torch can differentiate.

    The backward op took `grads` of function(*primals) to the gradients of the primals; given the `cotangents` of
    these, here are the gradients of its inputs (*grads, *primals): None for None and for integers.
    """

    def fresh(t):  # an alias of its own: the same tensor passed twice must not count twice
        if t is None or not t.is_floating_point():
            return t
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    def differentiable(t):
        return t is not None and t.is_floating_point()

    if transforming():
        return _transformed_second_order(function, primals, grads, cotangents)
    with torch.enable_grad():
        primals, grads = [*map(fresh, primals)], [*map(fresh, grads)]
        inputs = [*grads, *primals]
        pairs = [(out, grad) for out, grad in zip(function(*primals), grads) if grad is not None and out.requires_grad]
        asked = [(p, c) for p, c in zip(primals, cotangents) if c is not None and differentiable(p)]
        if not pairs or not asked:
            return [None] * len(inputs)
        outputs, seeds = zip(*pairs)
        first = torch.autograd.grad(outputs, [p for p, _ in asked], seeds, create_graph=True, materialize_grads=True)
        first = [(f, c.to(f.dtype)) for f, (_, c) in zip(first, asked) if f.requires_grad]
        if not first:
            return [None] * len(inputs)
        wanted = [t for t in inputs if differentiable(t)]
        second = torch.autograd.grad(
            [f for f, _ in first], wanted, [c for _, c in first], create_graph=True, allow_unused=True
        )
    found = iter(second)
    return [next(found) if differentiable(t) else None for t in inputs]


def _transformed_second_order(function, primals, grads, cotangents):
    """second_order under torch.func, whose levels torch.autograd.grad does not know."""

    def is_float(t):
        return t is not None and t.is_floating_point()

    floats = [place for place, p in enumerate(primals) if is_float(p)]
    given = [place for place, g in enumerate(grads) if g is not None]
    asked = [i for i, place in enumerate(floats) if cotangents[place] is not None]

    def forward(*values):
        outputs = function(*(values[floats.index(i)] if i in floats else p for i, p in enumerate(primals)))
        return tuple(outputs[place] for place in given)

    def first(values, seeds):
        found = torch.func.vjp(forward, *values)[1](seeds)
        return tuple(found[i] for i in asked)

    results = [None] * (len(grads) + len(primals))
    if given and asked:
        seeds = tuple(grads[place] for place in given)
        gradients, pullback = torch.func.vjp(first, tuple(primals[place] for place in floats), seeds)
        directions = tuple(cotangents[floats[i]].to(g.dtype) for i, g in zip(asked, gradients))
        for_values, for_seeds = pullback(directions)
        for place, value in zip(given, for_seeds):
            results[place] = value
        for place, value in zip(floats, for_values):
            results[len(grads) + place] = value
    return results


# ------------------------------------------------------------------------------------------------ modes of torch


def transforming() -> bool:
    """Whether a transform of torch.func is at work, whose wrappers hide what is inside."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@constant
def _tracing_gradient() -> bool:
    """Whether torch.compile is within a transform of torch.func other than vmap, which loops over what it traced."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


def wants_gradient(*arguments: Any) -> bool:
    """Whether a gradient may be asked of what is made of these."""
    if not torch.compiler.is_compiling() and transforming():
        return True
    if torch.is_grad_enabled():
        for a in arguments:  # a generator would take as long again
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


def refuse_forward_mode(name: str, arguments: tuple) -> None:
    """torch gives custom ops without a rule a zero tangent, silently; we raise instead."""
    if torch.autograd.forward_ad._current_level >= 0:
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(NO_FORWARD_MODE.format(name=name))
