"""The seam to TRL: the only module that names TRL's private methods, dictionary keys and attributes.

`TRLSeam` turns TRL's private data into our values, calls a public hook, and puts the answer back. Nothing of TRL is
copied or patched. When TRL moves, this file and `trl_fingerprints.json` change, and nothing else should have to.
"""

import inspect
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather, gather_object
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from grpo_plus.advantages import Rewards, checked
from grpo_plus.losses import TRL_LOSSES, LossInputs, PolicyLoss

TESTED_TRL = SpecifierSet(">=1.15,<1.17")

# Fingerprinted for each tested version. The first five are overridden and the next is called. Of the others the seam
# assumes what they do with the advantages, `_prepare_inputs` carries them to the loss, `log` writes them out, and where
# `_log_completion_extra` keeps the columns of a reward function.
RELIED_ON = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_compute_loss",
    "_save_checkpoint",
    "_load_optimizer_and_scheduler",
    "_get_per_token_logps_and_entropies",
    "_prepare_inputs",
    "log",
    "_log_completion_extra",
)

STATE_FILE = "grpo_plus_state.json"

TASK_SHARE = "advantages/task_share/"

# Columns of TRL's completions table that a reward function may fill through `log_extra` with lists, one per completion.
STEP_COLUMNS = ("step_rewards", "step_ends")

# Images and what belongs to them, under the names that TRL's dictionaries and its forward share.
MULTIMODAL = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[8:]


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


def _gather_labels(labels: list[str | None]) -> list[str] | None:
    """The rows' labels of all processes, in the order of the reward table; None where they have none."""
    if None in labels:
        return None
    return gather_object(labels)


class TRLSeam(GRPOTrainer):
    """GRPOTrainer with its decisions about advantages and loss as public hooks, for subclasses to override."""

    _tag_names = [*GRPOTrainer._tag_names, "grpo_plus"]  # noqa: RUF012  (TRL declares it so)
    _rewards: Rewards
    beta: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled and self.loss_type not in TRL_LOSSES:
            raise ValueError(
                f"loss_type={self.loss_type!r} does not add the router's auxiliary loss of a mixture-of-experts model, "
                f"but router_aux_loss_coef={self.router_aux_loss_coef}, from the arguments or the model's config. Set "
                "router_aux_loss_coef=0.0 in the arguments to train without it, or take one of TRL's losses."
            )

    def estimate_advantages(self, rewards: Rewards) -> Tensor | None:
        """Advantages of one generation batch.

        Args:
            rewards: of all processes, alike on each of them.

        Returns:
            (P, G) advantages; (P, G, T) for one per token, T at least the longest of `rewards.lengths`; or None to
            keep the ones that TRL computed. They are checked: another shape or a value that is not finite is an
            error. The completions table shows one number per completion: of advantages per token, their mean.
        """
        return None

    def task_of(self, example: dict[str, Any]) -> str | None:
        """Task of a row of the dataset, for estimators and metrics that keep tasks apart; None where there are none."""
        return None

    def prompt_key(self, prompt: Any) -> str | None:
        """What tells prompts apart across batches; None where nobody asks."""
        return None

    def advantage_metrics(self, rewards: Rewards, advantages: Tensor) -> dict[str, float]:
        """Numbers to log under `advantages/`.

        Args:
            advantages: (P, G) of all processes, as they reach the loss; of advantages per token, their mean.
        """
        return {}

    def next_beta(self, kl: float, completions: int) -> float:
        """Weight of the KL term after an optimizer step.

        Args:
            kl: the mean KL per token that the step's last micro-batch logged, over all processes.
            completions: completions that the step trained on, over all processes.
        """
        return self.beta

    def running_state(self) -> dict[str, Any]:
        """What must survive a checkpoint, as JSON; empty where nothing must."""
        return {}

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Take up what `running_state` returned before the checkpoint, {} where it left nothing there."""

    def policy_loss(self, inputs: LossInputs, *, num_items: Tensor, accumulation_steps: int) -> PolicyLoss:
        """Loss of one micro-batch, for a `loss_type` that TRL does not know.

        It is the whole loss: TRL adds no entropy bonus, and neither its entropy quantile nor its off-policy mask acts.

        Args:
            num_items: tokens that share the optimizer step, per process.
            accumulation_steps: micro-batches that share it.
        """
        raise NotImplementedError(f"loss_type={self.loss_type!r} is none of TRL's. Override policy_loss.")

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
        output = super()._generate_and_score_completions(inputs)
        advantages = self.estimate_advantages(self._rewards)
        if advantages is not None:
            advantages = checked("hook estimate_advantages", advantages, self._rewards)
            self._replace_advantages(output, advantages)
        self._log_advantage_metrics()
        return output

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

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        trls = self.loss_type in TRL_LOSSES
        loss = super()._compute_loss(model, inputs) if trls else self._compute_our_loss(model, inputs)
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
        completion_mask = inputs["completion_mask"]
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            completion_mask.shape[1],
            compute_entropy=True,
            **{name: inputs[name] for name in MULTIMODAL if name in inputs},
        )
        advantages = inputs["advantages"]
        old_logps = inputs.get("old_per_token_logps")
        loss_inputs = LossInputs(
            logps=logps,
            old_logps=logps.detach() if old_logps is None else old_logps,
            advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
            mask=completion_mask * inputs.get("tool_mask", 1),
            ref_logps=inputs.get("ref_per_token_logps"),
            importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
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
        mode = "train" if self.model.training else "eval"
        self._share_with_absent_tasks(mode, values)
        for name, value in values.items():
            self._metrics[mode][name].append(value)

    def _share_with_absent_tasks(self, mode: str, values: dict[str, float]) -> None:
        """A share of 0 for the batches of this log without the task: TRL averages over the values that are there."""
        logged = self._metrics[mode]
        shares = {name for name in (*logged, *values) if name.startswith(TASK_SHARE)}
        batches = max((len(logged[name]) for name in shares), default=0)
        for name in shares:
            values.setdefault(name, 0.0)
            logged[name].extend([0.0] * (batches - len(logged[name])))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = self.running_state()
        if state and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            unfinished = folder / f"{STATE_FILE}.tmp"
            unfinished.write_text(json.dumps(state))
            unfinished.replace(folder / STATE_FILE)

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
