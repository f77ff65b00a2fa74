"""pass@k over the prompts of one evaluation."""

from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from grpo_plus.advantages import Rewards
from grpo_plus.advantages.binary import all_wrong
from grpo_plus.config.evaluation import METRIC, chosen_reward


def pass_at_k(correct: Tensor, judged: Tensor, k: int) -> Tensor:
    """Unbiased chance that at least one of k completions of a prompt is right.

    1 − C(n−c, k)/C(n, k)       c of the prompt's n completions are right

    It is the mean over all choices of k of the n completions. 1 − (1 − c/n)ᵏ would be too small.
    Chen et al., "Evaluating Large Language Models Trained on Code" (https://huggingface.co/papers/2107.03374), Eq. 1.

    Args:
        correct: (P,) completions that are right.
        judged: (P,) completions that were judged.
        k: number of tries.

    Returns:
        (P,) float64, NaN where fewer than k completions were judged.
    """
    chance = 1 - all_wrong((judged - correct).double(), judged.double(), k)
    return chance.where(judged >= k, torch.nan)


class PassAtK:
    """Collects the prompts of an evaluation, and says which share of them k tries solve.

    Args:
        tries: each k.
        reward: name of the function that says which completions are right.
        threshold: the least reward of a completion that is right.
    """

    def __init__(self, tries: list[int], reward: str, threshold: float) -> None:
        self._tries = tries
        self._reward = reward
        # Rewards come as float32: one of 0.9 is below the float64 of that name.
        self._threshold = torch.tensor(threshold, dtype=torch.float32).item()
        self.begin(None)

    def begin(self, dataset: Any) -> None:
        """Begin an evaluation of a dataset; a stream does not say how many prompts it has."""
        self._left = len(dataset) if has_length(dataset) else None
        self._correct: list[Tensor] = []
        self._judged: list[Tensor] = []

    def add(self, rewards: Rewards) -> None:
        """Add a batch of all processes.

        Where the prompts do not fill the last batch of several processes, accelerate repeats the first ones at its end.
        """
        values = rewards.values[: self._left, :, rewards.index(self._reward)]
        if self._left is not None:
            self._left -= len(values)
        self._correct.append((values >= self._threshold).sum(-1))
        self._judged.append((~values.isnan()).sum(-1))

    def figures(self) -> dict[str, float | None]:
        """The mean over the prompts by name. None where no prompt had k judged completions."""
        if not self._correct:
            return {}
        correct, judged = torch.cat(self._correct), torch.cat(self._judged)
        means = {k: pass_at_k(correct, judged, k).nanmean().item() for k in self._tries}
        return {f"{METRIC}{k}": None if mean != mean else mean for k, mean in means.items()}


def pass_at_k_of(config: Any, names: list[str]) -> PassAtK | None:
    """What the configuration asks for; None for nothing."""
    if config.eval_pass_at_k is None:
        return None
    asking = f"eval_pass_at_k={config.eval_pass_at_k}"
    reward = chosen_reward(config.eval_pass_reward, names, asking=asking, setting="eval_pass_reward")
    return PassAtK(config.eval_pass_at_k, reward, config.eval_pass_threshold)
