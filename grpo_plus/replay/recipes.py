"""What is replayed: estimators with their hyper-parameters and modifiers, by the name that the report shows.

A run of ours records its estimator (`grpo_plus_run.json`). Where that is more than a name, the replay has one more
recipe, the run's own, such as `grpo(ddof=0) + clip`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo_plus.advantages import ESTIMATORS, LENGTH_MODIFIERS, Estimator, check_keywords, check_modifiers
from grpo_plus.replay.rollouts import Rollouts

Given = Sequence[str] | Mapping[str, Mapping[str, Any]] | None


@dataclass(frozen=True)
class Recipe:
    """An estimator with what it is told.

    Attributes:
        modifiers: what else happens to rewards and advantages, in order.
        recorded: whether the run itself says that it trained with this.
    """

    estimator: Estimator
    keywords: Mapping[str, Any] = field(default_factory=dict)
    modifiers: Mapping[str, Any] = field(default_factory=dict)
    recorded: bool = False

    @property
    def needs_lengths(self) -> bool:
        """Whether the estimator or a modifier reads the lengths of the completions."""
        return self.estimator.needs_lengths or not LENGTH_MODIFIERS.isdisjoint(self.modifiers)


def chosen_recipes(given: Given, rollouts: Rollouts) -> dict[str, Recipe]:
    """The recipes by name, each looked at. None: every registered estimator. Beside all of them the run's own recipe.

    Raises:
        ValueError: an unknown estimator, or a keyword that does not fit.
    """
    pairs = given.items() if isinstance(given, Mapping) else ((name, {}) for name in given or ESTIMATORS)
    named: dict[str, Mapping[str, Any]] = {ESTIMATORS.name_of(name): keywords for name, keywords in pairs}
    recipes = {name: Recipe(ESTIMATORS[name], keywords) for name, keywords in named.items()}
    for recipe in recipes.values():
        if recipe.keywords:
            check_keywords(recipe.estimator, recipe.keywords, num_generations=rollouts.size, names=rollouts.names)
    if (own := recorded_recipe(rollouts)) is not None:
        label = described(own)
        if label in recipes:
            recipes[label] = replace(recipes[label], recorded=not recipes[label].keywords)
        elif set(ESTIMATORS) <= set(named):
            recipes[label] = own
    return recipes


def recorded_recipe(rollouts: Rollouts) -> Recipe | None:
    """The recipe that the run recorded; None where there is none that can be trusted to be the run's.

    The file may be a stranger's. Only a registered name is taken from it: a dotted path would be imported.
    """
    settings: Mapping[str, Any] = {} if rollouts.record is None else rollouts.record.settings
    name = settings.get("advantage_estimator")
    if not isinstance(name, str) or name not in ESTIMATORS:
        return None
    keywords, modifiers = (settings.get(key) or {} for key in ("advantage_kwargs", "advantage_modifiers"))
    try:
        recipe = Recipe(ESTIMATORS[name], dict(keywords), dict(modifiers), recorded=True)
        check_keywords(recipe.estimator, recipe.keywords, num_generations=rollouts.size, names=rollouts.names)
        check_modifiers(recipe.modifiers, rollouts.names, num_generations=rollouts.size)
    except (ValueError, TypeError):
        return None
    return recipe


def described(recipe: Recipe) -> str:
    """The recipe in a few words: `grpo`, or `grpo(ddof=0) + clip`."""
    keywords = ", ".join(f"{name}={value}" for name, value in recipe.keywords.items())
    name = recipe.estimator.name + (f"({keywords})" if keywords else "")
    return " + ".join((name, *recipe.modifiers))
