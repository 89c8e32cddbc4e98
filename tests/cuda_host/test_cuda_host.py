"""The host that CUDA kernels are tested on: right kernels give what NumPy says, and each class of defect is caught.

Kernels are in cuda_host/cases.cu. What the sanitizers catch ends the process, so those run in others; what the
scheduler catches, and results that give a defect away, are seen in this one.
"""

import ctypes
import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from cuda_host import build
from hypothesis import given, settings
from hypothesis import strategies as st

CASES = pathlib.Path(build.__file__).with_name("cases.cu")
ORDERS = ("forward", "reverse", "random:1", "random:2")
PORTABLE = ("-DCUDA_HOST_UCONTEXT",)

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@functools.cache
def library(sanitize=False, portable=False):
    return build.build([CASES], torch=False, sanitize=sanitize, flags=PORTABLE if portable else ())


@functools.cache
def loaded(portable):
    return ctypes.CDLL(str(library(portable=portable)))


def call(lib, name, buffers=(), numbers=(), order="forward"):
    """What went wrong, or ""."""
    lib.run.restype = ctypes.c_char_p
    assert lib.cuda_host_order(order.encode())
    pointers = (ctypes.c_void_p * 4)(*(b.ctypes.data for b in buffers))
    return lib.run(name.encode(), pointers, (ctypes.c_int64 * 6)(*numbers)).decode()


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["native", "portable"])
def run(request, order):
    """run(name, buffers, numbers) of a kernel that is right."""

    def right(*args):
        assert call(loaded(request.param), *args, order=order) == ""

    return right


# ------------------------------------------------------------------------------------------------ right kernels

UNKNOWN = -1  # what a lane that the mask does not name, or that does not exist, gives


def warp_model(op, argument, width, mask, values):
    """(lane → result) of one warp, from CUDA's own description of the operations."""
    lanes = [lane for lane in range(len(values)) if mask >> lane & 1]
    get = lambda lane: values[lane] if lane in lanes else UNKNOWN
    mine = [values[lane] for lane in lanes]
    ballot = sum(1 << lane for lane in lanes if values[lane] > argument)
    whole = {
        4: ballot,
        5: ballot != 0,
        6: all(value > argument for value in mine),
        8: sum(mine),
        9: min(mine, default=0),
        10: max(mine, default=0),
        11: functools.reduce(int.__xor__, mine, 0),
        12: mask if len(set(mine)) == 1 else 0,
    }

    def result(lane):
        start = lane // width * width
        if op == 0:
            return get(start + argument % width)
        if op == 1:
            return get(lane - argument if lane - argument >= start else lane)
        if op == 2:
            return get(lane + argument if lane + argument < start + width else lane)
        if op == 3:
            return get(lane ^ argument if lane ^ argument < start + width else lane)
        if op == 7:
            return sum(1 << other for other in lanes if values[other] == values[lane])
        return whole[op]

    return {lane: result(lane) for lane in lanes}


@settings(max_examples=300, deadline=None)
@given(
    op=st.integers(0, 12),
    argument=st.integers(0, 31),
    width=st.sampled_from([32, 16, 8, 4, 2, 1]),
    mask=st.one_of(st.just(2**32 - 1), st.integers(1, 2**32 - 1)),
    threads=st.integers(1, 96),
    seed=st.integers(0, 2**16),
    order=st.sampled_from(ORDERS),
    portable=st.booleans(),
)
def test_warp_operations(op, argument, width, mask, threads, seed, order, portable):
    random = np.random.default_rng(seed)
    values = random.integers(0, random.choice([2, 8, 100]), threads).astype(np.int32)
    out = np.full(threads, 77, np.int32)
    assert call(loaded(portable), "warp_operation", [values, out], [op, argument, width, mask, threads], order) == ""
    expected = np.full(threads, 77, np.int64)
    for start in range(0, threads, 32):
        warp = [int(value) for value in values[start : start + 32]]
        existing = mask if op == 12 else mask & ((1 << len(warp)) - 1)
        for lane, result in warp_model(op, argument, width, existing, warp).items():
            expected[start + lane] = result
    np.testing.assert_array_equal(out, expected.astype(np.int32))


def test_lanes_that_run_ahead_leave_values_to_the_others(run):
    out = np.zeros(32, np.int32)
    run("lanes_run_ahead", [out])
    expected = np.full(32, 496 * 15)
    expected[:8] = [5 * (lane ^ ((lane // 2 + 3) & 1)) for lane in range(8)]
    np.testing.assert_array_equal(out, expected)


def test_matrix_product_from_what_lanes_gather(run):
    rows = np.random.default_rng().integers(-8, 8, (32, 16)).astype(np.float32)
    out = np.zeros((16, 16), np.float32)
    run("gathers", [rows, out])
    np.testing.assert_array_equal(out, rows.T @ rows)


@pytest.mark.parametrize(("n", "blocks", "threads"), [(1, 1, 32), (1000, 3, 64), (5000, 7, 1024)])
def test_block_sums(run, n, blocks, threads):
    values = np.random.default_rng().integers(-99, 99, n).astype(np.float32)
    sums, ticket = np.zeros(blocks + 1, np.float32), np.zeros(1, np.uint32)
    run("block_sums", [values, sums, ticket], [n, blocks, threads])
    steps = -(-n // (blocks * threads))
    parts = np.pad(values, (0, steps * blocks * threads - n)).reshape(steps, blocks, threads)
    np.testing.assert_array_equal(sums, [*parts.sum((0, 2)), values.sum()])
    assert ticket == 0


def test_atomics(run):
    values = np.random.default_rng().integers(0, 9999, 1000).astype(np.int32)
    bins, largest = np.zeros(8, np.int32), np.zeros(1, np.float32)
    run("count", [values, bins, largest], [1000, 4, 256])
    np.testing.assert_array_equal(bins, np.bincount(values & 7, minlength=8))
    assert largest == values.max()


@pytest.mark.parametrize("blocks", [1, 2, 64])
def test_grid_barrier(run, blocks):
    x = np.random.default_rng().integers(0, 9, blocks).astype(np.int32)
    expected = x.copy()
    for _ in range(5):
        expected = expected + np.roll(expected, -1)
    run("neighbours", [x], [blocks, 5])
    np.testing.assert_array_equal(x, expected)


def test_blocks_that_spin(run):
    x = np.zeros(16, np.int32)
    run("chain", [x], [16])
    np.testing.assert_array_equal(x, np.arange(1, 17))


@pytest.mark.parametrize(("blocks", "threads", "cluster"), [(4, 32, 2), (8, 40, 8), (3, 64, 1)])
def test_cluster(run, blocks, threads, cluster):
    values = np.random.default_rng().integers(0, 9, (blocks // cluster, cluster, threads)).astype(np.float32)
    out = np.zeros_like(values)
    run("ring", [values, out], [blocks, threads, cluster])
    np.testing.assert_array_equal(out, 10 * np.roll(values, 1, 1) + np.roll(values, 2, 1))


# ------------------------------------------------------------------------------------------------ what a device refuses


@pytest.mark.parametrize(
    ("name", "numbers", "error"),
    [
        ("threads", [1024], ""),
        ("threads", [1025], "invalid configuration argument"),
        ("threads", [0], "invalid configuration argument"),
        ("shared", [0, 48 << 10], ""),
        ("shared", [0, (48 << 10) + 1], "invalid argument"),
        ("shared", [227 << 10, 227 << 10], ""),
        ("shared", [227 << 10, (227 << 10) + 1], "invalid argument"),
        ("shared", [228 << 10, 0], "invalid argument"),
        ("cooperative", [16, 1024], ""),
        ("cooperative", [17, 1024], "too many blocks in cooperative launch"),
        ("cluster", [16, 8], ""),
        ("cluster", [12, 8], "cluster configuration is not valid"),
        ("cluster", [16, 16], "cluster configuration is not valid"),
    ],
)
def test_launches(name, numbers, error):
    assert call(loaded(False), name, (), numbers) == error


# ------------------------------------------------------------------------------------------------ defects

SCHEDULER = {  # name: what the message says beside the kernel's block
    "divergent_barrier": "divergent barrier: this thread is at __syncthreads",
    "barrier_in_branch": "deadlock",
    "barrier_after_exit": "threads 5: exited",
    "absent_lane": "threads 0-15: at __shfl_xor_sync (cases.cu:",
    "exited_lane": "",  # in some orders the lane is yet to exit: then it is a deadlock
    "unnamed_lane": "the mask does not name the lane that calls",
    "different_operations": "lanes of one mask are at different warp operations",
    "grid_barrier_missed": "deadlock",
    "grid_barrier_of_no_grid": "in a launch that is not cooperative",
    "endless_spin": "a loop waits for a write that never comes",
    "map_exited": "block 1 of the cluster has exited",
    "misaligned_copy": "not aligned",
}


@pytest.mark.parametrize("name", SCHEDULER)
def test_the_scheduler_catches(name, order):
    data = np.zeros(128, np.float32)
    message = call(loaded(False), name, [data], order=order)
    assert message.startswith("cuda_host: ")
    assert "block (" in message
    assert SCHEDULER[name] in message
    assert call(loaded(False), "threads", (), [32]) == ""  # and goes on


@pytest.mark.parametrize(
    ("name", "numbers", "right"),
    [
        ("missing_barrier", [], None),
        ("missing_warp_barrier", [], None),
        ("missing_grid_barrier", [], None),
        ("missing_wait", [1], [0]),
        ("early_copy", [0], [1]),
        ("uninitialised", [0], None),
        ("uninitialised", [1], None),
    ],
)
def test_results_give_away(name, numbers, right):
    """In at least one order; with `right` numbers instead, in none."""

    def is_wrong(order, numbers):
        data, ones = np.zeros(64, np.float32), np.ones(64, np.float32)
        assert call(loaded(False), name, [data, ones], numbers, order) == ""
        wanted = {"missing_barrier": 2 * ones[:32], "missing_grid_barrier": ones[:4]}.get(name, ones[:32])
        found = data[32:36] if name == "missing_grid_barrier" else data[:32]
        return not np.array_equal(found, wanted)

    assert any(is_wrong(order, numbers) for order in ORDERS)
    if right:
        assert not any(is_wrong(order, right) for order in ORDERS)


SANITIZERS = {  # name: (numbers, what the report says)
    "global_overrun": ([64], "heap-buffer-overflow"),
    "dynamic_overrun": ([40], "heap-buffer-overflow"),
    "static_overrun": ([], "global-buffer-overflow"),
    "local_overrun": ([], "stack-buffer-overflow"),
    "misaligned": ([], "misaligned address"),
    "signed_overflow": ([], "signed integer overflow"),
    "shift": ([], "shift exponent 32 is too large"),
    "offset_overflow": ([], "signed integer overflow"),
    "early_exit_of_cluster": ([], "heap-use-after-free"),
    "early_read_of_cluster": ([], "use-after-poison"),
}

CHILD = """
import ctypes, json, sys
lib = ctypes.CDLL(sys.argv[1])
lib.run.restype = ctypes.c_char_p
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
for name, sizes, numbers, order in json.loads(sys.argv[2]):
    buffers = (ctypes.c_void_p * 4)(*[libc.malloc(size) for size in sizes])
    for buffer, size in zip(buffers, sizes):
        ctypes.memset(buffer, 0, size)
    assert lib.cuda_host_order(order.encode())
    message = lib.run(name.encode(), buffers, (ctypes.c_int64 * 6)(*numbers)).decode()
    assert not message, message
print("the end")
"""


def in_another_process(*calls, portable=False):
    """(all ended well, what the process wrote) of sanitized (name, sizes of buffers in bytes, numbers, order)."""
    command = [sys.executable, "-c", CHILD, str(library(sanitize=True, portable=portable)), json.dumps(calls)]
    done = subprocess.run(
        command, env=os.environ | build.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode == 0 and done.stdout.endswith("the end\n"), done.stdout


@pytest.mark.parametrize("name", SANITIZERS)
def test_the_sanitizers_catch(name):
    numbers, says = SANITIZERS[name]
    well, output = in_another_process((name, [256], numbers, "forward"))
    assert not well
    assert says in output
    assert "cases.cu" in output


@pytest.mark.parametrize("portable", [False, True], ids=["native", "portable"])
def test_the_sanitizers_let_right_kernels_pass(portable):
    calls = [
        ("warp_operation", [384, 384], [3, 5, 16, 2**32 - 1, 96]),
        ("lanes_run_ahead", [128], []),
        ("gathers", [2048, 1024], []),
        ("block_sums", [4000, 16, 4], [1000, 3, 64]),
        ("count", [4000, 32, 4], [1000, 4, 256]),
        ("neighbours", [32], [8, 3]),
        ("chain", [64], [16]),
        ("ring", [1280, 1280], [8, 40, 4]),
        ("missing_wait", [128, 128], [0]),
    ]
    well, output = in_another_process(*((*one, order) for one in calls for order in ORDERS), portable=portable)
    assert well, output
