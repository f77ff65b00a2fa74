"""The decoding loop: distinct prompts go through the model once, and finished rows leave."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Live, Moves
from grpo_plus.rollout.passes import Pass
from grpo_plus.rollout.prompts import Prompts
from grpo_plus.rollout.sampling import Sampling
from grpo_plus.rollout.statistics import Progress, Statistics, Tally
from grpo_plus.rollout.steps import Steps

Watch = Callable[[Progress], None]


def nobody(so_far: Progress) -> None:
    """Watch nothing."""


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    prompts: Prompts,
    keeper: Keeper,
    passes: Sequence[Pass] = (),
    images: dict[str, Tensor] | None = None,
    late: bool | None = None,
    watch: Watch = nobody,
    **model_kwargs: Any,
) -> tuple[Tensor, Statistics]:
    """Sample completions of a batch, with the arguments that transformers gives to `generate(custom_generate=...)`.

    Args:
        prompts: of the rows of `input_ids` (B, L).
        keeper: of the cache in `model_kwargs`.
        passes: of the distinct prompts through the model. Empty: in one pass.
        images: of the distinct prompts, for one pass. None for rows of text.
        late: whether a finished row takes part in one more step, so that the device has work while the host waits for
            the news. None: on CUDA.
        watch: is called after each token but the last, with what the batch has done so far.

    Returns:
        Ids (B, L + T) as of transformers' own loop, and what was done.
    """
    sent = sum(one.tokens for one in passes) or len(prompts.first) * input_ids.shape[1]
    tally = Tally(len(input_ids), len(prompts.first), given=input_ids.numel(), sent=sent)
    steps = Steps(model, keeper, model_kwargs)
    sampling = Sampling(input_ids, logits_processor, stopping_criteria, generation_config)
    live = Live(len(input_ids), input_ids.device)
    late = input_ids.is_cuda if late is None else late
    if passes:
        logits = steps.prefill_in_passes(passes, prompts)
    else:
        logits = steps.prefill(input_ids, prompts, generation_config, images or {})
    with model._optimize_model_for_decode(), keeper.attached():
        while True:
            tokens = sampling.draw(live.whole(logits))
            tally.drew()
            if sampling.is_full:
                break
            news = sampling.news()
            if not late:
                _leave(live, steps, news.read())
            if live.rows:
                logits = steps.step(live.of(tokens))
                tally.stepped(len(live.rows))
            if late and (moves := _leave(live, steps, news.read())):
                logits = logits.index_select(0, moves.order)
            # The host has this news already: nothing here waits for the device.
            tally.unfinished = sum(news.read())
            if not live.rows:
                break
            watch(Progress(tally.statistics(), news.read(), sampling.ids, input_ids.shape[1]))
    return sampling.ids, tally.statistics()


def _leave(live: Live, steps: Steps, unfinished: list[bool]) -> Moves | None:
    moves = live.leave(unfinished)
    if moves is not None and moves.count:
        steps.keep(moves)
    return moves
