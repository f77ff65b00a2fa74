"""What a log says about the choice of an estimator: which to compare with the run's own, and why.

A log does not say which estimator learns better. The advice is therefore to train the candidates (`grpo-plus compare`),
or to stay with what the run has, where the log gives no ground for a change.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_plus.replay.evidence import Evidence
from grpo_plus.replay.rules import RULES, Rule

FEWEST_GROUPS = 30  # below, a share of the groups is chance
MOST = 2  # candidates beside the run's own: every one is trained over several seeds
DEFAULT = "grpo"  # TRL's
MORE_DEAD = 0.1
SILENT = 0.3  # share of groups without any difference, from which they inflate a batch's scale
INFLATED = ("gdpo", "sa_mrpo")


@dataclass(frozen=True)
class Reason:
    """A rule that fits the log, and what it found there."""

    rule: Rule
    found: str


@dataclass(frozen=True)
class Advice:
    """What to do next.

    Attributes:
        current: the estimator of the run.
        assumed: whether `current` is TRL's default for want of anything better, since the log fits no estimator.
        candidates: estimators to compare with it, with their hyper-parameters. Empty: stay.
        reasons: what was found, those that speak for the candidates first.
        unsuited: estimators that the log speaks against, and why.
        too_small: whether the log has too few groups to say anything.
    """

    current: str
    assumed: bool = False
    candidates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    unsuited: Mapping[str, str] = field(default_factory=dict)
    too_small: bool = False


def advise(
    evidence: Evidence,
    *,
    current: str | None,
    same: Collection[str] = (),
    dead: Mapping[str, float] | None = None,
    refused: Mapping[str, str] | None = None,
) -> Advice:
    """Apply the rules.

    Candidates are estimators that more rules speak for than for the run's own, and that none speaks against.

    Args:
        current: the run's estimator; None where the log fits none.
        same: estimators that ask for the same update as the run's own, up to a factor. They are no candidates.
        dead: by estimator, the share of groups that it leaves without an advantage.
        refused: estimators that cannot be applied to these rewards, and why.
    """
    own, refused = current or DEFAULT, refused or {}
    unsuited = dict(refused) | _more_dead(own, dead or {})
    if evidence.groups < FEWEST_GROUPS:
        return Advice(own, current is None, unsuited=unsuited, too_small=True)
    found = [Reason(rule, text) for rule in RULES if (text := rule.found(evidence)) is not None]
    for reason in found:
        unsuited |= {name: reason.found for name in reason.rule.against if name not in unsuited}
    chosen = _candidates(own, found, {own, *same, *unsuited})
    ordered = sorted(found, key=lambda reason: not {*chosen, own} & {*reason.rule.suits, *reason.rule.against})
    candidates = {name: keywords_for(name, evidence) for name in chosen}
    return Advice(own, current is None, candidates, tuple(ordered), unsuited)


def keywords_for(name: str, evidence: Evidence) -> dict[str, Any]:
    """The hyper-parameters that the log asks for: the rewards' range, and a scale that dead groups do not inflate."""
    keywords: dict[str, Any] = {}
    if name in INFLATED and evidence.silent >= SILENT:
        keywords["batch_over"] = "live"
    if name == "ngrpo" and evidence.high != 1:
        keywords["r_max"] = round(evidence.high, 6)
    if name == "sa_mrpo":
        outside = [r for r in evidence.rewards if not 0 <= r.low < r.high <= 1 and r.low < r.high]
        bounds = {reward.name: [round(reward.low, 6), round(reward.high, 6)] for reward in outside}
        keywords |= {"bounds": bounds} if bounds else {}
    return keywords


def _candidates(own: str, found: Sequence[Reason], excluded: Collection[str]) -> list[str]:
    """Estimators with more reasons than the run's own: first the one with most, then one that others speak for."""
    reasons = {name: [r for r in found if name in r.rule.suits] for r in found for name in r.rule.suits}
    of_own = len(reasons.get(own, [])) - sum(own in reason.rule.against for reason in found)
    better = [name for name, fors in reasons.items() if name not in excluded and len(fors) > of_own]
    chosen: list[str] = []
    while better and len(chosen) < MOST:
        covered = [reason for name in chosen for reason in reasons[name]]
        best = max(better, key=lambda name: (sum(r not in covered for r in reasons[name]), len(reasons[name])))
        better.remove(best)
        chosen.append(best)
    return chosen


def _more_dead(own: str, dead: Mapping[str, float]) -> dict[str, str]:
    """Estimators that leave clearly more groups untrained than the run's own."""
    base = dead.get(own, 1.0)
    return {
        name: f"It leaves {share:.0%} of the groups untrained, `{own}` {base:.0%}"
        for name, share in dead.items()
        if share >= base + MORE_DEAD
    }
