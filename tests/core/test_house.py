"""How the house stands: which floor imports which, the same names on every floor, nothing too large to hold in mind."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

import pykernels
from pykernels.core.declaration import OPS
from pykernels.launch import linear_recurrence, wkv4

ROOT = pathlib.Path(pykernels.__file__).parents[1]
CSRC = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
TRITON = sorted((ROOT / "kernels").glob("*.py"))

pytestmark = pytest.mark.skipif(not CSRC, reason="the sources are not beside the package: it is no checkout")


def test_floors_import_downwards_only():
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    lint = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.name)
def test_triton_files_import_no_torch(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "torch"]


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_samples_and_a_test_file(name):
    assert OPS[name].samples
    assert (ROOT / f"tests/ops/test_{OPS[name].module}.py").exists()


def test_an_op_has_one_name_on_every_floor():
    """A kernel's file is named as the launcher, a launcher as the op."""
    launchers = {path.stem for path in (ROOT / "pykernels/launch").glob("[!_]*.py")}
    assert launchers <= {path.stem for path in (ROOT / "pykernels/ops").glob("*.py")}
    assert {path.stem for path in (ROOT / "pykernels/samples").glob("[!_]*.py")} == {op.module for op in OPS.values()}
    for path in (*TRITON, *ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")):
        shared = path.stem in ("target", "tiles", "module", "tasks")
        assert shared or any(path.stem == name or path.stem.startswith(f"{name}_") for name in launchers), path


def test_steps_between_saved_states_are_the_same_everywhere():
    found = {"launch/linear_recurrence": linear_recurrence.SAVED, "launch/wkv4": wkv4.SAVED}
    for path in (*TRITON, *CSRC):
        for match in re.findall(r"\bSAVED(?:: \S+)? = (?:tl\.constexpr\()?(\d+)", path.read_text()):
            found[str(path)] = int(match)
    assert len(found) >= 6
    assert {*found.values()} == {32}


def test_no_folder_holds_more_than_two_dozen_files():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    folders = [pathlib.Path(file).parent for file in files]
    assert {str(folder): folders.count(folder) for folder in {*folders} if folders.count(folder) > 24} == {}


def test_no_op_file_is_longer_than_500_lines():
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "pykernels/ops").glob("*.py")}
    assert max(lengths.values()) <= 500, lengths


TYPES = re.compile(r"(namespace|struct|class|template.*\b(struct|class) \w+ )")


def long_blocks(text, limit=120):
    """(line, length) of each C++ function that is longer, by its braces; blocks of namespaces and classes are not."""
    found, opened = [], []
    for number, line in enumerate(text.splitlines(), 1):
        code = re.sub(r'//.*|"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)\'', "", line)
        for sign in re.findall(r"[{}]", code):
            if sign == "{":
                opened.append((number, code.strip()))
            elif opened:
                first, start = opened.pop()
                if number - first >= limit and not re.match(
                    r"(namespace|struct|class|template.*\b(struct|class) \w+ )", start
                ):
                    found.append((first, number - first + 1))
    return found


@pytest.mark.parametrize("path", CSRC, ids=lambda path: path.name)
def test_no_function_of_a_kernel_is_longer_than_120_lines(path):
    # Apart, the steps of csrc/cuda/linear_recurrence.cu's loop take registers that cost blocks a multiprocessor.
    assert len(long_blocks(path.read_text())) == (path.name == "linear_recurrence.cu")


@pytest.mark.parametrize("path", TRITON, ids=lambda path: path.name)
def test_no_function_of_a_triton_kernel_is_longer_than_120_lines(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    assert not {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 120}


def test_long_functions_are_found():
    body = "\n".join(["  x();"] * 130)
    assert long_blocks(f"namespace {{\nvoid f() {{\n{body}\n}}\n}}") == [(2, 132)]
    assert not long_blocks(f"struct S {{\n{body}\n}};")
