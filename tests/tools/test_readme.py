"""The documents keep their word: the op table follows from the declarations, examples run, links lead somewhere."""

import pathlib
import re

import pytest

import pykernels as pk
from pykernels.core.declaration import OPS

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_op_table_follows_from_the_declarations():
    """Every op has a row: its name, linked to its file; its summary; its kernels; a link to its paper."""
    rows = re.findall(r"^(\| \[`pk\..*) \| \[[^]]+\]\(https://\S+\) \|$", README, re.MULTILINE)
    expected = {
        f"| [`pk.{op.name}`](pykernels/ops/{op.module}.py) | {op.summary} | {', '.join(op.supports)}"
        for op in OPS.values()
    }
    assert set(rows) == expected, "README.md should hold these rows:\n" + "\n".join(sorted(expected))
    assert rows == sorted(rows)


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text())
    assert not [link for link in links if not (document.parent / link).exists()]


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
