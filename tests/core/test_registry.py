"""What every op stands on: the vocabulary of checks, and the choice of a backend."""

import ast
import copy
import inspect
import pathlib
import pickle
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pykernels as pk
from pykernels.core import backends
from pykernels.core import expect as checks
from pykernels.core.backends import use_backend
from pykernels.core.declaration import OPS
from pykernels.core.torch_op import torch_op

HERE = pathlib.Path(inspect.getfile(pk)).parent
CHECKED = [*HERE.glob("ops/*.py"), *HERE.glob("nn/*.py")]

# ------------------------------------------------------------------------------------------------ checks


def is_len(node):
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "len"


def costly(source):
    """Arguments of expect… calls that cost something, or fix a size, although nothing has failed.

    A call expect(False, …) is one whose check has failed.
    """
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        failed = call.args and isinstance(call.args[0], ast.Constant) and call.args[0].value is False
        if getattr(call.func, "id", "").startswith("expect") and not failed:
            for argument in call.args[1:]:
                if any(isinstance(part, ast.JoinedStr | ast.Call) for part in ast.walk(argument) if not is_len(part)):
                    found.append(f"line {call.lineno}: {ast.unparse(argument)}")
    return found


@pytest.mark.parametrize("path", CHECKED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_message_is_made_before_its_check_has_failed(path):
    found = costly(path.read_text())
    assert not found, "\n".join(found)


def test_messages_that_cost_something_are_found():
    assert len(costly('expect(a, "n", f"{b}", c)')) == len(costly('expect(a, "n", "x", c.tolist())')) == 1
    assert not costly('expect(a.any(), "n", "[{b}]", c, b=b)') + costly('expect(False, "n", f"{b}", c.tolist())')


class Named(torch.Tensor):
    pass


def test_data_is_read_where_there_is_some():
    t = torch.ones(2)
    assert all(map(checks.can_read, (t, torch.nn.Parameter(t), t.as_subclass(Named))))
    assert not checks.can_read(t.to("meta"))
    with FakeTensorMode() as mode:
        assert not checks.can_read(mode.from_tensor(t))
        assert not checks.can_read(t)
    seen = []
    torch.func.vmap(lambda x: seen.append(checks.can_read(x)) or x)(t)
    torch.func.grad(lambda x: seen.append(checks.can_read(x)) or x.sum())(t)
    assert seen == [False, False]


@pytest.mark.parametrize("value", [3, 0.5, np.float32(0.5), np.int64(3), Fraction(1, 2)])
def test_numbers_of_every_kind(value):
    assert checks.expect_number(value, "scale") == value


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.tensor(0.1), TypeError, "scale: expected a number, which has no gradient, got a tensor"),
        (torch.nn.Parameter(torch.ones(1)), TypeError, "scale: expected a number, which has no gradient"),
        ("1", TypeError, "scale: expected a number, got str"),
        (None, TypeError, "scale: expected a number, got NoneType"),
        (float("nan"), ValueError, "scale: expected a finite number from 0 to below 1, got nan"),
        (float("-inf"), ValueError, "scale: expected a finite number from 0 to below 1, got -inf"),
        (1, ValueError, "scale: expected a finite number from 0 to below 1, got 1"),
    ],
)
def test_numbers_that_are_none(value, error, message):
    with pytest.raises(error, match=message):
        checks.expect_number(value, "scale", 0, 1)
    with pytest.raises(TypeError, match="k: expected an integer"):
        checks.expect_integer(value if not isinstance(value, int) else True, "k")


def test_errors_of_a_call_name_what_the_caller_wrote():
    q = torch.ones(1, 1, 2, 4)
    for call, message in (
        (lambda: pk.attention(q, q, q, mask=q), r"attention\(\) got an unexpected keyword argument 'mask'"),
        (lambda: pk.attention(q, q, q, biass=q), "did you mean 'bias'"),
        (lambda: pk.attention(q, q), r"attention\(\) missing a required argument: 'value'"),
        (lambda: pk.reference.attention(q, q, q, q), r"attention\(\) too many positional arguments"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_functions_and_references_are_pickled_and_copied(op):
    for function in (op.function, op.reference):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function


# ------------------------------------------------------------------------------------------------ use_backend


def override():
    return backends.BACKENDS[backends._selection.override]


@pytest.fixture(autouse=True)
def automatic():
    assert override() == "auto"
    yield
    backends._selection.__init__()


def test_a_call_lasts_and_a_block_ends():
    use_backend("reference")
    with use_backend("cpu"):
        assert override() == "cpu"
        use_backend("triton")
        assert override() == "triton"
    assert override() == "reference"
    for name in ("cpu", "reference") * 20:
        use_backend(name)
    assert len(backends._selection.levels[0].calls) < 5
    use_backend("auto")


def test_blocks_that_overlap():
    first, second = use_backend("reference"), use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert override() == "cpu"
    second.__exit__()
    assert override() == "auto"


def test_one_object_entered_twice_and_again():
    chosen = use_backend("reference")
    for _ in range(2):
        with chosen:
            with use_backend("cpu"), chosen:
                assert override() == "reference"
            assert override() == "reference"
        assert override() == "auto"


def test_a_thread_has_its_own_choice():
    seen = []

    def run():
        seen.append(override())
        with use_backend("cpu"):
            barrier.wait()
            seen.append(override())

    barrier = threading.Barrier(2)
    with use_backend("reference"):
        thread = threading.Thread(target=run)
        thread.start()
        barrier.wait()
        assert override() == "reference"
        thread.join()
        assert override() == "reference"
    assert seen == ["auto", "cpu"]


def test_a_block_is_left_where_it_was_entered():
    chosen = use_backend("reference")
    chosen.__enter__()
    errors = []

    def leave():
        try:
            chosen.__exit__()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    assert errors == ["use_backend: expected to be left in the thread that entered it"]


def test_compiled_code_follows_the_choice_of_its_thread():
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    q = torch.randn(1, 1, 3, 4)
    compiled = torch.compile(pk.attention, fullgraph=True, backend=count)
    compiled(q, q, q)
    with use_backend("reference"):
        compiled(q, q, q)
        assert len(graphs) == 2
        thread = threading.Thread(target=compiled, args=(q, q, q))
        thread.start()
        thread.join()
    compiled(q, q, q)
    assert len(graphs) == 2
    targets = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    assert "pykernels.attention.default" in targets[0]
    assert "pykernels.attention.default" not in targets[1]


def test_a_name_is_an_arguments_or_a_results():
    """One of both would hide the other from the gradient."""
    with pytest.raises(ValueError, match="twice: expected results and arguments to differ in name, got x twice"):
        torch_op("twice(Tensor x, int backend) -> Tensor x", fake=lambda x: x, gradient=lambda grad_x: {})
