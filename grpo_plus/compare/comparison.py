"""What a comparison of trainings found, as values: results by arm, what the start was like, scores side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_plus.compare.choices import Choices
from grpo_plus.compare.plan import Arm, Variant
from grpo_plus.compare.samples import Sample, read_samples
from grpo_plus.compare.store import RESULT, read_json, read_log
from grpo_plus.compare.sweep import judging_half


@dataclass(frozen=True)
class ArmResult:
    """What a finished arm measured.

    Attributes:
        scores: by name, one number per held-out item.
        seconds: of the training, from the first step to the last.
        cpu_seconds: that all threads of the process were on a core meanwhile.
        tokens: that the model read and wrote in training, as TRL counts them; None where it logged none.
        peak_bytes: the most memory during the training, on the accelerator or resident; None where the system does
            not say.
        steps: optimizer steps.
        versions: of the packages that trained it.
    """

    scores: dict[str, list[float]]
    seconds: float
    cpu_seconds: float
    tokens: float | None
    peak_bytes: int | None
    steps: int
    versions: dict[str, str]


@dataclass(frozen=True)
class StartSignal:
    """Advantages and gradients at the start, under each variant's estimator.

    Attributes:
        advantages: by label, of all sampled completions in the same order.
        snr: by label, see `grpo_plus.compare.gradients.signal_to_noise`.
        cosine: by label and label, between the mean gradients.
        groups: how many groups were sampled.
        refused: why an estimator cannot be applied, by label.
        skipped: why there are no gradients; empty where there are.
    """

    advantages: dict[str, list[float]]
    snr: dict[str, float | None] = field(default_factory=dict)
    cosine: dict[str, dict[str, float | None]] = field(default_factory=dict)
    groups: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    skipped: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare` has found so far.

    Attributes:
        shared: what all arms have in common: task, facts, configuration.
        start: the held-out scores before any training, by name, one number per item.
        signal: what each estimator makes of the same completions of the start.
        results: of the arms that are finished.
        failures: the tracebacks of those that failed.
        choices: what a sweep tried and chose; the scores are then those of the judging half. None without a sweep.
    """

    folder: Path
    shared: Mapping[str, Any]
    arms: Sequence[Arm]
    start: Mapping[str, Sequence[float]]
    signal: StartSignal
    results: Mapping[Arm, ArmResult]
    failures: Mapping[Arm, str]
    choices: Choices | None = None

    @property
    def variants(self) -> list[Variant]:
        """In the order in which they were asked for."""
        return [arm.variant for arm in self.arms if arm.seed == self.arms[0].seed]

    @property
    def seeds(self) -> list[int]:
        """In the order in which they were asked for."""
        return list(dict.fromkeys(arm.seed for arm in self.arms))

    def log(self, arm: Arm) -> list[dict[str, Any]]:
        """The logged steps of a finished arm."""
        return [entry for entry in read_log(arm_folder(self.folder, arm)) if "reward" in entry]

    def samples(self, arm: Arm) -> list[Sample]:
        """What a finished arm answers to a few held-out prompts."""
        return read_samples(arm_folder(self.folder, arm))

    @property
    def start_samples(self) -> list[Sample]:
        """What the start answers to them."""
        return read_samples(self.folder / "start")

    @property
    def finished(self) -> list[Variant]:
        """The variants with a result on at least one seed."""
        return [variant for variant in self.variants if any(arm.variant == variant for arm in self.results)]

    @property
    def paired_seeds(self) -> list[int]:
        """The seeds on which every variant of `finished` has a result, so that the variants can be compared."""
        return [seed for seed in self.seeds if all(Arm(variant, seed) in self.results for variant in self.finished)]

    @property
    def score_names(self) -> list[str]:
        """The held-out scores; the verdict is about the first."""
        return list(self.start)

    def scores(self, name: str) -> dict[str, Tensor]:
        """(S, I) held-out scores of each finished variant, by label, on the paired seeds.

        Items that are NaN in any arm, where nothing judged them, are left out.

        Raises:
            ValueError: two arms were judged on different numbers of items.
        """
        if not self._comparable:
            return {}
        stacked = self._stacked(name)
        stacked = stacked[..., ~_unscored(stacked)]
        return dict(zip((variant.label for variant in self.finished), stacked, strict=True))

    def left_out(self, name: str) -> int:
        """How many items `scores` leaves out."""
        return int(_unscored(self._stacked(name)).sum()) if self._comparable else 0

    @property
    def _comparable(self) -> bool:
        return bool(self.finished and self.paired_seeds)

    def _stacked(self, name: str) -> Tensor:
        """(variants, S, I) scores of the finished variants."""
        found = [
            [self.results[Arm(variant, seed)].scores[name] for seed in self.paired_seeds] for variant in self.finished
        ]
        counts = {len(items) for rows in found for items in rows}
        if len(counts) > 1:
            raise ValueError(
                f"The arms were judged on {' and '.join(map(str, sorted(counts)))} items of {name!r}. A task's "
                "evaluate has to return one number per item, for the same items each time."
            )
        return torch.tensor(found, dtype=torch.float64)


def at_choices(comparison: Comparison, asked: Sequence[Arm], choices: Choices) -> Comparison:
    """A comparison of the chosen settings, on the judging half of the items.

    Args:
        comparison: of the arms at the chosen settings, on all items.
        asked: the arms without a setting. Those of a variant without a choice stay, and have no result.
    """
    chosen = {(arm.variant.label, arm.seed): arm for arm in comparison.arms}
    return replace(
        comparison,
        arms=[chosen.get((arm.variant.label, arm.seed), arm) for arm in asked],
        start=judging_half(comparison.start),
        results={
            arm: replace(result, scores=judging_half(result.scores)) for arm, result in comparison.results.items()
        },
        choices=choices,
    )


def _unscored(stacked: Tensor) -> Tensor:
    """(I,) booleans: items that are NaN in any arm."""
    return stacked.isnan().flatten(0, 1).any(0)


def read_arm(folder: Path) -> ArmResult | None:
    """The result of a finished arm; None where the arm is not."""
    path = folder / RESULT
    return ArmResult(**read_json(path)) if path.exists() else None


def arm_folder(folder: Path, arm: Arm) -> Path:
    """Where an arm's files are in the comparison's folder."""
    return folder / "arms" / arm.folder
