"""A run that is killed at random moments, resumed and killed again ends as the run that nobody killed."""

import json
import subprocess
import sys
from pathlib import Path


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been():
    command = [sys.executable, "-m", "tests.trainer.kills", "--cases", "ema_task", "--kills", "6"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [json.loads(line)["kills"] for line in done.stdout.splitlines()]
    assert len(kills) == 1
    assert kills[0] >= 6
