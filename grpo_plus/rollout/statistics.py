"""What a rollout has done, in numbers, and what it has written so far."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from time import perf_counter

from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Counts of one batch, or of several batches together.

    Attributes:
        rows: of the batch.
        prompts: distinct prompts among them.
        steps: calls of the model after the prefill.
        row_steps: rows of those calls together.
        new_tokens: drawn for rows that were not finished.
        finished: rows that ended before the greatest length.
        seconds: from the prefill to the last token.
        prompt_tokens: with padding, which transformers' own loop sends through the model.
        prefilled: of these tokens, with padding, those that went through the model.
    """

    rows: int = 0
    prompts: int = 0
    steps: int = 0
    row_steps: int = 0
    new_tokens: int = 0
    finished: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    prefilled: int = 0

    @classmethod
    def joined(cls, batches: Iterable["Statistics"]) -> "Statistics":
        """Sums over batches that were generated one after the other."""
        return cls(*map(sum, zip(*map(astuple, batches), strict=True)))


@dataclass(frozen=True)
class Progress:
    """A batch while it is generated.

    Attributes:
        statistics: what has been done so far.
        unfinished: for each row whether it goes on.
        ids: (B, L) prompts and what has been drawn.
        prompt_length: tokens of a prompt, with padding.
    """

    statistics: Statistics
    unfinished: list[bool]
    ids: Tensor
    prompt_length: int

    def completion_ids(self, rows: slice) -> list[list[int]]:
        """What has been drawn for some rows, on the host. A device is waited for."""
        return self.ids[rows, self.prompt_length :].tolist()


class Tally:
    """Counts a batch while it is generated. The clock starts with the tally.

    Args:
        given: tokens of the rows' prompts.
        sent: tokens of the prefill.

    Attributes:
        unfinished: rows that go on, as far as the host knows.
    """

    def __init__(self, rows: int, prompts: int, *, given: int, sent: int) -> None:
        self.unfinished = rows
        self._rows = rows
        self._prompts = prompts
        self._given, self._sent = given, sent
        self._steps = self._row_steps = self._new_tokens = 0
        self._started = perf_counter()

    def drew(self) -> None:
        """A token was drawn for each row that goes on."""
        self._new_tokens += self.unfinished

    def stepped(self, rows: int) -> None:
        """The model was called for a number of rows."""
        self._steps += 1
        self._row_steps += rows

    def statistics(self) -> Statistics:
        """What has been done so far."""
        return Statistics(
            rows=self._rows,
            prompts=self._prompts,
            steps=self._steps,
            row_steps=self._row_steps,
            new_tokens=self._new_tokens,
            finished=self._rows - self.unfinished,
            seconds=perf_counter() - self._started,
            prompt_tokens=self._given,
            prefilled=self._sent,
        )
