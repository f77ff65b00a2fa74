"""Self-check: a keeper is used on a model only after two steps with it gave what each row gives alone.

Three small rows of the batch's own tokens, two of them of one prompt, take two steps, and one row leaves between them.
Each row alone, in one forward without a cache and without padding, is the truth. The logits of the steps may be off by
a small multiple of what padding alone changes. A prefill in passes is compared in the same way.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.models.caches import CACHE
from grpo_plus.models.memory import is_out_of_memory
from grpo_plus.models.rounding import precision_of_products
from grpo_plus.rollout.given import Given
from grpo_plus.rollout.images import encoded, offsets_kept
from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Moves
from grpo_plus.rollout.passes import Pass
from grpo_plus.rollout.probes import Probe, Probes
from grpo_plus.rollout.prompts import Prompts
from grpo_plus.rollout.steps import Steps

PADDING = 8  # tokens before the longest row
FOLLOWING = 3  # tokens after the prompt of a probe, at most
NOISE_FACTOR = 3.0
# For each precision of products: the relative error of logits that is rounding, and the most that noise may excuse. A
# row that goes on from another prompt or position is off by 0.1 and more.
LIMITS = {"float32": (1e-4, 1e-3), "tf32": (1e-2, 3e-2), "half": (2e-2, 0.1)}
# A model that was not made for a keeper may raise anything.
FAILURES = (Exception,)


def why_not_exact(given: Given, kind: type[Keeper]) -> str | None:
    """Reason why a keeper is not exact on this model. None where it is.

    Args:
        given: the batch at hand, with an empty cache.
    """
    return _verdict(given.model, kind.words, lambda: _errors(given, kind, Probes.of(given)))


def why_not_exact_in_passes(given: Given, kind: type[Keeper]) -> str | None:
    """Reason why prompts may not go through the model in passes, before steps with a keeper. None where they may.

    Args:
        given: the batch at hand, with an empty cache.
    """
    return _verdict(given.model, "a prefill in passes", lambda: _errors_in_passes(given, kind, Probes.of(given)))


def _verdict(model: PreTrainedModel, words: str, errors: Callable[[], tuple[float, float]]) -> str | None:
    """Reason against what `words` name. `errors` measures the error and what is allowed."""
    device = model.device
    try:
        forked = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
        with forked, offsets_kept(model):
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


def _errors(given: Given, kind: type[Keeper], probes: Probes) -> tuple[float, float]:
    """The largest relative error of a row's logits, and what is allowed."""
    truth, allowed = _truth(given.model, probes, probes.rows())
    first, second = _steps(given, kind, probes)
    # The first row has one token, at the last place of its logits.
    expected = torch.cat([truth[:1, 1], truth[1:, 0]]), truth[[2, 1], 1]
    return _relative(torch.cat([first, second]), torch.cat(expected)), allowed


def _errors_in_passes(given: Given, kind: type[Keeper], probes: Probes) -> tuple[float, float]:
    """The same for logits of a prefill in two passes, and of a step after it."""
    step = probes.tokens[0]
    # Cut by as many tokens as follow, so that a window that holds the batch's prompts holds the rows.
    cut = [prompt.cut(slice(max(1, len(prompt.ids) - FOLLOWING))) for prompt in (probes.longer, probes.shorter)]
    probes = replace(probes, longer=cut[0], shorter=cut[1])
    rows = [row.followed_by(step) for row in probes.rows()]
    truth, allowed = _truth(given.model, probes, rows)
    prompts = probes.longer.ids, probes.shorter.ids
    beginnings, rests = (tuple(tokens.cpu() for tokens in part) for part in (prompts, probes.tokens))
    cache = deepcopy(given.arguments[CACHE])
    keeper = kind(given.model, cache)
    steps = Steps(given.model, keeper, given.arguments | {CACHE: cache})
    index = torch.arange(len(rows), device=step.device)
    passes = (Pass(beginnings), Pass(rests, parents=(0, 0, 1)))
    first = steps.prefill_in_passes(passes, Prompts(index, index))
    with keeper.attached():
        second = steps.step(step.expand(len(rows)))
    return _relative(torch.stack([first, second], 1), truth), allowed


def _truth(model: PreTrainedModel, probes: Probes, rows: Sequence[Probe]) -> tuple[Tensor, float]:
    """Logits (rows, 2, V) of the last two places of each row alone, and the relative error that is allowed."""
    truth = torch.stack([_forward(model, probes, [row])[0] for row in rows])
    padded = _forward(model, probes, rows, padding=PADDING)
    floor, ceiling = LIMITS[precision_of_products(model)]
    return truth, min(max(NOISE_FACTOR * _relative(padded, truth), floor), ceiling)


def _steps(given: Given, kind: type[Keeper], probes: Probes) -> tuple[Tensor, Tensor]:
    """Logits of the first step, (3, V), and of the second, (2, V): of the third row and the second."""
    batch = probes.batch(given.model, probes.prompts)
    distinct = probes.batch(given.model, [probes.longer, probes.shorter])
    ids, cache = batch.ids, deepcopy(given.arguments[CACHE])
    keeper = kind(given.model, cache)
    steps = Steps(given.model, keeper, given.arguments | batch.arguments | {CACHE: cache})
    steps.prefill(ids, Prompts(ids.new_tensor([0, 2]), ids.new_tensor([0, 0, 1])), given.config, distinct.images)
    one, two, three = probes.tokens
    with keeper.attached():
        first = steps.step(torch.cat([one, two[:1], three[:1]]))
        steps.keep(Moves.of([False, True, True], ids.device))
        return first, steps.step(torch.cat([three[1:], two[1:]]))


def _forward(model: PreTrainedModel, probes: Probes, rows: Sequence[Probe], padding: int = 0) -> Tensor:
    """Logits (rows, 2, V) of the last two places, in one forward without a cache."""
    batch = probes.batch(model, rows, padding)
    arguments = encoded(model, batch.ids, batch.arguments, batch.images)
    logits = model(input_ids=batch.ids, use_cache=False, return_dict=True, **arguments).logits
    return logits[:, -2:].float()


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
