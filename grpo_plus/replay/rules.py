"""What in a log speaks for which estimator: one table, for the advice of a replay and for docs/replay.md.

A rule reads the evidence and says what it found, or nothing. The limits are judgments of ours; no paper has them.

To add a rule, write its function here and register the function with what it speaks for, then add a log for it to
`tests/replay/test_advice.py`, and run `python -m tests.readme`, which writes the table of the page.
"""

from collections.abc import Callable
from dataclasses import dataclass

from grpo_plus.replay.evidence import Evidence, RewardFacts

PAPERS = "https://huggingface.co/papers/"
CHOOSING = "choosing.md"
DIVIDE_BY_GROUP = ("grpo", "grpo_pop", "loo_std")
KEEP_THE_SCALE = ("dr_grpo", "rloo", "opo", "gpg", "batch_std")

SPENT = 0.95  # share of groups in which a reward is flat, so that it hardly teaches
APART, TASKS_APART = 4.0, 3.0  # times between the spreads of rewards, and of tasks
HIDDEN = 0.05
EARNED, OPEN = 0.9, 0.7
OPPOSED = 0.25
FAILED = 0.3
SELDOM = 0.25
NEAR_TIES = 0.1
FEW = 4  # completions per group
OUTLIERS = 0.1
SHIFT = 0.2
DEAD = 0.5
ABOUT_LENGTH = 0.4


@dataclass(frozen=True)
class Rule:
    """What a finding speaks for.

    Attributes:
        found: the finding in words with its figure; None where the log does not show it.
        shows: what the log has to show, for the page.
        suits, against: names of estimators. Without either, the rule is about something else than the estimator.
        because: why, in a sentence.
        source: a paper's address, or the page that measured it.
    """

    found: Callable[[Evidence], str | None]
    shows: str
    because: str
    source: str
    suits: tuple[str, ...] = ()
    against: tuple[str, ...] = ()


RULES: list[Rule] = []


def rule(
    *, shows: str, because: str, source: str, suits: tuple[str, ...] = (), against: tuple[str, ...] = ()
) -> Callable[[Callable[[Evidence], str | None]], Callable[[Evidence], str | None]]:
    """Add a rule with this finding to the table."""

    def add(found: Callable[[Evidence], str | None]) -> Callable[[Evidence], str | None]:
        RULES.append(Rule(found, shows, because, source, suits, against))
        return found

    return add


def teaching(e: Evidence) -> list[RewardFacts]:
    """The rewards that still differ in some groups."""
    return [reward for reward in e.rewards if reward.flat < SPENT]


@rule(
    shows=f"one reward spreads {APART:g} times as far as another, weights included",
    suits=("gdpo", "mo_grpo"),
    because="In a sum the reward that spreads furthest decides. These divide each reward by its own spread first.",
    source=PAPERS + "2601.05242",
)
def rewards_apart(e: Evidence) -> str | None:
    """Rewards of unlike units."""
    ordered = sorted(teaching(e), key=lambda reward: reward.spread)
    if len(ordered) < 2 or ordered[-1].spread < APART * ordered[0].spread:
        return None
    quiet, loud = ordered[0], ordered[-1]
    return (
        f"Where they differ, `{loud.name}` spreads by {loud.spread:.2g} and `{quiet.name}` by {quiet.spread:.2g}, "
        f"{loud.spread / quiet.spread:.0f} times less"
    )


@rule(
    shows=f"in {HIDDEN:.0%} of the groups rewards cancel in the sum, and do not if each is normalized first",
    suits=("gdpo", "mo_grpo"),
    because="Under a sum such groups teach nothing.",
    source=PAPERS + "2601.05242",
)
def hidden_in_the_sum(e: Evidence) -> str | None:
    """Groups that only a sum makes dead."""
    if e.hidden < HIDDEN:
        return None
    return f"In {e.hidden:.0%} of the groups rewards cancel in the sum, and do not if each is normalized first"


@rule(
    shows=f"one reward is {EARNED:.0%} earned, another less than {OPEN:.0%}, and both still differ",
    suits=("sa_mrpo",),
    because="It moves the weight to the reward that is left to learn.",
    source=PAPERS + "2608.16072",
)
def almost_earned(e: Evidence) -> str | None:
    """A reward at its upper end beside another one that is not."""
    ordered = sorted(teaching(e), key=lambda reward: reward.level)
    if len(ordered) < 2 or ordered[-1].level < EARNED or ordered[0].level > OPEN:
        return None
    return (
        f"`{ordered[-1].name}` stands at {ordered[-1].level:.0%} of its range in the log and `{ordered[0].name}` at "
        f"{ordered[0].level:.0%}"
    )


@rule(
    shows=f"rewards push {OPPOSED:.0%} of the completions in opposite directions",
    suits=("dvao",),
    because="Its divisor grows where the rewards disagree, so such a group makes a smaller step.",
    source=PAPERS + "2605.25604",
)
def rewards_opposed(e: Evidence) -> str | None:
    """Rewards that contradict each other."""
    if e.conflict < OPPOSED:
        return None
    return f"{e.conflict:.0%} of the completions are above their group's mean in one reward and below it in another"


@rule(
    shows=f"every completion has the lowest reward in {FAILED:.0%} of the groups, and no task sets another upper end",
    suits=("ngrpo",),
    because="It pushes away from failures where nothing succeeded. Under most others such groups teach nothing.",
    source=PAPERS + "2509.18851",
)
def all_failed(e: Evidence) -> str | None:
    """Groups of failures only."""
    if e.failed < FAILED or len(e.spread_of_task) > 1:
        return None
    return f"In {e.failed:.0%} of the groups every completion has the lowest reward"


@rule(
    shows=f"rewards are 0 or one other value, and {SELDOM:.0%} of the completions or fewer succeed",
    suits=("maxrl",),
    because="It follows log p instead of p, so a prompt that is seldom solved weighs more.",
    source=PAPERS + "2602.02710",
)
def seldom_solved(e: Evidence) -> str | None:
    """Right or wrong, and mostly wrong."""
    if not e.binary or e.low != 0 or e.level > SELDOM:
        return None
    return f"Rewards are {e.low:g} or {e.high:g}, and {e.level:.0%} of the completions succeed"


@rule(
    shows=f"the rewards of one task spread {TASKS_APART:g} times as far as those of another",
    suits=("grpo", "ema_task", "popart"),
    against=KEEP_THE_SCALE,
    because="Without a scale per task or group, the task with the largest rewards leads. Is that meant? Then the "
    "reverse holds.",
    source=CHOOSING,
)
def tasks_apart(e: Evidence) -> str | None:
    """Tasks of unlike scales."""
    ordered = sorted(e.spread_of_task, key=e.spread_of_task.__getitem__)
    if len(ordered) < 2 or e.spread_of_task[ordered[-1]] < TASKS_APART * e.spread_of_task[ordered[0]]:
        return None
    quiet, loud = ((name, e.spread_of_task[name]) for name in (ordered[0], ordered[-1]))
    return (
        f"Rewards spread by {loud[1]:.2g} in the groups of `{loud[0]}` and by {quiet[1]:.2g} in those of `{quiet[0]}`"
    )


@rule(
    shows=f"{NEAR_TIES:.0%} of the live groups spread less than a tenth of what is usual for their task",
    suits=("dr_grpo", "rloo"),
    against=DIVIDE_BY_GROUP,
    because="Divided by its own std, a group that hardly differs makes as large a step as any other.",
    source=PAPERS + "2503.20783",
)
def near_ties(e: Evidence) -> str | None:
    """Groups that differ by little."""
    if e.near_ties < NEAR_TIES:
        return None
    return f"{e.near_ties:.0%} of the groups that differ do so by less than a tenth of what is usual"


@rule(
    shows=f"a group has {FEW} completions or fewer, and rewards take more than two values",
    suits=("rloo", "dr_grpo"),
    against=DIVIDE_BY_GROUP,
    because="The std of so few rewards is mostly noise.",
    source=CHOOSING,
)
def small_groups(e: Evidence) -> str | None:
    """Graded rewards in groups of very few."""
    graded = e.high > e.low and not e.binary
    return None if e.size > FEW or not graded else f"A group has {e.size} completions, and rewards are graded"


@rule(
    shows=f"{OUTLIERS:.0%} of the live groups have a reward ten median deviations from the others",
    suits=("median_mad", "rank"),
    because="An outlier moves mean and std, but neither the median nor the order.",
    source=PAPERS + "2601.22582",
)
def outliers(e: Evidence) -> str | None:
    """Single rewards far from the others."""
    if e.outliers < OUTLIERS:
        return None
    return f"{e.outliers:.0%} of the groups that differ have a reward far away from all others"


@rule(
    shows=f"weighting completions by their length moves the groups' means by {SHIFT:g} std",
    suits=("opo",),
    because="The baseline that varies least counts tokens, which matters only where reward and length go together.",
    source=PAPERS + "2505.23585",
)
def baseline_depends_on_length(e: Evidence) -> str | None:
    """A baseline that lengths move."""
    if e.shift < SHIFT:
        return None
    return f"Counting each completion by its length moves the baseline by {e.shift:.2f} std on average"


@rule(
    shows=f"the sum does not differ in {DEAD:.0%} of the groups",
    because="Hardly an estimator trains such groups. `max_refills` draws others in their place.",
    source=PAPERS + "2503.14476",
)
def mostly_dead(e: Evidence) -> str | None:
    """Groups without a difference."""
    return None if e.dead < DEAD else f"In {e.dead:.0%} of the groups the rewards do not differ"


@rule(
    shows=f"one of several rewards is the same in {SPENT:.0%} of the groups",
    because="It teaches next to nothing, under any estimator. Drop it, or grade it finer.",
    source=CHOOSING,
)
def spent_rewards(e: Evidence) -> str | None:
    """Rewards that tell no completions apart."""
    spent = [reward for reward in e.rewards if reward.flat >= SPENT]
    if len(e.rewards) < 2 or not spent:
        return None
    return " and ".join(f"`{r.name}` is the same for all completions in {r.flat:.0%} of the groups" for r in spent)


@rule(
    shows=f"reward and length are correlated inside groups, by {ABOUT_LENGTH:g} or more",
    because="The update is about length then. The reward is the place to mend that, and after it the loss: "
    "`loss_type` `dapo` and `dr_grpo` do not favor short or long completions.",
    source=PAPERS + "2503.20783",
)
def about_length(e: Evidence) -> str | None:
    """A reward that goes with length."""
    if abs(e.length_correlation) < ABOUT_LENGTH:
        return None
    return f"Reward and length are correlated by {e.length_correlation:+.2f} inside the groups"


@rule(
    shows="rewards are 0 or one other value",
    because="One thing only you know: does one of k attempts count? Then compare `passk` and `pkpo` too.",
    source=PAPERS + "2508.10751",
)
def right_or_wrong(e: Evidence) -> str | None:
    """Rewards that a chance of success can be taken of."""
    return f"Rewards are 0 or {e.high:g}" if e.binary and e.low == 0 else None
