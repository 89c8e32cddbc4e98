"""The audit of CUDA kernels on a file whose faults are made on purpose, and the baseline."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest

from pykernels.core import backends
from pykernels.tools import audit
from pykernels.tools.audit import baseline, cuda, disassembly, measure

pytest.importorskip("triton", reason="the audit uses Triton's disassembler and cache")
if backends.INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")

SOURCE = """\
namespace c10 { struct Half { unsigned short bits; }; }
namespace {

__device__ inline void multiply_tiles(float (&d)[4], const unsigned* a) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
}

// audit: stream where STEP=2: allow narrow load: every second number is wanted,
//   which no wide load brings
template <class T, int STEP>
__global__ __launch_bounds__(128, 2) void stream(const T* x, float* y, int n) {
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += 128) sum += x[i * STEP];  // NARROW
  y[threadIdx.x] = sum;
}

__global__ __launch_bounds__(256) void copy(const float4* x, float4* y, int n) {
  for (int i = threadIdx.x; i < n; i += 256) y[i] = x[i];
}

// audit: tile: dynamic shared ROWS * 32 * size: rows of 32
template <class T, int ROWS>
__global__ __launch_bounds__(32 * 3) void tile(float* y) {
  extern __shared__ float rows[];
  __shared__ float edge[64];
  rows[threadIdx.x] = edge[threadIdx.x % 64] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = rows[95 - threadIdx.x] + edge[63 - threadIdx.x % 64];
}

__global__ __launch_bounds__(64) void undeclared(float* y) {
  extern __shared__ float rows[];
  rows[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = rows[63 - threadIdx.x];
}

template <class T, bool USED>
__global__ __launch_bounds__(32) void product(const unsigned* a, float* y, int n) {
  float d[4] = {};
  for (int i = 0; i < n; ++i) {
    if (USED) multiply_tiles(d, a + threadIdx.x);
    else d[0] += __uint_as_float(a[i * 32 + threadIdx.x]) * 3;
  }
  for (int j = 0; j < 4; ++j) y[4 * threadIdx.x + j] = d[j];
}

__global__ __launch_bounds__(64) void stacked(float* y, int n) {
  float kept[100];
  for (int i = 0; i < 100; ++i) kept[i] = y[i * 64 + threadIdx.x];
  for (int i = 0; i < n; ++i) kept[(i * 7) % 100] += y[i];
  y[threadIdx.x] = kept[n % 100];
}

// Eight steps at once, and a loop over single ones for the rest.
__global__ __launch_bounds__(32) void grouped(const float4* x, float* y, int n) {
  float sum = 0;
  for (int t = 0; t < n; t += 8) {
    if (n - t >= 8) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 v = x[(t + i) * 32 + threadIdx.x];
        sum = (sum * v.x + v.y) * v.z + v.w;
      }
    } else {
#pragma unroll 1
      for (int i = t; i < n; ++i) {
        const float4 v = x[i * 32 + threadIdx.x];
        sum = (sum * v.x + v.y) * v.z + v.w;
      }
    }
  }
  y[threadIdx.x] = sum;
}

}  // namespace
void* kernels[] = {(void*)stream<float, 1>, (void*)stream<float, 2>, (void*)copy, (void*)tile<float, 8>,
                   (void*)tile<c10::Half, 2048>, (void*)undeclared, (void*)product<c10::Half, true>,
                   (void*)product<c10::Half, false>, (void*)product<float, false>, (void*)stacked, (void*)grouped};
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("csrc") / "planted.cu"
    file.write_text(SOURCE)
    return file


@pytest.fixture(scope="module")
def rows(source):
    found, used = cuda.inspect_file(source, "sm_80")
    assert cuda.complaints(source, used) == []
    return {(row.kernel, *map(str, row.settings.values())): row for row in found}


def failed(row):
    return sorted({check for check, _ in row.failures})


@needs_nvcc
def test_every_instantiation_is_a_row(rows):
    assert len(rows) == 11
    row = rows["stream", "float", "1"]
    assert (row.op, row.dtype, row.settings, row.warps) == ("planted", "float32", {"T": "float", "STEP": 1}, 4)
    assert row.registers > 0
    assert row.configuration == "T=float STEP=1 warps=4"
    assert rows["tile", "Half", "2048"].dtype == "float16"
    assert rows["copy",].memory == dict.fromkeys(("LDG.128", "STG.128"), rows["copy",].memory["LDG.128"])
    assert (rows["copy",].limit, rows["copy",].failures) == ("DRAM", [])


@needs_nvcc
def test_narrow_loads(rows):
    row = rows["stream", "float", "1"]
    line = SOURCE[: SOURCE.index("// NARROW")].count("\n") + 1
    assert row.failures == [("narrow load", f"a loop lives on loads of 4 bytes a lane (line {line})")]
    row = rows["stream", "float", "2"]
    assert row.failures == []
    assert [reason for *_, reason in row.excused] == ["every second number is wanted, which no wide load brings"]


@needs_nvcc
def test_shared_memory(rows):
    row = rows["tile", "float", "8"]
    assert (row.shared, row.shared_known, failed(row)) == (8 * 32 * 4 + 64 * 4, True, [])
    row = rows["tile", "Half", "2048"]
    assert (row.shared, failed(row), row.occupancy) == (2048 * 32 * 2 + 64 * 4, [], 3 / 64)
    assert (rows["undeclared",].shared, rows["undeclared",].shared_known) == (0, False)


@needs_nvcc
def test_tensor_cores(rows):
    assert failed(rows["product", "Half", "False"]) == ["narrow load", "tensor cores"]
    assert failed(rows["product", "float", "False"]) == ["narrow load"]  # fp32 may well do without
    row = rows["product", "Half", "True"]
    assert "tensor cores" not in failed(row)
    assert list(row.tensor) == ["HMMA.16816"]
    assert row.slots_per_kflop == pytest.approx(row.slots * 1000 / (2 * 16 * 8 * 16 * sum(row.tensor.values())))


@needs_nvcc
def test_unrolled_loop_around_that_of_its_remainder(rows):
    row = rows["grouped",]
    assert (row.memory, row.flops, row.failures) == ({"LDG.128": 8}, 8 * 4 * 32, [])


@needs_nvcc
def test_stack(rows):
    row = rows["stacked",]
    assert "spill" in failed(row)
    assert row.stack >= 400
    assert row.local_bytes > 0


@needs_nvcc
def test_static_shared_memory_is_without_the_systems(source):
    found, _ = cuda.inspect_file(source, "sm_90")
    assert next(row for row in found if row.kernel == "tile" and row.dtype == "float32").shared == 8 * 32 * 4 + 64 * 4


@needs_nvcc
def test_without_any_shared_memory(tmp_path):
    (tmp_path / "plain.cu").write_text(
        "namespace { __global__ void __launch_bounds__(64) k(float* y) { y[threadIdx.x] *= 2; } }\n"
        "void* kernels[] = {(void*)k};\n"
    )
    (row,), _ = cuda.inspect_file(tmp_path / "plain.cu", "sm_90")
    assert (row.shared, row.occupancy, row.failures) == (0, 1, [])


@needs_nvcc
def test_what_nvcc_refuses_is_a_row(tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void kernel() { nonsense; }\n")
    (row,), used = cuda.inspect_file(tmp_path / "broken.cu", "sm_80")
    assert (failed(row), used) == (["compile"], set())
    assert "nonsense" in row.failures[0][1]


# ------------------------------------------------------------------------------------------------ directives


def test_directives_are_read_strictly(tmp_path):
    text = "\n".join([
        "// audit: a where T=float ROWS=8 ROWS=16 target=sm_80 EVEN=false: allow spill: too many rows,",
        "//   for now",
        "  // audit: b: dynamic shared 2 * (ROWS + 1) * size: two tiles",
        "// audit: b: allow everything: why not",
        "// audit: b: allow spill",
        "// audit b: allow spill: no colon",
        "// the audit: not a directive",
    ])  # fmt: skip
    (one, two), wrong = cuda.directives(text)
    assert one == cuda.Directive(
        1,
        "a",
        dict(T=("float",), ROWS=(8, 16), target=("sm_80",), EVEN=(False,)),
        "",
        "spill",
        "too many rows, for now",
    )
    assert (two.line, two.shared) == (3, "2 * (ROWS + 1) * size")
    assert [re.match(r"line \d+", what)[0] for what in wrong] == ["line 4", "line 5", "line 6"]
    (tmp_path / "x.cu").write_text(text)
    assert len(cuda.complaints(tmp_path / "x.cu", {1})) == 4  # the second was of no use
    assert len(cuda.complaints(tmp_path / "x.cu", None)) == 3  # not all targets were tried


def test_reading_the_source():
    assert cuda.parameters(SOURCE, "stream") == ["T", "STEP"]
    assert cuda.parameters("template <class A, int B = 4, bool C>\n__global__ void k(", "k") == ["A", "B", "C"]
    assert cuda.parameters(SOURCE, "copy") == []
    bodies = cuda.functions(SOURCE)
    assert cuda.asks_for_tensor_cores(bodies, "product")
    assert not cuda.asks_for_tensor_cores(bodies, "stream")
    both = 'void a() { if constexpr (true) { b(); } }\nvoid c() { if constexpr (true) { asm("mma.sync"); } }'
    asks = [cuda.asks_for_tensor_cores(cuda.functions(both), name) for name in "ac"]
    assert asks == [False, True]
    name = "void (anonymous namespace)::k<c10::BFloat16, (bool)1, true, f<1, 2>, -3>(float*)"
    assert cuda._template(name) == ("k", ["BFloat16", 1, True, "f<1, 2>", -3])


def test_lines_of_one_file():
    listing = disassembly.parse_sass(
        '\t//## File "/a/device.h", line 7 inlined at "/b/x.cu", line 30\n\t//## File "/b/x.cu", line 30\n'
        "        /*0000*/                   MOV R1, R2 ;\n",
        "x.cu",
    )
    assert listing.instructions[0].lines == (30,)
    moves = [
        disassembly.Instruction("HFMA2.MMA", "R8, -RZ, RZ, 0, 0"),
        disassembly.Instruction("HFMA2", "R1, R2, R3, R4"),
    ]
    assert disassembly.count(moves, 32)["fma"] == 1  # the other only sets a register


def test_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda, "FOLDER", tmp_path / "none")
    assert "no checkout" in cuda.unavailable()
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    assert cuda.unavailable() == "there are none"
    (tmp_path / "rnn.cu").touch()
    (tmp_path / "wkv4.cu").touch()
    monkeypatch.setenv("PATH", "")
    assert cuda.unavailable() == "nvcc is not on PATH"
    assert [file.name for file in cuda.sources(["rnn", "wkv"])] == ["rnn.cu"]


# ------------------------------------------------------------------------------------------------ baseline


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setattr(baseline, "compilers", lambda: {"triton": "1", "nvcc": "2"})
    return measure.Row(
        "attention", "_forward", "sm_90", "H100", "bfloat16", {"BLOCK": 64}, ["B1 H8 N1024 D64 causal"],
        warps=4, stages=3, registers=100, occupancy=0.25, in_loop=True, slots_per_kflop=2.0, slots_per_kilobyte=30.0,
    )  # fmt: skip


def change(row, **fields):
    return dataclasses.replace(row, failures=[], **fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(), None),
        (dict(slots_per_kflop=2.09, registers=200), None),
        (dict(slots_per_kflop=1.0), None),
        (dict(slots_per_kflop=2.11), "slots/kFLOP 2 → 2.11"),
        (dict(slots_per_kilobyte=40.0), "slots/kB 30 → 40"),
        (dict(spilled=4, stack=8), "spilled 0 → 4, stack 0 → 8"),
        (dict(local_bytes=128.0), "local_bytes 0 → 128"),
        (dict(occupancy=0.125), "empty_warps_% 75 → 87.5"),
        (dict(settings={"BLOCK": 32}), "not in it yet: --update-baseline"),
    ],
)
def test_baseline(row, tmp_path, fields, said):
    file = tmp_path / "baseline.tsv"
    baseline.update(file, [row, change(row, kernel="_other", in_loop=False), change(row, inputs=["another"])])
    assert len(baseline.read(file)[1]) == 1
    now = change(row, **fields)
    gone = baseline.compare(file, [now])
    assert now.failures == ([("baseline", said)] if said else [])
    assert [what for row in gone for _, what in row.failures] == (
        ["BLOCK=64 warps=4 stages=3 is no more: --update-baseline"] if "settings" in fields else []
    )


def test_baseline_is_rewritten_in_part(row, tmp_path, monkeypatch):
    file = tmp_path / "baseline.tsv"
    other = change(row, op="lstm", inputs=["B1 T256 H256"])
    baseline.update(file, [other, row, change(row, slots_per_kflop=3.0)])  # the worst of two alike
    before = file.read_text().splitlines()
    assert [line.split("\t")[0] for line in before[2:]] == ["attention", "lstm"]
    assert baseline.compare(file, [change(row, slots_per_kflop=3.0)]) == []  # of lstm nothing was audited
    baseline.update(file, [row])
    assert file.read_text().splitlines() == [*before[:2], before[2].replace("\t3\t30", "\t2\t30"), before[3]]
    monkeypatch.setattr(baseline, "compilers", lambda: {"triton": "9"})
    ((check, what),) = baseline.compare(file, [row])[0].failures
    assert (check, what) == ("baseline", "made by triton 1: --update-baseline with 9")


def test_command_line_refuses(capsys):
    parser = audit.argparse.ArgumentParser()
    audit.add_arguments(parser)
    assert audit.main(parser.parse_args(["--update-baseline"])) == 2
    assert audit.main(parser.parse_args(["--samples", "--baseline", "f"])) == 2
