"""The command to type after a comparison: the same flags with other variants or seeds, or a training of the winner."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_plus.compare.conclusion import NextStep
from grpo_plus.compare.plan import Variant
from grpo_plus.report.secrets import MASK, is_secret_name, masked, masked_text

YOURS = ("--model_name_or_path", "MODEL", "--dataset_name", "DATASET", "--reward_funcs", "MODULE.FUNCTION")
BY_STEP = ("estimators", "losses", "seeds", "advantage_kwargs", "baseline")  # flags that a step decides anew


@dataclass(frozen=True)
class NextCommand:
    """Says how a next step is typed.

    Attributes:
        given: our flags of `grpo-plus compare` that differ from their defaults.
        rest: TRL's flags; [] on the demo's task.
        variants: what was compared.
    """

    given: Mapping[str, Any]
    rest: Sequence[str]
    variants: Sequence[Variant]

    def __call__(self, step: NextStep) -> str:
        """The command, without secrets; "" where the step needs none."""
        if step.winner is not None:
            return self._training(next(v for v in self.variants if v.label == step.winner))
        return self._comparison(step) if step.variants else ""

    def _comparison(self, step: NextStep) -> str:
        wanted = [variant for variant in self.variants if variant.label in step.variants]
        estimators = dict.fromkeys(variant.estimator for variant in wanted)
        losses = dict.fromkeys(variant.loss for variant in wanted if variant.loss is not None)
        keywords = {name: each for name, each in self.given.get("advantage_kwargs", {}).items() if name in estimators}
        baseline = self.given.get("baseline")
        changed = {
            "estimators": ",".join(estimators),
            "losses": ",".join(losses) or None,
            "seeds": step.seeds,
            "advantage_kwargs": keywords or None,
            "baseline": baseline if baseline in step.variants else None,
        }
        same = {name: value for name, value in self.given.items() if name not in BY_STEP}
        return _typed(["compare", *without_secrets(self.rest), *_flags(changed | same)])

    def _training(self, variant: Variant) -> str:
        steps = {"max_steps": self.given["max_steps"]} if self.rest and "max_steps" in self.given else {}
        return _typed(["train", *(without_secrets(self.rest) or YOURS), *_flags(steps | variant.overrides)])


def without_secrets(words: Sequence[str]) -> list[str]:
    """The words of a command line, with the values of secret flags masked."""
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, sign, _ = word.partition("=")
        if word.startswith("--") and sign and is_secret_name(name.lstrip("-")):
            shown.append(f"{name}={MASK}")
        elif before.startswith("--") and not word.startswith("--") and is_secret_name(before.lstrip("-")):
            shown.append(MASK)
        else:
            shown.append(masked_text(word))
    return shown


def _flags(values: dict[str, Any]) -> Iterable[str]:
    """Fields as flags; one that may be given several times, several times."""
    for name, value in values.items():
        if value is None:
            continue
        for each in value if isinstance(value, list) else [value]:
            yield from (f"--{name}", json.dumps(masked(each)) if isinstance(each, dict) else str(each))


def _typed(words: Iterable[str]) -> str:
    return shlex.join(["grpo-plus", *words])
