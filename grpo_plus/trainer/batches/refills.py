"""Dynamic sampling: live groups of earlier or of further generation batches take the place of dead ones.

Yu et al., "DAPO" (https://huggingface.co/papers/2503.14476), section 3.2, with a bound on the batches.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather, pad_across_processes
from torch import Tensor

from grpo_plus.advantages import Rewards
from grpo_plus.trainer.batches.prompts import DrawsOfStep, rows_at
from grpo_plus.trainer.batches.refill_buffer import Log, RefillBuffer, joined, split
from grpo_plus.trainer.batches.refill_rows import (
    Padding,
    draw_prompts,
    fill,
    join_column,
    join_rewards,
    join_rows,
    rows_of,
    rows_of_process,
)
from grpo_plus.trainer.names import (
    PADDING,
    REFILL_AGE,
    log_value,
    logged_columns,
    scored,
    tokenizer_of,
    trained_tokens,
)

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam

Output = dict[str, Any]
Generate = Callable[[list[dict[str, Any]]], tuple[Output, Rewards]]
NO_ROWS = {"num_items_in_batch"}


@dataclass(frozen=True)
class Batch:
    """A generation batch.

    Attributes:
        output: TRL's dictionary of this process's rows.
        rewards: of all processes.
        log: TRL's table of completions, of all processes.
    """

    output: Output
    rewards: Rewards
    log: Log


class Refills:
    """Fills generation batches up with live groups: of the buffer first, then of up to `max_refills` further batches.

    Args:
        trainer: whose dataset the prompts are drawn from, and whose `dead_groups` decides.
        buffer: groups of earlier batches.
    """

    def __init__(self, trainer: "TRLSeam", max_refills: int, buffer: RefillBuffer) -> None:
        self.max_refills = max_refills
        self._buffer = buffer
        self._trainer = trainer
        self._warned = False
        self.reset()
        self._kept = False

    def reset(self) -> None:
        """Begin a training."""
        self._draws = DrawsOfStep()  # one for each generation batch
        self._buffer.clear()

    def scored(self, output: Output) -> Output:
        """TRL's dictionary with what a group must bring along to be trained on later.

        These are the log-probabilities of the policy that sampled. TRL has them where a batch outlives that policy.
        """
        trainer = self._trainer
        if not trainer.model.training or not self._buffer.batches:
            return output
        old_logps = output.get("old_per_token_logps")
        if old_logps is None:
            with torch.no_grad():
                old_logps = scored(trainer, output)
        age = torch.zeros(len(old_logps), device=old_logps.device)
        return output | {"old_per_token_logps": old_logps, REFILL_AGE: age}

    def fill_up(self, inputs: list[dict[str, Any]], generate: Generate) -> tuple[Output, Rewards]:
        """TRL's generation batch for `inputs`, with live groups in the place of dead ones, and its rewards.

        Args:
            generate: makes one generation batch, and says what its completions earned.
        """

        def made(rows: list[dict[str, Any]]) -> Batch:
            return Batch(*generate(rows), {name: list(v) for name, v in logged_columns(self._trainer).items()})

        batch, refills = self._filled_from_buffer(made(inputs)), 0
        dead = self._trainer.dead_groups(batch.rewards)
        for indices in self._drawn_prompts(len(dead)):
            if not dead.any() or self._keeps(batch.output):
                break
            new = made(rows_at(self._trainer, indices, len(inputs), tuple(inputs[0])))
            if self._keeps(batch.output, new.output):
                break
            groups = fill(dead, ~self._trainer.dead_groups(new.rewards))
            self._hold(new, trained=torch.isin(torch.arange(len(dead)) + len(dead), groups))
            output = self.join_outputs(batch.output, new.output, rows_of(groups, self._trainer.num_generations))
            batch = self._joined(batch, output, new.rewards, new.log, groups)
            dead = self._trainer.dead_groups(batch.rewards)
            refills += 1
        self._show(batch.log)
        self._log(dead, refills)
        return batch.output, batch.rewards

    def _filled_from_buffer(self, batch: Batch) -> Batch:
        """The batch with groups of earlier batches in the place of dead ones. Its own live groups are held."""
        if not self._buffer.batches:
            return batch
        self._buffer.next_batch()
        if self._keeps(batch.output):
            return batch
        dead = self._trainer.dead_groups(batch.rewards)
        self._hold(batch, trained=torch.ones_like(dead))
        found = self._buffer.take(int(dead.sum()), batch.output.keys() - NO_ROWS)
        log_value(self._trainer, "sampling/buffered_groups", len(found) / len(dead))
        if not found:
            return batch
        rows, rewards, log = joined(found, {name: self._padding(name) for name in found[0].rows})
        log_value(self._trainer, "sampling/buffered_age", rows[REFILL_AGE].mean().item())
        groups = fill(dead, torch.ones(len(found), dtype=torch.bool))
        output = self._with_rows(batch.output, rows, rows_of(groups, self._trainer.num_generations))
        return self._joined(batch, output, rewards, log, groups)

    def _hold(self, batch: Batch, *, trained: Tensor) -> None:
        """Hold the live groups of a batch for later ones."""
        live = ~self._trainer.dead_groups(batch.rewards)
        if self._buffer.batches and live.any():
            rows = self._rows_of_all(batch.output)
            self._buffer.add(split(rows, batch.rewards, batch.log, live, trained, self._buffer.held.batch))

    def _drawn_prompts(self, prompts: int) -> Iterator[list[int]]:
        if (sampler := self._trainer.prompt_sampler) is not None:
            return (sampler.draw(prompts) for _ in range(self.max_refills))
        trainer = self._trainer
        draw = self._draws.next(trainer.state.global_step)
        if not self.max_refills:
            return iter(())  # the buffer alone refills, and a stream has no length
        seed = "{} {} {}".format(trainer.args.seed, *draw)
        return draw_prompts(seed, len(trainer.train_dataset), prompts, self.max_refills)

    def _joined(self, batch: Batch, output: Output, rewards: Rewards, log: Log, groups: Tensor) -> Batch:
        """The batch with these rows, whose `groups` count those of the batch first and then those of `rewards`."""
        rows = rows_of(groups, self._trainer.num_generations)
        names = [name for name in dict.fromkeys((*batch.log, *log)) if batch.log.get(name) or log.get(name)]
        table = {name: join_column(batch.log.get(name, []), log.get(name, []), rows) for name in names}
        return Batch(output, join_rewards(batch.rewards, rewards, groups), table)

    def _show(self, log: Log) -> None:
        """Leave in TRL's table of completions the rows that are trained on."""
        for name, column in logged_columns(self._trainer).items():
            column.clear()
            column.extend(log.get(name, []))

    def _keeps(self, *outputs: Output) -> bool:
        """Whether the groups must stay, on any process: rows with pictures, of a tool for example, cannot be joined."""
        odd = _unjoinable(*outputs)
        keeps = bool(
            self._trainer.accelerator.gather(torch.tensor([bool(odd)], device=outputs[0]["advantages"].device)).any()
        )
        if keeps and not self._kept:
            self._kept = True
            warnings.warn(
                f"{self._asked()} replaces rows of text only, and a generation batch holds "
                f"{', '.join(odd) or 'more on another process'}. Its dead groups stay. Set {self._asked(off=True)} if "
                "most batches are of this kind.",
                stacklevel=2,
            )
        return keeps

    def join_outputs(self, old: Output, new: Output, rows: Tensor) -> Output:
        """One dictionary of TRL's with this process's part of `rows`, indices into all old rows and then all new ones.

        A new row can go to another process than its own.
        """
        if unknown := _unjoinable(old, new):
            raise ValueError(
                f"{self._asked()} cannot join batches that hold {', '.join(unknown)}: only rows of text can change "
                f"places, and every batch must hold the same. Set {self._asked(off=True)}."
            )
        return self._with_rows(old, self._rows_of_all(new), rows)

    def _with_rows(self, old: Output, new: dict[str, Tensor], rows: Tensor) -> Output:
        """`join_outputs`, where the new rows are those of all processes."""
        accelerator, device = self._trainer.accelerator, old["advantages"].device
        taken = rows_of_process(rows, accelerator.process_index, len(old["advantages"]))
        output = {
            name: join_rows(old[name], values.to(device), taken, self._padding(name)) for name, values in new.items()
        }
        return output | {"num_items_in_batch": accelerator.gather(trained_tokens(output).sum()).sum()}

    def _rows_of_all(self, output: Output) -> dict[str, Tensor]:
        """The rows of all processes. TRL fills up to the longest row of each."""
        rows = {}
        for name in sorted(output.keys() - NO_ROWS):
            values = output[name]
            if (padding := self._padding(name)) is not None:
                side = padding.side == "left"
                values = pad_across_processes(values, dim=1, pad_index=padding.value, pad_first=side)
            rows[name] = gather(values)
        return rows

    def _padding(self, name: str) -> Padding | None:
        padding = PADDING[name]
        if padding is not None and name.endswith("_ids"):
            return replace(padding, value=tokenizer_of(self._trainer).pad_token_id)
        return padding

    def _asked(self, *, off: bool = False) -> str:
        """The settings that refill, with their values; or what to write in their place."""
        asked = {"max_refills": self.max_refills, "refill_buffer": self._buffer.batches}
        return " and ".join(f"{name}={0 if off else value}" for name, value in asked.items() if value)

    def _log(self, dead: Tensor, refills: int) -> None:
        groups, trained = len(dead), int((~dead).sum())
        if trained < groups and self.max_refills and not self._warned and self._trainer.accelerator.is_main_process:
            warnings.warn(
                f"{groups - trained} of {groups} groups are dead after max_refills={self.max_refills} refills, and the "
                "run goes on with them. sampling/dead_groups logs their share. Raise max_refills, or choose prompts "
                "that are neither always nor never solved.",
                stacklevel=2,
            )
            self._warned = True
        # TRL averages without NaN: a batch in which nothing trains has no ratio.
        ratio = (1 + refills) * groups / trained if trained else math.nan
        for name, value in {"refills": refills, "dead_groups": 1 - trained / groups, "generated_ratio": ratio}.items():
            log_value(self._trainer, f"sampling/{name}", value)


def _unjoinable(*outputs: Output) -> list[str]:
    """What some of TRL's dictionaries hold and others do not, or what is no row of text."""
    names = set().union(*outputs) - NO_ROWS
    return sorted(name for name in names if name not in PADDING or not all(name in output for output in outputs))
