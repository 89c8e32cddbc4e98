"""`python -m pykernels doctor`: what this machine is, and which backends each op has on it and why not the others."""

from __future__ import annotations

import argparse
import importlib.metadata
import pathlib
import platform
import re
import shutil
import subprocess

import torch

from .. import OPS, __version__, available_backends
from ..core import native
from ..core.registry import TRITON_NEEDED


def machine() -> dict[str, str]:
    """What a measurement depends on."""
    facts = {"pykernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    facts["triton"] = _version("triton")
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["processor"] = _processor()
    facts["threads"] = f"{torch.get_num_threads()}"
    level, reason = native.load()
    facts["instruction set"] = level or f"none: {reason}"
    facts["CUDA kernels"] = _cuda_kernels()
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} processors"
        )
    return facts


def _cuda_kernels() -> str:
    """What they were built for, and whether they are in use, on each GPU if these differ."""
    gpus = [torch.device("cuda", index) for index in range(max(torch.cuda.device_count(), 1))]
    reasons = [native.cuda_missing(gpu) for gpu in gpus]
    capabilities = ", ".join(f"{value / 100:.1f}" for value in native.cuda_architectures())
    if not capabilities:
        return f"none: {reasons[0]}"
    uses = [f"not in use: {reason}" if reason else "in use" for reason in reasons]
    if len({*uses}) > 1:
        uses = [f"GPU {gpu.index} {use}" for gpu, use in zip(gpus, uses)]
    else:
        uses = uses[:1]
    return "; ".join((f"built for compute capability {capabilities}", *uses))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


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
