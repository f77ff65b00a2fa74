"""All trainings of this folder in one launch: two processes spend more on their imports than on any of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from tests.cli.conftest import make_workplace
from tests.processes.jobs import JOBS
from tests.processes.worker import save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder per job, with what each rank wrote into it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    done = folder / "done"
    with FileLock(f"{folder}.lock"):  # the suite's workers share one launch
        if not done.exists():
            launch(folder)
            done.touch()
    return folder


def launch(folder: Path) -> None:
    for name, config in JOBS.items():
        if "command" in config:
            (folder / name).mkdir(parents=True)
            make_workplace(folder / name)
        if config.get("saved"):
            save_model(folder / name)
    # `--cpu` would ask for MPI; this launcher is torchrun, and use_cpu=True makes the processes meet over gloo.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    # A command ends its process group, and a second group may meet addresses of the first: commands come last.
    ordered = dict(sorted(JOBS.items(), key=lambda entry: "command" in entry[1]))
    command += ["-m", "tests.processes.worker", str(folder), json.dumps(ordered)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
