"""A run that is killed at random moments, resumed and killed again ends as the run that nobody killed."""

import random

from tests.trainer.kills import survives
from tests.trainer.test_resuming import CASES, saved_base


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    config = CASES["ema_task"] | {"save_total_limit": 1}
    base = saved_base(tmp_path / "base")
    assert survives(tmp_path / "runs", base, config, kills=6, chance=random.Random(0)) >= 6
