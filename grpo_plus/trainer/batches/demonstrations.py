"""Completions of the dataset in the place of drawn ones: from the generation batch to the update.

They are the last completions of their group, so that all that TRL does with a group happens to them, too. A completion
with log-probabilities keeps its importance ratio. One without has no ratio: `grpo_plus.losses.demonstrations` says what
stands in its place.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from grpo_plus.advantages import Rewards
from grpo_plus.config.run import check_demonstrated_run
from grpo_plus.losses import LOSSES
from grpo_plus.losses.demonstrations import BY_DEFAULT, UNJUDGED, demonstration_weights
from grpo_plus.packing.transfer import on_device
from grpo_plus.trainer.batches.given import Given, given_of, listed
from grpo_plus.trainer.names import DEMONSTRATED, GIVEN_LOGPS, log_value, set_reported, trained_tokens
from grpo_plus.trainer.update.spread import spreads_weights

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam

Rows = list[list[int]]
SHOWN = "demonstration"  # the column of the table of completions
PER_TOKEN = ("token-mean", "global-token-mean")


class Demonstrations:
    """Puts the completions of a dataset column into their groups. Does nothing without a column.

    Args:
        trainer: whose batches they join.
    """

    def __init__(self, trainer: "TRLSeam") -> None:
        self._trainer = trainer
        self._column = trainer.plus.demonstration_column or ""
        self._loss: Any = trainer.plus.demonstration_loss or BY_DEFAULT
        self._judges = not set(self._loss) & set(UNJUDGED)
        self._given: dict[int, Given] = {}  # of the batch that is being generated, by this process's row
        self._rows_given: Tensor | None = None  # (B,) of all processes, of the batch that was judged last
        if self._column:
            check_demonstrated_run(self._column, trainer)
            self._check_first()

    @property
    def _acts(self) -> bool:
        return bool(self._column) and self._trainer.model.training

    @contextmanager
    def of(self, rows: list[dict[str, Any]]) -> Iterator[None]:
        """Inside, TRL generates and scores these rows, with what they have in the column."""
        self._given = self._found(rows) if self._acts else {}
        try:
            yield
        finally:
            self._given = {}

    def _found(self, rows: list[dict[str, Any]]) -> dict[int, Given]:
        found: dict[int, Given] = {}
        size, first = self._trainer.num_generations, self._trainer.accelerator.process_index * len(rows)
        for index, row in enumerate(rows):
            values = listed(row.get(self._column))[:size]
            place = (first + index) % size - size + len(values)
            if place >= 0 and (given := self._short_enough(row, values[place])) is not None:
                found[index] = given
        return found

    def joined(
        self, complete: Callable[..., tuple[Rows, list | None]], prompt_ids: Rows, *others: Any, **named: Any
    ) -> tuple[Rows, list | None]:
        """What TRL's generation of a turn returns, with the given completions in it.

        Args:
            complete: generates for some prompts.
            others, named: what `complete` takes beside the prompts.
        """
        given = self._given
        if not given:
            return complete(prompt_ids, *others, **named)
        drawn = list(range(len(prompt_ids)))
        if not self._trainer.use_vllm and not spreads_weights(self._trainer):
            # One row at least: all processes count what they generate.
            drawn = [row for row in drawn if row not in given] or [0]
        some_ids, some_logps = complete([prompt_ids[row] for row in drawn], *others, **named)
        ids = dict(zip(drawn, some_ids, strict=True)) | {row: one.completion_ids for row, one in given.items()}
        completion_ids = [list(ids[row]) for row in range(len(prompt_ids))]
        if some_logps is None:
            return completion_ids, None
        # The engine drew none of their tokens. TRL takes None for a token without a value: its ratio is 1.
        logps = dict(zip(drawn, some_logps, strict=True)) | {row: [None] * len(ids[row]) for row in given}
        return completion_ids, [logps[row] for row in range(len(prompt_ids))]

    def drawn(self, prompt_ids: Rows, completion_ids: Rows, masks: Rows | None) -> tuple[Rows, Rows, Rows | None]:
        """What TRL has generated, with masks of 0 at the tokens that are given."""
        if self._given:
            masks = [[int(row not in self._given)] * len(ids) for row, ids in enumerate(completion_ids)]
        return prompt_ids, completion_ids, masks

    def judged(self, rewards_per_func: Tensor) -> Tensor:
        """The rewards (B, K) of all processes, NaN where a completion is to have no advantage. Logs both kinds."""
        if not self._acts:
            return rewards_per_func
        accelerator = self._trainer.accelerator
        rows = [self._given.get(row) for row in range(len(rewards_per_func) // accelerator.num_processes)]
        set_reported(self._trainer, SHOWN, [one is not None for one in rows])
        kinds = [[one is not None, one is not None and one.logps is None] for one in rows]
        given, demonstrated = accelerator.gather(torch.tensor(kinds, device=accelerator.device)).unbind(1)
        self._rows_given = given
        totals = (rewards_per_func * self._trainer.reward_weights.to(rewards_per_func)).nansum(1)
        means = {
            "demonstrations/share": given.float(),
            "demonstrations/reward": totals[given],
            "demonstrations/drawn_reward": totals[~given],
        }
        for name, values in means.items():
            if len(values):
                log_value(self._trainer, name, float(values.mean()))
        return rewards_per_func if self._judges else rewards_per_func.masked_fill(demonstrated.unsqueeze(1), math.nan)

    def of_the_policy(self, rewards: Rewards) -> Rewards:
        """The rewards of the batch that was judged last, NaN for completions that the policy did not draw."""
        if self._rows_given is None:
            return rewards
        given = self._rows_given.view(*rewards.judged.shape, 1).to(rewards.values.device)
        return replace(rewards, values=rewards.values.masked_fill(given, math.nan))

    def added_to(self, output: dict[str, Any]) -> dict[str, Any]:
        """TRL's dictionary with what belongs to the given completions, which follows the rows from there."""
        if not self._acts:
            return output
        ids = output["completion_ids"]
        logps = torch.full(ids.shape, math.nan)
        demonstrated = torch.zeros(len(ids))
        for row, given in self._given.items():
            if given.logps is None:
                demonstrated[row] = 1
            else:
                known = [math.nan if value is None else value for value in given.logps]
                logps[row, : len(known)] = torch.tensor(known)
        return output | {DEMONSTRATED: demonstrated.to(ids.device), GIVEN_LOGPS: logps.to(ids.device)}

    def settled(self, output: dict[str, Any]) -> dict[str, Any]:
        """The dictionary of a whole generation batch, whose advantages are final.

        A batch without given completions is left as TRL made it. Where demonstrations have no advantage, each kind of
        completion gets a mean of its own: its advantages are multiplied by the share of the batch that it is not.
        """
        if not self._acts:
            return output
        demonstrated = output[DEMONSTRATED]
        loss = LOSSES[self._trainer.loss_type]
        by_token = (self._trainer.plus.loss_reduction or loss.reduction) in PER_TOKEN
        sizes = trained_tokens(output).sum(1).to(demonstrated) if by_token else torch.ones_like(demonstrated)
        parts = torch.stack(
            [sizes.sum(), (sizes * demonstrated).sum(), output[GIVEN_LOGPS].isfinite().sum().to(demonstrated)]
        )
        total, shown, logged = self._trainer.accelerator.reduce(parts.double(), reduction="sum").tolist()
        if not shown and not logged:
            return {name: value for name, value in output.items() if name not in (DEMONSTRATED, GIVEN_LOGPS)}
        if self._judges or not shown:
            return output
        advantages = output["advantages"]
        demonstrated = demonstrated.bool().view(-1, *[1] * (advantages.dim() - 1))
        scaled = advantages * (total / max(total - shown, 1.0))
        return output | {"advantages": scaled.masked_fill(demonstrated, total / shown)}

    def weigh(self, inputs: dict[str, Any] | None, logps: Tensor, live: tuple[int, ...] | None) -> None:
        """Put into a micro-batch what its loss reads: weights of demonstrations, and given old log-probabilities.

        Args:
            inputs: the micro-batch; None outside of a loss.
            logps: (B, T) of the policy, without gradient.
            live: the rows that were forwarded; None: all.
        """
        if inputs is None or DEMONSTRATED not in inputs:
            return
        demonstrated, given = inputs[DEMONSTRATED].bool().unsqueeze(1), inputs[GIVEN_LOGPS]
        forwarded = torch.ones_like(demonstrated)
        if live is not None:  # a skipped row's log-probs are none: against given ones, its ratio could be infinite
            rows = on_device(torch.tensor(live), logps.device)
            forwarded = torch.zeros_like(demonstrated).index_fill(0, rows, True)
            given = given.where(forwarded, math.nan)
        old_logps = torch.where(demonstrated, logps, inputs.get("old_per_token_logps", logps))
        inputs["old_per_token_logps"] = torch.where(given.isnan(), old_logps, given)
        weights = demonstration_weights(self._loss, logps, self._trainer.state.global_step)
        advantages = inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        shares = weights.demonstrated * weights.tokens, torch.full_like(logps, weights.drawn)
        inputs["advantages"] = advantages * torch.where(demonstrated, *shares)
        read = demonstrated & forwarded
        self._trainer._step_figures.add("demonstrations/nll", -logps, trained_tokens(inputs) * read)
        if not self._judges:
            log_value(self._trainer, "demonstrations/mu", weights.demonstrated)

    def _short_enough(self, row: dict[str, Any], value: Any) -> Given | None:
        """The completion; None where it is longer than the policy's can be, with one warning."""
        given = self._read(row["prompt"], value)
        most = self._trainer.max_completion_length
        if len(given.completion_ids) <= most:
            return given
        self._trainer._figures.warn(
            "long demonstrations",
            f"demonstration_column={self._column!r} holds a completion of {len(given.completion_ids)} tokens, and "
            f"max_completion_length={most}. Longer completions are left out, and the policy draws others in their "
            f"place. The prompt of this one: {str(row['prompt'])[:200]!r}.",
        )
        return None

    def _check_first(self) -> None:
        """Refuse at construction what no completion of the column could pass."""
        dataset = self._trainer.train_dataset
        for index, value in enumerate(dataset[self._column]) if isinstance(dataset, Dataset) else ():
            if values := listed(value):
                self._read(dataset[index]["prompt"], values[0])
                return

    def _read(self, prompt: Any, value: Any) -> Given:
        """One completion of the column. An error names the column and the prompt."""
        try:
            return given_of(self._trainer, prompt, value)
        except ValueError as error:
            raise ValueError(f"demonstration_column={self._column!r}, prompt {str(prompt)[:200]!r}: {error}") from error
