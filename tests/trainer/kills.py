"""Kill a training with SIGKILL at random moments, let it resume, and compare what it ends with: `make test-kills`.

Every attempt is a fork of one process, which has imported everything. Half of the kills fall on an operation on a file
of the run, counted from the start of the attempt, so that they hit a save; the others fall on a moment. A run resumes
with `resume_from_checkpoint=True` after each kill, and must end as the run that nobody killed.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from grpo_plus.trainer.saving.checkpoints import numbered, why_unusable
from tests.close import differing
from tests.trainer.test_resuming import CASES, figures_of, made, saved_base
from tests.training import weights_of

OPERATIONS = 150  # on files of one attempt: about twice as many as a whole run makes, so that many kills are early
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "shutil.rmtree", "os.truncate"}


def kill_at_operation(folder: Path, number: int) -> None:
    """Let the process die of its `number`-th operation on a file of the folder."""
    left = [number]

    def hook(event: str, arguments: tuple) -> None:
        if event in EVENTS and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def whole_checkpoints(folder: Path) -> list[int]:
    return [step for step, path in numbered(folder).items() if why_unusable(path) is None]


def train(folder: Path, base: Path, config: dict[str, Any]) -> None:
    """Train to the end, from the newest whole checkpoint where there is one."""
    trainer = made(folder, base, **config)
    trainer.train(resume_from_checkpoint=bool(whole_checkpoints(folder)))
    torch.save((weights_of(trainer), figures_of(trainer), trainer.estimator_state, trainer.beta), folder / "end.pt")


def attempt(folder: Path, base: Path, config: dict[str, Any], *, operation: int = 0, seconds: float = 0.0) -> int:
    """The exit status of one fork: -9 where it was killed."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            with (folder / "output.txt").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            if operation:
                kill_at_operation(folder, operation)
            train(folder, base, config)
            status = 0
        finally:
            os._exit(status)
    if seconds:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)  # of a process that has ended, too: nobody has waited for it yet
    _, status = os.waitpid(process, 0)
    return os.waitstatus_to_exitcode(status)


def survives(folder: Path, base: Path, config: dict[str, Any], kills: int, chance: random.Random) -> int:
    """How many kills the runs met, `kills` or more. A run that ends too early for them is followed by another.

    Raises:
        AssertionError: an attempt failed, a whole checkpoint was lost, or a run ended otherwise than an undisturbed run.
    """
    undisturbed = folder / "undisturbed"
    undisturbed.mkdir(parents=True)
    begin = time.monotonic()
    assert attempt(undisturbed, base, config) == 0, (undisturbed / "output.txt").read_text()[-3000:]
    seconds = time.monotonic() - begin
    expected = torch.load(undisturbed / "end.pt", weights_only=True)
    met = runs = 0
    while met < kills:
        killed = folder / f"killed-{runs}"
        killed.mkdir()
        met += killed_run(killed, base, config, kills - met, seconds, chance)
        found = torch.load(killed / "end.pt", weights_only=True)
        assert differing(found[0], expected[0]) == []
        assert found[1:] == expected[1:]
        runs += 1
    return met


def killed_run(
    folder: Path, base: Path, config: dict[str, Any], kills: int, seconds: float, chance: random.Random
) -> int:
    """Train to the end through at most `kills` kills, each within `seconds` of an attempt; how many it met."""
    met, newest, status = 0, 0, -signal.SIGKILL
    while status != 0:
        moment: dict[str, Any] = {}
        if met < kills:
            by_operation = chance.random() < 0.5
            moment = (
                {"operation": chance.randint(1, OPERATIONS)} if by_operation else {"seconds": chance.random() * seconds}
            )
        status = attempt(folder, base, config, **moment)
        assert status in (0, -signal.SIGKILL), f"{moment}: " + (folder / "output.txt").read_text()[-3000:]
        found = max(whole_checkpoints(folder), default=0)
        assert found >= newest, f"{moment}: checkpoint-{newest} was whole, and the newest is {found}"
        newest, met = found, met + (status != 0)
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--kills", type=int, default=20, help="how many each case and seed must meet")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each case")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        base = saved_base(Path(folder) / "base")
        for name in arguments.cases:
            for seed in range(arguments.seeds):
                chance = random.Random(f"{name} {seed}")
                config = CASES[name] | {"save_total_limit": chance.randint(1, 2)}
                met = survives(Path(folder) / f"{name}-{seed}", base, config, arguments.kills, chance)
                print(json.dumps({"case": name, "seed": seed, "kills": met}), flush=True)


if __name__ == "__main__":
    main()
