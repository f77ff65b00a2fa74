"""What a replay found, in sentences: for the terminal and for the first screen of the report."""

from collections.abc import Iterable

from grpo_plus.replay.advice import FEWEST_GROUPS, Advice, Reason
from grpo_plus.replay.command import PLACEHOLDERS
from grpo_plus.replay.recipes import described, recorded_recipe
from grpo_plus.replay.result import FACTOR, LOGGED, SAME, Replay

COMMAND_NOTE = f"{PLACEHOLDERS} stand for the run's own, which a log does not hold. `--config FILE` works too."
LIMIT = "A log shows how updates would have differed. Which estimator learns better, only trainings show."


def headline(advice: Advice) -> str:
    """The advice in a sentence: what to compare, or why to stay."""
    if advice.candidates:
        return f"Compare `{advice.current}` with {_listed(advice.candidates)}."
    if advice.too_small:
        return f"Stay with `{advice.current}`: a log of fewer than {FEWEST_GROUPS} groups gives no ground for a change."
    if any(advice.current in reason.rule.suits for reason in advice.reasons):
        return f"Stay with `{advice.current}`: the log speaks for it."
    return f"Stay with `{advice.current}`: the log gives no ground for a change."


def reason_line(reason: Reason) -> str:
    """A finding, what it speaks for, and why."""
    rule = reason.rule
    sides = [f"{word} {_listed(names)}" for word, names in (("for", rule.suits), ("against", rule.against)) if names]
    speaks = f": this speaks {' and '.join(sides)}" if sides else ""
    return f"{reason.found}{speaks}. {rule.because}"


def advice_lines(replay: Replay) -> list[str]:
    """Why, line by line: the reasons, and what is against other estimators."""
    advice = replay.advice
    lines = [reason_line(reason) for reason in advice.reasons]
    untrained = [name for name in advice.unsuited if name not in replay.refused]
    if unlike := [name for name in untrained if not any(name in r.rule.against for r in advice.reasons)]:
        lines.append(f"Under {_listed(unlike)}, fewer groups would teach than in this run.")
    if "opo" in advice.candidates and replay.rollouts.length_unit == "characters":
        lines.append("Lengths are in characters, for the log has no token counts, so what they show is approximate.")
    if advice.assumed:
        lines.append(f"`{advice.current}`, the default of TRL, stands for the run's own estimator, which is not known.")
    return lines


def in_short(replay: Replay) -> list[str]:
    """The advice for a terminal: what to do, why, and the command."""
    lines = [headline(replay.advice), *(f"- {line}" for line in (*advice_lines(replay), *origin_lines(replay)))]
    if replay.advice.candidates:
        return [*lines, LIMIT, "", replay.next_command, "", COMMAND_NOTE]
    return lines


def _listed(names: Iterable[str]) -> str:
    """Names as a list in words."""
    *first, last = (f"`{name}`" for name in names)
    return f"{', '.join(first)} and {last}" if first else last


def reference(replay: Replay) -> str:
    """What the others are compared with: the run's own advantages, or those of TRL's default."""
    return next(name for name in (LOGGED, "grpo", *replay.names) if name in replay.names)


def apart_lines(replay: Replay) -> list[str]:
    """What the run trained on, and what sets the estimators apart, in words."""
    s = replay.statistics
    lines = origin_lines(replay)
    base = reference(replay)
    others = {
        name: value
        for name, value in zip(replay.names, s.correlation()[replay.names.index(base)].tolist(), strict=True)
        if name not in (base, *replay.families[0].names) and value == value
    }
    if others:
        far, near = min(others, key=others.__getitem__), max(others, key=others.__getitem__)
        flips = s.flips()[replay.names.index(base), replay.names.index(far)].item()
        lines.append(
            f"Compared with `{base}`, `{near}` ranks the completions of a batch most alike (rank correlation "
            f"{others[near]:.2f}) and `{far}` least ({others[far]:.2f}; {flips:.0%} of the completions that train "
            "under both are pushed the other way)."
        )
    if len(s.names) > 1:
        lines += _lines_of_rewards(replay)
    return lines


def origin_lines(replay: Replay) -> list[str]:
    """Whose advantages the run trained on, where the log holds any."""
    return [_origin(replay)] if LOGGED in replay.names else []


def _origin(replay: Replay) -> str:
    if not replay.difference:
        return (
            f"The log does not tell whose advantages the run trained on: where rewards differ, `{LOGGED}` holds "
            "nothing but 0 or NaN, or rewards differ nowhere."
        )
    if replay.same:
        names = " and of ".join(f"`{name}`" for name in sorted(replay.same, key=lambda name: name != replay.own))
        recorded = any(replay.recipes[name].recorded for name in replay.same)
        return (
            f"The advantages that the run trained on (`{LOGGED}`) are those of {names}"
            f"{', as the run recorded' if recorded else ''}: relative difference "
            f"{replay.difference[replay.same[0]]:.0e}, where the float32 of the log allows {SAME:.0e}."
        )
    nearest = min(replay.difference, key=replay.difference.__getitem__)
    return (
        f"No estimator gives the advantages that the run trained on (`{LOGGED}`); the nearest is `{nearest}`, with a "
        f"relative difference of {replay.difference[nearest]:.2g}. {_explanation(replay)}"
    )


def _explanation(replay: Replay) -> str:
    """What may set the run's advantages apart from the replayed ones."""
    record = replay.rollouts.record
    settings = {} if record is None else record.settings
    name = settings.get("advantage_estimator")
    if name is None:
        return (
            "The run may have used other hyper-parameters, modifiers, or reward weights than the replay, which a log "
            "does not hold (`--reward_weights`)."
        )
    own = recorded_recipe(replay.rollouts)
    if own is None:
        return f"The run recorded `{name}`, which is not registered here: name it with `--estimators` to replay it."
    if (why := replay.refused.get(described(own))) is not None:
        return f"The run recorded `{described(own)}`, which no replay gives: {why}."
    if settings.get("reward_weight_schedule"):
        return (
            "The run's reward weights moved (`reward_weight_schedule`), and the replay holds them as they were at the "
            "start. `--reward_weights` takes others."
        )
    if described(own) not in replay.recipes:
        return f"The run recorded `{described(own)}`: leave `--estimators` out to replay it too."
    return (
        f"The run recorded `{described(own)}`, so something else has changed its advantages: a hook that was "
        "overridden, a function of the same name, or another part of a run that was resumed with other settings."
    )


def _lines_of_rewards(replay: Replay) -> list[str]:
    shares = replay.statistics.reward_share()
    leading = int(shares[replay.names.index(reference(replay))].nan_to_num().argmax())
    column = {
        name: share for name, share in zip(replay.names, shares[:, leading].tolist(), strict=True) if share == share
    }
    low, high = min(column, key=column.__getitem__), max(column, key=column.__getitem__)
    own = column.get(reference(replay), float("nan"))
    lines = [
        f"`{replay.statistics.names[leading]}` accounts for {own:.0%} of Σ|A| under `{reference(replay)}`; between "
        f"{column[low]:.0%} (`{low}`) and {column[high]:.0%} (`{high}`) under the others."
    ]
    unmoved = [
        name
        for name in replay.names
        if (own_reactions := [r for r in replay.reactions if r.estimator == name])
        and all(abs(r.size - 1) < 0.05 and r.cosine > 0.99 for r in own_reactions)
    ]
    names = ", ".join(f"`{name}`" for name in unmoved) or "none"
    return [*lines, f"Estimators that hardly notice when one reward is multiplied by {FACTOR:.0f}: {names}."]
