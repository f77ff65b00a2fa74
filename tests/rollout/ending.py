"""A batch whose rows end at given steps, and its generation by a keeper or by transformers' own loop."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from grpo_plus.models.caches import CACHE
from grpo_plus.rollout.loop import decode
from grpo_plus.rollout.prompts import Prompts
from tests.packing.models import VOCABULARY

PROMPT, COMPLETION = 23, 12
ROW_PROMPTS = (1, 0, 0, 2, 0, 2, 0, 2)  # of three prompts, not side by side
ENDS = (4, 2, 12, 9, 6, 12, 6, 3)  # the only row of the batch's first prompt ends before most others
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": 0.95}


class EndsAt(StoppingCriteria):
    """Each row ends after a number of tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.shape[1] - PROMPT >= torch.tensor(ENDS)


def batch(padded: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, L)."""
    prompts = torch.randint(5, VOCABULARY, (3, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    if padded:
        mask[1, :5], mask[2, :10] = 0, 0
    rows = list(ROW_PROMPTS)
    return (prompts * mask)[rows], mask[rows]


def generated(model: Any, *, padded: bool, sampled: bool = True, **how: Any) -> tuple[Tensor, Tensor]:
    """Token ids and the random state afterwards."""
    ids, mask = batch(padded)
    kind = SAMPLED if sampled else {"do_sample": False}
    config = GenerationConfig(max_new_tokens=COMPLETION, pad_token_id=0, eos_token_id=2, disable_compile=True, **kind)
    torch.manual_seed(1)
    out = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=[EndsAt()], **how
    )
    return out, torch.get_rng_state()


def kept_by(make: Any, keepers: list[Any]) -> Any:
    """A loop for `custom_generate`, whose keepers are collected."""

    def loop(model: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:
        keeper = make(model, kwargs[CACHE])
        assert keeper.why_not(model, keeper.cache) is None
        keepers.append(keeper)
        prompts = Prompts.of(input_ids, kwargs.get("attention_mask"))
        return decode(model, input_ids, prompts=prompts, keeper=keeper, **kwargs)[0]

    return loop
