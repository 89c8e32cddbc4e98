"""`python -m pykernels doctor`: what this machine is, and which backends each op has on it and why not the others."""

from __future__ import annotations

import argparse
import shutil
import subprocess

import torch

from ..core.backends import TRITON_NEEDED
from ..core.declaration import OPS, available_backends
from .machine import machine


def _compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return "not found"
    lines = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.strip().splitlines()
    return next((line for line in lines if "release" in line), lines[0] if lines else path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, title="this machine", title_justify="left")
    compilers = {"C++ compiler": _compiler("c++"), "CUDA compiler": _compiler("nvcc")}
    gpus = {} if torch.cuda.is_available() else {"GPU": "torch sees none"}
    cuda_first = ", ".join(name for name in sorted(OPS) if OPS[name].cuda_first)
    choices = {"CUDA before Triton": f"{cuda_first}, on a GPU that they have passed their first-use test on"}
    for name, value in {**machine(), **gpus, **compilers, **choices}.items():
        needed = f" ({TRITON_NEEDED} or newer is needed)" if name == "triton" else ""
        facts.add_row(name, escape(value + needed))
    console.print(facts)

    columns = ("reference", "cpu", "triton", "cuda")
    table = Table("op", *columns, title="backends", title_justify="left")
    reasons: dict[str, int] = {}
    for op in sorted(OPS):
        report = available_backends(op)
        marks = []
        for backend in columns:
            reason = report[backend]
            if reason is None:
                marks.append("[green]yes[/]")
            elif backend not in OPS[op].supports:
                marks.append("[dim]none[/]")
            else:
                marks.append(f"[yellow]no ({reasons.setdefault(reason, len(reasons) + 1)})[/]")
        table.add_row(op, *marks)
    console.print(table)
    for reason, number in reasons.items():
        console.print(f"({number}) {escape(reason)}", highlight=False)
    return 0
