"""Dynamic sampling: further generation batches, whose live groups take the place of dead ones.

Yu et al., "DAPO" (https://huggingface.co/papers/2503.14476), section 3.2, with a bound on the batches.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather, pad_across_processes
from torch import Tensor

from grpo_plus.advantages import Rewards
from grpo_plus.trainer.names import PADDING, log_value, logged_columns, pad_token_id, trained_tokens
from grpo_plus.trainer.prompts import rows_at
from grpo_plus.trainer.refill_rows import (
    draw_prompts,
    fill,
    join_column,
    join_rewards,
    join_rows,
    rows_of,
    rows_of_process,
)

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam

Output = dict[str, Any]
Generate = Callable[[list[dict[str, Any]]], tuple[Output, Rewards]]


class Refills:
    """Fills generation batches up with live groups, up to `max_refills` further batches for each.

    Args:
        trainer: whose dataset the prompts are drawn from, and whose `dead_groups` decides.
    """

    def __init__(self, trainer: "TRLSeam", max_refills: int) -> None:
        self.max_refills = max_refills
        self._trainer = trainer
        self._warned = False
        self.reset()
        self._kept = False

    def reset(self) -> None:
        """Begin a training."""
        self._last_draw = (-1, 0)  # the optimizer step, and which of its generation batches

    def fill_up(self, inputs: list[dict[str, Any]], generate: Generate) -> tuple[Output, Rewards]:
        """TRL's generation batch for `inputs`, with live groups in the place of dead ones, and its rewards.

        Args:
            generate: makes one generation batch, and says what its completions earned.
        """
        columns = tuple(inputs[0])
        output, rewards = generate(inputs)
        dead = self._trainer.dead_groups(rewards)
        refills = 0
        for indices in self._drawn_prompts(len(dead)):
            if not dead.any() or self._keeps(output):
                break
            logged = {name: list(column) for name, column in logged_columns(self._trainer).items()}
            new, new_rewards = generate(rows_at(self._trainer, indices, len(output["advantages"]), columns))
            if self._keeps(output, new):
                self._restore_log(logged)
                break
            groups = fill(dead, ~self._trainer.dead_groups(new_rewards))
            rewards = join_rewards(rewards, new_rewards, groups)
            taken = rows_of(groups, self._trainer.num_generations)
            self._join_log(logged, taken)
            output = self.join_outputs(output, new, taken)
            dead = self._trainer.dead_groups(rewards)
            refills += 1
        self._log(dead, refills)
        return output, rewards

    def _drawn_prompts(self, prompts: int) -> Iterator[list[int]]:
        if (sampler := self._trainer.prompt_sampler) is not None:
            return (sampler.draw(prompts) for _ in range(self.max_refills))
        # A step may take several generation batches; counted from its start, a resumed run counts alike.
        trainer = self._trainer
        step, batch = self._last_draw
        self._last_draw = trainer.state.global_step, batch + 1 if step == trainer.state.global_step else 0
        seed = "{} {} {}".format(trainer.args.seed, *self._last_draw)
        return draw_prompts(seed, len(trainer.train_dataset), prompts, self.max_refills)

    def _join_log(self, logged: dict[tuple[str, ...], list], taken: Tensor) -> None:
        """Leave in TRL's table of completions the rows that are trained on."""
        for name, column in logged_columns(self._trainer).items():
            if column:  # no images where there are none
                column.extend(join_column(logged.get(name, []), column, taken))

    def _restore_log(self, logged: dict[tuple[str, ...], list]) -> None:
        """Leave in TRL's table of completions what it held."""
        for name, column in logged_columns(self._trainer).items():
            column.clear()
            column.extend(logged.get(name, []))

    def _keeps(self, *outputs: Output) -> bool:
        """Whether the groups must stay, on any process: rows with pictures, of a tool for example, cannot be joined."""
        odd = _unjoinable(*outputs)
        keeps = bool(
            self._trainer.accelerator.gather(torch.tensor([bool(odd)], device=outputs[0]["advantages"].device)).any()
        )
        if keeps and not self._kept:
            self._kept = True
            warnings.warn(
                f"max_refills={self.max_refills} replaces rows of text only, and a generation batch holds "
                f"{', '.join(odd) or 'more on another process'}. Its dead groups stay. Set max_refills=0 if most "
                "batches are of this kind.",
                stacklevel=2,
            )
        return keeps

    def join_outputs(self, old: Output, new: Output, rows: Tensor) -> Output:
        """One dictionary of TRL's with this process's part of `rows`, indices into all old rows and then all new ones.

        TRL fills up to the longest row of each process, and a new row can go to another process than its own.
        """
        accelerator = self._trainer.accelerator
        if unknown := _unjoinable(old, new):
            raise ValueError(
                f"max_refills={self.max_refills} cannot join batches that hold {', '.join(unknown)}: only rows of text "
                "can change places, and every batch must hold the same. Set max_refills=0."
            )
        names = old.keys() - {"num_items_in_batch"}
        taken = rows_of_process(rows, accelerator.process_index, old["advantages"].shape[0])
        joined = {}
        for name in sorted(names):
            padding, values = PADDING[name], new[name]
            if padding is not None:
                if name.endswith("_ids"):
                    padding = replace(padding, value=pad_token_id(self._trainer))
                side = padding.side == "left"
                values = pad_across_processes(values, dim=1, pad_index=padding.value, pad_first=side)
            joined[name] = join_rows(old[name], gather(values), taken, padding)
        return joined | {"num_items_in_batch": accelerator.gather(trained_tokens(joined).sum()).sum()}

    def _log(self, dead: Tensor, refills: int) -> None:
        groups, trained = len(dead), int((~dead).sum())
        if trained < groups and not self._warned and self._trainer.accelerator.is_main_process:
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
    names = set().union(*outputs) - {"num_items_in_batch"}
    return sorted(name for name in names if name not in PADDING or not all(name in output for output in outputs))
