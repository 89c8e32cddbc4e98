"""The types of the public surface, as code that uses the package sees them; `make typecheck` runs the same."""

import pathlib
import subprocess
import sys

import pytest

import pykernels as pk

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONSUMER = HERE / "consumer.py"


def mypy(cache: pathlib.Path, *arguments: str) -> tuple[int, str]:
    pytest.importorskip("mypy", reason="the types are checked by mypy")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the package is not in its checkout")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_the_public_surface_type_checks_and_a_wrong_call_does_not(tmp_path):
    status, said = mypy(tmp_path / "cache")
    assert status == 0, said
    wrong = tmp_path / "wrong.py"
    wrong.write_text('import torch\nimport pykernels as pk\npk.topk_search(torch.empty(2), torch.empty(2), "4")\n')
    status, said = mypy(tmp_path / "cache", str(wrong))
    assert status == 1
    assert 'Argument 3 to "topk_search" has incompatible type "str"' in said


def test_the_consumer_calls_every_public_function():
    text = CONSUMER.read_text()
    functions = [name for name in pk.__all__ if callable(getattr(pk, name))]
    assert [name for name in functions if f"pk.{name}(" not in text] == []
