"""How often each prompt of a dataset was solved, and how likely the next batch is to hold the prompt.

A prompt that is always solved, or never, gives a group of equal rewards, which teaches nothing. The variance p(1 − p)
of a completion's success is what a group-relative update learns from. Foster et al., "Learning to Reason at the
Frontier of Learnability" (https://huggingface.co/papers/2502.12272), prefer prompts of a high variance. The draw in
proportion, the floor and the decay are ours.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# p(1 - p) of a prompt that nobody has tried: as high as it gets, so that untried prompts come first.
UNTRIED = 0.25


class PassRates:
    """Counts the passes of each row of a dataset.

    Args:
        rows: of the dataset.
        decay: what a visit leaves of the earlier counts.
    """

    def __init__(self, rows: int, decay: float) -> None:
        self._decay = decay
        self._passed = torch.zeros(rows, dtype=torch.float64)
        self._judged = torch.zeros(rows, dtype=torch.float64)

    @property
    def visited(self) -> float:
        """The share of the rows that have been judged."""
        return (self._judged > 0).double().mean().item()

    def add(self, rows: Sequence[int], passed: Tensor, judged: Tensor) -> None:
        """Count a visit.

        Args:
            rows: one per group.
            passed: (P,) completions that pass.
            judged: (P,) completions that were judged. A group without one is no visit.
        """
        seen = judged > 0
        index = torch.tensor(rows)[seen]
        for counts, new in ((self._passed, passed), (self._judged, judged)):
            counts[index] = self._decay * counts[index] + new[seen].double()

    def probabilities(self, floor: float) -> Tensor:
        """(rows,) probability of each row at the first draw, float64.

        qᵢ = (1 − floor) · wᵢ/Σw + floor/rows        wᵢ = pᵢ(1 − pᵢ), or 1/4 for a row that nobody has tried

        Where no row has a weight, all draws are uniform.
        """
        rates = self._passed / self._judged  # NaN where nobody has tried
        weights = (rates * (1 - rates)).nan_to_num(UNTRIED)
        total, uniform = weights.sum(), torch.full_like(weights, 1 / len(weights))
        return (1 - floor) * weights / total + floor * uniform if total > 0 else uniform

    def draw(self, count: int, floor: float, seed: Sequence[int], without: Collection[int] = ()) -> list[int]:
        """Rows, one after the other, in proportion to their probabilities and never one twice.

        The random generator is its own: the run's other random numbers do not move, and a seed draws the same rows
        everywhere.

        Args:
            without: rows to leave out, unless too few are left.
        """
        chances = self.probabilities(floor).numpy()
        if len(chances) - len(without) >= count:
            chances[list(without)] = 0.0
        generator = np.random.default_rng(seed)
        return generator.choice(len(chances), count, replace=False, p=chances / chances.sum()).tolist()

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, for JSON."""
        index = self._judged.nonzero().flatten()
        counts = {"passed": self._passed[index].tolist(), "judged": self._judged[index].tolist()}
        return {"rows": index.tolist(), **counts}

    def load(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned, of a dataset of the same size.

        Raises:
            ValueError: it holds something else.
        """
        try:
            rows = torch.tensor(state["rows"], dtype=torch.long)
            passed, judged = (torch.tensor(state[name], dtype=torch.float64) for name in ("passed", "judged"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The passes of the prompts cannot be read ({type(error).__name__}).") from None
        one_each = rows.dim() == 1 and rows.shape == passed.shape == judged.shape
        known = (rows >= 0) & (rows < len(self._judged))
        if not (one_each and (known & (passed >= 0) & (passed <= judged) & judged.isfinite()).all()):
            raise ValueError("The passes of the prompts are no counts.")
        self.clear()
        self._passed[rows], self._judged[rows] = passed, judged

    def clear(self) -> None:
        """Forget all visits."""
        self._passed.zero_()
        self._judged.zero_()
