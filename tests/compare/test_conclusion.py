import pytest
import torch

from grpo_plus.compare.conclusion import NextStep, conclusion
from grpo_plus.compare.power import seeds_needed, spread_of
from grpo_plus.compare.verdict import ScoreVerdict, checked_baseline
from tests.compare.test_report import comparison_of, noisy


def concluded(folder, scores, baseline=None):
    comparison = comparison_of(folder, scores)
    return conclusion(ScoreVerdict(comparison, "accuracy", checked_baseline(comparison, baseline)))


def of_seeds(*means):
    """Scores of 40 items, each the seed's mean."""
    return [[mean] * 40 for mean in means]


def test_a_variant_that_is_ahead_of_all_others_is_the_answer(tmp_path):
    found = concluded(tmp_path, {"low": noisy(0.3, 4), "high": noisy(0.8, 4), "same": noisy(0.3, 4)})
    assert found.settled
    assert found.verdict.startswith("`high` is ahead of all others: of `")
    assert "by 0.5" in found.verdict
    assert found.step == NextStep("Train with `high`.", winner="high")
    assert found.reasons[0] == "4 seeds of each variant, judged on 40 held-out items."
    assert found.reasons[1].startswith("All 3 intervals of differences hold at once with a probability of 95%.")


def test_where_the_two_highest_are_not_told_apart_the_answer_is_one_in_part(tmp_path):
    scores = {"low": noisy(0.3, 4), "high": of_seeds(0.8, 0.7, 0.8, 0.7), "near": of_seeds(0.7, 0.8, 0.75, 0.71)}
    found = concluded(tmp_path, scores)
    assert not found.settled
    assert found.verdict.startswith("`high` is ahead of `low` by 0.4")
    assert found.verdict.endswith(
        "1 smaller difference shown, too. Nothing separates `high`, the highest mean, from `near`."
    )


def test_nothing_is_separated_where_every_interval_holds_zero(tmp_path):
    a, b = (0.5, 0.6, 0.55), (0.4, 0.55, 0.56)
    found = concluded(tmp_path, {"a": of_seeds(*a), "b": of_seeds(*b)})
    assert not found.settled
    assert found.verdict.startswith(
        "Nothing here separates the variants. 3 seeds can show differences in `accuracy` of"
    )
    apart = torch.tensor(a) - torch.tensor(b)
    size = float(found.verdict.split("` of ")[1].split()[0])
    assert size == pytest.approx(4.303 * apart.std().item() / 3**0.5, rel=0.05)
    needed = seeds_needed(apart.mean().item(), spread_of(apart[:, None].expand(3, 40), size, 1))
    assert found.step.variants == ("a", "b")
    assert found.step.seeds == pytest.approx(needed, abs=1)
    assert (
        f"train at least {found.step.seeds - 3} more seeds of the two, if the true difference is the one seen (0.047)"
        in (found.step.action)
    )


def test_a_difference_that_no_number_of_seeds_would_show_asks_for_none(tmp_path):
    found = concluded(tmp_path, {"a": of_seeds(0.5, 0.6, 0.4), "b": of_seeds(0.6, 0.401, 0.5)})
    assert found.step.action.startswith("More than 100 seeds would be needed to tell `b` and `a` apart")
    assert found.step.winner == "b"


def test_equal_means_of_unequal_scores_name_no_number_of_seeds(tmp_path):
    found = concluded(tmp_path, {"a": of_seeds(0.5, 0.6, 0.4), "b": of_seeds(0.6, 0.4, 0.5)})
    assert found.step.action.endswith("have the same mean. Train with either.")


def test_arms_that_score_alike_on_every_item_are_not_told_to_train_more_seeds(tmp_path):
    same = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    found = concluded(tmp_path, {"a": same, "b": same})
    assert found.verdict == "`a` and `b` have the same `accuracy` on every held-out item."
    assert found.step == NextStep("More steps, or another score, may tell them apart.")


@pytest.mark.parametrize("baseline", [None, "a"])
@pytest.mark.parametrize("worst", [[[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]], [[-9.0, -9.0]] * 3])
def test_of_arms_that_score_alike_a_third_one_is_not_said_to(tmp_path, baseline, worst):
    same = [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    found = concluded(tmp_path, {"b": same, "a": same, "c": worst}, baseline)
    assert found.verdict.endswith("`b` and `a` have the same `accuracy` on every held-out item.")
    assert ("is ahead of `c`" in found.verdict) == (worst[0][0] < 0)
    assert found.step == NextStep("More steps, or another score, may tell them apart.")


def test_twins_do_not_make_small_differences_visible(tmp_path):
    low = [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    found = concluded(tmp_path, {"a": [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], "b": low, "c": low})
    assert "3 seeds can show differences in `accuracy` of 1.9" in found.verdict


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_claim_nothing_however_large_the_gap(tmp_path, seeds):
    found = concluded(tmp_path, {"a": [[0.0] * 9] * seeds, "b": [[1.0] * 9] * seeds})
    assert not found.settled
    assert found.verdict.startswith("`b` reached 1.000 in `accuracy`, from 0.500. That is the highest mean, but ")
    assert found.verdict.endswith("can show no difference.")
    assert "ahead" not in found.verdict
    # Nothing is known of the spread, so no number of seeds is promised to settle anything.
    assert found.step == NextStep("Train 5 seeds. Intervals need 3.", ("a", "b"), 5)


def test_a_seed_that_one_variant_lacks_is_left_out_of_all(tmp_path):
    scores = {"a": noisy(0.2, 4), "b": [*noisy(0.6, 3), None], "c": [None] * 4}
    comparison = comparison_of(tmp_path, scores)
    assert comparison.paired_seeds == [0, 1, 2]
    assert {label: values.shape for label, values in comparison.scores("accuracy").items()} == {
        "a": (3, 40),
        "b": (3, 40),
    }
    reasons = conclusion(ScoreVerdict(comparison, "accuracy")).reasons
    assert "Left out, for not every variant has finished on it: seed 3." in reasons
    assert "`c` has not finished on any seed and is not compared." in reasons


def test_one_variant_has_nothing_to_be_compared_with(tmp_path):
    assert concluded(tmp_path / "a", {"a": noisy(0.2, 3)}).verdict.endswith(
        "There is no other variant to compare with."
    )
    alone = concluded(tmp_path / "b", {"a": noisy(0.2, 3), "b": [None] * 3})
    assert alone.verdict == "One variant has finished: there is nothing to compare it with."
    assert alone.step.variants == ("a", "b")


def test_a_training_that_made_every_variant_worse_is_called_so(tmp_path):
    found = concluded(tmp_path, {"a": noisy(0.2, 3), "b": noisy(0.4, 3)})
    assert "Every variant scores below the start, 0.500: the training made the model worse." in found.reasons


def test_a_baseline_is_compared_with_each_other_and_a_wrong_one_is_refused(tmp_path):
    comparison = comparison_of(tmp_path, {"a": noisy(0.2, 3), "b": noisy(0.3, 3), "c": noisy(0.4, 3)})
    verdict = ScoreVerdict(comparison, "accuracy", "b")
    assert [(d.first, d.second) for d in verdict.differences] == [("a", "b"), ("c", "b")]
    found = conclusion(verdict).verdict
    assert found.startswith("`c` is ahead of `b` by 0.099 [")
    assert found.endswith("Only `b` was compared with each: `c` has the highest mean, and may not be the best.")
    with pytest.raises(ValueError, match="There is no variant 'd'"):
        checked_baseline(comparison, "d")
