"""The first-use self-test, and `python -m pykernels gpu` as far as it goes without one."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import pathlib
import warnings

import pytest
import torch
from cuda_host import build, host
from torch._subclasses.fake_tensor import FakeTensorMode
from toy import declared, make, softmax_scale

import pykernels as pk
from pykernels.__main__ import main
from pykernels.core import backends, declaration, torch_op
from pykernels.core.backends import CPU, CUDA, REFERENCE, TRITON, BackendDeclined, choose
from pykernels.tools import gpu
from pykernels.tools import self_test as first_use

GPU = torch.device("cuda")


def chosen(arguments):
    """The backend that toy's call with these arguments would get on a GPU."""
    return choose(declaration.OPS["toy"], GPU, arguments)


class Counted:
    """softmax_scale, or something near it, that counts its calls."""

    def __init__(self, factor=1.0):
        self.factor, self.calls = factor, 0

    def __call__(self, x, w):
        self.calls += 1
        out, index = softmax_scale(x, w)
        return out * self.factor, index


@pytest.fixture
def verifying(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(backends, "unavailable", lambda backend, device_type: None)
    monkeypatch.setattr(first_use, "_verdicts", {})
    monkeypatch.setattr(backends, "verify", None)
    pk.verify_on_first_use()


@pytest.fixture
def toy():
    """declared(), with the kernel as the Triton backend."""

    def of(kernel):
        entered = declared(kernel)
        op = entered.__enter__()
        undo.append(entered)
        declaration.OPS["toy"] = dataclasses.replace(op, supports={"triton": lambda *_: None})
        return tuple(make(torch.float32, "cpu").values())

    undo = []
    yield of
    for entered in undo:
        entered.__exit__(None, None, None)


@pytest.fixture
def hurried(toy):
    """(toy's arguments, its kernel), which has a Triton and a CUDA backend and would rather have CUDA."""
    kernel = Counted()
    arguments = toy(kernel)
    supports = {"triton": lambda *_: None, "cuda": lambda x, w: "it takes seven columns" if x.size(1) != 7 else None}
    declaration.OPS["toy"] = dataclasses.replace(declaration.OPS["toy"], supports=supports, cuda_first=True)
    return arguments, kernel


@pytest.fixture
def unasked(verifying):
    """Verdicts are read, and no test is made."""
    pk.verify_on_first_use(False)


def put_on_file(verdict, device="cpu", dtype=torch.float32):
    first_use._write(first_use._key("toy", CUDA, device, dtype), verdict)


def on_file():
    files = sorted(first_use.cache_folder().glob("*"))
    return [verdict for file in files for verdict in json.loads(file.read_text()).values()]


def test_a_wrong_kernel_is_not_used_and_that_is_said_once(verifying, toy, monkeypatch):
    kernel = Counted(1.01)
    arguments = toy(kernel)
    with pytest.warns(UserWarning, match=r"toy, triton, failed .* on cpu: sample 'small': out\[0\]: error"):
        assert chosen(arguments) == REFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(arguments) == REFERENCE
    tried = kernel.calls
    monkeypatch.setattr(first_use, "_verdicts", {})  # as in another process: it has the verdict from the file
    with pytest.warns(UserWarning, match="failed its first-use test"):
        assert chosen(arguments) == REFERENCE
    assert kernel.calls == tried > 0
    with pk.use_backend("triton"), pytest.raises(BackendDeclined, match="failed its first-use test"):
        declaration.OPS["toy"].function(*arguments)


def test_a_right_kernel_is_tested_once_per_dtype_compiler_and_source(verifying, toy, monkeypatch):
    kernel = Counted()
    arguments = toy(kernel)
    counts = []
    for _ in range(2):
        assert chosen(arguments) == TRITON
        counts.append(kernel.calls)
    assert chosen(tuple(t.bfloat16() for t in arguments)) == TRITON
    counts.append(kernel.calls)
    monkeypatch.setattr(first_use, "_compiled", lambda backend: ("triton-9.9", "another"))
    monkeypatch.setattr(first_use, "_verdicts", {})
    assert chosen(arguments) == TRITON
    counts.append(kernel.calls)
    assert 0 < counts[0] == counts[1] < counts[2] < counts[3]
    assert on_file() == [None] * 3


def test_cuda_comes_first_where_it_is_on_file_as_right(unasked, hurried, monkeypatch):
    (x, w), kernel = hurried
    put_on_file(None)
    reads = []
    read = first_use._read
    monkeypatch.setattr(first_use, "_read", lambda key: reads.append(key) or read(key))
    assert [chosen((x, w)) for _ in range(3)] == [CUDA] * 3
    assert chosen((x.half(), w.half())) == TRITON
    assert chosen((x[:, 1:], w[1:])) == TRITON
    assert (len(reads), kernel.calls) == (2, 0)  # one for each dtype, no test
    declaration.OPS["toy"] = dataclasses.replace(declaration.OPS["toy"], cuda_first=False)
    assert chosen((x, w)) == TRITON


def test_cuda_that_is_on_file_as_wrong_is_not_used(unasked, hurried):
    put_on_file("toy, cuda, failed")
    with pytest.warns(UserWarning, match="toy, cuda, failed"):
        assert chosen(hurried[0]) == TRITON
    assert chosen(hurried[0]) == TRITON


def test_cuda_comes_first_once_it_was_tested(unasked, hurried, monkeypatch):
    """Which was not asked for at first, and then not possible."""
    arguments, kernel = hurried
    assert chosen(arguments) == TRITON
    pk.verify_on_first_use()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert chosen(arguments) == TRITON
    assert kernel.calls == 0
    assert chosen(arguments) == CUDA
    assert kernel.calls > 0


def test_each_gpu_has_a_verdict_of_its_own(unasked, hurried, monkeypatch):
    monkeypatch.setattr(first_use, "architecture", lambda device: f"sm_{90 - 10 * (torch.device(device).index or 0)}")
    put_on_file(None, "cuda:0")
    with FakeTensorMode():
        for gpu, wanted in (("cuda:0", CUDA), ("cuda:1", TRITON), ("cuda:0", CUDA)):
            inputs = torch.empty(5, 7, device=gpu), torch.empty(7, device=gpu)
            assert choose(declaration.OPS["toy"], inputs[0].device, inputs) == wanted


def test_the_choice_is_a_constant_to_torch_compile(unasked, hurried):
    put_on_file(None)
    (x, w), _ = hurried
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: x * chosen((x, w)), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, w), x * CUDA)
    assert torch.equal(compiled(x.half(), w.half()), x.half() * TRITON)


def test_it_is_off_unless_asked_for(toy, monkeypatch):
    monkeypatch.setattr(backends, "unavailable", lambda backend, device_type: None)
    kernel = Counted(1.01)
    assert chosen(toy(kernel)) == TRITON
    assert kernel.calls == 0


def test_what_may_not_happen_again_is_not_kept(verifying, toy):
    def crash(x, w):
        raise MemoryError("none left")

    arguments = toy(crash)
    with pytest.warns(UserWarning, match="MemoryError: none left"):
        assert chosen(arguments) == REFERENCE
    assert on_file() == []


def test_the_callers_modes_and_numbers_are_its_own(verifying, toy):
    """The test's gradients need grad mode, its dtypes no autocast; its inputs are random."""
    arguments = toy(Counted())
    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu"):
        assert chosen(arguments) == TRITON
    assert torch.equal(torch.get_rng_state(), state)


def test_it_runs_while_a_call_is_compiled(verifying, monkeypatch):
    monkeypatch.setattr(first_use, "TRITON", CPU)  # so that the CPU kernel is the one under test
    op = declaration.OPS["rnn_step"]
    inputs = op.samples[0].make(torch.float32, "cpu")
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), op.function(**inputs), rtol=0, atol=0)
    assert on_file() == [None]


def write_many(start):
    for n in range(start, start + 40):
        first_use._write(f"toy {n}", None if n % 2 else f"wrong {n}")


def test_processes_that_write_at_once_lose_nothing(verifying):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(40 * n,)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    found = [first_use._read(f"toy {n}") for n in range(160)]
    assert found == [None if n % 2 else f"wrong {n}" for n in range(160)]
    assert len(on_file()) == 160


@pytest.mark.parametrize("content", ["[1, 2]", "{", b"\xff", '{"another": null}', '{"KEY": 3}', '"KEY"', ""])
def test_a_foreign_file_is_no_verdict(content, verifying, toy):
    arguments = toy(Counted())
    key = first_use._key("toy", TRITON, "cpu", torch.float32)
    file = first_use._file(key)
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.replace("KEY", key).encode())
    assert chosen(arguments) == TRITON
    assert on_file() == [None]


def test_a_full_disk_is_no_failure(verifying, toy, monkeypatch):
    def dump(verdict, file):
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", dump)
    assert chosen(toy(Counted())) == TRITON
    assert [*first_use.cache_folder().iterdir()] == []


def test_no_home_is_no_failure(verifying, toy, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", home)
    assert chosen(toy(Counted())) == TRITON


def test_a_folder_that_cannot_be_written_is_no_failure(verifying, toy, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert chosen(toy(Counted())) == TRITON


def test_kernels_run_on_their_tensors_gpu(monkeypatch):
    """Triton launches on the current one."""
    current, seen = [0], []

    @contextlib.contextmanager
    def device(of):
        before, current[0] = current[0], of.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        for name in ("cuda:0", "cuda:1", "cpu"):
            torch_op.on_own_device(lambda *_: seen.append(current[0]), (None, torch.empty(2, device=name)))
    assert seen == [0, 1, 0]
    assert current == [0]


@pytest.mark.cuda_host
@pytest.mark.skipif(not host.MODE or build.missing() is not None, reason="run by tests/cuda_host/run.py")
def test_cuda_kernels_pass_on_the_host(tmp_path):
    arguments = ["weighted_gather", "--backend", "cuda", "--device", "cpu", "--json", str(tmp_path / "verdicts")]
    assert first_use.main(arguments) == 0
    verdicts = json.loads((tmp_path / "verdicts").read_text())
    assert verdicts == dict.fromkeys(("float32", "bfloat16", "float16"))
    assert first_use._test("weighted_gather", CUDA, "cpu", torch.float32) == (None, True)


# ------------------------------------------------------------------------------------------------ the command


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text())


def test_without_a_device_every_step_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--json", str(tmp_path / "new" / "gpu.json")]) == 0
    report = read(tmp_path / "new" / "gpu.json")
    assert [(part["step"], part["status"]) for part in report["parts"]] == [(step, "no device") for step in gpu.STEPS]
    assert report["machine"]["torch"] == torch.__version__
    assert "no device" in capsys.readouterr().out


RACE = {
    "op": "rnn_step",
    "workload": "B1 H256",
    "dtype": "fp32",
    "train": False,
    "limit": "memory",
    "timings": {name: {"seconds": {"median": 1e-5}, "share": 0.5} for name in ("triton", "cuda")},
}
ROW = {
    "op": "rnn_step",
    "kernel": "_step",
    "dtype": "float32",
    "inputs": ["B1 H256"],
    "backward": False,
    "in_loop": True,
    "limit": "DRAM",
    "share": 1.0,
    "serial": 0.4,
}


def test_an_emulated_device_goes_the_whole_way(monkeypatch, tmp_path, capsys):
    """Triton's interpreter for a GPU: its kernels are tested and checked; what the clock and nvcc say is made up."""
    monkeypatch.setattr(gpu, "can_run", lambda op, backend, device: backend == "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
    monkeypatch.setenv("FAKE_RESULTS", json.dumps({"bench": {"results": [RACE]}, "fail": [ROW]}))
    monkeypatch.setitem(gpu.STEPS, "check", ("pykernels check --dtype fp32", 600))
    monkeypatch.setitem(gpu.STEPS, "bench", ("fake_step bench", 60))
    monkeypatch.setitem(gpu.STEPS, "audit", ("fake_step fail", 60))
    file = tmp_path / "gpu.json"
    assert main(["gpu", "rnn_step", "--device", "cpu", "--target", "sm_90", "--json", str(file)]) == 1
    parts = {part["step"]: part for part in read(file)["parts"]}
    assert {step: part["status"] for step, part in parts.items()} == {
        "self-test": "passed",
        "check": "passed",
        "bench": "passed",
        "audit": "failed",
    }
    assert parts["self-test"]["result"] == dict.fromkeys(("float32", "bfloat16", "float16"))
    assert any(sample.get("results") for sample in parts["check"]["result"]["samples"])
    printed = capsys.readouterr().out
    assert "1.00/0.40" in printed
    assert "0.50 of memory" in printed
    assert "times as fast in CUDA" in printed


@pytest.mark.parametrize(("how", "status"), [("abort", "crashed"), ("hang", "timed out"), ("fail", "failed")])
def test_a_part_that_dies_takes_nothing_with_it(how, status, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "can_run", lambda op, backend, device: True)
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent))
    monkeypatch.setenv("FAKE_RESULTS", json.dumps({"audit": [ROW]}))
    for step in gpu.STEPS:
        monkeypatch.setitem(gpu.STEPS, step, (f"fake_step {how if step == 'check' else step}", 3))
    file = tmp_path / "gpu.json"
    assert main(["gpu", "rnn_step", "--device", "cpu", "--target", "sm_90", "--json", str(file)]) == 1
    found = {(part["step"], part["backend"]): part["status"] for part in read(file)["parts"]}
    expected = {(step, backend): "passed" for step in ("self-test", "check") for backend in gpu.BACKENDS}
    expected |= {("check", backend): status for backend in gpu.BACKENDS}
    assert found == expected | {("bench", None): "passed", ("audit", None): "passed"}
    assert f"{status} check rnn_step triton" in capsys.readouterr().out


def test_predictions_stand_beside_their_workload(capsys):
    backward = ROW | {"kernel": "_step_backward", "backward": True}
    others = [ROW | change for change in ({"inputs": ["B2"]}, {"dtype": "float16"}, {"op": "rnn"}, {"in_loop": False})]
    rows = [ROW, backward, *others]
    forward, *both = gpu.predict([RACE, RACE | {"train": True, "timings": {}}], rows)
    assert (forward.kernel, forward.overlapped, forward.serial, forward.measured) == ("_step", 1.0, 0.4, 0.5)
    assert [(one.kernel, one.measured) for one in both] == [("_step", None), ("_step_backward", None)]


@pytest.mark.parametrize(
    ("architecture", "target"),
    [("sm_90", "sm_90"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("gfx942", "gfx942"), ("gfx1100", None)],
)
def test_the_target_is_the_nearest_that_the_audit_knows(architecture, target, monkeypatch):
    monkeypatch.setattr(gpu, "architecture", lambda device: architecture)
    assert gpu.target_of("cuda:0") == target
