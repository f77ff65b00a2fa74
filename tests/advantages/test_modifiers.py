from dataclasses import replace

import pytest
import torch
from hypothesis import given

from grpo_plus.advantages import ESTIMATORS, MODIFIERS, Rewards, UnknownRewardError, check_modifiers, estimate
from grpo_plus.advantages.kl_penalty import kl_in_reward
from grpo_plus.advantages.modifiers import alp, clip, difficulty, filter_zero_std, gate
from tests.advantages.cases import rewards_of
from tests.advantages.test_properties import advantages_of, batches, every_estimator, fit
from tests.close import assert_close


def graded(values: list) -> Rewards:
    """Two functions, correctness and length."""
    return replace(rewards_of(values), names=("correctness", "length"))


def test_gate_counts_a_reward_only_where_another_passes():
    rewards = gate(graded([[[1, 0.5], [0, 0.9], [0.5, 0.7]]]), by="correctness")
    assert rewards.values[..., 1].tolist() == [[0.5, 0, 0]]
    assert rewards.values[..., 0].tolist() == [[1, 0, 0.5]]


def test_gate_passes_from_its_threshold_on_in_float32():
    # 0.7 in float32 is 0.699999988
    rewards = gate(graded([[[0.7, 1], [0.69, 1], [0.71, 1]]]), by="correctness", at_least=0.7)
    assert rewards.values[..., 1].tolist() == [[1, 0, 1]]


def test_gate_leaves_abstentions_alone():
    # Neither a verdict that is missing nor a gated reward that is missing becomes a judgment.
    rewards = gate(graded([[[None, 1], [0, None], [None, None]]]), by="correctness")
    assert rewards.values[0, 0, 1] == 1
    assert rewards.values[0, 1:, 1].isnan().all()
    assert rewards.judged.tolist() == [[True, True, False]]


def test_gate_takes_a_list_of_what_it_gates():
    rewards = replace(rewards_of([[[0, 1, 1]]]), names=("correctness", "length", "format"))
    assert gate(rewards, by="correctness", gated=["format"]).values.tolist() == [[[0, 1, 0]]]


def test_kl_in_reward_takes_the_penalty_from_every_judged_completion():
    rewards = graded([[[1, 0.5], [0, 0.5], [1, None], [None, None]]])
    priced = kl_in_reward(replace(rewards, kl_penalty=torch.tensor([[0.3, -0.1, 0.2, 0.4]]).double()))
    assert priced.total()[0, :3].tolist() == pytest.approx([1.2, 0.6, 0.8])
    assert priced.judged.tolist() == [[True, True, True, False]]
    # The others' means: 0.7, 1, 0.9.
    assert estimate("rloo", priced).tolist() == [pytest.approx([0.5, -0.4, -0.1, 0.0])]
    assert priced.names == ("correctness", "length", "kl_in_reward")


def test_kl_in_reward_refuses_rewards_whose_kl_nobody_knows():
    with pytest.raises(ValueError, match="a log of completions does not hold it"):
        estimate("rloo", graded([[[1, 0], [0, 0]]]), modifiers={"kl_in_reward": {}})
    with pytest.raises(ValueError, match=r"kl_penalty has shape \(1, 3\); \(1, 2\) is needed"):
        replace(graded([[[1, 0], [0, 0]]]), kl_penalty=torch.zeros(1, 3))


def test_alp_charges_tokens_by_the_share_that_succeeds():
    some = [[[1, 5], [None, 5], [1, 5], [0, None]], [[0, 5], [None, 5], [0.5, 5], [0, None]]]
    values = [[[1, 5], [1, 5], [0, 5], [0, 5]], [[0, 5]] * 4, [[1, 5]] * 4, *some]
    rewards = replace(graded(values), lengths=torch.tensor([[10, 20, 30, 40]] * 5))
    penalized = alp(rewards, by="correctness", beta=0.4, max_length=40)
    # 0.01 per token, times 1/2; 1/4, the least; 1; 2/3 of the judged; and 1/3, the least of three judged
    expected = [
        [0.95, 0.9, -0.15, -0.2],
        [-0.025, -0.05, -0.075, -0.1],
        [0.9, 0.8, 0.7, 0.6],
        [1 - 0.2 / 3, 1 - 0.6 / 3, -0.8 / 3],
        [-0.1 / 3, 0.5 - 0.1, -0.4 / 3],
    ]
    assert penalized.values[:3, :, 0].tolist() == [pytest.approx(row) for row in expected[:3]]
    assert penalized.values[3:, [0, 2, 3], 0].tolist() == [pytest.approx(row) for row in expected[3:]]
    assert penalized.values[3:, 1, 0].isnan().all()
    assert penalized.values[..., 1].nan_to_num(7).equal(rewards.values[..., 1].nan_to_num(7))


def test_alp_makes_a_group_that_is_all_right_learn_to_be_short():
    rewards = replace(graded([[[1, 0], [1, 0]]]), lengths=torch.tensor([[10, 30]]))
    charged = {"alp": {"by": "correctness", "beta": 0.1, "max_length": 100}}
    # -.01 and -.03 about their mean
    assert_close(
        "advantages", estimate("dr_grpo", rewards, modifiers=charged), torch.tensor([[0.01, -0.01]]), rtol=1e-6
    )
    free = {"alp": charged["alp"] | {"beta": 0}}
    assert estimate("dr_grpo", rewards, modifiers=free).tolist() == [[0, 0]]


def test_difficulty_weights_a_group_by_its_failures():
    rewards = rewards_of([[1, 0, 0, 0], [1, 1, 1, 0]])
    advantages = torch.tensor([[3.0, -1, -1, -1], [1, 1, 1, -3]])
    expected = torch.stack([advantages[0] * 0.75**2, advantages[1] * 0.25**2])
    assert_close("advantages", difficulty(rewards, advantages, gamma=2), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("group", "right", "wrong"),
    [([1, 0, 0, 0], 1.1247750450, -0.3749250150), ([1, 1, 0, 0], 0.4329377149, -0.4329377149),
     ([1, 1, 1, 0], 0.1249750050, -0.3749250150)],
)  # fmt: skip
def test_difficulty_after_grpo_is_f_grpo(group, right, wrong):
    # (1 - p) times grpo's 1.4997, .8659, .4999
    advantages = estimate("grpo", rewards_of([group]), modifiers={"difficulty": {"gamma": 1.0}})
    expected = torch.tensor([[right if reward else wrong for reward in group]])
    assert_close("advantages", advantages, expected, rtol=1e-6)


def test_difficulty_counts_judged_completions_and_a_named_reward():
    rewards = graded([[[1, 0], [0, 5], [None, 5], [None, None]], [[None, 1], [None, 2], [None, 3], [None, 4]]])
    advantages = torch.ones(2, 4)
    # One of two judged succeeds; where correctness judged nothing the group keeps its advantages.
    assert difficulty(rewards, advantages, by="correctness").tolist() == [[0.5] * 4, [1] * 4]


def test_filter_zero_std_drops_groups_in_which_the_named_reward_is_constant():
    rewards = graded([[[0, 0.1], [0, 0.9]], [[0, 0.1], [1, 0.1]], [[None, 0.1], [None, 0.9]]])
    advantages = torch.tensor([[-1.0, 1.0]] * 3)
    # The third group has no verdict to filter by.
    expected = [[0, 0], [-1, 1], [-1, 1]]
    assert filter_zero_std(rewards, advantages, by="correctness").tolist() == expected


def test_filter_zero_std_sees_through_float32_rounding():
    rewards = rewards_of([[0.7] * 7 + [0.70000005]])
    assert (filter_zero_std(rewards, torch.ones(1, 8), by="reward_0") == 0).all()


def test_clip_limits_both_sides():
    rewards = rewards_of([[1, 2, 3]])
    assert clip(rewards, torch.tensor([[-7.0, 2.0, 6.0]]), max=5.0).tolist() == [[-5, 2, 5]]


def test_modifiers_of_advantages_run_in_the_order_given():
    # maxrl of 1, 0, 0, 0: 3, -1, -1, -1, and the weight is 3/4
    rewards = rewards_of([[1, 0, 0, 0]])
    weighted, clipped = {"difficulty": {}}, {"clip": {"max": 2.0}}
    assert estimate("maxrl", rewards, modifiers={**weighted, **clipped}).tolist() == [[2.0, -0.75, -0.75, -0.75]]
    assert estimate("maxrl", rewards, modifiers={**clipped, **weighted}).tolist() == [[1.5, -0.75, -0.75, -0.75]]


def test_modifiers_of_rewards_run_before_the_estimator_wherever_they_stand():
    # Gated totals are 1.5 and 0, ungated 1.5 and 0.9.
    rewards = graded([[[1, 0.5], [0, 0.9]]])
    modifiers = {"clip": {"max": 9.0}, "gate": {"by": "correctness"}}
    assert_close("gated", estimate("dr_grpo", rewards, modifiers=modifiers), torch.tensor([[0.75, -0.75]]), rtol=1e-7)


def test_advantage_modifiers_see_the_gated_rewards():
    # Length differs, but not among the completions whose answer is right: gated, it is 0 throughout.
    rewards = graded([[[0, 0.1], [0, 0.9]]])
    advantages = estimate(
        "ngrpo", rewards, modifiers={"gate": {"by": "correctness"}, "filter_zero_std": {"by": "length"}}
    )
    assert advantages.tolist() == [[0, 0]]


@every_estimator
@given(rewards=batches())
def test_modifiers_that_change_nothing_compose_with_every_estimator(name: str, rewards: Rewards):
    rewards = fit(name, rewards)
    modifiers = {"gate": {"by": "reward_0", "at_least": -9.0}, "difficulty": {"gamma": 0}, "clip": {"max": 1e9}}
    keywords = {"k": min(2, rewards.values.shape[1])} if "k" in ESTIMATORS[name].keywords else {}
    modified = estimate(name, rewards, keywords, modifiers=modifiers)
    assert torch.equal(modified, advantages_of(name, rewards))


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ({"clipp": {}}, "Unknown advantage modifier 'clipp'. Did you mean 'clip'.* Known: gate, pods, "),
        ({"clip": 5.0}, "'clip' takes a table of keywords, not 5.0"),
        ({"clip": {"maxx": 5.0}}, "'clip' takes no keyword 'maxx'. Did you mean 'max'"),
        ({"clip": {"rewards": 5.0}}, "'clip' takes no keyword 'rewards'"),
        ({"clip": {}}, "'clip' needs the keyword 'max'"),
        ({"clip": {"max": 0}}, "max=0 does not fit: a finite number above 0 is needed"),
        ({"clip": {"max": "5"}}, "max='5' must be a number"),
        ({"clip": {"max": float("nan")}}, "max=nan does not fit"),
        ({"clip": {"max": True}}, "max=True must be a number"),
        ({"difficulty": {"gamma": -0.5}}, "gamma=-0.5 does not fit: a finite number from 0 is needed"),
        ({"difficulty": {"at_least": None}}, "at_least=None must be a number"),
        ({"alp": {"by": "a", "beta": 0.1}}, "'alp' needs the keyword 'max_length'"),
        ({"alp": {"by": "a", "beta": -1, "max_length": 9}}, "beta=-1 does not fit: a finite number from 0"),
        ({"alp": {"by": "a", "beta": 0.1, "max_length": 0}}, "max_length=0 does not fit: a finite number above 0"),
        ({"gfpo": {"keep": 1}}, "keep=1 does not fit"),
        ({"filter_zero_std": {}}, "'filter_zero_std' needs the keyword 'by'"),
        ({"filter_zero_std": {"by": 3}}, "by=3 must be text"),
        ({"gate": {"by": ["a"]}}, "must be text"),
        ({"gate": {"by": "a", "gated": "b"}}, "gated='b' must be a list"),
        ({"gate": {"by": "a", "gated": ["a"]}}, "must be a list of rewards other than by='a'"),
        ({"gate": {"by": "a", "gated": 5}}, "does not fit the advantage modifier 'gate'"),
    ],
)
def test_what_cannot_work_is_refused(modifiers, message):
    with pytest.raises(ValueError, match=message):
        check_modifiers(modifiers)


def test_names_of_rewards_are_checked_where_they_are_known():
    modifiers = {"filter_zero_std": {"by": "corectness"}}
    check_modifiers(modifiers)
    with pytest.raises(UnknownRewardError, match=r"no reward 'corectness'\. Did you mean 'correctness'"):
        check_modifiers(modifiers, ["correctness", "length"])


def test_every_modifier_passes_the_check_with_what_it_needs():
    needed = {
        "gate": {"by": "a"},
        "difficulty": {},
        "filter_zero_std": {"by": "a"},
        "clip": {"max": 1},
        "pods": {"keep": 2},
        "gfpo": {"keep": 2},
        "alp": {"by": "a", "beta": 0.1, "max_length": 100},
        "kl_in_reward": {},
    }
    assert set(needed) == set(MODIFIERS)
    check_modifiers(needed)
    with pytest.raises(ValueError, match="keep=9 does not fit: groups have num_generations=8"):
        check_modifiers({"gfpo": {"keep": 9}}, num_generations=8)
    check_modifiers({"gate": {"by": "a", "gated": ["b", "c"]}, "difficulty": {"by": "b"}}, ["a", "b", "c"])
