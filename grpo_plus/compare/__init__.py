"""Which advantages for these rewards? Answered from the log of a run that exists already, or by training.

| file | what lives there |
|---|---|
| `rollouts.py` | `Rollouts`: the completions that a TRL run logged, batch by batch; `columns.py` reads their columns |
| `replay.py` | `replay`: every estimator over them, in one pass; `statistics.py` adds up, `result.py` holds it |
| `replay_report.py` | what a replay says, and `write_replay` |
| `task.py`, `plan.py` | what a comparison of trainings is about: a `Task`, and `Variant`s on seeds |
| `train.py` | `compare`: trains them; `arm.py` one of them; `start.py` puts the weights back; `store.py` the folders |
| `gradients.py` | each estimator's first gradient at the start, signal and noise |
| `held_out.py` | scores of held-out prompts from a run's own reward functions |
| `comparison.py` | what was found, as values; `intervals.py` how sure it is, `verdict.py` in words |
| `training_report.py` | what a comparison says, and `write_comparison`; `training_rows.py` its numbers |
| `report.py`, `files.py` | sections of text, tables and figures -> one HTML file and Markdown; written whole |
| `figures.py`, `curves.py` | drawings; `svg.py` what they share |

    from grpo_plus.compare import Rollouts, replay, write_replay

    write_replay(replay(Rollouts("runs/mine"), ["grpo", "dr_grpo", "my_package.mine"]), "report")

What trains loads TRL, and is imported from its module: `from grpo_plus.compare.train import compare`.

To add a statistic to a replay, accumulate it in `statistics.py`, add its rows to `Replay.rows`, and a section in
`replay_report.py`; to add one to a comparison, `training_rows.py` and `training_report.py`.
"""

from grpo_plus.compare.replay import replay
from grpo_plus.compare.replay_report import write_replay
from grpo_plus.compare.result import Replay
from grpo_plus.compare.rollouts import Finding, RolloutBatch, Rollouts

__all__ = ["Finding", "Replay", "RolloutBatch", "Rollouts", "replay", "write_replay"]
