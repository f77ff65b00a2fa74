"""The seam to TRL: overrides its private methods, turns its data into our values, and asks the hooks.

Nothing of TRL is copied or patched. `names.py` has TRL's names and the versions in which they were read.
"""

import inspect
import math
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import GRPOTrainer

from grpo_plus.advantages import Rewards, check_rewards, check_trls_range, checked
from grpo_plus.config.data import check_data
from grpo_plus.config.numbers import check_numbers
from grpo_plus.config.plain import own_fields
from grpo_plus.config.speed import check_liger
from grpo_plus.losses import TRL_LOSSES
from grpo_plus.models.adapters import adapter_values
from grpo_plus.models.pictures import image_token
from grpo_plus.qlora.checks import check_run
from grpo_plus.trainer.batches.demonstrations import Demonstrations
from grpo_plus.trainer.batches.prompts import sampler_of_prompts
from grpo_plus.trainer.batches.refill_buffer import RefillBuffer
from grpo_plus.trainer.batches.refills import Refills
from grpo_plus.trainer.figures import Figures
from grpo_plus.trainer.names import (
    complete_table_columns,
    dataset_prompts,
    gathered_labels,
    gathered_lengths,
    generations_of,
    log_advantages_anew,
    logged_advantages,
    multimodal,
    whole_rows,
)
from grpo_plus.trainer.rewards.calls import RewardCalls
from grpo_plus.trainer.rewards.evaluation import EvalRewards, both, listed, weighing
from grpo_plus.trainer.rewards.kl import KLInReward
from grpo_plus.trainer.rewards.overlap import Overlap
from grpo_plus.trainer.rewards.pass_at_k import pass_at_k_of
from grpo_plus.trainer.rewards.weights import RewardWeights
from grpo_plus.trainer.rollouts.generation import generating
from grpo_plus.trainer.rollouts.kept import KeptSets
from grpo_plus.trainer.rollouts.rollout_log import RolloutLog
from grpo_plus.trainer.rollouts.sampler_ratio import SamplerRatio
from grpo_plus.trainer.rollouts.shown import Shown
from grpo_plus.trainer.rollouts.steps import gathered_steps, own_turns, reads_turns
from grpo_plus.trainer.rollouts.written import Generation, Written
from grpo_plus.trainer.safety.determinism import prepare_cublas
from grpo_plus.trainer.safety.guard import Guard
from grpo_plus.trainer.saving.position import RandomStates
from grpo_plus.trainer.scoring import ScoringSeam
from grpo_plus.trainer.speed import speed_of
from grpo_plus.trainer.update.micro_batches import MicroBatches, read
from grpo_plus.trainer.update.pictures import knows_rows
from grpo_plus.trainer.update.regrouping import regrouped
from grpo_plus.trainer.update.step_figures import step_figures_of
from grpo_plus.trainer.vllm import adapters_alone


class TRLSeam(ScoringSeam):
    """GRPOTrainer that asks the hooks: translates TRL's private data for the hooks, and their answers for TRL.

    Attributes:
        speed: what makes the run cheaper.
        rewards: of the last generation batch, of all processes.
        prompt_sampler: what draws the prompts of a generation batch; None: TRL.
    """

    _tag_names = [*GRPOTrainer._tag_names, "grpo_plus"]  # noqa: RUF012  (TRL declares it so)
    rewards: Rewards
    _tool_masks: list[list[int]] | None = None
    _buffered_inputs: list[dict[str, Any]] | None
    beta: float

    def __init__(self, *args: Any, eval_reward_funcs: Any = None, **kwargs: Any) -> None:
        given = inspect.signature(GRPOTrainer).bind(*args, **kwargs).arguments
        added = listed(eval_reward_funcs)
        check_numbers(given.get("args"))
        check_liger(given.get("args"))
        check_data(given, added)
        prepare_cublas(given.get("args"))
        check_run(*(given.get(name) for name in ("model", "args", "quantization_config", "peft_config")))
        exact = adapter_values(given["model"])
        with weighing(given.get("args"), len(added)), adapters_alone(given.get("args")):
            super().__init__(**(both(given, added) if added else given))
        self._eval_rewards = EvalRewards(self, given=len(listed(given.get("reward_funcs"))), added=len(added))
        self.plus = own_fields(self.args)
        self._pass_at_k = pass_at_k_of(self.plus, self._eval_rewards.names)
        self._guard = Guard(self, self.plus.max_nonfinite_steps)
        self._adapters_as_trained(exact)
        self._warn_of_what_no_checkpoint_holds()
        self.speed = speed_of(self, self.plus)
        self._figures = Figures(self)
        self._overlap = Overlap(self, self.plus.overlap_rewards)
        self._reward_calls = RewardCalls(self, self.plus.reward_timeout, self._overlap)
        schedule: Any = self.plus.reward_weight_schedule  # a dictionary after the configuration's checks
        self._reward_weights = RewardWeights(self, schedule, in_evaluation=not self._eval_rewards.are_own)
        self._known = MicroBatches()
        self._buffer = RefillBuffer(self.plus.refill_buffer)
        self._refills = Refills(self, self.plus.max_refills, self._buffer)
        self.prompt_sampler = sampler_of_prompts(self)
        self._demonstrations = Demonstrations(self)
        self._kl = KLInReward(self)
        self._kept = KeptSets(self, self.plus.truncated_sampling, tells=self.has_own_fields)
        self._sampler = SamplerRatio(self, in_update=self.speed.drops_old_policy_pass)
        self._step_figures = step_figures_of(self)
        self._rollout_log = RolloutLog(self)
        self._generations: list[Generation] = []  # of the batch that is being generated

    def _begins_training(self) -> None:
        for part in (self._kept, self._refills, self.prompt_sampler, self._sampler, self._step_figures):
            if part is not None:
                part.reset()

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        self._reward_weights.begin_batch()
        with self._reward_calls.checked(inputs, prompts, completions, completion_ids_list):
            rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rewards_per_func = self._demonstrations.judged(rewards_per_func)
        tasks = [self.task_of(example) for example in inputs]
        if tasks[0] is not None and "task" not in (*self._pending_extra_logs, *self.reward_func_names):
            self._log_completion_extra("task", tasks)
        lengths, full_lengths = gathered_lengths(self, completion_ids_list, self._tool_masks)
        turns = None
        if reads_turns(self.plus):
            turns = own_turns(self, prompts, completions, completion_ids_list, self._tool_masks)
        steps = gathered_steps(self, inputs, turns)
        prompts = dataset_prompts(self, inputs, prompts)
        self.rewards = Rewards.from_table(
            rewards_per_func,
            num_generations=generations_of(self),
            weights=self.reward_weights,
            names=tuple(self.reward_func_names),
            lengths=lengths,
            tasks=gathered_labels(tasks),
            prompts=gathered_labels([self.prompt_key(prompt) for prompt in prompts]),
            steps=steps,
            full_lengths=full_lengths,
        )
        if columns := complete_table_columns(self, len(prompts)):
            self._figures.warn(
                "columns",
                f"log_extra got no list of one value per completion for {', '.join(map(repr, columns))}. The table of "
                "completions shows nothing where a value is missing.",
            )
        if self.rewards.values.isinf().any():  # every process sees the whole table, so all of them are here
            check_rewards(self.rewards, gather_object(completions))
        return rewards_per_func

    def _generate(self, prompts: list) -> tuple:
        self._generations = []
        self._overlap.generates(prompts)
        with self._kept.recorded() as kept, self._sampler.recorded() as sampled:
            generated = super()._generate(prompts)
        self._overlap.generated(generated)
        self.speed.agree()
        written = Written.of(self._generations, *self._demonstrations.drawn(*generated[:3]))
        self._kept.take(kept, written, generated[6])
        self._sampler.take(sampled, written)
        self._tool_masks = generated[2]
        return generated

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list | None]:
        return self._demonstrations.joined(self._generate_drawn, *args, **kwargs)

    def _generate_drawn(
        self, prompt_ids: list[list[int]], images: list | None, fields: dict[str, Any], *others: Any, **named: Any
    ) -> tuple[list[list[int]], list | None]:
        generate = super()._generate_single_turn
        exact = generating(self) if self.has_own_fields else nullcontext()
        shown = Shown(prompt_ids, images, fields, image_token(self.model.config))

        def complete(part: Shown, first: int = 0) -> tuple[list[list[int]], list | None]:
            with self.speed.seeing(part.by_row), self._overlap.part(first) as written:
                return written(generate(part.prompt_ids, part.images, part.fields, *others, **named))

        followed = self._rollout_log.followed(len(prompt_ids), self._overlap.watch)
        with exact, self.speed.adapters.held(), followed:
            if shown.why_whole is not None and self.speed.chunks is not None:
                warnings.warn(f"generation_chunk_size: all rows at once. {shown.why_whole}.", stacklevel=2)
            if self.speed.chunks is None or shown.why_whole is not None:
                completion_ids, logps = complete(shown)
            else:
                parts = self.speed.chunks.generate(lambda rows: complete(shown[rows], rows.start)[0], prompt_ids)
                completion_ids, logps = parts, None
        self._generations.append(Generation(prompt_ids, list(completion_ids)))  # TRL cuts ends in its own list
        return completion_ids, logps

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        score = super()._generate_and_score_completions
        sampler = self.prompt_sampler if self.model.training else None
        if sampler is not None:
            inputs = sampler.replaced(inputs)

        def generate(rows: list[dict[str, Any]]) -> tuple[dict[str, Any], Rewards]:
            with self._demonstrations.of(rows), self._overlap.batch(rows):
                scored = self._kl.added_to(self._refills.scored(score(rows)))
                output = self._demonstrations.added_to(self._sampler.added_to(self._kept.added_to(scored)))
            if sampler is not None:
                sampler.take(self._demonstrations.of_the_policy(self.rewards))
            return output, self.rewards

        with self._sampler.left_to_the_update():
            if self.model.training and (self.plus.max_refills or self.plus.refill_buffer):
                output, self.rewards = self._refills.fill_up(inputs, generate)
            else:
                output, _ = generate(inputs)
        output = self._kept.summed_up(output)
        if not self.model.training and self._pass_at_k is not None:
            self._pass_at_k.add(self.rewards)
        if not self.model.training and self._eval_rewards.are_own:
            return output  # estimators and modifiers may name the training's rewards
        with self._figures.guarded("The comparison of sampler and policy"):
            self._sampler.compare(output)
        advantages = self.estimate_advantages(self.rewards)
        if advantages is None:
            check_trls_range(self.rewards, self.scale_rewards, self.multi_objective_aggregation)
            trained = logged_advantages(self, self.rewards.judged)
        else:
            advantages = checked("hook estimate_advantages", advantages, self.rewards)
            trained = self._replace_advantages(output, advantages)
        if trained is not None:
            self._figures.log_advantages(self.rewards, lambda: self.advantage_metrics(self.rewards, trained))
        return self._demonstrations.settled(output)

    def _replace_advantages(self, output: dict[str, Any], advantages: Tensor) -> Tensor:
        """Replace TRL's advantages: for the loss by this process's rows, in the log by one number per completion.

        Args:
            output: TRL's dictionary of this process's rows.
            advantages: (P, G) or (P, G, T) of all processes.

        Returns:
            (P, G) the numbers in the log, float64 on the CPU.
        """
        local_rows = output["advantages"].shape[0]
        first = self.accelerator.process_index * local_rows
        local = advantages.flatten(0, 1)[first : first + local_rows]
        if local.dim() == 2:
            # Other ranks' longest completion may be longer or shorter: a negative padding cuts.
            local = F.pad(local, (0, output["completion_ids"].shape[1] - local.shape[1]))
        per_completion = self.rewards.per_completion(advantages).to(output["advantages"]).cpu().double()
        log_advantages_anew(self, per_completion)
        output["advantages"] = local.to(output["advantages"])
        return per_completion

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Evaluate, judged by `eval_reward_funcs` where there are any."""
        with self._eval_rewards.judging():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate one dataset; its pass@k are metrics like its loss."""
        if self._pass_at_k is not None:
            self._pass_at_k.begin(dataloader.dataset)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._pass_at_k is not None:
            figures = self._pass_at_k.figures()
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._eval_rewards.left():
            super()._save_checkpoint(model, trial)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        fresh = self._buffered_inputs
        if fresh is None or fresh is before or not self.speed.reads_rows or not knows_rows(fresh[0]):
            return inputs
        rows = read(fresh, self._alive)
        if self.speed.keeps_prompts_together:
            accumulation_steps = self.args.gradient_accumulation_steps
            fresh, rows = regrouped(fresh, rows, accumulation_steps=accumulation_steps, loss_type=self.loss_type)
        self._buffered_inputs = fresh
        self._known.keep(fresh, rows)
        return fresh[self._step % self.args.steps_per_generation]

    def _resumes_within_batch(self, inputs: dict[str, Any]) -> None:
        # An update that follows a generation knows which LoRA layers share an input, and computes them together: the
        # same sums in another order. A forward without effect lets a resumed run know as much.
        if self.speed.fuses_lora:
            with torch.no_grad(), RandomStates.kept(), self.speed.adapters.held():
                self._get_per_token_logps_and_entropies(self.model, *whole_rows(inputs), **multimodal(inputs))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        trls = self.loss_type in TRL_LOSSES
        self._step_figures.begin()
        # TRL's loss calls our forward without the micro-batch. Here our forward finds which rows to skip, and leaves
        # the ratio to the sampler for the loss.
        self._micro_batch = inputs = dict(inputs)
        try:
            with self._kl.left_out_of_the_loss(inputs):
                loss = super()._compute_loss(model, inputs) if trls else self._compute_our_loss(model, inputs)
        finally:
            self._micro_batch = None
        self._step_figures.take(inputs)
        if self.accelerator.sync_gradients or not self.model.training:
            kl = self._step_figures.log()
            # None: the step has no token. Not finite: the guard skips the step.
            if self.beta != 0.0 and self.model.training and kl is not None and math.isfinite(kl):
                rows = inputs["completion_ids"].shape[0] * self.current_gradient_accumulation_steps
                self.beta = self.next_beta(kl, rows * self.accelerator.num_processes)
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
            self._step_figures.add(name, values, loss_inputs.mask)
        return result.loss
