"""Which settings choose the prompts of a batch."""

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from datasets import IterableDataset
from torch.utils import data

from grpo_plus.config.keywords import as_choice
from grpo_plus.registry import check_taken, suggestion

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig


@dataclass(frozen=True)
class PassRate:
    """Draw prompts by how often their completions pass.

    Attributes:
        reward: the reward function that says which completions pass. None: the only one.
        threshold: the least reward of a completion that passes.
        floor: the share of the draws that is uniform over the dataset, above 0 and at most 1.
        decay: what a new visit leaves of the counts of the earlier ones. 0: the last visit alone. 1: all alike.
    """

    reward: str | None = None
    threshold: float = 1.0
    floor: float = 0.1
    decay: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that are out of range."""
        if not (self.reward is None or isinstance(self.reward, str)):
            raise ValueError(f"reward={self.reward!r} must be the name of a reward function.")
        for name in ("threshold", "floor", "decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name}={value!r} must be a finite number.")
        if not 0 < self.floor <= 1:
            raise ValueError(f"floor={self.floor!r} must be above 0, or a prompt may never return, and at most 1.")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay={self.decay!r} must be from 0 to 1.")


SAMPLERS = {"pass_rate": PassRate}


def check_prompt_sampler(config: "GRPOPlusConfig") -> None:
    """Refuse an unknown sampler, wrong keywords, and an order of the dataset that the sampler would not keep.

    A name alone and JSON become a dictionary.
    """
    if config.prompt_sampler is None:
        return
    config.prompt_sampler = as_choice("prompt_sampler", config.prompt_sampler)
    prompt_sampler_of(config)
    if not config.shuffle_dataset:
        raise ValueError(
            f"prompt_sampler={config.prompt_sampler} draws prompts in an order of its own, but shuffle_dataset=False "
            "asks for the order of the dataset. Drop one of the two."
        )


def prompt_sampler_of(config: "GRPOPlusConfig") -> PassRate | None:
    """The sampler that the configuration asks for; None for TRL's, which draws every prompt once in an epoch.

    Raises:
        ValueError: an unknown sampler, or keywords that it does not take.
    """
    given: Any = config.prompt_sampler  # a dictionary after the configuration's checks
    if given is None:
        return None
    if len(given) != 1 or not all(isinstance(keywords, dict) for keywords in given.values()):
        raise ValueError(
            f"prompt_sampler={given} must be the name of one sampler with its keywords. Write "
            "prompt_sampler={'pass_rate': {}}."
        )
    [(name, keywords)] = given.items()
    if name not in SAMPLERS:
        raise ValueError(f"Unknown prompt_sampler {name!r}.{suggestion(str(name), SAMPLERS)}")
    check_taken(f"prompt_sampler: {name!r}", keywords, [entry.name for entry in fields(SAMPLERS[name])])
    try:
        return SAMPLERS[name](**keywords)
    except ValueError as error:
        raise ValueError(f"prompt_sampler={given} does not fit {name!r}: {error}") from error


def check_drawable(config: "GRPOPlusConfig", dataset: Any) -> None:
    """Refuse a sampler of prompts where rows cannot be drawn by index."""
    if config.prompt_sampler is not None and isinstance(dataset, IterableDataset | data.IterableDataset):
        raise ValueError(
            f"prompt_sampler={config.prompt_sampler} draws rows of train_dataset by index, but a "
            f"{type(dataset).__name__} has none. Load it without streaming, or leave prompt_sampler unset."
        )
