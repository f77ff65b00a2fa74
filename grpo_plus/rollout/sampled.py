"""Which probability the sampler gave each token that it drew."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_plus.rollout.recorder import Recorder


class SampledRecorder(Recorder):
    """Last of a rollout's processors: remembers the log-probability of each drawn token under the final scores.

    A processor learns at the next step what was drawn, and of the last step from the completions.
    """

    def __init__(self) -> None:
        self._logps: list[Tensor] = []
        self._scores: Tensor | None = None  # of the step whose tokens are not known yet

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Remember what the tokens of the step before had been given."""
        if self._scores is not None:
            self._logps.append(_logps(self._scores, input_ids[:, -1]))
        self._scores = scores
        return scores

    @property
    def size(self) -> int:
        """B, the rows that were generated."""
        return 0 if self._scores is None else len(self._scores)

    def table(self, completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities (B, T) of the tokens of B completions, of which the longest has T.

        Entries after a completion's end mean nothing.
        """
        if self._scores is None:
            return torch.zeros(len(completion_ids), 0)
        longest = max(map(len, completion_ids))
        if longest <= len(self._logps):
            return torch.stack(self._logps, 1)[:, :longest]
        last = [ids[-1] if len(ids) == longest else 0 for ids in completion_ids]
        tokens = torch.tensor(last).to(self._scores.device, non_blocking=True)
        return torch.stack([*self._logps, _logps(self._scores, tokens)], 1)


def _logps(scores: Tensor, tokens: Tensor) -> Tensor:
    return scores.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)  # two launches, a logsumexp takes eight
