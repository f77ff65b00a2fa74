"""The decoding loop: distinct prompts go through the model once, and finished rows leave."""

from time import perf_counter
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Live, Moves
from grpo_plus.rollout.prompts import Prompts
from grpo_plus.rollout.sampling import Sampling
from grpo_plus.rollout.statistics import Statistics
from grpo_plus.rollout.steps import Steps


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    prompts: Prompts,
    keeper: Keeper,
    late: bool | None = None,
    **model_kwargs: Any,
) -> tuple[Tensor, Statistics]:
    """Sample completions of a batch, with the arguments that transformers gives to `generate(custom_generate=...)`.

    Args:
        prompts: of the rows of `input_ids` (B, L).
        keeper: of the cache in `model_kwargs`.
        late: whether a finished row takes part in one more step, so that the device has work while the host waits for
            the news. None: on CUDA.

    Returns:
        Ids (B, L + T) as of transformers' own loop, and what was done.
    """
    started = perf_counter()
    steps = Steps(model, keeper, model_kwargs)
    sampling = Sampling(input_ids, logits_processor, stopping_criteria, generation_config)
    live = Live(len(input_ids), input_ids.device)
    late = input_ids.is_cuda if late is None else late
    drawn_for, stepped = [len(input_ids)], list[int]()  # rows of each draw and of each step
    logits = steps.prefill(input_ids, prompts, generation_config)
    with model._optimize_model_for_decode(), keeper.attached():
        while True:
            tokens = sampling.draw(live.whole(logits))
            if sampling.is_full:
                break
            news = sampling.news()
            if not late:
                _leave(live, steps, news.read())
            if live.rows:
                logits = steps.step(live.of(tokens))
                stepped.append(len(live.rows))
            if late and (moves := _leave(live, steps, news.read())):
                logits = logits.index_select(0, moves.order)
            if not live.rows:
                break
            drawn_for.append(sum(news.read()))
    return sampling.ids, Statistics(
        rows=len(input_ids),
        prompts=len(prompts.first),
        steps=len(stepped),
        row_steps=sum(stepped),
        new_tokens=sum(drawn_for),
        finished=len(input_ids) - (drawn_for[-1] if live.rows else 0),
        seconds=perf_counter() - started,
    )


def _leave(live: Live, steps: Steps, unfinished: list[bool]) -> Moves | None:
    moves = live.leave(unfinished)
    if moves is not None and moves.count:
        steps.keep(moves)
    return moves
