"""What this machine is, as far as a measurement depends on it."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import re

import torch

from .. import __version__
from ..core import native


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
