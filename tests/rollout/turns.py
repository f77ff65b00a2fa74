"""Prompts of a later turn: a system prompt, the prompt of a group, and what each row and its tool have written."""

import torch
from torch import Tensor

from tests.packing.models import VOCABULARY

SYSTEM, PROMPTS, ROWS = 6, (20, 15, 25), 4  # tokens, tokens of each group's prompt, and rows of a group
WRITTEN = (3, 5, 7, 9)  # tokens of the rows of a group


def batch() -> dict[str, Tensor]:
    """Ids and mask (B, L), padded on the left. Two rows are equal, and the last begins like no other."""
    generator = torch.Generator().manual_seed(3)

    def drawn(tokens: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (tokens,), generator=generator).tolist()

    system = drawn(SYSTEM)
    prompts = [system + drawn(tokens) for tokens in PROMPTS]
    rows = [prompt + drawn(tokens) for prompt in prompts for tokens in WRITTEN]
    rows += [rows[-1], [3, 4]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
