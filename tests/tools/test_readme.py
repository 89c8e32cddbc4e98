"""The README keeps its word: its op table follows from the declarations, and its example runs."""

import pathlib
import re

import pykernels as pk
from pykernels.core.declaration import OPS

README = (pathlib.Path(__file__).parents[2] / "README.md").read_text()


def test_op_table_follows_from_the_declarations():
    rows = [f"| `pk.{op.name}` | {op.summary} | {', '.join(op.supports)} |" for op in OPS.values()]
    table = "\n".join(["| op | what it computes | kernels |", "|---|---|---|", *sorted(rows)])
    assert table in README, f"README.md should hold this table:\n{table}"


def test_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) > 1
    exec("\n".join(examples), {})  # a later one may use what an earlier one imported


def test_every_public_docstring_names_its_arguments():
    for op in OPS.values():
        names = [name for name in op.function.__signature__.parameters]
        missing = [name for name in names if name not in (op.function.__doc__ or "")]
        assert not missing, f"{op.name}: {missing}"
    assert pk.__doc__
