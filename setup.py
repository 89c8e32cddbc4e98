"""Builds the CPU kernels, once per instruction-set level, and with nvcc the CUDA kernels; metadata: pyproject.toml.

Only headers of torch's stable ABI are used, so one build serves every Python ≥ 3.10 and every torch ≥ 2.10. The torch
of this environment is found without importing it, which also works inside pip's isolated builds. Without torch or a
compiler the install goes on without the kernels, and `python -m pykernels doctor` says what was lost.
"""

import concurrent.futures
import copy
import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = pathlib.Path("csrc")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
X86 = platform.machine().lower() in ("x86_64", "amd64")
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")
CUDA_ARCHS = "sm_80,sm_86,sm_89,sm_90a,sm_100,compute_120"  # machine code; and PTX, from which a driver makes newer
OBJECTS = pathlib.Path("build/cuda")  # not build_temp, which editable installs throw away


def find_torch() -> pathlib.Path | None:
    spec = importlib.util.find_spec("torch")
    places = [*spec.submodule_search_locations] if spec else []
    places += [os.path.join(sysconfig.get_path(scheme), "torch") for scheme in ("purelib", "platlib")]
    return next((p for p in map(pathlib.Path, places) if (p / "include/torch/csrc/stable/library.h").exists()), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def extensions() -> list[Extension]:
    torch = find_torch()
    if torch is None:
        print("pykernels: no torch ≥ 2.10 in this environment, so no kernels: install torch first", file=sys.stderr)
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
            define_macros=[STABLE_ABI],
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
    cuda = Extension(
        "pykernels._cuda",
        [str(path) for path in sorted(CSRC.glob("*.cu"))],
        depends=headers,
        include_dirs=[str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch", "torch_cpu"],
        define_macros=[STABLE_ABI],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi",
        ],
    )
    for extension in (built := [module, *kernels, *([cuda] if find_nvcc() else [])]):
        extension.py_limited_api = True
        extension.optional = True  # a failure is reported, and the install goes on
    return built


class Build(build_ext):
    """Compiles the levels side by side, each with object files of its own, and what nvcc is for."""

    user_options = [  # noqa: RUF012
        *build_ext.user_options,
        ("cuda-archs=", None, f"what nvcc compiles for, as far as it can (default: {CUDA_ARCHS})"),
    ]

    def initialize_options(self):
        super().initialize_options()
        self.cuda_archs = CUDA_ARCHS

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        self.ensure_string_list("cuda_archs")

    def build_extension(self, extension):
        if extension.name == "pykernels._cuda":
            try:
                return self.build_cuda(extension, find_nvcc())
            except (OSError, subprocess.CalledProcessError) as error:
                raise CompileError(f"nvcc: {error}") from error
        own = copy.copy(self)
        own.build_temp = os.path.join(self.build_temp, extension.name)
        build_ext.build_extension(own, extension)

    def build_cuda(self, extension, nvcc):
        """Compiles what changed since its object was made: the source, a header, the flags or the compiler."""
        version, known = (
            subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout
            for option in ("--version", "--list-gpu-arch")
        )
        targets = targets_of(self.cuda_archs, {int(number) for number in re.findall(r"compute_(\d+)", known)})
        codes = [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in targets]
        files = min(self.parallel, len(extension.sources))
        command = [
            nvcc,
            *extension.extra_compile_args,
            *codes,
            f"--threads={max(1, self.parallel // files)}",
            *(f"-D{name}={value}" for name, value in extension.define_macros),
            *(f"-I{path}" for path in extension.include_dirs),
        ]
        common = repr((command, version)).encode() + b"".join(
            pathlib.Path(path).read_bytes() for path in extension.depends
        )
        OBJECTS.mkdir(parents=True, exist_ok=True)

        def compiled(source):
            object_ = OBJECTS / pathlib.Path(source).with_suffix(".o").name
            stamp, digest = object_.with_suffix(".digest"), hashlib.sha256(common + pathlib.Path(source).read_bytes())
            if not (object_.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest()):
                stamp.unlink(missing_ok=True)
                print(f"nvcc: {source} for {', '.join(targets)}", flush=True)
                subprocess.run([*command, "-c", source, "-o", object_], check=True)
                stamp.write_text(digest.hexdigest())
            return object_

        with concurrent.futures.ThreadPoolExecutor(files) as threads:
            objects = [*threads.map(compiled, extension.sources)]
        library = pathlib.Path(self.get_ext_fullpath(extension.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        where = [f"-L{path}" for path in extension.library_dirs] + [f"-l{name}" for name in extension.libraries]
        hidden = "-Xlinker=--exclude-libs,ALL"  # the CUDA runtime is linked in, and is not anyone else's
        subprocess.run([nvcc, "-shared", *codes, *objects, *where, hidden, "-o", library], check=True)


def targets_of(archs: list[str], known: set[int]) -> list[str]:
    """The archs that nvcc knows; PTX that is too new for it is made for the newest of them instead."""
    number = lambda name: int(re.search(r"\d+", name)[0])
    here = [name for name in archs if number(name) in known]
    if not here:
        raise CompileError(f"nvcc knows none of {', '.join(archs)}")
    if any(name.startswith("compute_") for name in archs if name not in here):
        here.append(f"compute_{max(map(number, here))}")
    return here


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
