"""Which estimators a log speaks for: one hand-made log per rule, and logs that give no ground."""

import json
import shlex
from dataclasses import fields

import pytest
import torch

from grpo_plus import cli
from grpo_plus.advantages import ESTIMATORS, Rewards
from grpo_plus.compare.plan import Variant
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.replay import Rollouts, replay
from grpo_plus.replay.advice import advise
from grpo_plus.replay.evidence import Evidence, evidence_of
from grpo_plus.replay.in_words import headline, in_short, origin_lines
from grpo_plus.replay.rules import RULES
from tests.replay.logs import write_rewards


def log(*groups, weights=None, names="ab", **labels) -> Rewards:
    """Groups of a number or a pair per completion, over and over until there are 32."""
    repeats = 32 // len(groups)
    values = torch.tensor(groups * repeats, dtype=torch.float64)
    values = values if values.dim() == 3 else values.unsqueeze(-1)
    weights = torch.ones(values.shape[-1]) if weights is None else torch.tensor(weights)
    labels = {name: each * repeats for name, each in labels.items()}
    if "lengths" in labels:
        labels["lengths"] = torch.tensor(labels["lengths"])
    return Rewards(values, weights.double(), tuple(names[: values.shape[-1]]), **labels)


PLAIN = log([1, 0.5, 0, 0.25, 0.75, 1], [0, 0.5, 1, 0.5, 0.25, 0])
# a: 1 and 0; b: a tenth of that, elsewhere
APART = log([(1, 0.1), (1, 0.1), (0, 0), (0, 0), (0, 0), (1, 0)])
# With weights 1 and .5 the first of eight groups sums to 1 everywhere. Its z-scores leave half of a's.
CANCELLED = log(
    [(1, 0), (0, 2), (0, 2), (1, 0), (0, 2), (1, 0)],
    *[[(1, 2), (0, 0), (1, 2), (0, 0), (1, 2), (0, 0)]] * 7,
    weights=[1.0, 0.5],
)
# b is earned by 23 of 24, a by 8 of 24.
EARNED = log([(1, 1), (1, 1), (0, 1), (0, 1), (0, 1), (0, 0)], *[[(1, 1), (1, 1), (0, 1), (0, 1), (0, 1), (0, 1)]] * 3)
# Two of six completions are above the mean in one reward and below it in the other.
OPPOSED = log([(1, 0), (0, 1), (1, 1), (0, 0), (1, 1), (0, 0)])
FAILURES = log([0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1])
SELDOM = log([0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0])
TASKS = log([1, 0.5, 0, 0.25, 0.75, 1], [5, 2.5, 0, 1.25, 3.75, 5], tasks=("small", "large"))
NEAR_TIES = log([1, 0.5, 0, 0.25, 0.75, 1], [0.5, 0.51, 0.5, 0.5, 0.51, 0.5], *[[1, 0.5, 0, 0.25, 0.75, 0]] * 2)
SMALL = log([1, 0.5, 0], [0.5, 0, 0.25])
OUTLIERS = log([0.1, 0.2, 0.3, 0.4, 0.5, 9.0], *[[1, 0.5, 0, 0.25, 0.75, 1]] * 3)
# The long completions are the good ones: their mean by length is above the plain mean.
LONG = log([1, 0.5, 0, 0.25, 0.75, 1], lengths=[[100, 50, 1, 25, 75, 100]])
DEAD = log([1, 1, 1, 1, 1, 1], [1, 0.5, 0, 0.25, 0.75, 1])
SPENT = log([(1, 1), (0.5, 1), (0, 1), (0.25, 1), (0.75, 1), (1, 1)])
EVEN = log([0, 1, 0, 1, 0, 1])


def found_in(rewards: Rewards) -> dict[str, str]:
    evidence = evidence_of(rewards)
    return {rule.found.__name__: text for rule in RULES if (text := rule.found(evidence)) is not None}


# By rule: a log, what the rule says of it, and the candidates beside grpo; other rules may fit the log as well.
CASES = {
    # std of a: sqrt(3/10) = .548, of b a tenth of sqrt(4/15) = .0516
    "rewards_apart": (APART, "`a` spreads by 0.55 and `b` by 0.052, 11 times less", ["gdpo", "mo_grpo"]),
    "hidden_in_the_sum": (CANCELLED, "In 12% of the groups rewards cancel in the sum", ["gdpo", "mo_grpo"]),
    "almost_earned": (EARNED, "`b` stands at 96% of its range in the log and `a` at 33%", ["sa_mrpo"]),
    "rewards_opposed": (OPPOSED, "33% of the completions are above their group's mean in one", ["dvao"]),
    "all_failed": (FAILURES, "In 33% of the groups every completion has the lowest reward", ["ngrpo"]),
    "seldom_solved": (SELDOM, "Rewards are 0 or 1, and 17% of the completions succeed", ["maxrl"]),
    # std of the small one: sqrt(.833 / 5) = .41, of the large one five times that; grpo is spoken for already
    "tasks_apart": (TASKS, "spread by 2 in the groups of `large` and by 0.41 in those of `small`", []),
    "near_ties": (NEAR_TIES, "25% of the groups that differ do so by less than a tenth", ["dr_grpo", "rloo"]),
    "small_groups": (SMALL, "A group has 3 completions, and rewards are graded", ["rloo", "dr_grpo"]),
    "outliers": (OUTLIERS, "25% of the groups that differ have a reward far away", ["median_mad", "rank"]),
    # mean .583, by length 2.375 (100 + 25 + 0 + 6.25 + 56.25 + 100 over 351) = .819; std .408: .236 / .408
    "baseline_depends_on_length": (LONG, "moves the baseline by 0.58 std on average", ["opo"]),
    "mostly_dead": (DEAD, "In 50% of the groups the rewards do not differ", []),
    "spent_rewards": (SPENT, "`b` is the same for all completions in 100% of the groups", []),
    "about_length": (LONG, "Reward and length are correlated by +1.00 inside the groups", ["opo"]),
    "right_or_wrong": (EVEN, "Rewards are 0 or 1", []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_log_speaks_for_what_its_rule_says(name):
    rewards, says, candidates = CASES[name]
    assert says in found_in(rewards)[name]
    assert list(advise(evidence_of(rewards), current="grpo").candidates) == candidates


def test_every_rule_has_its_log_and_names_estimators_that_exist():
    assert {rule.found.__name__ for rule in RULES} == set(CASES)
    assert {name for rule in RULES for name in (*rule.suits, *rule.against)} <= set(ESTIMATORS)


def test_where_no_rule_fits_the_advice_is_to_stay():
    both_earned = [[(1, 1)] * 11 + [(0.2, 0.1)]] * 2
    assert found_in(log(*both_earned, tasks=("x", "y"))) == {}
    assert found_in(log([0, 0, 0, 0, 0, 0])).keys() == {"mostly_dead"}
    assert found_in(log([0, 0, 0])).keys() == {"mostly_dead"}
    assert found_in(PLAIN) == {}
    advice = advise(evidence_of(PLAIN), current="gdpo")
    assert (advice.candidates, advice.reasons, advice.unsuited) == ({}, (), {})
    assert headline(advice) == "Stay with `gdpo`: the log gives no ground for a change."


def test_what_the_log_speaks_for_already_is_kept():
    assert list(advise(evidence_of(TASKS), current="dr_grpo").candidates) == ["grpo", "ema_task"]
    advice = advise(evidence_of(APART), current="gdpo")
    assert advice.candidates == {}
    assert headline(advice) == "Stay with `gdpo`: the log speaks for it."


def test_thirty_groups_are_needed():
    few = advise(evidence_of(Rewards(APART.values[:29], APART.weights, APART.names)), current=None)
    assert (few.candidates, few.too_small, few.assumed) == ({}, True, True)
    assert advise(evidence_of(Rewards(APART.values[:30], APART.weights, APART.names)), current=None).candidates
    assert headline(few) == "Stay with `grpo`: a log of fewer than 30 groups gives no ground for a change."


def test_an_estimator_that_is_spoken_against_or_refused_or_the_same_is_no_candidate():
    small_tasks = log([1, 0.5, 0], [5, 2.5, 0], tasks=("small", "large"))
    # Small groups speak for rloo and dr_grpo and against grpo; tasks apart speak for grpo and against the other two.
    assert list(advise(evidence_of(small_tasks), current="rloo").candidates) == ["ema_task", "popart"]
    near = evidence_of(NEAR_TIES)
    assert list(advise(near, current="grpo", refused={"dr_grpo": "it cannot"}).candidates) == ["rloo"]
    assert list(advise(near, current="grpo", same=["grpo", "rloo"]).candidates) == ["dr_grpo"]
    assert advise(near, current="grpo").unsuited.keys() == {"grpo", "grpo_pop", "loo_std"}


def test_the_second_candidate_answers_another_reason():
    both = Evidence(groups=99, size=8, rewards=evidence_of(APART).rewards, low=0, high=2, conflict=0.4)
    assert list(advise(both, current="grpo").candidates) == ["gdpo", "dvao"]


def test_an_estimator_that_leaves_more_groups_untrained_is_no_candidate():
    advice = advise(evidence_of(SELDOM), current="grpo", dead={"grpo": 0.2, "maxrl": 0.31, "rank": 0.29})
    assert advice.candidates == {}
    assert advice.unsuited == {"maxrl": "It leaves 31% of the groups untrained, `grpo` 20%"}


def test_candidates_get_the_hyper_parameters_that_the_log_asks_for():
    failing = evidence_of(log([0, 0, 0, 0, 0, 0], [2, 2, 0, 0, 2, 0], [2, 2, 0, 0, 2, 0]))
    assert advise(failing, current="grpo").candidates["ngrpo"] == {"r_max": 2.0}
    values = EARNED.values * torch.tensor([1.0, 3.0])
    quiet = [*values[:32], *torch.ones(16, 6, 2) * torch.tensor([0.0, 3.0])]  # a third of the groups are silent
    earned = evidence_of(Rewards(torch.stack(quiet), torch.tensor([1.0, 0.5]).double(), ("a", "b")))
    assert advise(earned, current="grpo").candidates["sa_mrpo"] == {"batch_over": "live", "bounds": {"b": [0.0, 3.0]}}


def test_the_evidence_of_a_small_log():
    a = [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0.06], [1, 1, 0, 0]]
    b = [[0, 0, 2, 2], [2, 2, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    watched = [[0, 1, 2, 3]] * 4
    values = torch.tensor([a, b, watched], dtype=torch.float64).permute(1, 2, 0)
    weights = torch.tensor([1.0, -0.5, 0.0]).double()
    found = evidence_of(Rewards(values, weights, ("a", "b", "watched"), tasks=("x", "x", "y", "y")))
    # Sums: 1 0 -1 0 | -1 x 4 | 0 0 0 .06 | 1 1 0 0. Their std: .8165 | 0 | .03 | .5774. Their mean: -1.94 / 16.
    assert (found.groups, found.size, found.low, found.high, found.binary) == (4, 4, -1.0, 1.0, False)
    assert found.level == pytest.approx((1 - 1.94 / 16) / 2)
    assert (found.dead, found.silent, found.hidden, found.failed) == (0.25, 0.25, 0.0, 0.25)
    # Only in the first group, a: + - - + and b, a penalty: + + - -.
    assert found.conflict == 2 / 16
    # .03 would be near to nothing for the task x, and is usual for y: the lower median of .03 and .5774.
    assert (found.near_ties, found.outliers) == (0.0, 0.0)
    assert found.spread_of_task == {"x": pytest.approx(0.8165, abs=1e-4), "y": pytest.approx(0.3037, abs=1e-4)}
    # a differs in three groups, std .5774, .03, .5774; b in the first alone, std 1.1547, which counts half.
    a_facts, b_facts = found.rewards
    assert (a_facts.flat, b_facts.flat) == (0.25, 0.75)
    assert [a_facts.spread, b_facts.spread] == pytest.approx([0.3949, 0.5774], abs=1e-4)
    assert [a_facts.level, b_facts.level] == pytest.approx([4.06 / 16, 12 / 2 / 16])


def test_rewards_that_cancel_under_any_estimator_are_not_hidden():
    """Two rewards of equal weight with a constant sum: their z-scores cancel, too."""
    contrary = log([(1, 0), (0, 1), (0, 1), (1, 0), (0, 1), (1, 0)])
    assert evidence_of(contrary).hidden == 0
    assert evidence_of(contrary).dead == 1


def test_abstentions_and_rewards_of_weight_0_speak_for_nothing():
    watched = log(*[[(1, 0), (0.5, 9), (0, 0), (0.25, 9), (0.75, 0), (1, 9)]] * 2, weights=[1.0, 0.0])
    assert found_in(watched) == {}
    nan = float("nan")
    nobody = log([1, 0.5, 0, 0.25, 0.75, 1], [nan] * 6)
    assert found_in(nobody) == {}
    assert evidence_of(nobody).groups == 16


def write_apart(run_dir, steps=16):
    """A run of `grpo`, to rounding, whose second reward is in another unit."""
    groups = log(APART.values[0].tolist(), [(0.5, 0.1), (0, 0), (0, 0), (0, 0), (0, 0), (0.25, 0)])
    rewards = {name: groups.values[:2, :, k].flatten().tolist() for k, name in enumerate("ab")}
    total = groups.total()[:2]
    advantages = (total - total.mean(-1, keepdim=True)) / (total.std(-1, keepdim=True) + 1e-4)
    for step in range(1, steps + 1):
        texts = [f"{step}, {row}" for row in range(12)]
        write_rewards(run_dir, step, rewards, size=6, advantage=advantages.flatten().tolist(), completion=texts)
    return run_dir


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    run_dir = write_apart(tmp_path_factory.mktemp("apart"))
    settings = {"num_generations": 6, "learning_rate": 1e-5, "loss_type": "dapo; rm -rf /", "max_steps": -1}
    settings |= {"advantage_estimator": "grpo", "beta": True, "temperature": None}
    record = {"settings": settings, "rewards": {"a": 1.0, "b": 1.0}}
    (run_dir / "grpo_plus_run.json").write_text(json.dumps(record))
    return replay(Rollouts(run_dir), ["grpo", "grpo_pop", "dr_grpo", "rloo", "gdpo", "passk"])


def test_a_replay_advises_on_its_own_log(apart):
    assert apart.own == "grpo"
    assert list(apart.advice.candidates) == ["gdpo", "mo_grpo"]
    assert apart.advice.unsuited.keys() == {"passk"}
    lines = in_short(apart)
    assert lines[0] == "Compare `grpo` with `gdpo` and `mo_grpo`."
    assert "8 times less: this speaks for `gdpo` and `mo_grpo`" in lines[1]


def test_a_run_with_the_kl_in_its_reward_says_why_it_has_no_recipe(tmp_path):
    write_rewards(
        tmp_path, 1, {"a": [1.0, 0.0, 0.0, 1.0]}, size=2, advantage=[0.9, -0.9, -1.2, 1.2], completion=list("abcd")
    )
    settings = {"num_generations": 2, "advantage_estimator": "rloo", "advantage_modifiers": {"kl_in_reward": {}}}
    (tmp_path / "grpo_plus_run.json").write_text(json.dumps({"settings": settings, "rewards": {"a": 1.0}}))
    lines = origin_lines(replay(Rollouts(tmp_path)))
    assert "recorded `rloo + kl_in_reward`, which no replay gives: kl_in_reward needs the KL" in lines[0]


def test_the_command_is_one_that_compare_takes(apart, capsys):
    words = shlex.split(apart.next_command.replace("\\\n", ""))
    assert words[:4] == ["grpo-plus", "compare", "--estimators", "grpo,gdpo,mo_grpo"]
    assert words[words.index("--baseline") + 1] == Variant("grpo").label
    assert words[words.index("--loss_type") + 1] == "dapo; rm -rf /"  # one word, whatever a received file says
    assert words[words.index("--reward_funcs") + 1 :][:2] == ["MODULE.a", "MODULE.b"]
    assert not {"--max_steps", "--beta", "--temperature", "--reward_weights"} & set(words)
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    known = {f"--{entry.name}" for entry in fields(GRPOPlusConfig)} | set(capsys.readouterr().out.split())
    flags = {word for word in words if word.startswith("--")}
    assert flags - known == {"--model_name_or_path", "--dataset_name", "--reward_funcs"} - known


def test_estimators_with_one_direction_are_a_family(apart):
    labels = [family.label for family in apart.families]
    # grpo's std of six is sqrt(6/5) of the population's; its eps leaves a little more than rounding.
    assert labels == ["grpo ≈ grpo_pop x 0.913 = logged", "dr_grpo = rloo x 0.833", "gdpo"]
    assert apart.families[0].short == "grpo and 2 alike"
