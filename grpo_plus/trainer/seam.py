"""The seam to TRL: the only module that names TRL's private methods, dictionary keys and attributes.

`TRLSeam` turns TRL's private data into our values, calls a public hook, and puts the answer back. Nothing of TRL is
copied or patched. When TRL moves, this file and `trl_fingerprints.json` change, and nothing else should have to.
"""

import inspect
import itertools
import json
import math
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather, gather_object, pad_across_processes
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from grpo_plus.advantages import Rewards, checked
from grpo_plus.advantages.metrics import share_with_absent_tasks
from grpo_plus.losses import TRL_LOSSES, LossInputs
from grpo_plus.losses.sampler import SamplerGap, joined, sampler_differences, sampler_ratio, suspicion
from grpo_plus.models.adapters import adapter_values
from grpo_plus.packing import Packed, PaddedRows, base_model, forward_live, regroup, reorder
from grpo_plus.trainer.checkpoints import mark_unfinished
from grpo_plus.trainer.hooks import Hooks
from grpo_plus.trainer.refill_rows import (
    Padding,
    draw_prompts,
    fill,
    join_column,
    join_rewards,
    join_rows,
    rows_of,
    rows_of_process,
)

TESTED_TRL = SpecifierSet(">=1.15,<1.17")

# Fingerprinted for each tested version. The first ten are overridden. Of the others the seam assumes what they do:
# `log` writes the advantages out, `_log_completion_extra` keeps the columns of a reward function.
RELIED_ON = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_compute_loss",
    "_save_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_from_checkpoint",
    "_load_best_model",
    "_get_per_token_logps_and_entropies",
    "_prepare_inputs",
    "_generate_single_turn",
    "log",
    "_log_completion_extra",
)

# What comes before the loss, for StepProfile to time: the second calls the first once and scores what it returns.
GENERATES, PREPARES = "_generate", "_generate_and_score_completions"

STATE_FILE = "grpo_plus_state.json"
SAMPLER_RATIO = "importance_sampling_ratio"

# Columns of TRL's completions table that a reward function may fill through `log_extra` with lists, one per completion.
STEP_COLUMNS = ("step_rewards", "step_ends")

# Images and what belongs to them, under the names that TRL's dictionaries and its forward share.
MULTIMODAL = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[8:]

# What a row of text is made of.
ROWS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")

# How TRL fills up the rows of its dictionaries: token ids with the pad token, a masked log-probability is 0, a masked
# ratio 1. None: one number per row.
PADDING = {
    "prompt_ids": Padding("left", 0),
    "prompt_mask": Padding("left", 0),
    "completion_ids": Padding("right", 0),
    "completion_mask": Padding("right", 0),
    "tool_mask": Padding("right", 1),
    "old_per_token_logps": Padding("right", 0),
    "sampling_per_token_logps": Padding("right", 0),
    "ref_per_token_logps": Padding("right", 0),
    SAMPLER_RATIO: Padding("right", 1),
    "advantages": None,
}


def untested_version(installed: str) -> str | None:
    """A warning for a TRL outside the window that the suite runs on; None inside it."""
    if TESTED_TRL.contains(installed, prereleases=True):
        return None
    return (
        f"grpo_plus was tested with trl {TESTED_TRL}, found {installed}. `grpo-plus doctor` says whether anything "
        "that it relies on has changed."
    )


if message := untested_version(version("trl")):
    warnings.warn(message, stacklevel=2)


def log_value(trainer: GRPOTrainer, name: str, value: float, *, latest: bool = False) -> None:
    """Log a number of the training with TRL's: the mean since the last log, or the latest."""
    if latest:
        trainer._metrics["train"][name] = []
    trainer._metrics["train"][name].append(value)


def sampled_batches(trainer: "TRLSeam", count: int) -> Iterator[tuple[Rewards, dict[str, Tensor]]]:
    """Generation batches as the training would sample them from the model as it is: rewards, and rows for `logps_of`.

    Rows are in the order of the groups. Nothing is trained; the random state moves on.
    """
    trainer.model.train()
    # TRL repeats a batch for every step that trains on it.
    repeats = trainer.num_iterations * trainer.args.steps_per_generation
    for inputs in itertools.islice(trainer.get_train_dataloader(), 0, count * repeats, repeats):
        output = trainer._generate_and_score_completions(inputs)
        yield trainer._rewards, {name: output[name] for name in ROWS if name in output}


def logps_of(trainer: "TRLSeam", rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the completions, as the training differentiates them, and their mask (B, T)."""
    return trainer._get_per_token_logps_and_entropies(trainer.model, *_whole(rows))[0], _trained(rows)


def _gather_labels(labels: list[str | None]) -> list[str] | None:
    """The rows' labels of all processes, in the order of the reward table; None where they have none."""
    if None in labels:
        return None
    return gather_object(labels)


def _whole(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask (B, L) of prompts with their completions, and how many of the tokens are completion's."""
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    return ids, mask, inputs["completion_ids"].shape[1]


def _trained(inputs: dict[str, Any]) -> Tensor:
    """(B, T), 1 at the tokens that the policy sampled and the loss counts: neither padding nor a tool's."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def _with_advantages_times(inputs: dict[str, Any], factor: Tensor) -> dict[str, Any]:
    return inputs | {"advantages": inputs["advantages"] * factor}


class TRLSeam(Hooks, GRPOTrainer):
    """GRPOTrainer that asks the hooks: translates TRL's private data for them, and their answers for TRL."""

    _tag_names = [*GRPOTrainer._tag_names, "grpo_plus"]  # noqa: RUF012  (TRL declares it so)
    _rewards: Rewards
    _micro_batch: dict[str, Any] | None = None
    _buffered_inputs: list[dict[str, Any]] | None
    beta: float
    vllm_importance_sampling_correction: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(GRPOTrainer).bind(*args, **kwargs).arguments
        self.check_run(*(given.get(name) for name in ("model", "args", "quantization_config", "peft_config")))
        exact = adapter_values(given["model"])
        super().__init__(*args, **kwargs)
        self.restore_adapters(exact)
        self._last_draw = (-1, 0)  # the optimizer step, and which of its generation batches
        self._warned_of_dead_groups = self._warned_of_sampler = False
        self._sampler_gap = SamplerGap()

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards_per_func.device)
        tasks = [self.task_of(example) for example in inputs]
        if tasks[0] is not None and "task" not in (*self._pending_extra_logs, *self.reward_func_names):
            self._log_completion_extra("task", tasks)
        self._rewards = Rewards.from_table(
            rewards_per_func,
            num_generations=self.num_generations if self.model.training else self.num_generations_eval,
            weights=self.reward_weights,
            names=tuple(self.reward_func_names),
            lengths=gather(lengths),
            tasks=_gather_labels(tasks),
            prompts=_gather_labels([self.prompt_key(prompt) for prompt in prompts]),
            steps=self._gather_steps(len(prompts)),
        )
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._without_old_policy_pass():
            if self.model.training and self.max_refills > 0:
                output = self._generate_live_groups(inputs)
            else:
                output = super()._generate_and_score_completions(inputs)
        self._compare_with_sampler(output)
        advantages = self.estimate_advantages(self._rewards)
        if advantages is not None:
            advantages = checked("hook estimate_advantages", advantages, self._rewards)
            self._replace_advantages(output, advantages)
        self._log_advantage_metrics()
        return output

    @contextmanager
    def _without_old_policy_pass(self) -> Iterator[None]:
        """TRL scores without vLLM's importance sampling where the loss can form the ratio from its own forward."""
        correction = self.vllm_importance_sampling_correction
        if self.model.training and self.drops_old_policy_pass:
            self.vllm_importance_sampling_correction = False
        try:
            yield
        finally:
            self.vllm_importance_sampling_correction = correction

    def _compare_with_sampler(self, output: dict[str, Any]) -> None:
        """Warn where what sampled, vLLM or a rollout function, holds another policy than the one that was scored."""
        logps, sampler_logps = output.get("old_per_token_logps"), output.get("sampling_per_token_logps")
        if logps is not None and sampler_logps is not None and not self._warned_of_sampler:
            self._warn_of_sampler(sampler_differences(logps, sampler_logps, _trained(output).bool()))

    def _warn_of_sampler(self, differences: Tensor) -> None:
        """One warning in a run."""
        if not self._warned_of_sampler and (message := suspicion(differences, self.state.global_step)):
            warnings.warn(message, stacklevel=2)
            self._warned_of_sampler = True

    def _generate_live_groups(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's generation batch, with live groups of up to `max_refills` further ones in the place of dead groups."""
        columns = tuple(inputs[0])
        output = super()._generate_and_score_completions(inputs)
        dead = self.dead_groups(self._rewards)
        refills = 0
        for indices in self._drawn_prompts(len(dead)):
            if not dead.any():
                break
            output = self._refill(output, dead, indices, columns)
            dead = self.dead_groups(self._rewards)
            refills += 1
        self._log_sampling(dead, refills)
        return output

    def _drawn_prompts(self, prompts: int) -> Iterator[list[int]]:
        # A step may take several generation batches; counted from its start, a resumed run counts alike.
        step, batch = self._last_draw
        self._last_draw = self.state.global_step, batch + 1 if step == self.state.global_step else 0
        seed = "{} {} {}".format(self.args.seed, *self._last_draw)
        return draw_prompts(seed, len(self.train_dataset), prompts, self.max_refills)

    def _refill(
        self, output: dict[str, Any], dead: Tensor, indices: list[int], columns: tuple[str, ...]
    ) -> dict[str, Any]:
        """Generate for the prompts at `indices` and put the live groups in the place of dead ones."""
        rewards, logged = self._rewards, {name: list(column) for name, column in self._logged_columns().items()}
        local_rows = output["advantages"].shape[0]
        first = self.accelerator.process_index * local_rows
        rows = [self.train_dataset[indices[i // self.num_generations]] for i in range(first, first + local_rows)]
        # The columns that the dataloader left: others would reach the reward functions in a refill only.
        new = super()._generate_and_score_completions(
            [{name: value for name, value in row.items() if name in columns} for row in rows]
        )
        groups = fill(dead, ~self.dead_groups(self._rewards))
        self._rewards = join_rewards(rewards, self._rewards, groups)
        taken = rows_of(groups, self.num_generations)
        for name, column in self._logged_columns().items():
            if column:  # no images where there are none
                column.extend(join_column(logged.get(name, []), column, taken))
        return self._join_outputs(output, new, taken)

    def _join_outputs(self, old: dict[str, Any], new: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        """One dictionary of TRL's with this process's part of `rows`, indices into all old rows and then all new ones.

        TRL fills up to the longest row of each process, and a new row can go to another process than its own.
        """
        names = (old.keys() | new.keys()) - {"num_items_in_batch"}
        if unknown := sorted(name for name in names if name not in PADDING or name not in old or name not in new):
            raise ValueError(
                f"max_refills={self.max_refills} cannot join batches that hold {', '.join(unknown)}: only rows of text "
                "can change places, and every batch must hold the same. Set max_refills=0."
            )
        taken = rows_of_process(rows, self.accelerator.process_index, old["advantages"].shape[0])
        joined = {}
        for name in sorted(names):
            padding, values = PADDING[name], new[name]
            if padding is not None:
                if name.endswith("_ids"):
                    padding = replace(padding, value=self._tokenizer.pad_token_id)
                side = padding.side == "left"
                values = pad_across_processes(values, dim=1, pad_index=padding.value, pad_first=side)
            joined[name] = join_rows(old[name], gather(values), taken, padding)
        return joined | {"num_items_in_batch": self.accelerator.gather(_trained(joined).sum()).sum()}

    def _logged_columns(self) -> dict[tuple[str, ...], deque]:
        """The columns of TRL's table of completions, each as long as one generation batch."""
        columns: dict[tuple[str, ...], deque] = {}
        for name, column in self._logs.items():
            columns |= {(name, k): v for k, v in column.items()} if isinstance(column, dict) else {(name,): column}
        return columns

    def _log_sampling(self, dead: Tensor, refills: int) -> None:
        groups, trained = len(dead), int((~dead).sum())
        if trained < groups and not self._warned_of_dead_groups and self.accelerator.is_main_process:
            warnings.warn(
                f"{groups - trained} of {groups} groups are dead after max_refills={self.max_refills} refills, and the "
                "run goes on with them. sampling/dead_groups logs their share. Raise max_refills, or choose prompts "
                "that are neither always nor never solved.",
                stacklevel=2,
            )
            self._warned_of_dead_groups = True
        # TRL averages without NaN: a batch in which nothing trains has no ratio.
        ratio = (1 + refills) * groups / trained if trained else math.nan
        for name, value in {"refills": refills, "dead_groups": 1 - trained / groups, "generated_ratio": ratio}.items():
            self._metrics["train"][f"sampling/{name}"].append(value)

    def _gather_steps(self, rows: int) -> tuple[list, list] | None:
        """What the reward functions of all processes passed to `log_extra` as step rewards and ends; None for none."""
        columns = [self._pending_extra_logs.get(name) for name in STEP_COLUMNS]
        present = None not in columns
        for name, column in zip(STEP_COLUMNS, columns, strict=True):
            if present and len(column) != rows:
                raise ValueError(
                    f"log_extra({name!r}, ...) got {len(column)} lists for {rows} completions. Give one for each "
                    "completion, from one reward function, and an empty one where there are no steps."
                )
        # Every process takes part, whether its own completions have steps or not: a gather waits for all.
        pairs = gather_object(list(zip(*columns, strict=True)) if present else [None] * rows)
        if not any(pairs):
            return None
        return [pair and pair[0] for pair in pairs], [pair and pair[1] for pair in pairs]

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: list | None,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list | None]:
        generate = super()._generate_single_turn
        with self.generating():
            if self.chunks is None or images or multimodal_fields:  # images are not laid out by row
                return generate(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
            return self.chunks.generate(lambda part: generate(part, None, {}, num_generations)[0], prompt_ids), None

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        fresh = self._buffered_inputs
        if fresh is None or fresh is before or not self.keeps_prompts_together():
            return inputs
        self._buffered_inputs = regrouped = self._regrouped(fresh)
        return regrouped[self._step % self.args.steps_per_generation]

    def _regrouped(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The generation batch's micro-batches with prompts together, each row in its own optimizer step."""
        accumulation = self.args.gradient_accumulation_steps
        window = min(accumulation, len(batches))
        if any(name in batches[0] for name in MULTIMODAL) or max(accumulation, len(batches)) % window:
            return batches
        windows = [batches[start : start + window] for start in range(0, len(batches), window)]
        return [batch for part in windows for batch in self._regrouped_window(part)]

    def _regrouped_window(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        prompts = torch.cat([batch["prompt_ids"] * batch["prompt_mask"] for batch in batches]).tolist()
        tokens = [
            int(length) if live else 0
            for batch in batches
            for length, live in zip(_trained(batch).sum(1).tolist(), self._alive(batch), strict=True)
        ]
        order = regroup([tuple(prompt) for prompt in prompts], tokens, len(batches))
        if self.loss_type != "bnpo":
            return reorder(batches, order)
        # bnpo divides by the tokens of the micro-batch: a row keeps the divisor of the one that it came from.
        batches = [_with_advantages_times(batch, 1 / _trained(batch).sum().clamp(min=1.0)) for batch in batches]
        regrouped = reorder(batches, order)
        return [_with_advantages_times(batch, _trained(batch).sum().clamp(min=1.0)) for batch in regrouped]

    def _alive(self, inputs: dict[str, Any]) -> list[bool]:
        alive = self.live_rows(inputs["advantages"]) if self.model.training else None
        return [True] * len(inputs["advantages"]) if alive is None else alive.tolist()

    def _live_rows(self) -> tuple[tuple[int, ...] | None, Tensor | None]:
        """Rows to forward, and the log-probs of the others, at which their ratio is 1; None where all are forwarded."""
        inputs = self._micro_batch
        alive = self._alive(inputs) if inputs is not None else []
        if inputs is None or all(alive):
            return None, None
        rows = tuple(row for row, live in enumerate(alive) if live)
        if not rows:  # every process needs a backward: the shortest row gives gradients of 0, not None
            lengths = inputs["completion_mask"].sum(1)
            rows = (int(torch.where(lengths > 0, lengths, lengths.max() + 1).argmin()),)
        return rows, inputs.get("old_per_token_logps")

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Any, Tensor | None]:
        forward = super()._get_per_token_logps_and_entropies
        rows = PaddedRows(input_ids, attention_mask, logits_to_keep, *self._live_rows())
        packed = None
        if not compute_aux_loss and all(value is None for value in multimodal.values()):
            packed = self._packed_logps(model, rows, batch_size)
            if packed is None and rows.live is not None:
                packed = forward_live(rows, lambda ids, mask: forward(model, ids, mask, logits_to_keep, None, True)[:2])
        if packed is None:
            arguments = (logits_to_keep, batch_size, compute_entropy, compute_aux_loss)
            scores = forward(model, input_ids, attention_mask, *arguments, **multimodal)
        else:
            scores = packed.logps, packed.entropies, None
        if packed is not None and self.model.training and torch.is_grad_enabled():
            self._metrics["train"]["packing/token_ratio"].append(input_ids.numel() / packed.tokens)
            self._metrics["train"]["packing/live_fraction"].append(len(rows.live or input_ids) / len(input_ids))
        self._form_sampler_ratio(scores[0].detach(), rows.live)
        return scores

    def _form_sampler_ratio(self, logps: Tensor, live: tuple[int, ...] | None) -> None:
        """For the loss to read, where the old policy's pass was dropped: the ratio that TRL forms after it."""
        inputs = self._micro_batch
        if inputs is None or SAMPLER_RATIO in inputs or not (self.model.training and self.drops_old_policy_pass):
            return
        rows = torch.tensor(live or range(len(logps)), device=logps.device)
        scored = logps[rows], inputs["sampling_per_token_logps"][rows], _trained(inputs)[rows].bool()
        ratio = sampler_ratio(
            *scored,
            mode=self.vllm_importance_sampling_mode,
            low=self.vllm_importance_sampling_clip_min,
            high=self.vllm_importance_sampling_clip_max,
        )
        # A skipped row's ratio is 1: of its log-probs nothing is known, and infinity times an advantage of 0 is NaN.
        inputs[SAMPLER_RATIO] = ratio.new_ones(len(logps), ratio.shape[1]).index_copy(0, rows, ratio)
        self._sampler_gap.add(*scored, ratio)
        if (self._step + 1) % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._log_sampler_gap()

    def _log_sampler_gap(self) -> None:
        self._warn_of_sampler(self._sampler_gap.differences())
        figures = self.accelerator.gather(self._sampler_gap.figures().unsqueeze(0))
        self._sampler_gap = SamplerGap()
        for name, value in joined(figures).items():
            self._metrics["train"][f"sampling/{name}"].append(value)

    def _packed_logps(self, model: Any, rows: PaddedRows, batch_size: int | None) -> Packed | None:
        forward = super()._get_per_token_logps_and_entropies
        base = base_model(self.accelerator.unwrap_model(model))
        max_tokens = None if batch_size is None else batch_size * rows.input_ids.shape[1]
        with self.accelerator.autocast():
            return self.logps(
                model, base, rows, lambda ids, mask, length: forward(base, ids, mask, length)[0], max_tokens=max_tokens
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        trls = self.loss_type in TRL_LOSSES
        # TRL's loss calls our forward without the micro-batch, so this is how it learns which rows to skip, and where
        # it puts the ratio to the sampler before the loss reads it.
        self._micro_batch = inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, inputs) if trls else self._compute_our_loss(model, inputs)
        finally:
            self._micro_batch = None
        if self.beta != 0.0 and self.model.training and self.accelerator.sync_gradients:
            rows = inputs["completion_ids"].shape[0] * self.current_gradient_accumulation_steps
            self.beta = self.next_beta(self._metrics["train"]["kl"][-1], rows * self.accelerator.num_processes)
        return loss

    def _compute_our_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training
        # TRL counts the tokens of a generation batch; an optimizer step may take a part of it.
        num_items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        accumulation_steps = self.current_gradient_accumulation_steps if training else 1
        if training:
            num_items = num_items * accumulation_steps / self.args.steps_per_generation
        loss_inputs, entropies = self._loss_inputs(model, inputs)
        result = self.policy_loss(loss_inputs, num_items=num_items, accumulation_steps=accumulation_steps)
        for name, values in {**result.metrics, "entropy": entropies}.items():
            self._log_average(name, values, loss_inputs.mask)
        return result.loss

    def _loss_inputs(self, model: Any, inputs: dict[str, Any]) -> tuple[LossInputs, Tensor]:
        """The policy's forward on one micro-batch, with TRL's names translated; and the entropies (B, T)."""
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            *_whole(inputs),
            compute_entropy=True,
            **{name: inputs[name] for name in MULTIMODAL if name in inputs},
        )
        advantages = inputs["advantages"]
        old_logps = inputs.get("old_per_token_logps")
        loss_inputs = LossInputs(
            logps=logps,
            old_logps=logps.detach() if old_logps is None else old_logps,
            advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
            mask=_trained(inputs),
            ref_logps=inputs.get("ref_per_token_logps"),
            importance_sampling_ratio=inputs.get(SAMPLER_RATIO),
        )
        return loss_inputs, entropies

    def _log_average(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Log the mean of (B, T) values over the tokens of all processes, or of (B, 1) values over the rows."""
        weights = mask if values.shape == mask.shape else torch.ones_like(values)
        sums = torch.stack([(values * weights).sum(), weights.sum()]).float()
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train" if self.model.training else "eval"][name].append(total / max(count, 1.0))

    def _log_advantage_metrics(self) -> None:
        rows = self._rewards.judged.numel()
        logged = list(self._logs["advantages"])[-rows:]
        if len(logged) < rows:
            return  # an evaluation batch that is larger than TRL's log
        advantages = torch.tensor(logged, dtype=torch.float64).view_as(self._rewards.judged)
        values = {
            f"advantages/{name}": value for name, value in self.advantage_metrics(self._rewards, advantages).items()
        }
        logged = self._metrics["train" if self.model.training else "eval"]
        share_with_absent_tasks(logged, values)
        for name, value in values.items():
            logged[name].append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            mark_unfinished(folder)
            if state := self.running_state():
                (folder / STATE_FILE).write_text(json.dumps(state))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.check_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.restore_adapters({})

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.restore_adapters({})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / STATE_FILE
            self.load_running_state(json.loads(path.read_text()) if path.exists() else {})

    def _replace_advantages(self, output: dict[str, Any], advantages: Tensor) -> None:
        """Put all processes' advantages, (P, G) or (P, G, T), in the place of TRL's: this rank's rows for the loss, as
        wide as its completions are padded, and one number for each completion of all ranks in the log.
        """
        local_rows = output["advantages"].shape[0]
        first = self.accelerator.process_index * local_rows
        local = advantages.flatten(0, 1)[first : first + local_rows]
        if local.dim() == 2:
            # Other ranks' longest completion may be longer or shorter: a negative padding cuts.
            local = F.pad(local, (0, output["completion_ids"].shape[1] - local.shape[1]))
        logged = self._logs["advantages"]
        in_log = self._rewards.per_completion(advantages).flatten().to(output["advantages"]).tolist()
        for _ in range(min(len(in_log), len(logged))):
            logged.pop()
        logged.extend(in_log)
        output["advantages"] = local.to(output["advantages"])
