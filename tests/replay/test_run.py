import math
import warnings

import pytest
import torch
from trl import GRPOConfig

from grpo_plus.advantages import ESTIMATORS, Rewards, estimate
from grpo_plus.replay import Rollouts, replay
from grpo_plus.replay.recipes import Recipe
from grpo_plus.replay.result import LOGGED
from tests.close import assert_close
from tests.replay.logs import table, write, write_rewards
from tests.training import make_trainer

GROUPS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]  # one, two and four of four right


def doubled(rewards: Rewards, *, factor: float = 2.0) -> torch.Tensor:
    total = rewards.total()
    return factor * (total - total.nanmean(-1, keepdim=True))


def upside_down(rewards: Rewards) -> torch.Tensor:
    return -doubled(rewards)


def rows_of(result, statistic, **where):
    return {
        row["estimator"]: row["value"]
        for row in result.rows()
        if row["statistic"] == statistic and all(row[key] == value for key, value in where.items())
    }


@pytest.fixture
def small(tmp_path):
    write_rewards(tmp_path, 1, {"r": GROUPS}, size=4)
    return Rollouts(tmp_path)


@pytest.fixture
def random_log(tmp_path):
    """Ten batches of unlike sizes, with abstentions, two rewards and tasks."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 11):
        rows = 12 if step < 7 else 20
        values = torch.rand(2, rows, generator=generator).mul(5).round().div(5)
        values[0, torch.rand(rows, generator=generator) < 0.1] = math.nan
        rewards = {"a": values[0].tolist(), "b": (values[1] / 2).tolist()}
        tasks = [("x", "y")[(row // 4) % 2] for row in range(rows)]
        write_rewards(tmp_path, step, rewards, size=4, task=tasks)
    return Rollouts(tmp_path, num_generations=4)


@pytest.mark.parametrize(
    ("scale_rewards", "estimator"), [("group", "grpo"), ("batch", "batch_std"), ("none", "dr_grpo")]
)
def test_a_log_of_stock_trl_gives_the_advantages_that_trl_logged(tmp_path, scale_rewards, estimator):
    arguments = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer(tmp_path, config_class=GRPOConfig, scale_rewards=scale_rewards, **arguments).train()
    rollouts = Rollouts(tmp_path)
    for batch in rollouts.batches():
        # TRL computes in float32. Where rewards have no spread, rounding divided by 1e-4 is left of it; we give 0.
        assert_close("advantages", estimate(estimator, batch.rewards), batch.logged, rtol=1e-6)
    result = replay(rollouts)
    assert (rollouts.size, result.statistics.batches, result.steps) == (4, 4, (1, 4))
    assert result.same[0] == estimator
    assert result.difference[estimator] < 1e-6
    others = {"grpo", "batch_std", "dr_grpo"} - {estimator}
    assert not others & set(result.same)


def test_the_statistics_of_a_small_log(small):
    result = replay(small, ["dr_grpo", "grpo", "tests.replay.test_run.upside_down"])
    dr_grpo = result.names.index("dr_grpo")
    s = result.statistics
    # dr_grpo: .75, -.25 x 3; .5 x 2, -.5 x 2; 0 x 4
    assert s.dead()[dr_grpo].item() == pytest.approx(1 / 3)
    assert s.zero()[dr_grpo].item() == pytest.approx(4 / 12)
    assert s.mean_size()[dr_grpo].item() == pytest.approx((1.5 + 2.0) / 12)
    # (1.5 + 2)^2 / (.75^2 + 3 * .25^2 + 4 * .25) / 12
    assert s.effective()[dr_grpo].item() == pytest.approx(12.25 / 1.75 / 12)
    assert s.flat_share() == {"r": pytest.approx(1 / 3), "total": pytest.approx(1 / 3)}
    flips = rows_of(result, "sign_flips", versus="dr_grpo")
    assert flips == {"grpo": 0.0, "tests.replay.test_run.upside_down": 1.0}
    correlations = rows_of(result, "rank_correlation", versus="dr_grpo")
    assert correlations["tests.replay.test_run.upside_down"] == pytest.approx(-1.0)
    # Ranks from the middle, ties shared. dr_grpo: .75 | .5 .5 | 0 x 4 | -.25 x 3 | -.5 x 2 -> 5.5, 4 x 2, 1 x 4, -2.5 x 3,
    # -5 x 2. grpo: 1.5 | .87 x 2 | 0 x 4 | -.5 x 3 | -.87 x 2, the same order.
    assert correlations["grpo"] == pytest.approx(1.0)


def test_rank_correlation_is_spearmans_with_ties(tmp_path):
    # a: 1, 0, 0, 0 and b: 0, .1, .2, 1 -> totals 1, .1, .2, 1; maxrl and dr_grpo agree, best_minus_second sees a tie.
    write_rewards(tmp_path, 1, {"r": [3.0, 1.0, 2.0, 0.0, 3.0, 3.0, 0.0, 0.0]}, size=4)
    result = replay(Rollouts(tmp_path), ["dr_grpo", "best_minus_second"])
    # dr_grpo: 1.5 -.5 .5 -1.5 1.5 1.5 -1.5 -1.5, centered ranks 2.5 -.5 .5 -2.5 2.5 2.5 -2.5 -2.5
    # best_minus_second: only the first is not 0, centered ranks 3.5 and -.5 x 7
    first, second = torch.tensor([2.5, -0.5, 0.5, -2.5, 2.5, 2.5, -2.5, -2.5]), torch.tensor([3.5] + [-0.5] * 7)
    expected = (first @ second / first.norm() / second.norm()).item()
    assert rows_of(result, "rank_correlation", versus="dr_grpo") == {"best_minus_second": pytest.approx(expected)}


def test_shares_by_reward_and_task(tmp_path):
    # Group 1: only a differs, |A| = .5 x 2; group 2: only b, |A| = 1.5 x 2.
    rewards = {"a": [1.0, 0.0, 1.0, 1.0], "b": [0.0, 0.0, 3.0, 0.0]}
    write_rewards(tmp_path, 1, rewards, task=["x", "x", "y", "y"])
    result = replay(Rollouts(tmp_path), ["dr_grpo", "grpo"])
    shares = {name: rows_of(result, "share_of_size", reward=name)["dr_grpo"] for name in "ab"}
    assert shares == {"a": pytest.approx(0.25), "b": pytest.approx(0.75)}
    assert rows_of(result, "share_of_size", task="y")["dr_grpo"] == pytest.approx(0.75)
    assert rows_of(result, "share_of_size", task="y")["grpo"] == pytest.approx(0.5, abs=1e-3)
    assert rows_of(result, "zero_spread", reward="a") == {"": pytest.approx(0.5)}


def test_who_reacts_to_another_unit(tmp_path):
    write_rewards(tmp_path, 1, {"a": [1.0, 0.0, 0.5, 0.0], "b": [0.0, 0.0, 0.25, 0.0]})
    result = replay(Rollouts(tmp_path), ["dr_grpo", "gdpo"])
    by_estimator = {(r.estimator, r.reward): r for r in result.reactions}
    # dr_grpo, a times 10: before .5 -.5 .375 -.375, after 5 -5 2.625 -2.625
    dr_grpo = by_estimator["dr_grpo", "a"]
    assert dr_grpo.size == pytest.approx(15.25 / 1.75)
    before, after = torch.tensor([0.5, -0.5, 0.375, -0.375]), torch.tensor([5.0, -5.0, 2.625, -2.625])
    assert dr_grpo.cosine == pytest.approx((before @ after / before.norm() / after.norm()).item())
    assert by_estimator["gdpo", "a"].size == pytest.approx(1.0, abs=2e-3)
    assert by_estimator["gdpo", "a"].cosine == pytest.approx(1.0, abs=1e-3)


def test_weights_count(tmp_path):
    write_rewards(tmp_path, 1, {"a": [1.0, 0.0, 0.5, 0.0], "b": [0.0, 1.0, 0.0, 0.5]})
    result = replay(Rollouts(tmp_path, reward_weights=[2.0, 0.0]), ["dr_grpo"])
    assert result.statistics.mean_size().tolist() == [pytest.approx((1 + 0.5) / 2)]
    assert rows_of(result, "share_of_size", reward="b") == {"dr_grpo": 0.0}


def test_a_users_estimator_by_dotted_path_with_its_keywords(small):
    path = "tests.replay.test_run.doubled"
    result = replay(small, {"dr_grpo": {}, path: {"factor": 3.0}})
    plain, users = result.statistics.mean_size().tolist()
    assert users == pytest.approx(3 * plain)
    with pytest.raises(ValueError, match=f"{path}' takes no keyword 'fctor'"):
        replay(small, {path: {"fctor": 3.0}})


def test_a_registered_estimator_is_replayed_without_being_named(small):
    from grpo_plus.advantages import register

    with ESTIMATORS.temporarily():
        register("of_this_test")(doubled)
        assert "of_this_test" in replay(small).names


def test_an_unknown_estimator_is_an_error(small):
    with pytest.raises(ValueError, match="Did you mean 'dr_grpo'"):
        replay(small, ["dr_grop"])


@pytest.mark.parametrize("name", ["ema_task", "popart", "spo"])
def test_estimators_with_memory_see_the_batches_in_order(tmp_path, name):
    generator = torch.Generator().manual_seed(2)
    for step in (3, 1, 100000, 20):
        rewards = (torch.rand(8, generator=generator) * step % 1).tolist()
        write_rewards(tmp_path, step, {"r": rewards}, size=4)
    rollouts = Rollouts(tmp_path)
    batches = list(rollouts.batches())
    assert [batch.step for batch in batches] == [1, 3, 20, 100000]

    def replayed(order):
        state = {}
        return torch.cat([estimate(name, batch.rewards, state=state).flatten() for batch in order])

    sample = replay(rollouts, [name]).sample[0]
    assert_close("sample", sample, replayed(batches), rtol=1e-12)
    assert (sample - replayed(batches[::-1])).abs().max() > 1e-3


def test_every_estimator_gives_what_estimate_gives(random_log):
    """However batches are put together for speed."""
    result = replay(random_log)
    for name in result.names:
        state = {}
        expected = [estimate(name, batch.rewards, state=state).flatten() for batch in random_log.batches()]
        sample = result.sample[result.names.index(name)]
        assert_close(name, sample, torch.cat(expected), rtol=1e-12)
    assert {"batch_std", "gdpo", "ema_task", "reinforce_pp"} < set(result.names)


def test_the_size_of_a_chunk_changes_nothing(random_log, monkeypatch):
    rows = replay(random_log).rows()
    monkeypatch.setattr("grpo_plus.replay.run.CHUNK", 1)
    again = replay(random_log).rows()
    values, others = (torch.tensor([row["value"] for row in r]).double() for r in (rows, again))
    torch.testing.assert_close(values, others, equal_nan=True, rtol=1e-9, atol=1e-12)


def test_an_estimator_that_refuses_is_named_and_the_others_go_on(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0]})
    write_rewards(tmp_path, 2, {"r": [1.0, 0.5, 1.0, 0.0, 1.0, 0.0]})
    result = replay(Rollouts(tmp_path), ["passk", "grpo", "dr_grpo"])
    assert result.names == ["grpo", "dr_grpo"]
    assert "needs a reward of 0 or 1" in result.refused["passk"]
    assert "from step 2 on" in result.refused["passk"]
    alone = replay(Rollouts(tmp_path), ["grpo", "dr_grpo"])
    assert result.rows() == alone.rows()
    with pytest.raises(ValueError, match="No estimator can be applied to these rewards. passk: "):
        replay(Rollouts(tmp_path), ["passk"])


def test_a_log_without_a_usable_batch_says_why(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0]})
    with pytest.raises(ValueError, match="Nothing of the log can be used. .*4 of 4 completions are in no group of 4"):
        replay(Rollouts(tmp_path, num_generations=4))


def test_the_logged_advantages_are_compared_only_where_every_table_has_them(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0]}, advantage=[0.5, -0.5, 0.5, -0.5])
    assert replay(Rollouts(tmp_path), ["dr_grpo"]).difference == {"dr_grpo": 0.0}
    write_rewards(tmp_path, 2, {"r": [1.0, 0.0, 1.0, 0.0]})
    result = replay(Rollouts(tmp_path), ["dr_grpo"])
    assert LOGGED not in result.names
    assert result.difference == {}


def test_groups_asked_for_come_with_their_texts(tmp_path):
    for step in (1, 2):
        write_rewards(tmp_path, step, {"r": [1.0, 0.0, 3.0, 0.0]})
    result = replay(Rollouts(tmp_path), ["dr_grpo", "grpo"], groups=[(2, 1), (1, 0)])
    second, first = result.groups
    assert (second.step, second.group, first.step) == (2, 1, 1)
    assert second.advantages[0].tolist() == [1.5, -1.5]
    assert (second.prompt, second.completions) == ("prompt 1", ("step 2, completion 2", "step 2, completion 3"))
    with pytest.raises(ValueError, match="There is no group 2 at step 1. The log has steps 1 to 2"):
        replay(Rollouts(tmp_path), ["grpo"], groups=[(1, 2)])


def test_the_groups_shown_are_those_of_most_disagreement(tmp_path):
    write_rewards(tmp_path, 1, {"r": [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]})
    write_rewards(tmp_path, 2, {"r": [0.1, 0.0, 1.0, 0.0, 9.0, 0.0]})
    result = replay(Rollouts(tmp_path), ["dr_grpo", "grpo"], examples=1)
    # In units of the batch's root mean square, group by group: dr_grpo .02, .19, 1.72; grpo 1, 1, 1.
    assert [(group.step, group.group) for group in result.groups] == [(2, 0)]
    assert result.groups[0].disagreement == pytest.approx(0.49, abs=0.01)


def test_groups_that_disagree_alike_are_shown_in_the_order_of_the_log(tmp_path):
    """In 1,025 batches of one prompt, two chunks of them, all are dead but the 65th and the last."""
    batches, size = 1025, 8
    rewards = [0.0] * batches * size
    for batch in (64, 1024):
        rewards[batch * size : batch * size + 2] = [1.0, 0.5]
    steps = [step for step in range(1, batches + 1) for _ in range(size)]
    write(tmp_path, batches, table({"r": rewards}, prompt=["p"] * len(steps)) | {"step": steps})
    result = replay(Rollouts(tmp_path, num_generations=size), ["dr_grpo", "grpo", "best_minus_second"])
    assert [group.step for group in result.groups] == [65, 1025, 1, 2]
    assert result.groups[0].disagreement == result.groups[1].disagreement > 0


@pytest.mark.parametrize(
    ("modifiers", "needs"), [({}, False), ({"clip": {"max": 1}}, False), ({"gfpo": {"keep": 2}}, True)]
)
def test_a_recipe_needs_lengths_for_its_modifiers_too(modifiers, needs):
    assert Recipe(ESTIMATORS["grpo"], modifiers=modifiers).needs_lengths is needs
    assert Recipe(ESTIMATORS["opo"], modifiers=modifiers).needs_lengths
