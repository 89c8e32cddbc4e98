"""What an install does without torch, without a compiler or with one that fails, and what the import brings along."""

import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import types
import zipfile

import pytest
import torch

import pykernels as pk
from pykernels.core import backends, native
from pykernels.core.backends import CUDA, TRITON, constant, unavailable
from pykernels.tools.machine import machine

ROOT = pathlib.Path(pk.__file__).parents[1]
X86 = platform.machine().lower() in ("x86_64", "amd64")
from_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the package is not in its checkout")

# ------------------------------------------------------------------------------------------------ the import

IMPORTED = """
import sys, torch
before = {*sys.modules}
import pykernels
print(sorted({"torch._dynamo", "torch._inductor", "triton", "sympy", "numpy", "rich"} & ({*sys.modules} - before)))
"""


def test_the_import_brings_no_compiler():
    """Dynamo, and Triton with it, takes as long as torch itself."""
    run = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_constant_is_marked_as_torch_marks_it():
    marked, theirs = (mark(lambda: None) for mark in (constant, torch.compiler.assume_constant_result))
    assert vars(marked) == vars(theirs) != {}


# ------------------------------------------------------------------------------------------------ the build

COMPILER = """#!/bin/sh
case "$*" in
    --version) echo compiler 1.0; exit;;
    --list-gpu-arch) echo compute_80; echo compute_90; exit;;
    *" -c "*) echo "$*" >> "$CALLS"
esac
case "$*" in *" -c csrc"*"$BROKEN"*) echo "$BROKEN:1: error: nonsense"; exit 3;; esac
while [ "$1" != -o ]; do shift; done
: > "$2"
"""


@pytest.fixture
def build(tmp_path):
    """build(*commands, **environment) in a copy of the checkout, where compilers write empty files."""
    tree, tools = tmp_path / "tree", tmp_path / "bin"
    skipped = shutil.ignore_patterns(".*", "build", "*.so", "*.egg-info", "left_out.json", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=skipped)
    tools.mkdir()
    for name in ("nvcc", "c++"):
        (tools / name).write_text(COMPILER)
        (tools / name).chmod(0o755)
    (tree / "torch").mkdir()
    (tree / "torch/__init__.py").touch()
    (tree / "torch/version.py").write_text("__version__ = '2.10.0+cpu'")

    def run(*commands, **environment):
        """(its exit status, the lines on stdout, all on stderr)."""
        ours = {
            "CXX": str(tools / "c++"),
            "CUDA_HOME": str(tmp_path),
            "BROKEN": "no file",
            "CALLS": str(tmp_path / "calls"),
        }
        cleared = {name: value for name, value in os.environ.items() if not name.startswith(("PYKERNELS_", "DIST_"))}
        done = subprocess.run(
            [sys.executable, "setup.py", *commands],
            cwd=tree,
            env={**cleared, "PATH": "/usr/bin:/bin", **ours, **environment},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout.splitlines(), done.stderr

    run.tree, run.calls = tree, tmp_path / "calls"
    return run


def wheel_of(build):
    (wheel,) = (build.tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        libraries = {name.split(".")[0] for name in opened.namelist() if name.endswith(".so")}
        left_out = json.loads(opened.read("pykernels/left_out.json"))
        assert "pykernels/py.typed" in opened.namelist()
    return wheel, libraries, left_out


@from_checkout
def test_a_build_shows_its_progress_and_compiles_what_changed(build):
    status, lines, _ = build("bdist_wheel")
    wheel, libraries, left_out = wheel_of(build)
    progress = [line for line in lines if line.startswith("[")]
    assert (status, left_out) == (0, {})
    assert "-cp310-abi3-" in wheel.name
    assert {"pykernels/_C", "pykernels/_C_baseline", "pykernels/_cuda"} <= libraries
    assert len(progress) == len(build.calls.read_text().splitlines()) > 20
    assert {line.split()[0] for line in progress} == {f"[{i + 1}/{len(progress)}]" for i in range(len(progress))}
    levels = "baseline, avx2, avx512, avx512bf16" if X86 else "baseline"
    assert [line.split(" (")[0] for line in lines if line.startswith("pykernels: builds the ")] == [
        f"pykernels: builds the CPU kernels for {levels}",
        "pykernels: builds the CUDA kernels for sm_80, sm_90a, compute_90",
    ]
    for ending in ("topk.cu for sm_80, sm_90a, compute_90", "topk.cpp for baseline", "module.cpp"):
        assert [line.endswith(ending) for line in progress].count(True) == 1

    (source,) = build.tree.glob("csrc/**/topk.cu")
    source.write_text(source.read_text() + "\n")
    build("build_ext")
    assert len(build.calls.read_text().splitlines()) == len(progress) + 1
    (build.tree / "torch/version.py").write_text("__version__ = '2.11.0+cpu'")
    build("build_ext")
    assert len(build.calls.read_text().splitlines()) == 2 * len(progress) + 1


@from_checkout
def test_a_build_compiles_through_ccache_where_it_is(build):
    launcher = build.tree.parent / "bin/ccache"
    launcher.write_text('#!/bin/sh\necho "$1" >> "$CALLS.ccache"\nexec "$@"\n')
    launcher.chmod(0o755)
    tools = str(launcher.parent)
    assert build("build_ext", PATH=f"{tools}:/usr/bin:/bin")[0] == 0
    through = (build.calls.parent / "calls.ccache").read_text().splitlines()
    assert {*through} == {f"{tools}/c++", f"{tools}/nvcc"}
    assert len(through) == len(build.calls.read_text().splitlines())

    (build.tree / "torch/version.py").write_text("__version__ = '2.11.0+cpu'")
    assert (
        build("build_ext", PATH=f"{tools}:/usr/bin:/bin", CXX=f"{launcher} {tools}/c++", PYKERNELS_NO_CUDA="1")[0] == 0
    )
    again = (build.calls.parent / "calls.ccache").read_text().splitlines()[len(through) :]
    assert {*again} == {f"{tools}/c++"}  # and not ccache by ccache


def setup_of_checkout():
    spec = importlib.util.spec_from_file_location("pykernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@from_checkout
@pytest.mark.skipif(not X86, reason="the level is of x86-64")
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ shows what a source is to the compiler")
def test_a_source_whose_object_two_levels_share_is_the_same_at_both(monkeypatch):
    """But for the vocabulary that defines the dot product, and that the lower level compiles without."""
    monkeypatch.chdir(ROOT)
    setup = setup_of_checkout()
    common = ["g++", "-E", "-std=c++20", f"-D{'='.join(setup.STABLE_ABI)}", f"-I{setup.find_torch() / 'include'}"]
    vocabulary = f'"{setup.VOCABULARY}"'

    def ours(source, level):
        """The lines of csrc in what the compiler reads, without the vocabulary's."""
        run = subprocess.run([*common, *setup.LEVELS[level], source], capture_output=True, text=True, check=True)
        place, lines = "", []
        for line in run.stdout.splitlines():
            if line.startswith("# "):
                place = os.path.normpath(line.split()[2].strip('"'))
            elif place.startswith("csrc") and f'"{place}"' != vocabulary:
                lines.append(line)
        return lines

    sources = [str(path) for path in sorted(setup.CSRC.glob("cpu/*.cpp")) if path.name != "module.cpp"]
    shared = [source for source in sources if not setup.uses_dot_product(source)]
    assert 0 < len(shared) < len(sources)
    for source in shared:
        lower, upper = (ours(source, level) for level in (setup.WITHOUT_DOT_PRODUCT, setup.DOT_PRODUCT_LEVEL))
        assert lower == upper != []


@from_checkout
def test_what_is_left_out_is_not_in_the_wheel_and_said_there(build):
    assert build("bdist_wheel")[0] == 0
    shutil.rmtree(build.tree / "dist")
    assert build("bdist_wheel", PYKERNELS_NO_CUDA="1")[0] == 0
    _, libraries, left_out = wheel_of(build)
    assert left_out == {"cuda": "built with PYKERNELS_NO_CUDA=1"}
    assert "pykernels/_C_baseline" in libraries
    assert "pykernels/_cuda" not in libraries

    shutil.rmtree(build.tree / "dist")
    status, lines, _ = build("bdist_wheel", PYKERNELS_NO_KERNELS="1", CXX="/bin/false")
    wheel, libraries, left_out = wheel_of(build)
    assert status == 0
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries == set()
    assert left_out == dict.fromkeys(("cpu", "cuda"), "built with PYKERNELS_NO_KERNELS=1")
    assert "pykernels: the cpu kernels are left out: built with PYKERNELS_NO_KERNELS=1" in lines

    shutil.rmtree(build.tree / "torch")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(build.tree / "installed")
    code = """
import torch, pykernels as pk
step = lambda: pk.rnn_step(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 2), torch.ones(2, 2))
assert step().shape == step().shape == (1, 2)
"""
    used = subprocess.run(
        [sys.executable, "-c", code], cwd=build.tree / "installed", capture_output=True, text=True, check=True
    )
    assert used.stderr.count("the CPU kernels are left out: built with PYKERNELS_NO_KERNELS=1") == 1


NO_KERNELS = "\nTo install the PyTorch references alone, without kernels, set PYKERNELS_NO_KERNELS=1.\n"
NO_CUDA = "\nTo install without the CUDA kernels, set PYKERNELS_NO_CUDA=1.\n"


@from_checkout
@pytest.mark.parametrize(
    ("environment", "reason", "advice"),
    [
        ({"CXX": "/bin/false"}, "error: /bin/false failed on --version with exit status 1", NO_KERNELS),
        ({"CXX": "/no/c++"}, "error: the compiler /no/c++ does not run: No such file or directory", NO_KERNELS),
        (
            {"BROKEN": "linear_recurrence.cpp"},
            "/linear_recurrence.cpp for baseline with exit status 3\nlinear_recurrence.cpp:1: error: nonsense\n",
            NO_KERNELS,
        ),
        (
            {"BROKEN": "linear_recurrence.cu"},
            "linear_recurrence.cu for sm_80, sm_90a, compute_90 with exit status 3\nlinear_recurrence.cu:1: error",
            NO_CUDA,
        ),
    ],
)
def test_a_compiler_that_fails_is_an_error(build, environment, reason, advice):
    status, _, said = build("bdist_wheel", **environment)
    assert status != 0
    assert reason in said
    assert said.endswith(advice)
    assert not (build.tree / "dist").exists()


@from_checkout
def test_an_sdist_and_the_metadata_take_neither_torch_nor_compiler(build):
    (build.tree / "torch/version.py").write_text("__version__ = '2.9.1'")
    assert build("sdist", "dist_info", CXX="/bin/false")[0] == 0
    status, _, said = build("bdist_wheel")
    assert status != 0
    assert "error: no torch ≥ 2.10, but 2.9.1 in " in said
    assert "    pip install --no-build-isolation .\n" in said
    assert said.endswith(NO_KERNELS)


@from_checkout
def test_a_build_without_torch_says_to_install_it_first(monkeypatch, tmp_path):
    setup = setup_of_checkout()
    assert (setup.find_torch() / "include").is_dir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (setup.find_torch() / "include").is_dir()  # as in an isolated build of this environment
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda scheme: str(tmp_path))
    with pytest.raises(setup.CompileError, match=r"no torch where .*\n.*\n *pip install 'torch>=2.10' 'setuptools"):
        setup.find_torch()


# ------------------------------------------------------------------------------------------------ several GPUs


@pytest.mark.parametrize(
    ("version", "old"), [("3.5.1", True), ("2.3.0+rocm", True), ("3.6.0", False), ("3.10.0", False), ("4.0", False)]
)
def test_an_old_triton_is_a_reason(version, old, monkeypatch):
    """And not a compiler's error at the first call."""
    monkeypatch.setattr(pytest.importorskip("triton", reason="its version is read"), "__version__", version)
    backends._unavailable.cache_clear()
    try:
        reason = unavailable(TRITON, "cpu") or ""
        assert (reason == f"it needs Triton {backends.TRITON_NEEDED} or newer; this is {version}") == old
    finally:
        backends._unavailable.cache_clear()


@from_checkout
def test_the_promised_triton_is_the_oldest_that_runs():
    promised = re.findall(r"triton>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert promised == [backends.TRITON_NEEDED] * 2


def test_each_gpu_has_a_verdict_of_its_own(monkeypatch):
    capabilities = [(9, 0), (7, 5), (12, 0)]
    library = types.SimpleNamespace(pykernels_cuda_missing=types.SimpleNamespace())
    library.pykernels_cuda_missing = lambda index: b"no code for it" if index == 2 else None
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "current_device": lambda: 1,
        "get_device_capability": lambda device=1: capabilities[torch.device(device).index],
        "get_device_properties": lambda index: types.SimpleNamespace(name="G", total_memory=0, multi_processor_count=1),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(native, "cuda_library", lambda: ROOT)
    monkeypatch.setattr(native, "_cuda_opened", lambda: (library, None))
    monkeypatch.setattr(native, "cuda_architectures", lambda: [900])
    backends._unavailable.cache_clear()
    try:
        for backend, wrong in ((TRITON, (1,)), (CUDA, (1, 2))):
            reasons = [unavailable(backend, torch.device("cuda", index)) for index in range(3)]
            assert [index for index, reason in enumerate(reasons) if reason] == [*wrong], reasons
            assert unavailable(backend, "cuda") == reasons[1]
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
            assert unavailable(backend, "cuda") is None
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        assert machine()["CUDA kernels"].startswith(
            "built for compute capability 9.0; GPU 0 in use; GPU 1 not in use: "
        )
    finally:
        backends._unavailable.cache_clear()


# ------------------------------------------------------------------------------------------------ the example


@pytest.mark.parametrize(
    ("arguments", "without", "said"),
    [
        (["--plot", "recall.png"], ("matplotlib", "matplotlib.figure"), "it needs matplotlib: pip install matplotlib"),
        (["--plot", "none/recall.png"], (), "--plot: no folder "),
        (["--plot", "recall.abc"], (), "--plot: expected a file name that ends in one of "),
        (["--steps", "0"], (), "--steps: expected a number from 1 to "),
        (["--facts", "65537"], (), "--facts: expected a number from 1 to 65536, got 65537"),
    ],
)
def test_the_example_says_what_is_wrong_before_it_trains(arguments, without, said, monkeypatch, capsys):
    path = ROOT / "examples" / "key_value_recall.py"
    if not path.exists():
        pytest.skip(f"{path.name}: not beside the package")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "run", None)
    for name in without:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", [path.name, *arguments])
    with pytest.raises(SystemExit):
        example.main()
    assert said in capsys.readouterr().err
