"""The draws of a rollout, for the whole batch: the same seed gives the tokens that transformers' own loop gives."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList


class News:
    """Which rows of a batch go on: copied to the host while the device goes on with its work.

    Args:
        unfinished: (B,) 1 for rows that go on.
        together: whether all rows go on until the last is finished.
    """

    def __init__(self, unfinished: Tensor, *, together: bool) -> None:
        self._together = together
        self._copied: torch.cuda.Event | None = None
        self._rows: list[bool] | None = None
        if unfinished.is_cuda:
            self._host = torch.empty(unfinished.shape, dtype=unfinished.dtype, pin_memory=True)
            self._host.copy_(unfinished, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = unfinished

    def read(self) -> list[bool]:
        """For each row whether it goes on. The first call waits for the copy, and for nothing after it."""
        if self._rows is None:
            if self._copied is not None:
                self._copied.synchronize()
            rows = self._host.bool().tolist()
            self._rows = [any(rows)] * len(rows) if self._together else rows
        return self._rows


class Sampling:
    """What processors, random numbers and criteria see: every row, finished rows too, as in transformers' own loop.

    A processor may hold something per row, and a generator that draws for fewer rows gives other tokens from there on.

    Attributes:
        ids: (B, L) prompts and what has been drawn.
        unfinished: (B,) integers, 1 for rows that go on.
        pads: whether a finished row gets padding. Without, its later tokens count, and it cannot leave.
    """

    def __init__(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> None:
        self.ids = input_ids
        self.unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self._processor = logits_processor
        self._criteria = stopping_criteria
        self._samples = generation_config.do_sample
        self._padding = generation_config._pad_token_tensor

    def draw(self, logits: Tensor) -> Tensor:
        """Append one token (B,) to every row. `logits` (B, V) may be written to."""
        scores = self._processor(self.ids, logits)
        if self._samples:
            tokens = torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(dim=-1)
        if self.pads:
            tokens = tokens * self.unfinished + self._padding * (1 - self.unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        # The criteria get no scores: transformers collects them for outputs that this loop does not give.
        self.unfinished = self.unfinished & ~self._criteria(self.ids, None)
        return tokens

    def news(self) -> "News":
        """Which rows go on, on the way to the host."""
        return News(self.unfinished, together=not self.pads)

    @property
    def is_full(self) -> bool:
        """Whether the rows have all the tokens that they may have. The host knows without asking the device."""
        longest = self._criteria.max_length
        return longest is not None and self.ids.shape[1] >= longest
