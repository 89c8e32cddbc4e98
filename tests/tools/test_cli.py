"""The command line, and the rule of correctness on kernels broken in every way that it must see."""

import json
import subprocess
import sys

import pytest
import torch
from toy import declared, softmax_scale

from pykernels.__main__ import main
from pykernels.core import native
from pykernels.tools.check import Expected
from pykernels.tools.machine import machine


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def unwritten(x, w):
    out = torch.empty_like(x)
    out[1:] = (x.softmax(-1) * w)[1:]
    return out, x.argmax(-1)


BROKEN = {
    "value": lambda x, w: (softmax_scale(x, w)[0] * 1.01, x.argmax(-1)),
    "index": lambda x, w: (softmax_scale(x, w)[0], x.argmin(-1)),
    "gradient": lambda x, w: softmax_scale(WrongGradient.apply(x), w),
    "no gradient": lambda x, w: softmax_scale(x.detach(), w),
    "unwritten": unwritten,
    "infinity": lambda x, w: (softmax_scale(x, w)[0] / (x > -9), x.argmax(-1)),
    "dtype": lambda x, w: (softmax_scale(x, w)[0].double(), x.argmax(-1)),
}


def test_a_right_kernel_passes_in_every_dtype(capsys, tmp_path):
    with declared(softmax_scale):
        assert main(["check", "toy", "--json", str(tmp_path / "check.json")]) == 0
    samples = json.loads((tmp_path / "check.json").read_text())["samples"]
    assert {sample["dtype"] for sample in samples} == {"fp64", "fp32", "bf16", "fp16"}
    assert [result["name"] for result in samples[0]["results"]] == ["out[0]", "out[1]", "grad x", "grad w"]
    assert "All is right" in capsys.readouterr().out


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_kernel_fails(how, capsys):
    with declared(BROKEN[how]):
        assert main(["check", "toy", "--dtype", "fp32"]) == 1
    printed = capsys.readouterr().out
    assert "wrong toy, cpu, cpu, fp32, small: " in printed
    assert ("grad x" if "gradient" in how else "out[") in printed


@pytest.mark.parametrize(("excesses", "verdict"), [([2], 0), ([2, 0, 0, 2], 1), ([4], 1)])
def test_a_small_excess_is_drawn_again(excesses, verdict):
    """It must then hold three times; a large one is not."""
    calls = iter(excesses)

    def off(x, w):
        allowed = Expected(op, {"x": x.detach(), "w": w.detach()}).allowed["out[0]"]
        return softmax_scale(x, w)[0] + next(calls, 0) * allowed, x.argmax(-1)

    with declared(off) as op:
        assert main(["check", "toy", "--dtype", "fp32"]) == verdict


def test_a_kernel_that_raises_is_not_swallowed():
    def crash(x, w):
        raise ZeroDivisionError

    with declared(crash), pytest.raises(RuntimeError, match="toy, cpu, cpu, fp32, sample 'small'"):
        main(["check", "toy", "--dtype", "fp32"])


def test_checking_nothing_is_a_failure_with_its_reasons(capsys):
    with declared(softmax_scale, declines="it is Sunday"):
        assert main(["check", "toy"]) == 1
        assert main(["check", "toy", "--backend", "cuda"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("Nothing could be checked") == 2
    assert "it is Sunday" in printed
    assert "toy has no cuda kernel" in printed


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "attention" in printed


@pytest.mark.parametrize("command", ["doctor", "check", "bench", "audit", "gpu"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"pykernels {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "bench"])
def test_an_unknown_op_lists_those_there_are(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "atention"])
    assert "varlen_attention" in capsys.readouterr().err


LIBRARY = native.cuda_library()
CUDA_ENTRIES = """
import sys, torch
before = {*torch._C._dispatch_get_all_op_names()}
torch.ops.load_library(sys.argv[1])
for name in sorted({*torch._C._dispatch_get_all_op_names()} - before):
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))
    schema = torch._C._get_schema(name, "")
    values = {"Tensor": torch.zeros(2, 2), "int": 0, "float": 0.0, "bool": False}
    arguments = [values.get(str(a.type)) for a in schema.arguments]
    try:
        getattr(torch.ops.pykernels_cuda, name.split("::")[1])(*arguments)
    except NotImplementedError as error:
        print("CPU" if "from the 'CPU' backend" in str(error) else error)
"""


@pytest.mark.skipif(LIBRARY is None, reason="the CUDA kernels were not built")
def test_the_cuda_library_loads_without_a_gpu():
    """Its entries are for CUDA tensors, and refuse others."""
    run = subprocess.run([sys.executable, "-c", CUDA_ENTRIES, LIBRARY], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert all(name.startswith("pykernels_cuda::") and name.endswith("True") for name in lines[::2]), lines
    assert lines[1::2] == ["CPU"] * len(lines[::2]), lines


@pytest.mark.skipif(LIBRARY is None, reason="the CUDA kernels were not built")
def test_the_cuda_library_says_what_it_was_built_for():
    architectures = native.cuda_architectures()
    assert architectures == sorted(architectures) != []
    assert all(800 <= architecture < 2000 for architecture in architectures)


@pytest.mark.parametrize(
    ("architectures", "reason", "said"),
    [
        ([], "the CUDA kernels were not built", "none: the CUDA kernels were not built"),
        ([800, 1200], "torch sees no NVIDIA GPU", "compute capability 8.0, 12.0; not in use: torch sees no NVIDIA GPU"),
        ([900], None, "compute capability 9.0; in use"),
    ],
)
def test_doctor_says_what_the_cuda_kernels_are_for(architectures, reason, said, monkeypatch):
    monkeypatch.setattr(native, "cuda_missing", lambda device_type: reason)
    monkeypatch.setattr(native, "cuda_architectures", lambda: architectures)
    assert machine()["CUDA kernels"].endswith(said)
