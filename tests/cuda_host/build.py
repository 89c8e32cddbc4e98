"""Compiles csrc/cuda/*.cu with the C++ compiler into a torch library whose entries take CPU tensors.

    python tests/cuda_host/build.py [--plain] [file.cu …]     prints the library's path

Object files are kept under build/cuda_host by a hash of everything that went into them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_host"
RUNTIME = [HERE / name for name in ("fiber.cpp", "scheduler.cpp", "launch.cpp")]
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS += ["-fno-strict-aliasing", "-DCUDA_ON_HOST", f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc/cuda'}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fsanitize-sections=cuda_shared"]


def compiler() -> str | None:
    """The C++ compiler, or None: CXX, else g++ (clang++ keeps no red zones in a named section)."""
    return shutil.which(os.environ.get("CXX", "g++"))


def sources() -> list[pathlib.Path]:
    """The package's CUDA kernels."""
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def missing() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if compiler() is None:
        return "no C++ compiler"
    return None if sources() else "there is no csrc/cuda/*.cu"


def torch_flags() -> tuple[list[str], list[str]]:
    """(for the compiler, for the linker), without importing torch."""
    torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    compile_flags = [f"-isystem{torch / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    return compile_flags, [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def digest(*parts: str | bytes | pathlib.Path) -> str:
    whole = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, pathlib.Path) else part.encode() if isinstance(part, str) else part
        whole.update(hashlib.sha256(data).digest())
    return whole.hexdigest()[:16]


def make(target: pathlib.Path, command: list[str]) -> pathlib.Path:
    """Run a command that writes `target`, unless it is there; whoever else looks sees all of it or nothing."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            partial = pathlib.Path(folder) / target.name
            run([*command, "-o", str(partial)])
            partial.replace(target)
    return target


def build(
    files: list[pathlib.Path] | None = None, *, sanitize: bool = True, torch: bool = True, flags: tuple[str, ...] = ()
) -> pathlib.Path:
    """The path of the library made of these files, by default of all kernels; without `torch`, of plain C++."""
    files = sources() if files is None else [pathlib.Path(f).resolve() for f in files]
    compile_flags, link_flags = torch_flags() if torch else ([], [])
    optimise = ["-O1", *SANITIZERS] if sanitize else ["-O2"]
    common = [*FLAGS, *optimise, *flags]
    headers = [*sorted((ROOT / "csrc").rglob("*.h")), *sorted(HERE.rglob("*.h"))]
    version = run([compiler(), "--version"])

    def compiled(source: pathlib.Path) -> pathlib.Path:
        options = [*common, *(compile_flags if source.suffix == ".cu" else [])]
        name = digest(version, "\0".join(options), str(source), source, *headers)
        command = [compiler(), *options, "-x", "c++", "-c", str(source)]
        return make(BUILD / f"{source.stem}-{name}.o", command)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compiled, [*files, *RUNTIME])]
    link = [compiler(), "-shared", *optimise, *objects, *link_flags]
    return make(BUILD / f"kernels-{digest(version, ' '.join(link))}.so", link)


def environment() -> dict[str, str]:
    """What a process needs that loads a library with sanitizers: their own come first."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last so that ASan finds what it intercepts
    preload = [run([compiler(), f"-print-file-name={name}"]).strip() for name in names]
    asan = "detect_leaks=0:quarantine_size_mb=64:allocator_may_return_null=1"
    return {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": asan,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=pathlib.Path, help="default: csrc/cuda/*.cu")
    parser.add_argument("--plain", action="store_true", help="no sanitizers")
    arguments = parser.parse_args()
    print(build(arguments.files or None, sanitize=not arguments.plain))


if __name__ == "__main__":
    main()
