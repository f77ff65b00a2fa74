"""DeepSpeed ZeRO-3 over two processes (gloo): the weights of one process, with rows packed by segments.

Runs where DeepSpeed is installed, with a launch for each training: DeepSpeed keeps word of a training in its process.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.close import assert_close
from tests.processes import worker
from tests.processes.conftest import ROOT
from tests.processes.test_sharded import KINDS, TEN_STEPS, flat, read, trained_alone

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def launch(folder: Path, kind: str) -> None:
    config = {**TEN_STEPS, **KINDS[kind]}
    if config.get("saved"):
        worker.save_model(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.processes.zero", str(folder), json.dumps(config)]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_under_zero_3_are_those_of_one_process(tmp_path, kind):
    one, spread = trained_alone(tmp_path / "one", kind), tmp_path / "spread"
    launch(spread, kind)
    for rank in range(2):
        models = 2 if kind == "reference" else 1
        assert read(spread, "packing", rank) == ["shared_prompt (segment attention)"] * models
    start = torch.tensor(read(one, "start"))
    both, alone = (flat(read(folder, "weights")) - start for folder in (spread, one))
    assert_close("update", both, alone, rtol=1e-6)
