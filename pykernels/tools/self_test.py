"""The first-use self-test: GPU kernels are held to the rule of check.py before this machine relies on them. Opt-in.

A compiler may turn a right kernel into a wrong one, on one architecture in one of its versions, and nothing would tell.
So on the first call of an op, per backend and dtype, a few of its samples run forward and backward. What fails is not
used: the call goes where it would go without that kernel, with one warning. The verdict is kept on disk, for this
architecture, compiler, torch and kernel source.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import tempfile
import threading
import warnings

import torch

from .. import kernels
from ..core import backends, native
from ..core.backends import BACKENDS, CUDA, TRITON, BackendDeclined, constant, unavailable
from ..core.declaration import OPS
from ..core.dtypes import FLOATS

SAMPLES = 8  # of an op, evenly spaced among them all
UNTESTED = "it has not been tested"

_verdicts: dict[tuple[str, int, torch.device, torch.dtype], str | None] = {}  # those that this process knows
_running = threading.local()


def verify_on_first_use(enable: bool = True) -> None:
    """Test each GPU kernel against its reference before its first use on this machine, and do without what fails.

    Off unless called. The first call of an op takes seconds longer, per backend and dtype; later processes find the
    verdict in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, pykernels/first-use), where it holds for the
    GPU's architecture and the versions of the compiler, torch and the kernels. A kernel that fails is replaced by the
    backend that comes after it, at last the PyTorch reference, with one warning; asked for by name (`use_backend`) it
    raises RuntimeError. Not tested while a CUDA graph is being captured.

    It also decides which kernels a call gets that names none: `lstm` and `gru` have CUDA kernels that launch once,
    where Triton's launch once a step. They come first on a GPU whose verdict is that they pass: from a test now or,
    whether this was called or not, from the file, into which `python -m pykernels gpu` writes too. Without a verdict
    Triton's serve.
    """
    backends.verify = failure if enable else None


def failure(name: str, backend: int, arguments: tuple) -> str | None:
    """Why a backend must not serve a call with these kernel arguments, tested now if need be. None: it may."""
    if backend not in (TRITON, CUDA):
        return None
    reason = _known(name, backend, *_device_and_dtype(arguments), True)
    return None if reason == UNTESTED else reason


def passed(name: str, backend: int, arguments: tuple) -> bool:
    """Whether a backend is known to have passed: here, on file or, where the user asked for it, in a test now."""
    return _known(name, backend, *_device_and_dtype(arguments), backends.verify is not None) is None


backends.passed = passed


def _device_and_dtype(arguments: tuple) -> tuple[torch.device, torch.dtype]:
    """Of the first tensor, and of the first that has floats."""
    device = None
    for one in arguments:
        if isinstance(one, torch.Tensor):
            device = device or one.device
            if one.is_floating_point():
                return device, one.dtype
    return device, torch.float32


@constant
def _known(name: str, backend: int, device: torch.device, dtype: torch.dtype, test: bool) -> str | None:
    """What is wrong with an op's kernels, None if nothing is, or UNTESTED; a test is not made during one."""
    key = name, backend, device, dtype
    if key in _verdicts and not (test and _verdicts[key] == UNTESTED):
        return _verdicts[key]
    if getattr(_running, "test", False):
        return UNTESTED
    if test and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        known = verdict(name, backend, str(device), dtype)
    else:
        known = _read(_key(name, backend, str(device), dtype))
    _verdicts[key] = known
    if known is not None and known != UNTESTED:
        warnings.warn(f"pykernels: {known}. It is not used.", stacklevel=5)
    return known


def verdict(name: str, backend: int, device: str, dtype: torch.dtype, again: bool = False) -> str | None:
    """What is wrong with an op's kernels on a device, from the verdicts on file or, if there is none, by a test."""
    key = _key(name, backend, device, dtype)
    known = UNTESTED if again else _read(key)
    if known != UNTESTED:
        return known
    wrong, certain = _test(name, backend, device, dtype)
    reason = wrong and f"{name}, {BACKENDS[backend]}, failed its first-use test on {architecture(device)}: {wrong}"
    if certain:
        _write(key, reason)
    return reason


def _test(name: str, backend: int, device: str, dtype: torch.dtype) -> tuple[str | None, bool]:
    """(what is wrong, or None; whether that would be so the next time)."""
    from .check import compare_sample  # which knows the ops

    op, outcome = OPS[name], []

    def run():
        _running.test = True
        for sample in op.samples[:: -(-len(op.samples) // SAMPLES)]:
            try:
                results = compare_sample(op, sample, dtype, device, BACKENDS[backend])
            except BackendDeclined:
                continue
            except Exception as error:  # it may have to do with this moment: not kept, but not used now either
                outcome.append((f"sample {str(sample)!r}: {type(error).__name__}: {error}", False))
                return
            wrong = [str(result) for result in results if not result.ok]
            if wrong:
                outcome.append((f"sample {str(sample)!r}: {'; '.join(wrong)}", True))
                return

    gpus = [torch.device(device).index or 0] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        # In a thread of its own, the caller's modes do not matter: no_grad, autocast, inference, transforms, tracing.
        thread = threading.Thread(target=run, name="pykernels first-use test")
        thread.start()
        thread.join()
    return outcome[0] if outcome else (None, True)


# ------------------------------------------------------------------------------------------------ the verdicts on file


def architecture(device: str) -> str:
    """sm_90, gfx942 or, where kernels run on the CPU to be tested, cpu."""
    if torch.device(device).type != "cuda":
        return torch.device(device).type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _key(name: str, backend: int, device: str, dtype: torch.dtype) -> str:
    what = name, BACKENDS[backend], str(dtype).removeprefix("torch."), architecture(device)
    return " ".join((*what, f"torch-{torch.__version__}", *_compiled(backend)))


@functools.cache
def _compiled(backend: int) -> tuple[str, ...]:
    """Versions and digest of what the kernels are compiled by and from."""
    if backend == TRITON:
        files = sorted(file for path in kernels.__path__ for file in pathlib.Path(path).glob("*.py"))
        versions = (f"triton-{importlib.metadata.version('triton')}",)
    else:
        files, versions = [file] if (file := native.cuda_library()) else [], ()
    return *versions, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def cache_folder() -> pathlib.Path:
    """Of one file for each verdict, so that processes that write at once cost each other none."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(home) if home else pathlib.Path.home() / ".cache") / "pykernels" / "first-use"


def _file(key: str) -> pathlib.Path:
    return cache_folder() / f"{re.sub(r'[^A-Za-z0-9_.+-]', ' ', key)}.json"


def _read(key: str) -> str | None:
    try:
        found = json.loads(_file(key).read_text())
    except (OSError, ValueError, RuntimeError):  # none yet, or not ours: the test runs again; RuntimeError: no home
        return UNTESTED
    reason = found.get(key, UNTESTED) if isinstance(found, dict) else UNTESTED
    return reason if reason is None or isinstance(reason, str) else UNTESTED


def _write(key: str, reason: str | None) -> None:
    """In one piece, whatever other processes write. Where nothing can be written the verdict lasts as long as we do."""
    with contextlib.suppress(OSError, RuntimeError):
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".new", delete=False) as new:
            try:
                json.dump({key: reason}, new)
                new.close()
                os.replace(new.name, file)
            except OSError:
                os.unlink(new.name)


# ------------------------------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """Test some ops' kernels now, whatever is on file: 1 if one is wrong. `python -m pykernels gpu` calls it."""
    parser = argparse.ArgumentParser(prog="pykernels.tools.self_test")
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--backend", choices=("triton", "cuda"), required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--json", required=True)
    args = parser.parse_args(argv)
    backend = BACKENDS.index(args.backend)
    if reason := unavailable(backend, args.device):
        parser.error(reason)
    found = {str(dtype).removeprefix("torch."): verdict(args.op, backend, args.device, dtype, True) for dtype in FLOATS}
    pathlib.Path(args.json).write_text(json.dumps(found, indent=1))
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
