"""Rewards of one generation batch, grouped by prompt: what an estimator sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_plus.advantages.reductions import RESOLUTION
from grpo_plus.advantages.steps import Row, States, Steps
from grpo_plus.registry import suggestion


class UnknownRewardError(ValueError):
    """A hyper-parameter names a reward that the run does not have."""


@dataclass(frozen=True)
class Rewards:
    """Rewards of one generation batch over all processes, grouped by prompt.

    Attributes:
        values: (P, G, K) reward of each function. NaN where a function abstained (returned None).
        weights: (K,) reward weights.
        names: (K,) names of the reward functions, as TRL logs them.
        lengths: (P, G) tokens of each completion that the policy wrote. None where the lengths are unknown.
        tasks: (P,) task of each prompt, from the column that `task_column` names. None without that column.
        prompts: (P,) identifier of each prompt. None where no estimator asks for identifiers.
        steps: rewards of the completions' steps. None where no reward function gave any.
        full_lengths: (P, G) tokens of each completion with those that a tool or an environment wrote in it. None where
            there are no such tokens.
        kl_penalty: (P, G) beta times the KL of each completion to the reference. None where the reward has no KL.
    """

    values: Tensor
    weights: Tensor
    names: tuple[str, ...]
    lengths: Tensor | None = None
    tasks: tuple[str, ...] | None = None
    prompts: tuple[str, ...] | None = None
    steps: Steps | None = None
    full_lengths: Tensor | None = None
    kl_penalty: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.dim() != 3:
            raise ValueError(f"Rewards.values has shape {tuple(self.values.shape)}; (P, G, K) is needed.")
        functions = self.values.shape[2]
        if self.weights.shape != (functions,) or len(self.names) != functions:
            raise ValueError(
                f"Rewards has {functions} reward columns, {len(self.names)} names and weights of shape "
                f"{tuple(self.weights.shape)}. Give one name and one weight per column."
            )
        for name in ("lengths", "full_lengths", "kl_penalty"):
            lengths = getattr(self, name)
            if lengths is not None and lengths.shape != self.values.shape[:2]:
                raise ValueError(
                    f"Rewards.{name} has shape {tuple(lengths.shape)}; {tuple(self.values.shape[:2])} is needed."
                )
        for name in ("tasks", "prompts"):
            labels = getattr(self, name)
            if labels is not None and len(labels) != len(self.values):
                raise ValueError(f"Rewards.{name} has {len(labels)} entries; {len(self.values)} are needed.")
        if self.steps is not None and self.steps.rewards.shape[:2] != self.values.shape[:2]:
            raise ValueError(
                f"Rewards.steps are those of {tuple(self.steps.rewards.shape[:2])} completions; "
                f"{tuple(self.values.shape[:2])} are needed."
            )

    @classmethod
    def from_table(
        cls,
        rewards_per_func: Tensor,
        *,
        num_generations: int,
        weights: Tensor,
        names: tuple[str, ...],
        lengths: Tensor | None = None,
        tasks: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        steps: tuple[Sequence[Row], Sequence[Row]] | tuple[Sequence[Row], Sequence[Row], States] | None = None,
        full_lengths: Tensor | None = None,
    ) -> "Rewards":
        """Group a (P*G, K) table whose groups are blocks of `num_generations` rows. Labels come one per row.

        The values become float64 on the CPU. For a few thousand numbers exact sums matter more than speed, and every
        process must compute the same advantages to the last bit. `steps` are the rewards and the ends of each
        completion's steps, and the states that they start from, as in `Steps.from_rows`. Steps need `lengths`.
        """
        rows, functions = rewards_per_func.shape
        if rows % num_generations:
            raise ValueError(
                f"The reward table of {', '.join(names)} has {rows} rows, which is not a multiple of the group size "
                f"{num_generations}: group {rows // num_generations} has only {rows % num_generations}. Make "
                "per_device_train_batch_size x processes x steps_per_generation a multiple of num_generations; in "
                "evaluation, per_device_eval_batch_size x processes a multiple of num_generations_eval."
            )
        if not weights.isfinite().all():
            raise ValueError(
                f"The reward weights are {weights.tolist()}. Use finite numbers, 0 for a reward that is only watched."
            )
        groups = rows // num_generations
        lengths, full_lengths = (
            None if each is None else each.detach().cpu().view(groups, num_generations)
            for each in (lengths, full_lengths)
        )
        spans = lengths if full_lengths is None else full_lengths
        return cls(
            values=rewards_per_func.detach().cpu().double().view(groups, num_generations, functions),
            weights=weights.detach().cpu().double(),
            names=names,
            lengths=lengths,
            tasks=None if tasks is None else tuple(tasks[::num_generations]),
            prompts=None if prompts is None else tuple(prompts[::num_generations]),
            steps=None if steps is None or spans is None else Steps.from_rows(*steps, lengths=spans),
            full_lengths=full_lengths,
        )

    @property
    def judged(self) -> Tensor:
        """Whether at least one reward function judged the completion, (P, G)."""
        return ~self.values.isnan().all(-1)

    def total(self) -> Tensor:
        """Weighted sum of the rewards, (P, G). An abstaining function adds 0. NaN only where all functions abstain."""
        return self.weighted_sum(self.values)

    def weighted_sum(self, per_function: Tensor) -> Tensor:
        """Weighted sum of values derived from the rewards, (P, G, K) -> (P, G). See `total`."""
        parts = per_function * self.weights
        total = parts.nansum(-1)
        # Parts that cancel, as in 0.1 + 0.2 - 0.3, leave float32 rounding behind, which a small std would blow up.
        total = total.where(total.abs() > RESOLUTION * parts.abs().nansum(-1), 0.0)
        return total.where(self.judged, torch.nan)

    def described_total(self) -> str:
        """Text for an error message: "the weighted sum of ... takes the values ..."."""
        total = self.total()
        seen = [round(value, 6) for value in total[~total.isnan()].unique().tolist()]
        values = ", ".join(map(str, seen[:4])) + (f", … {seen[-1]}" if len(seen) > 4 else "")
        return f"the weighted sum of {', '.join(map(repr, self.names))} takes the values {values}"

    def index(self, name: str) -> int:
        """Column of the reward called `name`. Raises UnknownRewardError if there is no such reward."""
        if name not in self.names:
            raise UnknownRewardError(f"There is no reward {name!r}.{suggestion(str(name), self.names)}")
        return self.names.index(name)

    @property
    def spans(self) -> Tensor | None:
        """Tokens up to the end of each completion, whoever wrote them, (P, G). None where the lengths are unknown."""
        return self.lengths if self.full_lengths is None else self.full_lengths

    def tokens(self) -> Tensor:
        """`lengths` as float64, (P, G), at least 1: the weights of statistics over trained tokens.

        Raises:
            ValueError: the lengths are unknown.
        """
        if self.lengths is None:
            raise ValueError("The lengths of the completions are needed, but these rewards come without: set lengths.")
        # An empty completion counts as one token: a group of empty ones would have no token-weighted mean.
        return self.lengths.double().clamp(min=1)

    def per_completion(self, advantages: Tensor) -> Tensor:
        """Advantages per completion, (P, G). Advantages per token, (P, G, T), are averaged over the tokens."""
        if advantages.dim() == 2:
            return advantages
        if self.spans is None:
            raise ValueError("The mean over the tokens needs the lengths of the completions: set lengths.")
        # Advantages per token are 0 past the end of a completion. An empty completion counts as one token.
        return advantages.sum(-1) / self.spans.double().clamp(min=1)


def sample_rewards(
    num_generations: int = 2,
    names: Sequence[str] = ("sample",),
    low: float = 0.0,
    high: float = 1.0,
    *,
    weights: Sequence[float] | None = None,
) -> Rewards:
    """A made-up batch of two groups, to try hyper-parameters on: one completion gets `low`, all others get `high`.

    The weighted sums lie between `low` and `high` too. A reward function of weight 0 keeps that weight, and the other
    functions share a weight of 1.
    """
    values = torch.full((2, num_generations, len(names)), high, dtype=torch.float64)
    values[0, 0] = low
    counts = torch.tensor([1.0] * len(names) if weights is None else weights, dtype=torch.float64) != 0
    shares = counts / counts.sum().clamp(min=1).double()
    first = torch.zeros(2, num_generations, 1, dtype=torch.long)
    steps = Steps(values[..., :1], first, first, torch.zeros(2, num_generations, dtype=torch.bool))
    lengths, no_penalty = torch.ones(2, num_generations), torch.zeros(2, num_generations).double()
    return Rewards(values, shares, tuple(names), lengths, steps=steps, kl_penalty=no_penalty)
