"""The calls of the model in one rollout: the distinct prompts once, then one token of every live row at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.models.routers import without_router_loss
from grpo_plus.rollout.images import encoded
from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Moves
from grpo_plus.rollout.passes import Pass, prefill
from grpo_plus.rollout.prompts import Prompts


class Steps:
    """Calls the model as transformers' own loop does, on the rows that are live.

    Args:
        keeper: of an empty cache.
        arguments: transformers' keyword arguments of the whole batch, without images.
    """

    def __init__(self, model: PreTrainedModel, keeper: Keeper, arguments: dict[str, Any]) -> None:
        self._model = model
        self._keeper = keeper
        self._arguments = arguments | without_router_loss(model)

    def prefill(self, input_ids: Tensor, prompts: Prompts, generation_config: Any, images: dict[str, Tensor]) -> Tensor:
        """Logits (B, V) of each row's first token.

        Args:
            images: of the distinct prompts. Empty for rows of text.
        """
        distinct = _rows_of(self._arguments, prompts.first) if prompts.shared else self._arguments
        ids = input_ids[prompts.first]
        seeing = encoded(self._model, ids, distinct, images)
        outputs = self._model._prefill(ids, generation_config, seeing)
        self._keeper.expand(prompts.index, distinct.get("attention_mask"))
        self._go_on(outputs)
        return _last(outputs, input_ids.device).index_select(0, prompts.index)

    def prefill_in_passes(self, passes: Sequence[Pass], prompts: Prompts) -> Tensor:
        """Logits (B, V) of each row's first token, where several prompts begin alike."""
        outputs, columns = prefill(self._model, passes, self._arguments)
        self._keeper.expand(prompts.index, columns["attention_mask"])
        self._arguments = self._arguments | _rows_of(columns, prompts.index)
        self._go_on(outputs)
        return _last(outputs, prompts.index.device).index_select(0, prompts.index)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (live, V) after one more token (live,) of every live row."""
        arguments = self._keeper.inputs(self._arguments)
        inputs = self._model.prepare_inputs_for_generation(tokens[:, None], **arguments)
        outputs = self._keeper.forward(**inputs, return_dict=True)
        self._go_on(outputs)
        return _last(outputs, tokens.device)

    def keep(self, moves: Moves) -> None:
        """Forget the rows that left."""
        self._keeper.keep(moves)
        self._arguments = _rows_of(self._arguments, moves.order)

    def _go_on(self, outputs: Any) -> None:
        """Lengthen mask and positions by a token."""
        self._arguments = self._model._update_model_kwargs_for_generation(outputs, self._arguments)


def _rows_of(arguments: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The rows in `index` of what is laid out by row. Positions may be (3, B, L)."""
    return {
        name: value.index_select(value.dim() - 2, index) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def _last(outputs: Any, device: torch.device) -> Tensor:
    # A copy, so that the logits of a whole prompt can go.
    return outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=device)
