"""Builds the CPU kernels, once per instruction-set level; metadata is in pyproject.toml.

Only headers of torch's stable ABI are used, so one build serves every Python ≥ 3.10 and every torch ≥ 2.10. The torch
of this environment is found without importing it, which also works inside pip's isolated builds. Without torch or a
C++ compiler the install goes on without the kernels, and `python -m pykernels doctor` says what was lost.
"""

import copy
import importlib.util
import os
import pathlib
import platform
import sys
import sysconfig

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

CSRC = pathlib.Path("csrc")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
X86 = platform.machine().lower() in ("x86_64", "amd64")


def find_torch() -> pathlib.Path | None:
    spec = importlib.util.find_spec("torch")
    places = [*spec.submodule_search_locations] if spec else []
    places += [os.path.join(sysconfig.get_path(scheme), "torch") for scheme in ("purelib", "platlib")]
    return next((p for p in map(pathlib.Path, places) if (p / "include/torch/csrc/stable/library.h").exists()), None)


def extensions() -> list[Extension]:
    torch = find_torch()
    if torch is None:
        print("pykernels: no torch ≥ 2.10 in this environment, so no CPU kernels: install torch first", file=sys.stderr)
        return []
    headers = [str(path) for path in sorted(CSRC.glob("*.h"))]
    sources = [str(path) for path in sorted(CSRC.glob("*.cpp")) if path.name != "module.cpp"]
    module = Extension("pykernels._C", [str(CSRC / "module.cpp")], define_macros=[("Py_LIMITED_API", "0x030A0000")])
    kernels = [
        Extension(
            f"pykernels._C_{level}",
            sources,
            depends=headers,
            include_dirs=[str(torch / "include")],
            library_dirs=[str(torch / "lib")],
            libraries=["torch", "torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
                *flags,
            ],
        )
        for level, flags in LEVELS.items()
        if X86 or not flags
    ]
    for extension in (built := [module, *kernels]):
        extension.py_limited_api = True
        extension.optional = True  # a failure is reported, and the install goes on
    return built


class Build(build_ext):
    """Compiles the levels side by side, each with object files of its own."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extension(self, extension):
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, extension.name)
        build_ext.build_extension(own, extension)


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    packages=[
        *find_packages(include=["pykernels*"]),
        *("pykernels.kernels", "pykernels.bench", "pykernels.bench.peers"),
    ],
    package_dir={"pykernels.kernels": "kernels", "pykernels.bench": "bench"},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
