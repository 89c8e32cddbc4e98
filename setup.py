"""Builds the CPU kernels, once per instruction-set level, and with nvcc the CUDA kernels; metadata: pyproject.toml.

Only headers of torch's stable ABI are used, so one build serves every Python ≥ 3.10 and every torch ≥ 2.10. The torch
of this environment is found without importing it, which also works inside pip's isolated builds. No torch, no compiler
or one that fails is an error: PYKERNELS_NO_KERNELS=1 asks for a build without kernels, PYKERNELS_NO_CUDA=1 for one
without CUDA's, and the package keeps that. An sdist and the metadata take neither torch nor a compiler.

`pip install .` builds the CUDA kernels wherever there is an nvcc, with or without a GPU, since a wheel may be made for
another machine. `make` builds for the machine it runs on: it sets PYKERNELS_NO_CUDA=1 where there is no GPU, unless
CUDA=1 asks for them. A build begins with what it compiles and how long that took where it was last measured. ccache
is used where it is on PATH.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError, LinkError

CSRC = pathlib.Path("csrc")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16"]}
X86 = platform.machine().lower() in ("x86_64", "amd64")
GARBAGE_COLLECTION = "--param=ggc-min-heapsize=2000000"  # KB: gcc collects none of its memory; 5 % less time
STABLE_ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")
CUDA_ARCHS = "sm_80,sm_86,sm_89,sm_90a,sm_100,sm_120,compute_120"  # machine code; PTX, of which a driver makes newer
CUDA = "pykernels._cuda"
# A level that adds only the bf16 dot product takes the lower level's object of every source without that instruction.
DOT_PRODUCT_LEVEL, WITHOUT_DOT_PRODUCT, DOT_PRODUCT_MACRO = "avx512bf16", "avx512", "__AVX512BF16__"
VOCABULARY = CSRC / "cpu/vec.h"  # defines the dot product, so its mention of the macro is not a use
CPU_TIME = "200 CPU seconds where last measured, for four levels, on Zen 5 cores with g++ 12"
CUDA_TIME = "100 CPU seconds where last measured, for sm_90a alone, on Zen 5 cores with nvcc 13"
OBJECTS = pathlib.Path("build/objects")  # not build_temp, which editable installs throw away

WITHOUT_KERNELS = "To install the PyTorch references alone, without kernels, set PYKERNELS_NO_KERNELS=1."
OTHER_COMPILER = "To compile with another compiler, set CXX to it."
WITHOUT_CUDA = "To install without the CUDA kernels, set PYKERNELS_NO_CUDA=1."
NO_TORCH = f"""no torch{{}}.
The kernels are compiled with its headers, so it comes first, in a command of its own:
    pip install 'torch>=2.10' 'setuptools>=77'
    pip install --no-build-isolation .
{WITHOUT_KERNELS}"""


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def find_torch() -> pathlib.Path:
    spec = importlib.util.find_spec("torch")
    places = [*spec.submodule_search_locations] if spec else []
    places += [os.path.join(sysconfig.get_path(scheme), "torch") for scheme in ("purelib", "platlib")]
    torch = next((p for p in map(pathlib.Path, places) if (p / "version.py").exists()), None)
    if torch is None:
        raise CompileError(NO_TORCH.format(" where this build can see it"))
    version = re.search(r"^__version__\b[^'\n]*'((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text(), re.MULTILINE)
    if (int(version[2]), int(version[3])) < (2, 10):
        raise CompileError(NO_TORCH.format(f" ≥ 2.10, but {version[1]} in {torch.parent}"))
    return torch


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (home and shutil.which("nvcc", path=os.path.join(home, "bin"))) or shutil.which("nvcc")


def left_out() -> dict[str, str]:
    """The kernels that this build goes without, "cpu" or "cuda", and why."""
    if is_set("PYKERNELS_NO_KERNELS"):
        return dict.fromkeys(("cpu", "cuda"), "built with PYKERNELS_NO_KERNELS=1")
    if is_set("PYKERNELS_NO_CUDA"):
        return {"cuda": "built with PYKERNELS_NO_CUDA=1"}
    return {} if find_nvcc() else {"cuda": "built where there was no nvcc"}


def extensions() -> list[Extension]:
    """Those to build, the longest first. Where torch is, Build finds out."""
    without = left_out()
    named = lambda *patterns: [str(path) for pattern in patterns for path in sorted(CSRC.glob(pattern))]
    common = dict(depends=named("*.h", "cpu/*.h"), py_limited_api=True)
    kernels = dict(common, define_macros=[STABLE_ABI], libraries=["torch", "torch_cpu"])
    cuda = Extension(
        CUDA,
        named("cuda/*.cu"),
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wno-psabi",
        ],
        **kernels | dict(depends=named("*.h", "cuda/*.h")),
    )
    levels = [
        Extension(
            f"pykernels._C_{level}",
            [path for path in named("cpu/*.cpp") if not path.endswith("module.cpp")],
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",
                GARBAGE_COLLECTION,
                *flags,
            ],
            **kernels,
        )
        for level, flags in LEVELS.items()
        if X86 or not flags
    ]
    module = Extension(
        "pykernels._C", named("cpu/module.cpp"), define_macros=[("Py_LIMITED_API", "0x030A0000")], **common
    )
    return [*([] if "cuda" in without else [cuda]), *([] if "cpu" in without else [*levels, module])]


def uses_dot_product(source: str) -> bool:
    """Whether a source, or a header of ours that it includes, names the macro of the bf16 dot product."""
    unread, read = [pathlib.Path(os.path.normpath(source))], set()
    while unread:
        path = unread.pop()
        if path in read or path == VOCABULARY:
            continue
        read.add(path)
        text = path.read_text()
        if DOT_PRODUCT_MACRO in text:
            return True
        included = re.findall(r'^#include "(.+)"', text, re.MULTILINE)
        unread += [pathlib.Path(os.path.normpath(path.parent / name)) for name in included]
    return False


def launcher(compiler: str) -> list[str]:
    """ccache where it is on PATH, unless the compiler is ccache itself, by name or by a link."""
    ccache = shutil.which("ccache")
    is_ccache = "ccache" in os.path.basename(os.path.realpath(shutil.which(compiler) or compiler))
    return [ccache] if ccache and not is_ccache else []


@dataclasses.dataclass
class File:
    """A file to compile: `made` is its object, the stamp beside it a digest of everything that went into it."""

    command: list[str]
    source: str
    name: str
    made: pathlib.Path
    digest: str

    @property
    def stamp(self) -> pathlib.Path:
        return self.made.with_suffix(".digest")

    @property
    def unchanged(self) -> bool:
        return self.made.exists() and self.stamp.exists() and self.stamp.read_text() == self.digest

    def compile(self) -> None:
        self.made.parent.mkdir(parents=True, exist_ok=True)
        self.stamp.unlink(missing_ok=True)
        print(run(self.command, self.name, launcher(self.command[0])), end="")
        self.stamp.write_text(self.digest)


class Build(build_ext):
    """Compiles the files of all libraries side by side, those that changed, and links."""

    user_options = [  # noqa: RUF012
        *build_ext.user_options,
        ("cuda-archs=", None, f"what nvcc compiles for, as far as it can (default: {CUDA_ARCHS})"),
    ]
    cuda_archs = CUDA_ARCHS  # not set by initialize_options: an editable install calls that after it set the options

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()
        self.ensure_string_list("cuda_archs")

    def build_extensions(self):
        torch = find_torch()
        if self.compiler.compiler_type != "unix":
            raise CompileError(
                f"the kernels are for g++ and clang, not for {self.compiler.compiler_type}\n{WITHOUT_KERNELS}"
            )
        files = {extension.name: self.files(extension, torch) for extension in self.extensions}
        self.share_objects(files)
        needed = {file.made: file for each in files.values() for file in each}  # levels share objects
        changed = [file for file in needed.values() if not file.unchanged]
        self.announce()
        changed.sort(key=lambda file: (not file.name.endswith(".cu"), -os.path.getsize(file.source)))  # longest first

        def compile_(number, file):
            print(f"[{number}/{len(changed)}] {file.name}\n", end="", flush=True)  # one write: threads share the line
            file.compile()

        with concurrent.futures.ThreadPoolExecutor(self.parallel) as threads:
            [*threads.map(compile_, itertools.count(1), changed)]
        for extension in self.extensions:
            self.link(extension, [str(file.made) for file in files[extension.name]], str(torch / "lib"))

    def announce(self) -> None:
        levels = [name.partition("_C_")[2] for extension in self.extensions if "_C_" in (name := extension.name)]
        if levels:
            print(f"pykernels: builds the CPU kernels for {', '.join(levels)} ({CPU_TIME})", flush=True)
        if any(extension.name == CUDA for extension in self.extensions):
            print(f"pykernels: builds the CUDA kernels for {', '.join(self.targets())} ({CUDA_TIME})", flush=True)
        elif why := left_out().get("cuda"):
            print(f"pykernels: builds no CUDA kernels: {why}", flush=True)

    def files(self, extension, torch) -> list[File]:
        cuda, level, threads = extension.name == CUDA, extension.name.partition("_C_")[2], []
        if cuda:
            compiler = [find_nvcc(), *self.codes()]
            threads = [f"--threads={max(1, self.parallel // len(extension.sources))}"]
        else:
            compiler = self.compiler.compiler_so_cxx
        command = [
            *compiler,
            *extension.extra_compile_args,
            *(f"-D{name}={value}" for name, value in extension.define_macros),
            *(f"-I{path}" for path in (torch / "include", *self.include_dirs)),
        ]
        inputs = [torch / "version.py", *map(pathlib.Path, extension.depends)]
        program = [*itertools.takewhile(lambda word: not word.startswith("-"), compiler)]
        version = run([*program, "--version"], "--version")
        common = repr((command, version)).encode() + b"".join(path.read_bytes() for path in inputs)
        target = f" for {', '.join(self.targets()) if cuda else level}" if cuda or level else ""

        def file(source):
            made = OBJECTS / extension.name / f"{source}.o"
            digest = hashlib.sha256(common + pathlib.Path(source).read_bytes()).hexdigest()
            return File([*command, *threads, "-c", source, "-o", str(made)], source, source + target, made, digest)

        return [*map(file, extension.sources)]

    def share_objects(self, files: dict[str, list[File]]) -> None:
        """The dot product's level takes the lower level's objects of the sources that do without it."""
        level, lower = (f"pykernels._C_{name}" for name in (DOT_PRODUCT_LEVEL, WITHOUT_DOT_PRODUCT))
        if level in files:
            files[level] = [
                own if uses_dot_product(own.source) else shared for own, shared in zip(files[level], files[lower])
            ]

    def link(self, extension, objects, torch_lib) -> None:
        library = self.get_ext_fullpath(extension.name)
        pathlib.Path(library).parent.mkdir(parents=True, exist_ok=True)
        if extension.name == CUDA:
            where = [f"-L{torch_lib}", *(f"-l{name}" for name in extension.libraries)]
            hidden = "-Xlinker=--exclude-libs,ALL"  # the CUDA runtime is linked in, and is not anyone else's
            run([find_nvcc(), "-shared", *self.codes(), *objects, *where, hidden, "-o", library], extension.name)
            return
        try:
            self.compiler.link_shared_object(
                objects,
                library,
                libraries=self.get_libraries(extension),
                library_dirs=[*self.library_dirs, torch_lib],
                export_symbols=self.get_export_symbols(extension),
                target_lang="c++",
            )
        except LinkError as error:
            raise CompileError(f"{extension.name}: {error}\n{WITHOUT_KERNELS}") from error

    def targets(self) -> list[str]:
        known = run([find_nvcc(), "--list-gpu-arch"], "--list-gpu-arch")
        return targets_of(self.cuda_archs, {int(number) for number in re.findall(r"compute_(\d+)", known)})

    def codes(self) -> list[str]:
        return [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in self.targets()]


def run(command: list[str], what: str, launcher: Sequence[str] = ()) -> str:
    """What a compiler says; where it fails, an error that ends in what to do."""
    advice = (
        WITHOUT_CUDA if pathlib.Path(command[0]).name.startswith("nvcc") else f"{OTHER_COMPILER}\n{WITHOUT_KERNELS}"
    )
    try:
        done = subprocess.run(
            [*launcher, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise CompileError(f"the compiler {command[0]} does not run: {error.strerror}\n{advice}") from error
    if done.returncode:
        said = "\n".join(done.stdout.splitlines()[:20])
        raise CompileError(f"{command[0]} failed on {what} with exit status {done.returncode}\n{said}\n{advice}")
    return done.stdout


def targets_of(archs: list[str], known: set[int]) -> list[str]:
    """The archs that nvcc knows; PTX that is too new for it is made for the newest of them instead."""
    number = lambda name: int(re.search(r"\d+", name)[0])
    here = [name for name in archs if number(name) in known]
    if not here:
        raise CompileError(f"nvcc knows none of {', '.join(archs)}\n{WITHOUT_CUDA}")
    if any(name.startswith("compute_") for name in archs if name not in here):
        here.append(f"compute_{max(map(number, here))}")
    return here


class BuildPy(build_py):
    """Puts into the package what was left out and why; libraries of an earlier build that are left out now go."""

    def run(self):
        super().run()
        package = pathlib.Path("" if self.editable_mode else self.build_lib, "pykernels")
        built = {f"{extension.name.split('.')[1]}.abi3.so" for extension in self.distribution.ext_modules}
        for library in {*package.glob("_*.abi3.so")}:
            if library.name not in built:
                library.unlink()
        for kernels, why in left_out().items():
            print(f"pykernels: the {kernels} kernels are left out: {why}", flush=True)
        (package / "left_out.json").write_text(json.dumps(left_out()))


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": Build, "build_py": BuildPy},
        packages=[
            *find_packages(include=["pykernels*"]),
            *("pykernels.kernels", "pykernels.bench", "pykernels.bench.peers"),
        ],
        package_dir={"pykernels.kernels": "kernels", "pykernels.bench": "bench"},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
