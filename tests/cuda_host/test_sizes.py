"""The numbers by which the launchers allocate are those of the CUDA kernels."""

import importlib
import pathlib
import re

import pytest

import pykernels

HEADER = pathlib.Path(pykernels.__file__).parents[1] / "csrc/cuda/sizes.h"


def constants(text):
    """(launcher, name, value) for each constant and each launcher that is named above it."""
    launchers = []
    for line in text.splitlines():
        if named := re.findall(r"pykernels/launch/(\w+)\.py", line):
            launchers = named
        for name, value in re.findall(r"\b([A-Z_]+) = (\d+)", line):
            yield from ((launcher, name, int(value)) for launcher in launchers)


@pytest.mark.skipif(not HEADER.exists(), reason="the sources are not beside the package: it is no checkout")
def test_the_launchers_have_the_kernels_numbers():
    found = [*constants(HEADER.read_text())]
    assert len(found) > 10
    for launcher, name, value in found:
        assert getattr(importlib.import_module(f"pykernels.launch.{launcher}"), name) == value, (launcher, name)


def test_constants_are_read_below_their_launchers():
    text = "// pykernels/launch/a.py, pykernels/launch/b.py\nconstexpr int X = 1, Y = 20;  // 3\n"
    assert [*constants(text)] == [("a", "X", 1), ("b", "X", 1), ("a", "Y", 20), ("b", "Y", 20)]
