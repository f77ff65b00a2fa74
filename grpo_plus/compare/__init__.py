"""Which advantages for these rewards? Answered from the log of a run that exists already.

| file | what lives there |
|---|---|
| `rollouts.py` | `Rollouts`: the completions that a TRL run logged, batch by batch; `columns.py` reads their columns |
| `replay.py` | `replay`: every estimator over them, in one pass; `statistics.py` adds up, `result.py` holds it |
| `report.py` | sections of text, tables and figures -> one HTML file and Markdown; `figures.py` draws |
| `replay_report.py` | what a replay says, as such sections, and `write_replay` |

    from grpo_plus.compare import Rollouts, replay, write_replay

    write_replay(replay(Rollouts("runs/mine"), ["grpo", "dr_grpo", "my_package.mine"]), "report")

To add a statistic, accumulate it in `statistics.py`, add its rows to `Replay.rows`, and a section in
`replay_report.py`. A comparison of another kind makes its own list of `report.Section`.
"""

from grpo_plus.compare.replay import replay
from grpo_plus.compare.replay_report import write_replay
from grpo_plus.compare.result import Replay
from grpo_plus.compare.rollouts import Finding, RolloutBatch, Rollouts

__all__ = ["Finding", "Replay", "RolloutBatch", "Rollouts", "replay", "write_replay"]
