from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_plus.advantages import Rewards, check_keywords, estimate, metrics
from grpo_plus.advantages.estimator import ESTIMATORS
from tests.advantages.cases import rewards_of
from tests.close import assert_close

NAN = float("nan")
PLAIN: dict[str, Any] = {"gamma": 0.5, "scale": False}
# Three completions of two turns and two tokens each. After the first turn, the tool says A, A and B in one token.
ENDS, STATES = [[1, 4]] * 3, [["prompt", "A"], ["prompt", "A"], ["prompt", "B"]]


def group_of(
    returned: list, rewards: list | None = None, ends: list = ENDS, states: list = STATES, lengths: list | None = None
) -> Rewards:
    """One group, or several where there are more states than one group has rewards."""
    table = torch.tensor([[NAN if value is None else value] for value in returned])
    lengths = lengths or [max(row, default=-1) + 1 for row in ends]
    steps = (rewards or [None] * len(returned), ends, states)
    return Rewards.from_table(
        table,
        num_generations=len(returned),
        weights=torch.ones(1),
        names=("graded",),
        lengths=torch.tensor(lengths),
        steps=steps,
    )


def test_a_turn_is_compared_with_the_turns_from_its_state():
    # A_E of 1, 0, 0: mean 1/3. Returns under gamma 1/2: .5, 1 of the first, 0 of the others.
    # From the prompt .5, 0, 0: mean 1/6, so 1/3, -1/6, -1/6. From A 1, 0: so 1/2, -1/2. From B one alone: 0.
    advantages = estimate("turns", group_of([1.0, 0.0, 0.0]), PLAIN)
    first, second = [2 / 3 + 1 / 3, 2 / 3 + 1 / 2], [-1 / 3 - 1 / 6, -1 / 3 - 1 / 2]
    expected = [[turn[0]] * 2 + [turn[1]] * 3 for turn in (first, second, [-1 / 3 - 1 / 6, -1 / 3])]
    assert_close("advantages", advantages, torch.tensor([expected]), rtol=1e-6)
    without = estimate("turns", group_of([1.0, 0.0, 0.0]), PLAIN | {"omega": 0.0})
    assert_close("A_E", without[..., 0], torch.tensor([[2 / 3, -1 / 3, -1 / 3]]), rtol=1e-6)
    assert metrics.turns_shared(group_of([1.0, 0.0, 0.0]).steps, torch.ones(1, 3).bool()) == pytest.approx(5 / 6)


def test_both_levels_are_divided_by_their_own_std():
    # Sample stds: of 1, 0, 0 it is 3^-.5; of .5, 0, 0 half of that; of 1, 0 it is 2^-.5.
    advantages = estimate("turns", group_of([1.0, 0.0, 0.0]), {"gamma": 0.5, "eps": 0.0})
    episode, prompt, after = 2 / 3 * 3**0.5, 1 / 3 * 2 * 3**0.5, 1 / 2 * 2**0.5
    expected = torch.tensor([episode + prompt, episode + after, -episode / 2 - after])
    assert_close("advantages", advantages[0, [0, 0, 1], [0, 2, 2]], expected, rtol=1e-6)


def test_reported_rewards_of_turns_count_in_the_turns_and_the_returned_ones_in_the_completion():
    # Returns under gamma 1/2: 2 + .5 * 1 and 1; 0 + .5 * 4 and 4. The completions are judged 3 and 5.
    rewards = group_of([3.0, 5.0], [[2.0, 1.0], [0.0, 4.0]], ENDS[:2], STATES[:2])
    advantages = estimate("turns", rewards, PLAIN)
    expected = [[-1 + 0.25] * 2 + [-1 - 1.5] * 3, [1 - 0.25] * 2 + [1 + 1.5] * 3]
    assert_close("advantages", advantages, torch.tensor([expected]), rtol=1e-6)


@pytest.mark.parametrize("scale", [True, False])
def test_completions_of_one_turn_get_their_own_advantage_twice(scale):
    returned = [1.0, 0.0, 0.5, None]
    rewards = group_of(returned, ends=[[2], [0], [4], [1]], states=[["prompt"]] * 4)
    plain = estimate("grpo", rewards, {"eps": 1e-6}) if scale else estimate("dr_grpo", rewards)
    advantages = estimate("turns", rewards, {"omega": 0.5, "scale": scale})
    written = torch.arange(5) < rewards.lengths.unsqueeze(-1)
    assert_close("advantages", advantages, 1.5 * plain.unsqueeze(-1) * written, rtol=1e-6)


def test_only_turns_of_the_same_group_are_compared():
    both = Rewards.from_table(
        torch.tensor([[1.0], [0.0], [7.0], [5.0]]),
        num_generations=2,
        weights=torch.ones(1),
        names=("graded",),
        lengths=torch.full((4,), 5),
        steps=([None] * 4, [[1, 4]] * 4, [["prompt", "A"]] * 4),
    )
    alone = [estimate("turns", group_of(own, ends=ENDS[:2], states=STATES[:2])) for own in ([1.0, 0.0], [7.0, 5.0])]
    assert_close("advantages", estimate("turns", both), torch.cat(alone), rtol=1e-9)


def test_an_unjudged_completion_and_one_without_turns_leave_the_others_alone():
    expected = estimate("turns", group_of([1.0, 0.0], ends=ENDS[:2], states=STATES[:2]), PLAIN)
    unjudged = estimate("turns", group_of([1.0, 0.0, None], states=[*STATES[:2], STATES[0]]), PLAIN)
    assert_close("others", unjudged[:, :2], expected, rtol=1e-9)
    assert (unjudged[:, 2] == 0).all()
    # An empty completion is judged, and takes part in A_E alone.
    empty = estimate("turns", group_of([1.0, 0.0, 0.5], ends=[*ENDS[:2], []], states=[*STATES[:2], []]), PLAIN)
    assert_close("others", empty[:, :2], expected, rtol=1e-6)
    assert (empty[:, 2] == 0).all()


def test_equal_rewards_of_equal_ways_give_exactly_zero_and_a_shorter_way_is_better():
    equal = group_of([0.7] * 3, states=[["prompt", "A"]] * 3)
    assert (estimate("turns", equal, {"eps": 0.0}) == 0).all()
    shorter = group_of([0.7] * 3, ends=[[1], [1, 4], [1, 4]], states=[["prompt"], *STATES[:2]])
    assert (estimate("turns", shorter, {"gamma": 1.0}) == 0).all()
    advantages = estimate("turns", shorter)
    assert advantages[0, 0, 0] > 0 > advantages[0, 1, 0] == advantages[0, 2, 0]
    assert (advantages[0, 1:, 2:] == 0).all()


def test_what_follows_the_last_turn_gets_nothing():
    turns = {"ends": [[1], *ENDS[1:]], "states": [["prompt"], *STATES[1:]]}
    advantages = estimate("turns", group_of([1.0, 0.0, 0.0], **turns, lengths=[9, 5, 5]), PLAIN)
    assert advantages.shape == (1, 3, 9)
    assert (advantages[0, 0, :2] > 0).all()
    assert (advantages[0, 0, 2:] == 0).all()
    assert (advantages[..., 5:] == 0).all()


def test_without_any_turn_all_is_zero():
    rewards = group_of([1.0, 0.0], ends=[[], []], states=[[], []])
    assert estimate("turns", rewards).tolist() == [[[0.0], [0.0]]]
    assert metrics.turns_shared(rewards.steps, rewards.judged) == 0.0


def test_process_reads_a_reward_at_the_end_as_that_of_the_last_turn():
    rewards = group_of([1.0, 0.0], ends=ENDS[:2], states=STATES[:2])
    reported = group_of([9.0, 9.0], [[0.0, 1.0], [0.0, 0.0]], ENDS[:2], STATES[:2])
    assert torch.equal(estimate("process", rewards), estimate("process", reported))


def test_rewards_without_turns_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="needs the turns of the completions.*A training finds them by itself"):
        estimate("turns", rewards_of([[0, 1]]))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"gamma": 1.5}, "gamma=1.5 is no discount per turn. Use a number from 0 to 1"),
        ({"omega": -1.0}, "omega=-1.0 is no weight of the turns' advantages"),
        ({"eps": -1.0}, "eps=-1.0 is negative"),
        ({"ddof": 2}, "ddof=2 is not a standard deviation"),
        ({"weight": 1.0}, "takes no keyword 'weight'"),
    ],
)
def test_keywords_that_cannot_work_are_refused_before_the_run(keywords, message):
    with pytest.raises(ValueError, match=message):
        check_keywords(ESTIMATORS["turns"], keywords)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": [[1.0], [0.0, 0.0]]}, r"Completion 0 has 2 turns, with the ends \[1, 4\], but 1 step_rewards"),
        ({"states": [["prompt", "A"], ["prompt"]]}, "Completion 1 has 2 turns, .* but 2 step_rewards and 1 step_state"),
        ({"ends": [[1, 4], [4, 1]]}, r"Completion 1 has step_ends \[4, 1\]. Give the ends of turns in rising"),
    ],
)
def test_turns_that_do_not_fit_are_refused(given, message):
    arguments = {"rewards": None, "ends": ENDS[:2], "states": STATES[:2]} | given
    with pytest.raises(ValueError, match=message):
        group_of([1.0, 0.0], **arguments)


@st.composite
def batches(draw) -> Rewards:
    """1 to 3 groups of 1 to 5 completions of 0 to 3 turns, from three states. Some are unjudged, some report rewards."""
    groups, generations = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    counts = torch.randint(0, 4, (groups * generations,), generator=generator).tolist()
    values = torch.randint(-200, 200, (len(counts), 1), generator=generator) / 100
    values[torch.rand(values.shape, generator=generator) < 0.2] = torch.nan
    reported = torch.rand(len(counts), generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    steps = (
        [torch.rand(n, generator=generator) if own else None for own, n in zip(reported, counts, strict=True)],
        [[2 * turn + 1 for turn in range(n)] for n in counts],
        [["abc"[draw(st.integers(0, 2))] for _ in range(n)] for n in counts],
    )
    lengths = torch.tensor([2 * n + 1 for n in counts])
    return Rewards.from_table(
        values, num_generations=generations, weights=torch.ones(1), names=("r",), lengths=lengths, steps=steps
    )


def picked(rewards: Rewards, groups: Any = slice(None), completions: Any = slice(None)) -> Rewards:
    """Some groups, or the completions of each in another order."""
    steps = rewards.steps
    parts = {name: getattr(steps, name)[groups][:, completions] for name in ("rewards", "ends", "states", "at_end")}
    return replace(
        rewards,
        values=rewards.values[groups][:, completions],
        lengths=rewards.lengths[groups][:, completions],
        steps=replace(steps, **parts),
    )


@given(rewards=batches(), scale=st.booleans(), data=st.data())
def test_turns_keep_their_promises(rewards: Rewards, scale: bool, data: st.DataObject):
    keywords = {"scale": scale, "eps": 0.0}
    advantages = estimate("turns", rewards, keywords)
    assert advantages.isfinite().all()
    assert (advantages[~rewards.judged] == 0).all()
    # A completion's tokens do not depend on where it stands, nor on other groups.
    order = data.draw(st.permutations(range(advantages.shape[1])))
    permuted = estimate("turns", picked(rewards, completions=order), keywords)
    assert_close("permuted", permuted, advantages[:, order], rtol=1e-9)
    first = estimate("turns", picked(rewards, groups=slice(0, 1)), keywords)
    assert_close("alone", first, advantages[:1, :, : first.shape[2]], rtol=1e-9)
    steps = replace(rewards.steps, rewards=8 * rewards.steps.rewards)
    scaled = estimate("turns", replace(rewards, values=8 * rewards.values, steps=steps), keywords)
    assert_close("scaled", scaled, advantages if scale else 8 * advantages, rtol=1e-9)
