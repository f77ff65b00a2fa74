"""What a rollout keeps of its prompts and tokens between the steps, one entry for each live row."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo_plus.rollout.live import Moves
from grpo_plus.rollout.prompts import Prompts


class Keeper(ABC):
    """Owns the cache of one rollout.

    The loop calls `expand` once, after the prefill has filled the cache with the distinct prompts. For each token it
    then calls `keep` if rows have left, and `inputs` for what the model is called with. Prefill and `expand` run
    outside of `attached`, the steps inside.

    Attributes:
        words: what it does, for the line in the log.
        is_timed: whether the clock chooses how it computes a step.
        cache: transformers' cache, which the model reads and writes.
        failure: reason why later batches had better do without this keeper. None where there is none.
    """

    words: ClassVar[str]
    is_timed: ClassVar[bool] = False
    failure: str | None = None

    def __init__(self, model: PreTrainedModel, cache: DynamicCache) -> None:
        self.model = model
        self.cache = cache

    @classmethod
    @abstractmethod
    def why_not(cls, model: PreTrainedModel, cache: DynamicCache) -> str | None:
        """Reason why this keeper cannot work for a model and its empty cache. None where no reason is known."""

    @classmethod
    @abstractmethod
    def pays(cls, model: PreTrainedModel, prompts: Prompts, length: int) -> bool:
        """Whether this keeper is the better choice for a batch of these prompts, `length` tokens with padding."""

    @abstractmethod
    def expand(self, index: Tensor, mask: Tensor | None) -> None:
        """Turn what was kept for each distinct prompt into what each row goes on from.

        Args:
            index: (B,) the prompt of each row.
            mask: (P, L) of the prompts, 0 at padding. None without padding.
        """

    @abstractmethod
    def keep(self, moves: Moves) -> None:
        """Forget the rows that left."""

    def inputs(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a step gives to `prepare_inputs_for_generation`.

        Args:
            arguments: of transformers: the cache, and mask (live, L) and positions of the live rows.
        """
        return arguments

    def forward(self, **inputs: Any) -> Any:
        """Run a step: call the model, or what gives the same logits."""
        return self.model(**inputs)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model can run steps on this keeper. Afterwards the model is as it was."""
        yield
