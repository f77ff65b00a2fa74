"""Self-check: a keeper is used on a model only after two steps with it gave what each row gives alone.

Three small rows of the batch's own tokens, two of them of one prompt, take two steps, and one row leaves between them.
Each row alone, in one forward without a cache and without padding, is the truth. The logits of the steps may be off by
a small multiple of what padding alone changes. A prefill in passes is compared in the same way.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from grpo_plus.models.memory import is_out_of_memory
from grpo_plus.models.rounding import precision_of_products
from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Moves
from grpo_plus.rollout.passes import Pass
from grpo_plus.rollout.prompts import Prompts
from grpo_plus.rollout.steps import Steps

LENGTH, PADDING = 96, 8  # tokens of a probe's prompt, at most, and of padding before the longest
NOISE_FACTOR = 3.0
# For each precision of products: the relative error of logits that is rounding, and the most that noise may excuse. A
# row that goes on from another prompt or position is off by 0.1 and more.
LIMITS = {"float32": (1e-4, 1e-3), "tf32": (1e-2, 3e-2), "half": (2e-2, 0.1)}
# A model that was not made for a keeper may raise anything.
FAILURES = (Exception,)


def why_not_exact(
    model: PreTrainedModel, kind: type[Keeper], arguments: dict[str, Any], prompts: Sequence[Tensor], config: Any
) -> str | None:
    """Reason why a keeper is not exact on this model. None where it is.

    Args:
        arguments: transformers' arguments of the batch at hand, with an empty cache.
        prompts: token ids of two prompts, or twice of one.
        config: of the generation.
    """
    return _verdict(model, kind.words, lambda: _errors(model, kind, arguments, Probes.of(*prompts), config))


def why_not_exact_in_passes(
    model: PreTrainedModel, kind: type[Keeper], arguments: dict[str, Any], prompts: Sequence[Tensor]
) -> str | None:
    """Reason why prompts may not go through the model in passes, before steps with a keeper. None where they may.

    The arguments are those of `why_not_exact`.
    """
    return _verdict(
        model, "a prefill in passes", lambda: _errors_in_passes(model, kind, arguments, Probes.of(*prompts))
    )


def _verdict(model: PreTrainedModel, words: str, errors: Callable[[], tuple[float, float]]) -> str | None:
    """Reason against what `words` name. `errors` measures the error and what is allowed."""
    device = model.device
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            before = _generator_state(device)
            error, allowed = errors()
            if not torch.equal(_generator_state(device), before):
                return f"{type(model).__name__} draws random numbers itself, others for fewer rows"
    except FAILURES as failure:
        if is_out_of_memory(failure):
            raise
        return f"the self-check failed: {type(failure).__name__}: {failure}"
    if error <= allowed:
        return None
    return f"{words} is not exact on {type(model).__name__}: logits differ by {error:.1e} (allowed {allowed:.1e})"


@dataclass(frozen=True)
class Probes:
    """Two rows of one prompt and a row of a shorter prompt, each with the tokens of its steps.

    Attributes:
        prompts: the longer and the shorter prompt.
        tokens: of each row. The first row takes one step, the others two.
    """

    prompts: tuple[Tensor, Tensor]
    tokens: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, first: Tensor, last: Tensor) -> "Probes":
        """Cut two prompts short. The tokens are theirs, and no two rows begin alike if there are enough of them."""
        longer, shorter = first[-LENGTH:], last[-LENGTH:]
        shorter = shorter[-max(1, len(longer) - 1) :]
        known = torch.cat([longer, shorter]).unique()
        low, middle, high = known[:1], known[len(known) // 2][None], known[-1:]
        return cls((longer, shorter), (low, torch.cat([middle, high]), torch.cat([high, low])))

    def rows(self) -> list[Tensor]:
        """The three rows, with their tokens."""
        longer, shorter = self.prompts
        return [torch.cat(parts) for parts in zip((longer, longer, shorter), self.tokens, strict=True)]


def _errors(
    model: PreTrainedModel, kind: type[Keeper], arguments: dict[str, Any], probes: Probes, config: Any
) -> tuple[float, float]:
    """The largest relative error of a row's logits, and what is allowed."""
    rows = probes.rows()
    truth, allowed = _truth(model, arguments, rows)
    first, second = _steps(model, kind, arguments, probes, config)
    # The first row has one token, at the last place of its logits.
    expected = torch.cat([truth[:1, 1], truth[1:, 0]]), truth[[2, 1], 1]
    return _relative(torch.cat([first, second]), torch.cat(expected)), allowed


def _errors_in_passes(
    model: PreTrainedModel, kind: type[Keeper], arguments: dict[str, Any], probes: Probes
) -> tuple[float, float]:
    """The same for logits of a prefill in two passes, and of a step after it."""
    step = probes.tokens[0]
    rows = [torch.cat([row, step]) for row in probes.rows()]
    truth, allowed = _truth(model, arguments, rows)
    beginnings, rests = (tuple(tokens.cpu() for tokens in part) for part in (probes.prompts, probes.tokens))
    cache = deepcopy(arguments["past_key_values"])
    keeper = kind(model, cache)
    steps = Steps(model, keeper, arguments | {"past_key_values": cache})
    index = torch.arange(len(rows), device=step.device)
    passes = (Pass(beginnings), Pass(rests, parents=(0, 0, 1)))
    first = steps.prefill_in_passes(passes, Prompts(index, index))
    with keeper.attached():
        second = steps.step(step.expand(len(rows)))
    return _relative(torch.stack([first, second], 1), truth), allowed


def _truth(model: PreTrainedModel, arguments: dict[str, Any], rows: list[Tensor]) -> tuple[Tensor, float]:
    """Logits (rows, 2, V) of the last two places of each row alone, and the relative error that is allowed."""
    truth = torch.stack([_forward(model, arguments, [row])[0] for row in rows])
    padded = _forward(model, arguments, rows, padding=PADDING)
    floor, ceiling = LIMITS[precision_of_products(model)]
    return truth, min(max(NOISE_FACTOR * _relative(padded, truth), floor), ceiling)


def _steps(
    model: PreTrainedModel, kind: type[Keeper], arguments: dict[str, Any], probes: Probes, config: Any
) -> tuple[Tensor, Tensor]:
    """Logits of the first step, (3, V), and of the second, (2, V): of the third row and the second."""
    longer, shorter = probes.prompts
    ids, batch = _batch(arguments, [longer, longer, shorter])
    cache = deepcopy(arguments["past_key_values"])
    keeper = kind(model, cache)
    steps = Steps(model, keeper, arguments | batch | {"past_key_values": cache})
    steps.prefill(ids, Prompts(ids.new_tensor([0, 2]), ids.new_tensor([0, 0, 1])), config)
    one, two, three = probes.tokens
    with keeper.attached():
        first = steps.step(torch.cat([one, two[:1], three[:1]]))
        steps.keep(Moves.of([False, True, True], ids.device))
        return first, steps.step(torch.cat([three[1:], two[1:]]))


def _forward(model: PreTrainedModel, arguments: dict[str, Any], rows: list[Tensor], padding: int = 0) -> Tensor:
    """Logits (rows, 2, V) of the last two places, in one forward without a cache."""
    ids, batch = _batch(arguments, rows, padding)
    logits = model(input_ids=ids, use_cache=False, return_dict=True, **batch).logits
    return logits[:, -2:].float()


def _batch(arguments: dict[str, Any], rows: list[Tensor], padding: int = 0) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Ids (rows, L) padded on the left, with mask and positions where transformers gives them to this model."""
    length = max(map(len, rows)) + padding
    ids = pad_sequence([row.flip(0) for row in rows], batch_first=True)
    ids = torch.nn.functional.pad(ids, (0, length - ids.shape[1])).flip(1)
    tokens = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = (torch.arange(length, device=ids.device) >= length - tokens[:, None]).long()
    batch: dict[str, Tensor | None] = {"attention_mask": None if bool(mask.all()) else mask}
    if arguments.get("position_ids") is not None:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, batch


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row's logits, relative to how far they lie from their mean."""
    expected = expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / spread.clamp(min=1e-30)).max())


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = getattr(torch, device.type).get_rng_state(device)
    return state
