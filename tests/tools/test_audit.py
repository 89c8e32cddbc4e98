"""The audit on kernels whose counts are known by hand, and on faults made on purpose."""

from __future__ import annotations

import collections
import inspect
import json
import pathlib
import subprocess
import sys
import types

import pytest
import torch

import pykernels
from pykernels.core import backends, declaration, torch_op
from pykernels.tools import audit
from pykernels.tools.audit import baseline, disassembly, environment, ir, measure, model, recorder

triton = pytest.importorskip("triton", reason="the audit compiles Triton kernels")
if backends.INTERPRET:
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)
import triton.language as tl  # noqa: E402

BASELINE = pathlib.Path(__file__).with_name("audit_baseline.tsv")
NVIDIA = ("sm_80", "sm_90", "sm_100")
AUDIT_EXCEPTIONS = [
    dict(kernel="gather", check="narrow load", where={"STEP": (3, 5)}, reason="a stride of three has no wide load"),
]


# ------------------------------------------------------------------------------------------------ kernels


@triton.jit
def add(x_ptr, y_ptr, z_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x_ptr + i, mask=i < N) + tl.load(y_ptr + i, mask=i < N)
    tl.store(z_ptr + i, total, mask=i < N)


@triton.jit
def read(base, i, STEP: tl.constexpr):
    return tl.load(base + i * STEP)


@triton.jit
def gather(x_ptr, z_ptr, N, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        total += read(x_ptr, start + i, STEP).to(tl.float32) * tl.load(z_ptr + start)
    tl.store(z_ptr + i, total)


@triton.jit
def product(a_ptr, b_ptr, scale_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """C = Σ_k A[:, k] · scale[k] B[k, :]"""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    c = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + n[None, :])
        scale = tl.load(scale_ptr + start + k)
        c = tl.dot(a, (b * scale[:, None]).to(b.dtype), c, input_precision="ieee")
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


@triton.jit
def two_products(a_ptr, c_ptr, K, M: tl.constexpr):
    """Two half-precision dots, one of them with as few rows as M."""
    m, n, k = tl.arange(0, M), tl.arange(0, 64), tl.arange(0, 64)
    wide = tl.load(a_ptr + n[:, None] * 64 + k[None, :])
    slim = tl.load(a_ptr + m[:, None] * 64 + k[None, :])
    tl.store(c_ptr + n[:, None] * 64 + n[None, :], tl.dot(wide, wide))
    tl.store(c_ptr + 4096 + m[:, None] * 64 + n[None, :], tl.dot(slim, wide))


# ------------------------------------------------------------------------------------------------ helpers


def launch(target, kernel, *args, **options):
    with recorder.recording(target) as launches:
        kernel[(1,)](*args, **options)
    (only,) = launches
    only.intensity = 1.0  # as if of a workload: a test's sample may be loaded by narrow loads
    return only


def examine(target, kernel, *args, **options):
    return measure.inspect(launch(target, kernel, *args, **options))


def multiply(target, dtype, M=64, N=64, BLOCK_K=64, K=1024, **options):
    a, c, scale = torch.empty(M, K, dtype=dtype), torch.empty(M, N), torch.empty(K, dtype=dtype)
    return examine(target, product, a, torch.empty(K, N, dtype=dtype), scale, c, K, M, N, BLOCK_K, **options)


def failed(row):
    return sorted({check for check, _ in row.failures})


# ------------------------------------------------------------------------------------------------ recording


def test_specialisation_is_a_real_launchs():
    x = torch.empty(65)
    found = launch("sm_90", add, x, x[1:], x[4:], 32, 1024, num_warps=8)  # offsets of 0, 4 and 16 bytes
    sixteen = [["tt.divisibility", 16]]
    assert found.signature == dict(x_ptr="*fp32", y_ptr="*fp32", z_ptr="*fp32", N="i32", BLOCK="constexpr")
    assert {at: value for at, value in found.attributes.items() if value} == {(i,): sixteen for i in (0, 2, 3)}
    assert found.constants == {(4,): 1024}
    assert found.settings == {"BLOCK": 1024}
    assert found.options["num_warps"] == 8
    odd = launch("sm_90", add, x, x, x, 33, 1024)
    assert not odd.attributes[(3,)]
    one = launch("sm_90", add, x, x, x, 1, 1024)
    assert one.signature["N"] == "constexpr"
    assert one.constants == {(3,): 1, (4,): 1024}
    assert one.settings == {"BLOCK": 1024}
    assert len({found.key, odd.key, one.key}) == 3
    assert launch("sm_90", add, x, x, x, 35, 1024).key == odd.key
    amd = launch("gfx942", add, x, x, x, 33, 1024)
    assert ["tt.pointer_range", 32] in amd.attributes[(0,)]  # AMD's backend also asks whether offsets fit 32 bits


def test_recording_leaves_the_driver_as_it_was():
    before = triton.runtime.driver._active
    with pytest.raises(TypeError), recorder.recording("sm_80"):
        add[(1,)](triton.runtime.driver.active.get_current_target().arch == 80)
    assert triton.runtime.driver._active is before


# ------------------------------------------------------------------------------------------------ kernels of one op

LENGTHS = (*range(2, 18), 24, 31, 32, 33, 48, 64, 65, 100, 128, 129, 256, 300, 512, 777, 1024)  # 31 of them


def half(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def attend(N, **more):
    return dict(query=half(1, 8, N, 64), key=half(1, 8, N, 64), value=half(1, 8, N, 64), causal=True) | more


def remember(T, *names):
    w = -torch.rand(1, T, 4, 64)
    return dict(w=w, u=torch.empty(4, 64), **{name: half(1, T, 4, 64) for name in names})


GROWING = {  # what a growing length means → (op, its arguments)
    "training": ("attention", attend),
    "training, with lse": ("attention", lambda N: attend(N, return_lse=True)),
    "windows": ("attention", lambda w: attend(300, causal=False, window=(w, w))),
    "packed tokens": ("varlen_attention", lambda N: dict(
        query=half(N, 8, 64), key=half(N, 8, 64), value=half(N, 8, 64), cu_seqlens_q=torch.tensor([0, N // 2, N]),
        cu_seqlens_k=torch.tensor([0, N // 2, N]))),
    "a cache": ("decode_attention", lambda M: dict(
        query=half(2, 8, 1, 64), key_cache=half(2, 4, M, 64), value_cache=half(2, 4, M, 64),
        cache_lengths=torch.full((2,), M))),
    "caches": ("decode_attention", lambda B: dict(
        query=half(B, 8, 1, 64), key_cache=half(B, 4, 256, 64), value_cache=half(B, 4, 256, 64),
        cache_lengths=torch.full((B,), 256))),
    "RWKV-4": ("wkv4", lambda T: dict(w=-torch.rand(256), u=torch.empty(256), k=half(1, T, 256), v=half(1, T, 256))),
    "RWKV-6": ("wkv6", lambda T: remember(T, "r", "k", "v")),
    "RWKV-7": ("wkv7", lambda T: {name: x for name, x in remember(T, *"rkvab").items() if name != "u"}),
    "keys": ("topk_search", lambda M: dict(query=half(1, 64), keys=half(64 * M, 64), k=32)),
    "queries": ("topk_search", lambda N: dict(query=half(N, 64), keys=half(4096, 64), k=32)),
    "product keys' queries": ("product_key_search", lambda N: dict(
        query=half(N, 4, 64), sub_keys=half(4, 2, 64, 32), k=16)),
    "a table": ("weighted_gather", lambda M: dict(
        values=half(M, 64), indices=torch.zeros(16, 8, dtype=torch.int64), weights=half(16, 8))),
    "bags": ("weighted_gather", lambda N: dict(
        values=half(1000, 64), indices=torch.zeros(N, 8, dtype=torch.int64), weights=half(N, 8))),
    "sequences": ("lstm", lambda B: dict(
        input=half(3, B, 64), hx=None, weight_ih=half(256, 64), weight_hh=half(256, 64))),
    "steps": ("lstm", lambda T: dict(
        input=half(min(T, 48), 2, 64), hx=None, weight_ih=half(256, 64), weight_hh=half(256, 64))),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_new_lengths_compile_few_kernels(name):
    """Of each, with the same tensors given, four at most: tile sizes, and whether strides are multiples of 16."""
    op, make = GROWING[name]
    compiled = collections.defaultdict(set)
    for length in LENGTHS:
        sample = declaration.Sample(f"{length}", lambda dtype, device, length=length: make(length))
        for launch in recorder.record(declaration.OPS[op], sample, torch.bfloat16, ["sm_90"]):
            absent = tuple(at for at, value in launch.constants.items() if value is None)
            compiled[launch.kernel, absent].add(launch.key)
    assert compiled
    assert {kernel: len(keys) for (kernel, _), keys in compiled.items() if len(keys) > 4} == {}


# ------------------------------------------------------------------------------------------------ counts known by hand


@pytest.mark.parametrize(("target", "loads"), [("sm_80", 4), ("sm_90", 4), ("gfx942", 2)])
def test_vector_add(target, loads):
    x = torch.empty(1 << 16)
    row = examine(target, add, x, x, x, x.numel(), 1024, num_warps=4)  # two inputs of 4 KiB over 128 or 256 lanes
    assert row.memory == {"LDG.128": loads, "STG.128": loads // 2}
    assert not row.in_loop
    assert row.bytes == 3 * 4096
    assert (row.limit, row.share) == ("DRAM", 1.0)
    assert row.occupancy == 1
    assert row.spilled == row.shared == 0
    assert row.failures == []


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm_80", "HMMA.16816"), ("sm_90", "HGMMA.64x64x16"), ("sm_100", "UTCHMMA"), ("sm_120", "HMMA.16816"),
     ("gfx90a", "v_mfma_f32_"), ("gfx942", "v_mfma_f32_"), ("gfx950", "v_mfma_f32_")],
)  # fmt: skip
def test_half_precision_dot_is_on_the_tensor_cores(target, instruction):
    row = multiply(target, torch.float16, num_stages=3)
    assert row.in_loop
    assert all(opcode.startswith(instruction) for opcode in row.tensor)
    assert row.flops == 2 * 64**3  # of one pass: no loop is unrolled here
    assert row.repeated == (None if target == "sm_100" else 1)
    assert row.dots == ["f16"]
    assert failed(row) == []  # the row of `scale` is narrow, but there is no more of it


@pytest.mark.parametrize(("target", "side"), [("sm_80", 32), ("gfx942", 64)])  # of four waves each needs 32 × 32
def test_exact_dot(target, side):
    row = multiply(target, torch.float32, M=side, N=side, BLOCK_K=32, num_stages=3)
    assert row.dots == ["f32 ieee"]
    assert failed(row) == []
    assert bool(row.tensor) == (target == "gfx942")  # AMD has exact fp32 matrix instructions
    assert row.flops == 2 * side * side * 32


def test_repeated_work():
    row = multiply("gfx942", torch.float16, M=32, N=32)  # one wave's worth of tile for four
    assert row.flops == 4 * 2 * 32 * 32 * 64
    assert row.repeated == 4


def test_half_precision_dot_that_misses():
    x, c = torch.empty(4096, dtype=torch.float16), torch.empty(8192)
    assert failed(examine("gfx942", two_products, x, c, 64, 16)) == []
    row = examine("gfx942", two_products, x, c, 64, 2)  # AMD's matrix instructions want four rows
    assert failed(row) == ["tensor cores"]
    assert row.failures[0][1].startswith("1 half-precision dot")


# ------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize("target", ["sm_80", "gfx90a"])
def test_narrow_loads_are_named_by_line(target):
    x, z = torch.empty(1 << 16, dtype=torch.bfloat16), torch.empty(4096)
    assert failed(examine(target, gather, x, z, 1 << 14, 1, 4096)) == []  # contiguous; z's scalar is no tile
    row = examine(target, gather, x, z, 1 << 14, 2, 4096)
    assert failed(row) == ["narrow load"]
    (_, what), *_ = row.failures
    inner, outer = (inspect.getsourcelines(kernel.fn)[1] for kernel in (read, gather))
    assert f"a tile of 4096 is loaded 2 bytes a lane in a loop (line {inner + 2}, from line {outer + 5})" in what
    odd_sample = launch(target, gather, x, z, 1 << 14, 2, 4096)
    odd_sample.intensity = None
    assert measure.inspect(odd_sample).failures == []


def test_kernels_declare_exceptions_as_data():
    x, z = torch.empty(1 << 16, dtype=torch.bfloat16), torch.empty(4096)
    row = examine("sm_80", gather, x, z, 1 << 14, 3, 4096)
    assert row.failures == []
    assert [(check, reason) for check, _, reason in row.excused] == [("narrow load", AUDIT_EXCEPTIONS[0]["reason"])]


def test_spill():
    row = multiply("sm_80", torch.float16, M=128, N=128, maxnreg=64)
    assert failed(row) == ["spill"]
    assert row.registers <= 64
    assert row.spilled > 0
    assert row.stack > 0
    row = multiply("gfx942", torch.float16, M=256, N=128, BLOCK_K=16, num_warps=1)
    assert "spill" in failed(row)
    assert row.local_bytes > 0


def test_shared_memory_over_the_limit():
    options = dict(M=128, N=128, num_stages=5)  # 5 − 1 buffers of 2 · 128 · 64 · 2 bytes
    assert "shared memory" not in failed(multiply("sm_80", torch.float16, **options))
    row = multiply("sm_86", torch.float16, **options)
    assert "shared memory" in failed(row)
    assert row.shared > row.shared_limit == 99 * 1024


def test_no_asynchronous_copy():
    row = multiply("sm_80", torch.float16, num_stages=1)
    assert failed(row) == ["async copy"]
    assert row.copies == 0


def test_what_does_not_compile_is_a_row():
    row = multiply("sm_80", torch.float16, BLOCK_K=8)
    assert failed(row) == ["compile"]
    assert "K >= 16" in row.failures[0][1]


# ------------------------------------------------------------------------------------------------ disassembly

SASS = """
.text.kernel:
	//## File "a.py", line 7 inlined at "a.py", line 30
	//## File "a.py", line 30
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/              @!PT LDS RZ, [RZ] ;
        /*0020*/                   BSSY B0, `(.L_x_2) ;
	//## File "a.py", line 8
.L_x_1:
        /*0030*/              @!P0 LDG.E.128 R4, [R2.64] ;
        /*0040*/                   MUFU.EX2 R5, R4 ;
        /*0050*/               @P0 BRA `(.L_x_4) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   BSYNC B0 ;
.L_x_2:
        /*0080*/              @!P2 CALL.REL.NOINC `(.L_x_3) ;
        /*0090*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*00a0*/                   STL.64 [R1], R4 ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   FFMA R0, R1, R2, R3 ;
        /*00d0*/                   BRA `(.L_x_1) ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
        /*00f0*/                   NOP ;
"""

GCN = """
kernel:                                 ; @kernel
	.loc	1 18 12                         ; a.py:18:12 @[ a.py:24:9 ]
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	s_cbranch_execz .LBB0_2
; %bb.1:
	buffer_load_ushort v1, v0, s[0:3], 0 offen
	v_mfma_f32_32x32x8_f16 a[0:15], v[2:3], v[4:5], a[0:15]
.LBB0_2:
	ds_read2_b64 v[2:5], v9 offset1:4
	buffer_load_dwordx4 v6, s[4:7], 0 offen lds
	scratch_load_dword v1, off, s33
	s_cbranch_scc0 .LBB0_1
	s_endpgm
	.section	.debug_str,"MS",@progbits,1
	s_nop 0
"""


def test_loops_of_sass():
    listing = disassembly.parse_sass(SASS)
    names = [instruction.opcode for instruction in listing.instructions]
    assert names[:3] == ["MOV", "BSSY", "LDG.E.128"]  # what is predicated off is gone
    assert "NOP" not in names
    assert listing.instructions[0].lines == (7, 30)
    assert listing.instructions[2].lines == (8,)
    found = sorted(disassembly.loops(listing), key=len)
    spin, inner, outer = ([names[place] for place in sorted(loop)] for loop in found)
    assert spin == ["BRA"]
    assert inner == ["LDG.E.128", "MUFU.EX2", "BRA", "BRA", "FFMA", "BRA"]  # with the cold block behind the exit
    assert set(found[1]) < set(found[2])
    assert "CALL.REL.NOINC" in outer
    assert "STL.64" not in outer
    counts = disassembly.count((listing.instructions[place] for place in found[1]), lanes=32)
    assert (counts.slots, counts["mufu"], counts["fma"], counts.loaded_bytes) == (6, 1, 1, 512)
    assert counts.loads == [(16, (8,))]


def test_loops_of_gcn():
    listing = disassembly.parse_gcn(GCN)
    assert listing.instructions[0].lines == (18, 24)
    assert listing.instructions[-1].opcode == "s_endpgm"
    (loop,) = disassembly.loops(listing)
    assert sorted(loop) == list(range(1, 8))
    counts = disassembly.count((listing.instructions[place] for place in loop), lanes=64)
    assert counts.flops == 2 * 32 * 32 * 8
    assert [size for size, _ in counts.loads] == [2, 16]
    assert counts.copies == 1
    assert counts.local_bytes == 64 * 4
    assert counts.memory == {"LDG.16": 1, "LDGSTS.128": 1, "LDL.32": 1}


@pytest.mark.parametrize(
    ("opcode", "size"),
    [("LDG.E.U16", 2), ("LDG.E.LTC128B.64", 8), ("LDGSTS.E.BYPASS.128", 16), ("LDSM.16.M88.4", 16), ("STS.U8", 1),
     ("LDG.E.ENL2.256", 32), ("LDG.E", 4), ("buffer_load_dwordx3", 12), ("global_load_short_d16", 2),
     ("ds_write2st64_b64", 16), ("ds_read_u16", 2), ("global_load_ubyte", 1)],
)  # fmt: skip
def test_widths(opcode, size):
    assert disassembly.width(opcode) == size


def test_tensor_core_instructions():
    def flops(opcode, operands, **more):
        return disassembly.count([disassembly.Instruction(opcode, operands)], 32, **more).flops

    assert flops("HMMA.16816.F32.BF16", "R4, R8, R10, R4") == 2 * 16 * 8 * 16
    assert flops("HGMMA.64x128x16.F32", "R24, gdesc[UR8], R24") == 2 * 64 * 128 * 16 / 4
    assert flops("UTCHMMA", "gdesc[UR12], gdesc[UR14], tmem[UR23]", shapes=[(128, 64)]) == 2 * 128 * 64 * 16
    assert flops("FFMA", "R0, R1, R2, R3") == 0


# ------------------------------------------------------------------------------------------------ model


def test_occupancy():
    a100, mi300 = model.GPUS["sm_80"], model.GPUS["gfx942"]
    assert model.resident_warps(32, 0, 4, a100) == 64
    assert model.resident_warps(255, 0, 4, a100) == 8  # 65536 / (256 · 128) = 2 blocks
    assert model.resident_warps(32, 80 * 1024, 4, a100) == 8  # two of 81 KiB in 164
    assert model.resident_warps(32, 200 * 1024, 4, a100) == 0
    assert model.resident_warps(256, 0, 4, mi300) == 8  # two waves on each of four SIMDs
    assert model.resident_warps(64, 33 * 1024, 4, mi300) == 4


def test_estimate_of_a_loop_that_is_known():
    """128 HMMA of 2048 clocks' work on an A100, 512 exponentials: 4 warps · 512 · 2 clocks of MUFU."""
    instructions = [disassembly.Instruction("HMMA.16816.F32", "R4, R8, R10, R4")] * 128
    instructions += [disassembly.Instruction("MUFU.EX2", "R5, R4")] * 512
    loop = disassembly.count(instructions, 32)
    got = model.estimate(loop, 4, model.GPUS["sm_80"], "tensor")
    assert got.clocks["tensor"] == 4 * 128 * 4096 / 2048
    assert got.clocks["MUFU"] == 4 * 512 * 2
    assert got.limit == "MUFU"
    assert got.overlapped == 1024 / 4096
    assert got.serial == 1024 / (1024 + 4096)
    hopper = model.estimate(loop, 4, model.GPUS["sm_90"], "tensor")
    assert hopper.clocks["tensor"] == pytest.approx(512 / 0.62)  # mma.sync does not reach Hopper's rate


@pytest.mark.parametrize(
    ("instructions", "work", "limit"),
    [
        ([("HMMA.16816.F32", "R4, R8, R10, R4")] * 4, "tensor", "tensor"),
        ([("FFMA", "R0, R1, R2, R3")] * 4, "FMA", "FMA"),
        ([("FFMA", "R0, R1, R2, R3")] * 4 + [("MUFU.EX2", "R5, R4")] * 4, "FMA", "MUFU"),
        ([("FFMA", "R0, R1, R2, R3")] * 4 + [("IADD3", "R5, R4, R3, RZ")] * 5, "FMA", "integer"),
        ([("FFMA", "R0, R1, R2, R3")] * 4 + [("UIADD3", "UR5, UR4, UR3, URZ")] * 9, "FMA", "issue"),
        ([("FFMA", "R0, R1, R2, R3")] * 4 + [("LDS.128", "R4, [R8]")] * 4, "FMA", "shared memory"),
        ([("FFMA", "R0, R1, R2, R3")] * 4 + [("UTMALDG.2D", "[UR4], [UR8]")], "FMA", "L2"),
        ([("LDG.E.128", "R4, desc[UR4][R8.64]")] * 4, "DRAM", "DRAM"),
    ],
)
def test_each_unit_can_be_the_limit(instructions, work, limit):
    loop = disassembly.count((disassembly.Instruction(*what) for what in instructions), 32)
    loop.global_bytes += 1024 * len(loop.bulk)  # whose size the audit knows from the source
    got = model.estimate(loop, 4, model.GPUS["sm_80"], work)
    assert got.limit == limit
    assert got.overlapped == (1 if limit in ("tensor", "FMA", "DRAM") else pytest.approx(got.overlapped))
    assert got.serial <= got.overlapped or limit in ("issue", "L2")  # which are not in the sum


def test_tiles_and_dots_of_the_source():
    x = torch.empty(64, 64)
    ttir = launch("sm_80", product, x, x, x, x, 1024, 64, 32, 16).compile().asm["ttir"]
    first = inspect.getsourcelines(product.fn)[1]
    tiles = ir.tiles(ttir)
    assert tiles[(first + 6,)] == ir.Tile((64, 16), 4)
    assert tiles[(first + 7,)] == ir.Tile((16, 32), 4)
    assert tiles[(first + 8,)].lane_bytes(128) == 0.5
    assert ir.tile_at(tiles, (first + 6, 99)) == tiles[(first + 6,)]
    (dot,) = ir.dots(ttir)
    assert (dot.dtype, dot.precision, dot.flops) == ("f32", "ieee", 2 * 64 * 32 * 16)
    assert "scf.for" in ttir.splitlines()[dot.loop]
    outside = launch("gfx942", two_products, x.half(), x, 64, 16).compile().asm["ttir"]
    assert [(dot.flops, dot.loop) for dot in ir.dots(outside)] == [(2 * 64**3, None), (2 * 16 * 64 * 64, None)]


# ------------------------------------------------------------------------------------------------ end to end


@pytest.fixture
def probe():
    """An op of its own: y = x + x; its gradient is another launch."""

    def launch_add(x, backend):
        result = torch.empty_like(x)
        add[(triton.cdiv(x.numel(), 1024),)](x, x, result, x.numel(), 1024)
        return result

    op = torch_op.torch_op(
        "audit_probe(Tensor x, int backend) -> Tensor y",
        fake=lambda x: torch.empty_like(x),
        launchers={"triton": launch_add},
        gradient=lambda grad_y: dict(x=torch.nn.functional.pad(op(grad_y[1:], backends.TRITON), (0, 1))),
    )

    @declaration.public(
        kernel=op,
        reference=lambda x: x + x,
        supports={"triton": lambda x: "no fp16" if x.dtype == torch.float16 else None},
        differentiable=("x",),
    )
    def audit_probe(run, x):
        return run(x)

    make = lambda dtype, device: dict(x=torch.empty(1 << 12, dtype=dtype, device=device))
    workloads = [declaration.Workload("plain", make), declaration.Workload("again", make)]
    declaration.declare(audit_probe, samples=[], workloads=workloads)
    yield declaration.OPS.pop("audit_probe")
    del torch_op.IMPLEMENTATIONS["audit_probe"]


def test_audit_of_an_op(probe, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(declaration.OPS, probe.name, probe)
    parser = audit.argparse.ArgumentParser()
    audit.add_arguments(parser)
    file = tmp_path / "audit.json"
    command = ["audit_probe", "--target", "sm_80", "gfx942", "--jobs", "0", "--json", str(file)]
    assert audit.main(parser.parse_args(command)) == 0
    assert "1 kernels, 8 configurations, 0 failures" in capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert {(row["target"], row["dtype"]) for row in rows} == {
        (target, dtype) for target in ("sm_80", "gfx942") for dtype in ("float32", "bfloat16")
    }  # fp16 is declined; forward and backward differ in alignment
    assert all(row["inputs"] == ["plain", "again"] for row in rows)
    monkeypatch.setattr(measure, "WIDE", 64)
    monkeypatch.setattr(measure, "_failures", lambda *_: [("spill", "made up")])
    monkeypatch.setattr(measure, "_OWN_SOURCE", "another")  # so that the cache is not asked
    assert audit.main(parser.parse_args(command)) == 1
    output = capsys.readouterr().out
    assert "FAIL sm_80 audit_probe: add float32 BLOCK=1024 warps=4 stages=3 (plain): spill: made up" in output
    assert "8 failures" in output
    command += ["--triton", triton.__version__]
    assert audit.main(parser.parse_args(command)) == 0  # what spills runs
    monkeypatch.setattr(measure, "_failures", lambda *_: [("shared memory", "made up")])
    monkeypatch.setattr(measure, "_OWN_SOURCE", "a third")
    assert audit.main(parser.parse_args(command)) == 1


def test_another_triton_has_an_environment_of_its_own(tmp_path, monkeypatch):
    """Whose packages come before this one's, which it sees all the same. pip is not run."""
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(environment.subprocess, "run", lambda *_: done)
    python = environment.python("0.1", tmp_path)
    (own,) = tmp_path.glob("lib/python*/site-packages")
    (own / "triton.py").touch()
    monkeypatch.undo()
    script = "import importlib.util as u\nfor name in ('triton', 'torch', 'pykernels'): print(u.find_spec(name).origin)"
    run = subprocess.run([python, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(own / "triton.py"), torch.__file__, pykernels.__file__]
    assert environment.python("0.1", tmp_path) == python  # made once
    assert environment.python(triton.__version__) == sys.executable
    done.returncode = 1
    monkeypatch.setattr(environment.subprocess, "run", lambda *_: done)
    with pytest.raises(RuntimeError, match="triton: expected a version"):
        environment.python("0.2", tmp_path / "none")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="target: expected one of sm_80"):
        audit.audit([], ["sm_70"])
    with pytest.raises(ValueError, match="op: expected one of"):
        audit.audit(["no_such_op"])


def test_a_compiler_that_dies_names_its_victim(tmp_path, monkeypatch):
    """A module that ends the process when a worker imports it stands for a crash inside LLVM."""
    (tmp_path / "deadly.py").write_text(
        "import multiprocessing, os\nif multiprocessing.parent_process() is not None:\n    os._exit(3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    x = torch.empty(1 << 12)
    alive, dead = (launch("sm_80", add, x, x, x, 1 << 12, 1024) for _ in range(2))
    dead.module = "deadly"
    sys.modules["deadly"] = types.SimpleNamespace(add=add)
    rows = audit._inspect_all([dead, alive], 1, lambda label, items: items)
    del sys.modules["deadly"]
    assert [failed(row) for row in rows] == [["compile"], []]


SHIPPED = {  # op → (the end of a workload's name, kernels that it runs)
    "attention": ("N1024 D64 causal", {"_forward", "_grad_q", "_grad_kv"}),
    "lstm": ("B1 T256 H256", {"_step", "_step_backward"}),
    "wkv4": ("B1 T1024 C768", None),
    "wkv6": ("B4 T512 H12 K64", None),
    "wkv7": ("B4 T512 H12 K64", None),
    "topk_search": ("M65536 d128 n256 k32", {"_search", "_merge"}),
    "weighted_gather": ("M65536 dv1024 n256 k32", {"_forward"}),
}


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", SHIPPED)
def test_kernels_as_they_are_shipped(name, target):
    """One size of each family, forward and backward; `make audit` compiles every configuration for every target."""
    op, (size, kernels) = declaration.OPS[name], SHIPPED[name]
    works = [work for work in op.workloads if work.label.endswith(size)]
    launches = {launch.key: launch for work in works for launch in recorder.record(op, work, torch.bfloat16, [target])}
    rows = [measure.inspect(launch) for launch in launches.values()]
    assert {row.kernel for row in rows} >= (kernels or set())
    baseline.compare(BASELINE, rows)
    for row in rows:
        assert not row.failures, f"{row.kernel} {row.configuration}: {row.failures}"
        assert row.spilled == 0 or any("spill" in text for text in map(str, row.excused)), row.kernel
        if name in ("attention", "lstm"):
            assert row.tensor, row.kernel
