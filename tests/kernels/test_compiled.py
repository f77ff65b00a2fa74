"""The Triton kernels become binaries of every GPU since Turing, without a GPU, and fit there."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.compiled import CAPABILITIES

pytestmark = pytest.mark.triton

# Without opting in to more, a block may use 48 KB of shared memory on every card.
SHARED = 48 * 1024
REGISTERS = 65_536  # of a multiprocessor


@pytest.fixture(scope="module")
def records():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kernel_is_compiled_for_every_architecture(records):
    made = {(record["kernel"], record["capability"]) for record in records}
    assert made == {(kernel, capability) for kernel in ("_fold", "_finish") for capability in CAPABILITIES}


def test_nothing_spills_and_the_shared_memory_fits(records):
    for record in records:
        assert record["stack"] == record["local"] == 0, record
        assert record["shared"] <= SHARED, record


def test_a_multiprocessor_holds_enough_threads_to_keep_its_memory_busy(records):
    # 16 bytes per load and thread: 512 threads have the 8 KB under way that a consumer card needs. Registers are
    # allotted to a warp in 256.
    for record in records:
        of_block = -(-record["registers"] * 32 // 256) * 256 * record["threads"] // 32
        assert REGISTERS // of_block * record["threads"] >= 512, record


def test_whole_rows_are_read_in_vectors(records):
    # Of a tile and its bias in both loops; of the target's weight and of the float32 products, which take two.
    for record in records:
        if record["with_gradient"]:
            assert record["vector_loads"] >= {"_fold": 4, "_finish": 3}[record["kernel"]], record


def test_a_first_step_compiles_within_seconds(records):
    for capability in (75, 89):
        assert sum(record["seconds"] for record in records if record["capability"] == capability) < 20
