"""Which advantages would have suited this run? Every estimator over the completions that a run logged.

    from grpo_plus.replay import Rollouts, replay, write_replay

    write_replay(replay(Rollouts("runs/mine"), ["grpo", "dr_grpo", "my_package.mine"]), "report")

`Rollouts` reads the log batch by batch, `replay` passes over it once and adds up, `Replay` holds what was found, and
`write_replay` writes the report.

To add a statistic, accumulate it in `Statistics.add` (`statistics.py`), add its numbers to `Replay.rows` (`result.py`),
and show them in a section of `report.py`.
"""

from grpo_plus.replay.report import write_replay
from grpo_plus.replay.result import Replay
from grpo_plus.replay.rollouts import Finding, RolloutBatch, Rollouts
from grpo_plus.replay.run import replay

__all__ = ["Finding", "Replay", "RolloutBatch", "Rollouts", "replay", "write_replay"]
