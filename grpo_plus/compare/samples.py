"""A few held-out prompts and what a model answers, kept beside the scores of an arm for people to read."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo_plus.compare.store import SAMPLES, read_json
from grpo_plus.report.secrets import masked_text

KEPT = 3  # samples of a model
LONGEST = 4000  # characters of a text


@dataclass(frozen=True)
class Sample:
    """A held-out prompt, and one completion of the prompt."""

    prompt: str
    completion: str


def for_file(samples: Iterable[Sample]) -> list[dict[str, str]]:
    """The first samples as JSON, of bounded length and without secrets."""
    kept = [sample for sample, _ in zip(samples, range(KEPT), strict=False)]
    return [{name: _shortened(masked_text(text)) for name, text in asdict(sample).items()} for sample in kept]


def read_samples(folder: Path) -> list[Sample]:
    """The samples of an arm or of the start; [] where it keeps none, as one of an earlier release."""
    path = folder / SAMPLES
    return [Sample(**sample) for sample in read_json(path)] if path.exists() else []


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} […]"
