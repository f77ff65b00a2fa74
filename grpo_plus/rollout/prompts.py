"""The distinct prompts of a batch."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Which rows of a batch begin with the same prompt, wherever in the batch they lie.

    Attributes:
        first: (P,) the first row of each distinct prompt.
        index: (B,) the prompt of each row.
        tokens: ids of each distinct prompt on the host, without padding. Empty where nobody has read them.
    """

    first: Tensor
    index: Tensor
    tokens: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None, *others: Tensor | None) -> "Prompts":
        """Compare the padded rows (B, L). Two rows are equal where tokens, padding and mask are, and all else.

        Args:
            others: integers (B, n).
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        columns = [mask, *(other for other in others if other is not None)]
        rows = torch.cat([input_ids, *(column.to(input_ids) for column in columns)], dim=1).cpu()
        prompts: dict[bytes, int] = {}
        first: list[int] = []
        index: list[int] = []
        for row, tokens in enumerate(rows.numpy()):
            prompt = prompts.setdefault(tokens.tobytes(), len(first))
            if prompt == len(first):
                first.append(row)
            index.append(prompt)
        ids, real = rows[first].split(input_ids.shape[1], dim=1)[:2]
        tokens = tuple(row[shown.bool()] for row, shown in zip(ids, real, strict=True))
        return cls(torch.tensor(first, device=input_ids.device), torch.tensor(index, device=input_ids.device), tokens)

    @property
    def shared(self) -> bool:
        """Whether two rows have one prompt."""
        return len(self.first) < len(self.index)

    @property
    def factor(self) -> float:
        """Rows per distinct prompt."""
        return len(self.index) / len(self.first)
