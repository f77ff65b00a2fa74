"""Scores of held-out prompts from the run's own reward functions, sampled as in training."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

from grpo_plus.advantages import Rewards
from grpo_plus.compare.samples import KEPT, Sample
from grpo_plus.report.completions import as_text
from grpo_plus.trainer import GRPOPlusTrainer
from grpo_plus.trainer.names import logged_texts

TOTAL = "reward"


class HeldOutTrainer(GRPOPlusTrainer):
    """Remembers the rewards of everything that it evaluates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config, size = self.args, self.num_generations_eval
        if config.per_device_eval_batch_size % size or config.per_device_eval_batch_size > config.generation_batch_size:
            raise ValueError(
                f"per_device_eval_batch_size={config.per_device_eval_batch_size} cannot evaluate the held-out prompts: "
                f"it has to be a multiple of num_generations_eval={size}, and at most the generation batch of "
                f"{config.generation_batch_size}. Set per_device_eval_batch_size={size}."
            )
        self._evaluated: list[Rewards] = []
        self._texts: dict[str, Sample] = {}

    def prompt_key(self, prompt: Any) -> str | None:
        """A digest of the prompt. In evaluation every run has digests, to sort the prompts by."""
        if self.model.training:
            return super().prompt_key(prompt)
        return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=repr).encode()).hexdigest()

    def advantage_metrics(self, rewards: Rewards, advantages: Tensor) -> dict[str, float]:
        """The usual figures; in evaluation, the rewards are kept, and the first completion of each prompt."""
        if not self.model.training:
            self._evaluated.append(rewards)
            firsts = logged_texts(self, rewards.judged.numel())[:: rewards.judged.shape[1]]
            for key, texts in zip(rewards.prompts or (), firsts, strict=True):
                self._texts[key] = Sample(*map(as_text, texts))
        return super().advantage_metrics(rewards, advantages)

    def held_out_scores(self, rows: Any) -> dict[str, list[float]]:
        """Evaluate `rows`: the mean reward of each prompt's completions, in total and by function.

        NaN for a prompt that a function did not judge. TRL shuffles the prompts by the seed, so they are sorted by
        their digests: every trainer returns the same order.
        """
        self._evaluated, self._texts = [], {}
        self.evaluate(rows)
        keys = [key for rewards in self._evaluated for key in rewards.prompts or ()]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        total = torch.cat([rewards.total().nanmean(-1) for rewards in self._evaluated])[order]
        each = torch.cat([rewards.values.nanmean(1) for rewards in self._evaluated])[order]
        names = self._evaluated[0].names
        scores = {name: each[:, k].tolist() for k, name in enumerate(names)} if len(names) > 1 else {}
        return {TOTAL: total.tolist(), **scores}

    def samples(self) -> list[Sample]:
        """The first prompts of the last evaluation, in the order of its scores, each with one of its completions."""
        return [self._texts[key] for key in sorted(self._texts)[:KEPT]]
