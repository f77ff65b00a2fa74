"""Estimators with state over several batches; the numbers are worked out beside them."""

import warnings
from dataclasses import replace

import pytest
import torch

from grpo_plus.advantages import ESTIMATORS, State, estimate
from grpo_plus.advantages.running import scales
from tests.advantages.cases import SIGNED, SIGNED_X5, rewards_of
from tests.close import assert_close

STATEFUL = [name for name in ESTIMATORS if ESTIMATORS[name].stateful]


def run(name: str, batches: list, state: State, keywords=None, **labels) -> torch.Tensor:
    """Advantages of the last batch."""
    for batch in batches:
        rewards = replace(rewards_of(batch), **labels)
        advantages = estimate(name, rewards, keywords, state=state)
    return advantages


@pytest.mark.parametrize(
    ("keywords", "last"),
    [({}, 4.849893), ({"decay": 0.5}, 1.497861)],
)
def test_ema_task_keeps_a_fivefold_step_that_group_normalization_erases(keywords, last):
    # "GRPO's Main Flaw": the second batch is five times the first. sigma: .925820, then 1.030950 (decay .99).
    advantages = run("ema_task", [[SIGNED], [SIGNED_X5]], {}, keywords)
    assert advantages[0, -1].item() == pytest.approx(last, abs=1e-6)
    assert run("ema_task", [[SIGNED]], {}, keywords)[0, -1].item() == pytest.approx(1.080122, abs=1e-6)


def test_ema_task_falls_back_to_the_group_beyond_its_bound():
    # A sixfold step would give 5.8 > 5: the group's own population std gives 1.0801.
    sixfold = [[6 * reward for reward in SIGNED]]
    assert run("ema_task", [[SIGNED], sixfold], {})[0, -1].item() == pytest.approx(1.080123, abs=1e-5)


@pytest.mark.parametrize(("size", "advantage"), [(4.9, 4.9), (5.1, 1.0)])
def test_ema_task_keeps_a_size_of_up_to_five(size, advantage):
    # A frozen scale of 1: beyond 5 the group's own std, which is `size`.
    last = run("ema_task", [[[-size, size]]], {"": [0.0, 1.0]}, {"decay": 1.0})
    assert last[0].tolist() == pytest.approx([-advantage, advantage], rel=1e-5)


@pytest.mark.parametrize("name", ["ema_task", "popart"])
def test_a_task_without_variance_has_a_std_of_a_thousandth(name):
    # .5 throughout the task's history: sqrt(1e-6), not the rounding of .25 - .5 * .5.
    last = run(name, [[[0.4985, 0.5015]]], {"": [0.5, 0.25]}, {"decay": 1.0})
    assert last[0].tolist() == pytest.approx([-0.0015 / 0.001001, 0.0015 / 0.001001], rel=1e-4)


def test_spo_starts_a_prompt_at_its_prior():
    # prior .25 worth 8: alpha 2, beta 6; then .9 of each, and one success of two.
    state: State = {}
    run("spo", [[[1, 0]]], state, {"prior": 0.25}, prompts=("a",))
    assert state == {"a": pytest.approx([2.8, 6.4])}


@pytest.mark.parametrize("name", ["ema_task", "popart"])
def test_tasks_do_not_share_their_moments(name):
    both = [[0, 1], [0, 100]]
    apart = run(name, [both], {}, tasks=("small", "large"))
    for row, group in enumerate(both):
        assert_close(f"group {row}", apart[row], run(name, [[group]], {}, tasks=("alone",))[0], rtol=1e-12)
    together = run(name, [both], {})
    assert (together[0] - apart[0]).abs().max() > 0.1


def test_popart_judges_by_the_tasks_history():
    # First batch: mean .5, squares .5. Second, all right, decay .9: mean .55, squares .55, std sqrt(.2475).
    advantages = run("popart", [[[0, 1]], [[1, 1]]], {}, {"decay": 0.9})
    assert advantages[0].tolist() == pytest.approx([0.45 / (0.2475**0.5 + 1e-6)] * 2)


def test_spo_tracks_each_prompt():
    # Prompt a: alpha = beta = 4 -> .9 * 4 + 2 = 5.6 and .9 * 4 + 0 = 3.6, so p = 5.6 / 9.2. Prompt b the other way round.
    state: State = {}
    run("spo", [[[1, 1], [0, 0]]], state, prompts=("a", "b"))
    assert state == {"a": pytest.approx([5.6, 3.6]), "b": pytest.approx([3.6, 5.6])}
    advantages = run("spo", [[[1, 0], [1, 0]]], state, prompts=("a", "b"))
    p = 5.6 / 9.2
    centered = torch.tensor([[1 - p, -p], [p, p - 1]], dtype=torch.float64)
    assert_close("advantages", advantages, centered / (centered.std() + 1e-8), rtol=1e-9)


@pytest.mark.parametrize("name", STATEFUL)
def test_a_batch_that_nobody_judged_leaves_no_trace(name):
    state: State = {}
    run(name, [[[0, 1]], [[1, 0]]], state, prompts=("a",))
    before = {key: list(value) for key, value in state.items()}
    advantages = run(name, [[[None, None]]], state, prompts=("a",))
    assert state == before
    assert (advantages == 0).all()


def batch_of(*odd: float) -> list:
    """Eight groups of eight rewards of 0 and 1, the first of them replaced by `odd`."""
    values = [float((row + column) % 2) for row in range(8) for column in range(8)]
    values[: len(odd)] = odd
    return [values[start : start + 8] for start in range(0, 64, 8)]


@pytest.mark.parametrize("name", ["ema_task", "popart"])
@pytest.mark.parametrize(
    ("odd", "position"),
    # The first batch has no history: three rewards of a size would be its scale.
    [((1e6,), 0), ((1e6,), 3), ((-1e6,), 0), ((-1e6,), 3), ((1e30,), 0), ((1e30,), 3), ((1e6, 1e6, -1e6), 3)],
)
def test_a_wrong_reward_leaves_the_scale_where_it_was(name, odd, position):
    state: State = {}
    batches = [batch_of()] * 4
    batches[position] = batch_of(*odd)
    with pytest.warns(UserWarning, match=r"A reward of size 1e.* in the run, whose rewards had sizes of up to 1\. It"):
        run(name, batches, state)
    advantages = run(name, [batch_of()] * 2, state)
    # 0 and 1 around a mean of .5 with a std of .5 have advantages of 1.
    assert advantages.abs().mean().item() == pytest.approx(1, abs=0.1)
    assert all(torch.tensor(moments).isfinite().all() for moments in state.values())


@pytest.mark.parametrize("name", ["ema_task", "popart"])
def test_the_wrong_reward_itself_has_no_advantage_beyond_all_bounds(name):
    with pytest.warns(UserWarning, match="A reward of size 1e\\+06"):
        advantages = run(name, [batch_of(), batch_of(1e6)], {})
    # popart: (10 - .57) / .57, where a reward of 10 in 64 has moved mean and std a little.
    assert 0 < advantages.max() < 20


@pytest.mark.parametrize("name", ["ema_task", "popart"])
def test_a_scale_that_changes_is_reached_in_a_few_batches(name):
    state: State = {}
    larger = [[1000 * reward for reward in group] for group in batch_of()]
    with pytest.warns(UserWarning, match="A reward of size 1000"):
        run(name, [batch_of()] * 20 + [larger] * 4, state)
    assert state[""][2] == 1000.0
    run(name, [larger] * 300, state)
    assert scales(name, state) == {"": pytest.approx(500, rel=0.1)}


@pytest.mark.parametrize("name", ["ema_task", "popart"])
@pytest.mark.parametrize(
    "batches",
    [
        [[[0.0] * 64] * 4, [[0.0] * 63 + [1.0]] + [[0.0] * 64] * 3] * 3,  # a success in 500
        [[[0.0] * 8], [[0.05] * 8], [[0.0] * 7 + [1.0]]],  # partial credit first
        [[[5.0, -5.0]], [[-40.0, 5.0]], [[300.0, 0.0]]],
    ],
)
def test_a_healthy_run_is_not_warned_of(name, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(name, batches, {})


def test_a_rare_success_enters_whole():
    # All zeros have no range: mean and squares of the first success are those of the plain running means.
    state: State = {}
    run("popart", [[[0.0] * 4], [[0.0, 0.0, 0.0, 1.0]]], state, {"decay": 0.9})
    assert state[""] == pytest.approx([0.025, 0.025, 1.0])


def test_tasks_have_their_own_scale_and_the_state_of_an_older_checkpoint_is_taken():
    state: State = {"small": [0.5, 0.5]}
    run("ema_task", [[[0, 1], [0, 100]]], state, {"decay": 0.5}, tasks=("small", "large"))
    assert scales("ema_task", state) == {"small": pytest.approx(0.5), "large": pytest.approx(50.0)}
    assert state["small"] == pytest.approx([0.5, 0.5, 1.0])
    assert scales("spo", {"a": [1.0, 2.0]}) == {}


@pytest.mark.parametrize("name", STATEFUL)
def test_without_a_state_nothing_is_remembered(name):
    first = estimate(name, rewards_of([[0, 1, 0]]))
    estimate(name, rewards_of([[1, 1, 0]]))
    assert torch.equal(estimate(name, rewards_of([[0, 1, 0]])), first)


@pytest.mark.parametrize(
    ("name", "keyword"), [("ema_task", "decay"), ("popart", "decay"), ("spo", "rho"), ("spo", "prior")]
)
def test_a_share_out_of_range_is_refused(name, keyword):
    with pytest.raises(ValueError, match=f"{keyword}=1.5 is not a share"):
        estimate(name, rewards_of([[0, 1]]), {keyword: 1.5})


@pytest.mark.parametrize("odd", [2.0, -1.0])
def test_spo_refuses_rewards_that_are_no_share(odd):
    values = ", ".join(map(str, sorted([odd, 1.0])))
    with pytest.raises(ValueError, match=f"spo needs rewards from 0 to 1, but .*'reward_0' takes the values {values}"):
        estimate("spo", rewards_of([[odd, 1]]))


def test_as_many_labels_as_prompts_are_needed():
    with pytest.raises(ValueError, match=r"Rewards.tasks has 2 entries; 1 are needed"):
        replace(rewards_of([[0, 1]]), tasks=("a", "b"))
