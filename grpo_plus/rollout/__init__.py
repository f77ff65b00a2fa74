"""Generate completions with transformers, each distinct prompt once and without rows that are finished.

Start reading at `rollouts.py`, which decides and installs, then `loop.py`, the loop itself. The loop is handed to
transformers' `generate(custom_generate=...)`: padding, settings, processors and criteria are prepared by transformers.

How it is exact: the model computes distinct prompts and live rows only, but processors, random numbers and criteria see
the whole batch, as in transformers' own loop (`sampling.py`). The same seed gives the same tokens, and leaves the
generator in the same state. What a batch keeps between the steps belongs to a `Keeper` (`keeper.py`). `check.py`
compares two steps with a keeper with rows alone (`probes.py`) before its first use. `reasons.py` names what
transformers' own loop generates. `passes.py` sends what several prompts begin with through the model once, as in later
turns of a tool loop. `images.py` keeps images apart, so that distinct prompts alone are read with theirs. `recorder.py`
lets a recorder see the scores that tokens are drawn from, `kept.py` records which tokens could be drawn.

To add a way to keep keys and values, write a `Keeper` in a file of its own and put it into `KEEPERS` of `rollouts.py`.
A keeper may also replace the call of the model in a step (`Keeper.forward`).
"""

from grpo_plus.rollout.images import ByRow
from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Moves
from grpo_plus.rollout.loop import Watch, decode
from grpo_plus.rollout.prompts import Prompts
from grpo_plus.rollout.reasons import why_not_config, why_not_model
from grpo_plus.rollout.rollouts import Rollouts
from grpo_plus.rollout.statistics import Progress, Statistics

__all__ = [
    "ByRow",
    "Keeper",
    "Moves",
    "Progress",
    "Prompts",
    "Rollouts",
    "Statistics",
    "Watch",
    "decode",
    "why_not_config",
    "why_not_model",
]
