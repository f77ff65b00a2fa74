"""What a rollout has done, in numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """Counts of one batch.

    Attributes:
        rows: of the batch.
        prompts: distinct prompts among them.
        steps: calls of the model after the prefill.
        row_steps: rows of those calls together.
        new_tokens: drawn for rows that were not finished.
        finished: rows that ended before the greatest length.
        seconds: from the prefill to the last token.
    """

    rows: int
    prompts: int
    steps: int
    row_steps: int
    new_tokens: int
    finished: int
    seconds: float
