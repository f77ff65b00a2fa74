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
    """

    first: Tensor
    index: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor | None) -> "Prompts":
        """Compare the padded rows (B, L). Two rows are equal where tokens, padding and mask are."""
        rows = input_ids if attention_mask is None else torch.cat([input_ids, attention_mask.to(input_ids)], dim=1)
        prompts: dict[bytes, int] = {}
        first: list[int] = []
        index: list[int] = []
        for row, tokens in enumerate(rows.cpu().numpy()):
            prompt = prompts.setdefault(tokens.tobytes(), len(first))
            if prompt == len(first):
                first.append(row)
            index.append(prompt)
        return cls(torch.tensor(first, device=input_ids.device), torch.tensor(index, device=input_ids.device))

    @property
    def shared(self) -> bool:
        """Whether two rows have one prompt."""
        return len(self.first) < len(self.index)

    @property
    def factor(self) -> float:
        """Rows per distinct prompt."""
        return len(self.index) / len(self.first)
