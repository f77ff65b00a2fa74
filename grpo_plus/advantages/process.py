"""Advantages per token, from rewards of a completion's steps.

`process` is the estimator for training, `process_advantages` the same formula for tensors of your own.
"""

import torch
from torch import Tensor

from grpo_plus.advantages.estimator import register
from grpo_plus.advantages.reductions import zscore
from grpo_plus.advantages.rewards import Rewards


@register("process", scope="group", needs_lengths=True, needs_steps=True)
def process(rewards: Rewards, *, ddof: int = 1, eps: float = 1e-4) -> Tensor:
    """Sum the normalized rewards of a token's own step and of all later steps: process supervision.

        r̃ᵢⱼ = (rᵢⱼ − mean(r)) / (std(r) + eps)        mean, std: over all steps j of all completions i of the group
        Aᵢₜ = Σⱼ r̃ᵢⱼ over the steps j of completion i that end at or after token t

    Needs a reward function that reports steps through TRL's `log_extra`, with one list per completion. `step_rewards`
    are the rewards, and `step_ends` the index in `completion_ids` of each step's last token. The number that the
    function returns is logged and decides nothing. None in its place takes the completion out.
    Shao et al., "DeepSeekMath" (https://huggingface.co/papers/2402.03300), section 4.1.3; see `process_advantages`.
    """
    deciding = [name for name, weight in zip(rewards.names, rewards.weights.tolist(), strict=True) if weight != 0]
    if len(deciding) > 1:
        raise ValueError(
            f"advantage_estimator='process' counts step rewards only, so those of {', '.join(map(repr, deciding))} "
            "would not all have an effect. Set reward_weights to 0 for the ones that are only watched, or override "
            "estimate_advantages to add their advantages to those of the steps."
        )
    if rewards.spans is None:
        raise ValueError("advantage_estimator='process' needs the lengths of the completions: set lengths.")
    num_tokens = max(1, int(rewards.spans.max()))
    if rewards.steps is None and not rewards.judged.any():
        return torch.zeros(*rewards.judged.shape, num_tokens, dtype=torch.float64)  # a judge that is down
    if rewards.steps is None:
        raise ValueError(
            "advantage_estimator='process' needs rewards of steps, and no reward function gave any. In one of them "
            "call log_extra('step_rewards', ...) and log_extra('step_ends', ...), each with one list per completion."
        )
    steps = rewards.steps.scored(rewards.total())
    prompts, generations, _ = steps.shape
    advantages = process_advantages(
        steps.flatten(0, 1),
        rewards.steps.ends.flatten(0, 1),
        num_generations=generations,
        num_tokens=num_tokens,
        ddof=ddof,
        eps=eps,
    )
    return advantages.view(prompts, generations, -1)


def process_advantages(
    step_rewards: Tensor, step_ends: Tensor, *, num_generations: int, num_tokens: int, ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """Sum the normalized rewards of a token's own step and of all later steps: process supervision.

        r̃ᵢⱼ = (rᵢⱼ − mean(r)) / (std(r) + eps)        mean, std: over all steps j of all completions i of the group
        Aᵢₜ = Σⱼ r̃ᵢⱼ over the steps j of completion i that end at or after token t

    A completion that errs late keeps credit for its good start. A completion of more steps weighs more in the mean and
    collects a larger sum. Tokens after the last step get 0. A group whose steps are all alike gets exactly 0.
    Shao et al., "DeepSeekMath" (https://huggingface.co/papers/2402.03300), section 4.1.3. The paper does not say which
    std it means; the defaults are those of `grpo`.

    Args:
        step_rewards: (B, J) for at most J steps, group after group. NaN where a completion has fewer steps.
        step_ends: (B, J) index of each step's last token, from 0. Not read where there is no reward.
        num_generations: completions per group; B is a multiple of it.
        num_tokens: T, the length of the padded completions.

    Returns:
        (B, T) float64.

    Raises:
        ValueError: shapes that do not match, an infinite reward, or a step that ends outside the completion.
    """
    judged = ~step_rewards.isnan()
    _check_steps(step_rewards, step_ends, judged, num_generations=num_generations, num_tokens=num_tokens)
    rows, steps = step_rewards.shape
    groups = step_rewards.detach().cpu().double().view(-1, num_generations * steps)
    scores = zscore(groups, ddof=ddof, eps=eps).view(rows, steps).nan_to_num()
    ends = step_ends.cpu().where(judged.cpu(), 0).long()
    at_end = torch.zeros(rows, num_tokens, dtype=torch.float64).scatter_add(1, ends, scores)
    return at_end.flip(1).cumsum(1).flip(1)


def _check_steps(
    step_rewards: Tensor, step_ends: Tensor, judged: Tensor, *, num_generations: int, num_tokens: int
) -> None:
    if step_rewards.dim() != 2 or step_ends.shape != step_rewards.shape:
        raise ValueError(
            f"step_rewards has shape {tuple(step_rewards.shape)} and step_ends {tuple(step_ends.shape)}; both need "
            "the shape (B, J)."
        )
    if step_rewards.shape[0] % num_generations:
        raise ValueError(
            f"step_rewards has {step_rewards.shape[0]} rows, which is not a multiple of num_generations="
            f"{num_generations}."
        )
    if step_rewards.isinf().any():
        raise ValueError("step_rewards holds an infinite reward. Use a finite number, or NaN where there is no step.")
    outside = judged & ((step_ends < 0) | (step_ends >= num_tokens))
    if outside.any():
        row, step = (int(index) for index in outside.nonzero()[0])
        raise ValueError(
            f"Step {step} of completion {row} ends at token {int(step_ends[row, step])}, but the completions have "
            f"{num_tokens} tokens, 0 to {num_tokens - 1}."
        )
