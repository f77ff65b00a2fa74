"""A batch as transformers gives it to a loop, with its images and its distinct prompts."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.models.pictures import TOKEN_TYPES, Pictures
from grpo_plus.rollout.images import without_images
from grpo_plus.rollout.prompts import Prompts


@dataclass(frozen=True)
class Given:
    """A batch of B rows.

    Attributes:
        input_ids: (B, L).
        arguments: transformers' keyword arguments of the model, without images.
        config: of the generation.
        pictures: of the rows. None for rows of text.
    """

    model: PreTrainedModel
    input_ids: Tensor
    arguments: dict[str, Any]
    config: Any
    pictures: Pictures | None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        input_ids: Tensor,
        arguments: dict[str, Any],
        config: Any,
        pictures: Pictures | None,
    ) -> "Given":
        """Take the images out of the arguments."""
        names = () if pictures is None else tuple(pictures.images)
        return cls(model, input_ids, without_images(arguments, names), config, pictures)

    @cached_property
    def prompts(self) -> Prompts:
        """Rows have one prompt where tokens and images are equal."""
        seen = None if self.pictures is None else self.input_ids.new_tensor(self.pictures.numbers()).unsqueeze(1)
        return Prompts.of(self.input_ids, *map(self.arguments.get, ("attention_mask", *TOKEN_TYPES)), seen)

    @property
    def images(self) -> dict[str, Tensor]:
        """Of the distinct prompts, as the model's forward takes them."""
        return {} if self.pictures is None else self.pictures.take(self.prompts.first.tolist())
