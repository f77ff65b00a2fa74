"""Which tokens the sampler could draw: recorded step by step, kept as lists of ids."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

from grpo_plus.kernels.linear_logprob.kept import KeptRows
from grpo_plus.rollout.recorder import Recorder

# Bytes of masks that wait to be turned into lists. Lists have lengths that the host must read, which waits for a GPU:
# the host reads them once in so many bytes and not once in a step.
WAITING_BYTES = 2**25
# Processors that rule tokens out and leave the odds between the others alone, up to the temperature, which TRL knows.
ONLY_MASK = (
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TopHLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "NoBadWordsLogitsProcessor",
    "PrefixConstrainedLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
)


class KeptRecorder(Recorder):
    """Last of a rollout's processors: remembers which tokens each row could draw at each step."""

    def __init__(self) -> None:
        self._steps = 0
        self._waiting: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._lists: list[tuple[Tensor, Tensor, Tensor]] = []  # rows, steps and ids

    def begin(self, processors: LogitsProcessorList) -> None:
        """Refuse a rollout whose distribution is not the policy's, normalized over the kept tokens."""
        moving = [name for name in (type(processor).__name__ for processor in processors) if name not in ONLY_MASK]
        if moving:
            raise ValueError(
                f"truncated_sampling='correct' is exact for processors that only rule tokens out, but "
                f"{', '.join(moving)} changes the odds between the others. Take it out of generation_kwargs and of the "
                "model's generation_config, or leave truncated_sampling unset."
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Remember the tokens that have a score."""
        # Some processors rule a token out by the lowest finite number.
        self._waiting.append(scores > torch.finfo(scores.dtype).min)
        if len(self._waiting) * scores.numel() >= WAITING_BYTES:
            self._list()
        return scores

    @property
    def size(self) -> int:
        """B, the rows that were generated."""
        return len((self._waiting or self._counts)[0])

    def table(self, lengths: Sequence[int]) -> KeptRows:
        """The kept sets of the rollout's completions.

        Args:
            lengths: of the completions. What came after is not part of them.
        """
        if self._waiting:
            self._list()
        longest = torch.tensor(lengths, device=self._counts[0].device)
        counts = torch.cat(self._counts, dim=1)[:, : max(lengths, default=0)]
        counts = counts * (torch.arange(counts.shape[1], device=longest.device) < longest.unsqueeze(1))
        rows, steps, ids = (torch.cat(parts) for parts in zip(*self._lists, strict=True))
        inside = steps < longest[rows]
        rows, ids = rows[inside], ids[inside]
        order = rows.argsort(stable=True)  # of one row, the steps are in order
        per_row = rows.bincount(minlength=len(lengths)).tolist()
        return KeptRows(counts.int(), pad_sequence(list(ids[order].split(per_row)), batch_first=True))

    def _list(self) -> None:
        """Turn the masks that wait into lists: of the kept tokens, or of those left out where these are fewer."""
        kept = torch.stack(self._waiting, dim=1)
        self._waiting.clear()
        sizes, vocab = kept.sum(-1), kept.shape[-1]
        are_kept = 2 * sizes <= vocab
        rows, steps, ids = (kept == are_kept.unsqueeze(-1)).nonzero(as_tuple=True)
        self._counts.append(torch.where(are_kept, sizes, sizes - vocab))
        self._lists.append((rows.int(), steps.int() + self._steps, ids.int()))
        self._steps += kept.shape[1]
