"""The benchmark: its gate, its clocks, its peers."""

import json
import time

import pytest
import torch
from toy import declared, softmax_scale

from pykernels.__main__ import main
from pykernels.bench import measure
from pykernels.bench.peers import faiss_flat, hf_rwkv, onnxrt, sdpa, torch_memory, torch_nn
from pykernels.core.declaration import OPS
from pykernels.tools.check import Expected


@pytest.fixture(autouse=True)
def _limits(monkeypatch):
    limits = measure.Limits({torch.float32: 1e11, torch.bfloat16: 1e11}, 1e10)
    monkeypatch.setattr(measure, "measure_limits", lambda device, dtypes: limits)


def test_a_right_kernel_is_timed_and_drawn(tmp_path, capsys):
    file = tmp_path / "new" / "bench.json"
    arguments = ["bench", "toy", "--quick", "--budget", "0.05", "--json", str(file), "--plot", str(tmp_path)]
    with declared(softmax_scale):
        assert main(arguments) == 0
    results = json.loads(file.read_text())["results"]
    assert {(r["workload"], r["dtype"]) for r in results} == {(n, d) for n in ("N1", "N2") for d in ("fp32", "bf16")}
    for result in results:
        assert result["ours"] == "cpu"
        assert result["peer"] == "eager"
        assert 0 < result["ratio"]["low"] <= result["ratio"]["median"] <= result["ratio"]["high"]
        assert result["limit"] == "memory"
        assert result["timings"]["cpu"]["share"] == pytest.approx(1e-7 / result["timings"]["cpu"]["seconds"]["median"])
    assert {path.name for path in tmp_path.glob("*.png")} == {"toy-speed.png", "toy-size-N.png"}
    assert "sdpa: it has no toy" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(tmp_path, capsys):
    file = tmp_path / "bench.json"
    with declared(lambda x, w: (softmax_scale(x, w)[0] * 1.01, x.argmax(-1))):
        assert main(["bench", "toy", "--quick", "--dtype", "fp32", "--budget", "0.05", "--json", str(file)]) == 1
    for result in json.loads(file.read_text())["results"]:
        assert result["timings"].keys() == {"eager"}
        assert result["left_out"]["cpu"].startswith("WRONG, so not timed: out[0]: error")
    assert "WRONG, so not timed" in capsys.readouterr().out


def test_calls_take_turns_and_the_hopeless_drop_out():
    order = []

    def call(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    seconds = {"a": 0.002, "b": 0.002, "c": 0.03, "d": 9.0}
    times = measure.Clock("cpu").race({name: call(name, seconds[name]) for name in seconds}, seconds, 0.2)
    assert order[:9] == ["a", "b", "c"] * 3
    assert len(times["c"]) == measure.SETTLED
    assert len(times["a"]) == len(times["b"]) > measure.SETTLED
    assert times["d"] == [9.0]


def test_peak_memory_sees_scratch():
    peak = measure.peak_memory(lambda: torch.ones(2**24).mul_(2).sum(), "cpu")
    if peak is None:
        pytest.skip("this system cannot reset the high-water mark of a process's memory")
    assert 0.95 < peak / 2**26 < 1.2


PEERS = (faiss_flat, hf_rwkv, onnxrt, sdpa, torch_memory, torch_nn)


@pytest.mark.parametrize(
    ("peer", "name"),
    [pytest.param(peer, name, id=f"{peer.NAME}-{name}") for peer in PEERS for name in OPS if hasattr(peer, name)],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_peers_are_right_where_they_express_it(peer, name):
    if reason := peer.missing():
        pytest.skip(reason)
    right = 0
    for sample in OPS[name].samples:
        inputs = sample.make(torch.float32, "cpu")
        for rows in ("query", "key", "value", "key_cache", "value_cache"):  # peers mind what unused memory holds
            if name.endswith("attention") and rows in inputs:
                inputs[rows] = inputs[rows].nan_to_num(0, 0, 0)
        if inputs.get("dropout_p") or "ties" in sample.label:  # a peer draws, and orders ties, in its own way
            continue
        try:
            results = Expected(OPS[name], inputs, backward=False).judge(getattr(peer, name), poison=False)
        except NotImplementedError:
            continue
        assert all(result.ok for result in results), f"{sample}: {results}"
        right += 1
    assert right >= 2
