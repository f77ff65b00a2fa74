"""GRPOPlusConfig: TRL's GRPOConfig with a handful of fields more, checked at construction."""

from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig

from grpo_plus.advantages import ESTIMATORS
from grpo_plus.advantages.schedule import check_schedule
from grpo_plus.config.advantages import check_advantages, check_refills
from grpo_plus.config.demonstrations import check_demonstrations
from grpo_plus.config.determinism import check_determinism
from grpo_plus.config.evaluation import check_pass_at_k
from grpo_plus.config.guard import check_guard
from grpo_plus.config.help import told
from grpo_plus.config.keywords import as_choice, as_dictionary
from grpo_plus.config.kl import check_kl_in_reward
from grpo_plus.config.losses import check_kl_target, check_loss
from grpo_plus.config.numbers import check_numbers, check_reward_timeout
from grpo_plus.config.overlap import check_overlap
from grpo_plus.config.prompts import check_prompt_sampler
from grpo_plus.config.sampling import check_truncated_sampling, check_vllm
from grpo_plus.config.speed import check_adapter_dtype, check_liger, check_speed
from grpo_plus.losses import LOSSES
from grpo_plus.version import __version__


@dataclass
class GRPOPlusConfig(GRPOConfig):
    """TRL's GRPOConfig with fields for advantages, losses and speed.

    Left at its defaults it trains what GRPOConfig trains.

    Args:
        advantage_estimator: a name that `grpo-plus ls advantages` prints, a name registered with
            `grpo_plus.advantages.register`, a dotted path to a function, or in Python the function itself. None leaves
            TRL's `scale_rewards` and `multi_objective_aggregation` in charge. A name excludes other values than the
            defaults for these two.
        advantage_kwargs: the estimator's hyper-parameters, such as {"ddof": 0}. On the command line: JSON.
        advantage_modifiers: what else happens to the rewards and advantages, in order. Each is a name with its
            keywords: {"filter_zero_std": {"by": "correctness"}, "clip": {"max": 5.0}}. The names stand in
            `grpo_plus.advantages.modifiers`.

        max_refills: dynamic sampling. Up to so many further generation batches replace groups whose advantages are all
            0, which teach nothing. 0: off. A refill draws a whole batch of prompts from `train_dataset`, by seed and
            step. Live groups that are not needed are lost, and groups that are dead after the last refill stay. With
            `filter_zero_std` by the correctness, the groups of DAPO are replaced
            (https://huggingface.co/papers/2503.14476, section 3.2). DAPO has no bound. Estimators, their memory,
            `advantages/` and the table of completions see the final batch. TRL's own figures in the log describe
            everything that was generated, and `sampling/` says what the refills cost.
        refill_buffer: live groups of the last so many generation batches take the place of groups whose advantages are
            all 0, before `max_refills` generates others. 0: off. A group comes with the log-probabilities of the policy
            that sampled it, so that its importance ratio is exact and the loss's clip bounds it. It comes once. Groups
            that a refill has generated and nobody needed come first, then the newest. Advantages are computed anew in
            the batch. It costs a forward of every generation batch, unless TRL makes it anyway. `sampling/buffered_*`
            in the log tells of it, and a checkpoint holds the groups.
        prompt_sampler: what draws the prompts of a batch. None: TRL, each prompt once in an epoch. "pass_rate", or with
            keywords {"pass_rate": {"floor": 0.2}}, draws them in proportion to p * (1 - p) of their last visits, where
            p is the share of their completions that pass. Prompts that nobody has tried come first. Its keywords are
            `reward` (the function that says what passes; the only one by default), `threshold` (1.0, the least reward
            that passes), `floor` (0.1, the share of the draws that is uniform) and `decay` (0.5, what a visit leaves of
            the earlier counts). An epoch has as many draws as ever, and a checkpoint holds the counts. On the command
            line: JSON.
        task_column: the dataset column that names each prompt's task. `ema_task` and `popart` then keep one scale per
            task, and the log shows each task's share of the advantages. None: the whole run is one task.
        reward_weight_schedule: weights of reward functions that change over the run, by name: {"format": [1.0, 0.1]}. A
            list holds two or more weights at equal distances over the run, and the weight is linear between two of
            them. It takes the place of the function's weight in `reward_weights`. The optimizer step decides, so a
            resumed run goes on with the same weights; a run that is made longer stretches the schedule, as that of the
            learning rate. Evaluations have the last weights throughout, so that `eval_reward` can be compared.
        demonstration_column: the dataset column with completions that take the last places of their prompt's group, up
            to `num_generations`. The policy does not draw these. A value is None, text, messages of the assistant,
            {"completion_ids": [...], "logprobs": [...]} of the policy that wrote them, or a list of these. The reward
            functions judge them like the others. Evaluations have none. A completion with log-probabilities has an
            importance ratio in any loss.
        demonstration_loss: how completions without log-probabilities are trained: "imitation", "luffy" or "chord", of
            `grpo_plus.losses.demonstrations`; with keywords {"chord": {"mu": 0.1}}. None: "imitation".
        reward_timeout: seconds that one call of a reward function may take. A call that takes longer ends the run with
            an error that names the function. The functions then run in a thread of their own, where timeouts by
            signals (SIGALRM) do not work. Reward models are not timed. None: no bound, and no thread.
        overlap_rewards: lets reward functions that wait, for a server or a sandbox, judge beside the rest of a step.
            None: TRL calls them one after another when all else is done. "batch": each gets TRL's one call, in a thread
            of its own, as soon as all completions are written. The calls run beside each other and beside the passes
            for log-probabilities. "groups": one call for each prompt, all at the same time, and each as soon as the
            prompt's completions are written. These run beside the generation of other prompts, too. A reward must then
            depend on the completions of its prompt alone. {"judge": "groups"} names some functions and leaves the
            others to TRL. Tokens, rewards, log and random states stay the same. It is not for functions that use the
            model, a GPU, torch's random numbers or signals. Reward models keep their place.
        health_warnings: whether a `RewardHealthCallback` with its default thresholds reads the log, and warns once per
            cause where the run cannot learn or learns something else. It changes nothing in the training.
        truncated_sampling: over which tokens log-probabilities are taken where the sampler draws from a part of the
            vocabulary, as with top_p, top_k, min_p or suppressed tokens. None: over all tokens, as in TRL, although
            that policy did not sample. "correct": over the tokens that could be drawn, for the policy, the old policy
            and the reference. Ratio, gradient, KL and entropy are then those of the policy that sampled. It needs
            transformers' plain generation, and refuses what changes the odds between the tokens that are left, such as
            a repetition penalty.
        eval_pass_at_k: numbers of tries k, such as [1, 4, 8]. Each evaluation then logs `eval_pass@k`, the chance that
            one of k completions of a prompt is right. The mean over the prompts is estimated without bias from
            `num_generations_eval` completions of each, which must be k or more (Chen et al.,
            https://huggingface.co/papers/2107.03374). `metric_for_best_model="pass@4"` works. None: not logged.
        eval_pass_reward: the reward function that says which completions are right. None: the only one.
        eval_pass_threshold: the least reward of a completion that is right.
        loss_kwargs: hyper-parameters of a `loss_type` that TRL lacks. On the command line: JSON. Such a loss does not
            read TRL's fields (`epsilon`, `delta`, ...).
        loss_reduction: how a loss that TRL lacks is summed, in the words of `grpo_plus.losses.reduce`. None: as its
            authors do.
        kl_estimator: "k1", "k2" or "k3", of the KL to the reference under a loss that TRL lacks.
        kl_target: the KL per token that `beta` is steered towards, under any loss. `beta` then is only the start and
            moves after each optimizer step (Ziegler et al.'s controller). None: `beta` stays.
        kl_horizon: how slowly `beta` moves, in completions. A KL that is off by 20 % or more changes `beta` by about a
            fifth in so many completions. One step changes `beta` by a fifth at most.

        packing: how rows go through the model. "shared_prompt": without padding, and each prompt once for all of its
            completions. "padding_free": without padding. "none": as TRL does. "auto": the first of these that a check
            on the run's first rows finds exact; on a GPU the fastest of those, timed in the first update. A form that
            is named and is not exact on the model is an error.
        skip_zero_advantage: whether completions whose advantages are 0 stay out of the training forward. None: where
            they have no gradient. In the log their entropy counts as the mean of the others, and their ratio as 1.
        skip_old_policy_pass: whether, with vLLM, the update's own log-probabilities take the place of a forward that
            TRL makes for them beforehand. None: where both come from the same policy, because no update lies between.
            The log's `sampling/` then describes the completions that are forwarded.
        vllm_lora_sync: whether vLLM is sent the adapters alone, as LoRA requests, in place of merged weights. vLLM then
            holds the base that it loaded itself, which may be in 4 bits (`vllm_mode="server"`: start the server with
            `--enable-lora`). Not run against vLLM. `docs/qlora.md` says what it takes.
        logprob_backend: what computes log-probabilities in packed rows. "trl": TRL's fused head. "torch": a frozen head
            in a single pass, two matrix products in place of three. "triton": the same on a GPU, with one kernel for
            all between the products. "auto": where the head is frozen and no entropy is trained, "torch" on a CPU and
            the faster of "triton" and "trl" on a GPU; else "trl".
        lora_backend: what computes linear layers with LoRA during training. "peft": PEFT. "torch": one step of autograd
            without PEFT's copies of the input and output. It takes plain adapters without dropout, on layers that are
            in 4 bits or not quantized. "auto": "torch" wherever the layers allow; on a GPU the faster one.
        generation_loop: what decodes where transformers generates. "grouped": each distinct prompt goes through the
            model once for all of its completions, with its images. A finished row leaves the batch, and the cache grows
            in place. The same seed gives the same tokens. "trl": transformers' own loop, as in TRL. "auto": "grouped"
            wherever it gives the same tokens, and "trl" elsewhere, with a warning that names the reason. "grouped" is
            an error where it does not. Nothing changes with vLLM, continuous batching or a rollout function.
        generation_chunk_size: rows that a process generates for at a time, for a smaller cache. None: its whole
            generation batch, as TRL. "auto": as many as the free memory of a CUDA device holds by the planner's count,
            and half as many where the memory runs out all the same; on other devices all. A part holds whole groups of
            equal prompts, and so fewer rows, wherever that takes no further part. Greedy completions stay the same.
            Sampled completions are other draws of the same distribution.
        offload_activations: whether the inputs of checkpointed layers wait for their backward in pinned memory of the
            host. They leave a CUDA device while their layer computes, and come back one layer ahead of their backward.
            The numbers are the same. One input is B * L * H numbers, and there is one per layer.
        max_tokens_per_pass: most tokens that an update sends through the model at once. A micro-batch of more tokens
            takes several passes. The backward holds one pass at a time, and computes every pass but the last again. The
            completions of a prompt stay in one pass where they fit. A longer prompt goes through in parts where the
            model's cache carries them exactly, and a completion is never cut. The loss is that of all rows together,
            and the gradients differ by rounding alone. None: one pass, as TRL. "auto": as many tokens as the free
            memory of a CUDA device holds by the planner's count. Where the memory runs out all the same, the passes are
            halved and the micro-batch of text is computed again. Other devices take one pass. A prompt with images
            stays whole, and rows with images that stay padded take one pass.
        mlp_tile_tokens: number of tokens that MLPs and norms see at a time. Longer rows go through them in tiles, so
            that a layer's peak in backward is its attention's. "auto": 4096 where gradient checkpointing is on and not
            reentrant, which costs no further forward of the MLP in most models. None or 0: all tokens at once. A number
            acts without checkpointing, too: MLPs and norms are then computed once more, and only their inputs are kept.
            Generation does not change.
        adapter_dtype: of the adapters and of Adam's state, "float32" or "bfloat16". None: float32 above a base that
            bitsandbytes quantized, else as PEFT made them. TRL takes bfloat16 above such a base, where a step of a
            small learning rate rounds to nothing.

        max_nonfinite_steps: optimizer steps in a row that may have a loss or a gradient that is not finite. Each is
            skipped: the weights and Adam's moments stay, and `guard/skipped_steps` in the log counts it. The last one
            ends the run with an error that names its prompts, after a checkpoint, and with its rows in a file.
        deterministic: whether two runs of one script end with the same bits, on the same machine. torch, cuBLAS and
            cuDNN then take deterministic algorithms while `train()` runs, and no choice depends on the clock or on
            free memory: a `max_tokens_per_pass` of "auto" is one pass. What cannot be repeated is refused. Each
            checkpoint's line in the log has a hash of its weights. `docs/reliability.md` says what it takes.

    Raises:
        ValueError: an unknown estimator, loss or keyword, a keyword's value out of range, or a setting of TRL's that
            would have no effect.
    """

    advantage_estimator: str | None = told("advantage_estimator", None)
    advantage_kwargs: dict[str, Any] | str | None = told("advantage_kwargs", None)
    advantage_modifiers: dict[str, Any] | str | None = told("advantage_modifiers", None)
    max_refills: int = told("max_refills", 0)
    refill_buffer: int = told("refill_buffer", 0)
    prompt_sampler: dict[str, Any] | str | None = told("prompt_sampler", None)

    task_column: str | None = told("task_column", None)
    reward_weight_schedule: dict[str, Any] | str | None = told("reward_weight_schedule", None)
    demonstration_column: str | None = told("demonstration_column", None)
    demonstration_loss: dict[str, Any] | str | None = told("demonstration_loss", None)
    reward_timeout: float | None = told("reward_timeout", None)
    overlap_rewards: dict[str, Any] | str | None = told("overlap_rewards", None)
    health_warnings: bool = told("health_warnings", True)
    truncated_sampling: str | None = told("truncated_sampling", None)
    eval_pass_at_k: list[int] | None = told("eval_pass_at_k", None)
    eval_pass_reward: str | None = told("eval_pass_reward", None)
    eval_pass_threshold: float = told("eval_pass_threshold", 1.0)
    loss_kwargs: dict[str, Any] | str | None = told("loss_kwargs", None)
    loss_reduction: str | None = told("loss_reduction", None)
    kl_estimator: str = told("kl_estimator", "k3")

    kl_target: float | None = told("kl_target", None)
    kl_horizon: int = told("kl_horizon", 10_000)

    packing: str = told("packing", "auto")
    skip_zero_advantage: bool | None = told("skip_zero_advantage", None)
    skip_old_policy_pass: bool | None = told("skip_old_policy_pass", None)
    vllm_lora_sync: bool = told("vllm_lora_sync", False)
    generation_loop: str = told("generation_loop", "auto")
    generation_chunk_size: int | str | None = told("generation_chunk_size", None)
    offload_activations: bool = told("offload_activations", False)
    max_tokens_per_pass: int | str | None = told("max_tokens_per_pass", "auto")
    mlp_tile_tokens: int | str | None = told("mlp_tile_tokens", "auto")
    adapter_dtype: str | None = told("adapter_dtype", None)

    logprob_backend: str = told("logprob_backend", "auto")

    lora_backend: str = told("lora_backend", "auto")

    max_nonfinite_steps: int = told("max_nonfinite_steps", 5)
    deterministic: bool = told("deterministic", False)

    def __post_init__(self) -> None:
        """Check the fields of ours and those of TRL's that they meet."""
        check_numbers(self)
        if self.advantage_estimator is not None:
            self.advantage_estimator = ESTIMATORS.name_of(self.advantage_estimator)
        self.loss_type: str = LOSSES.name_of(self.loss_type)
        super().__post_init__()
        check_reward_timeout(self)
        check_overlap(self)
        for name in ("loss_kwargs", "advantage_kwargs", "advantage_modifiers"):
            setattr(self, name, as_dictionary(name, getattr(self, name)))
        check_loss(self)
        check_kl_target(self)
        check_speed(self)
        check_liger(self)
        check_truncated_sampling(self)
        check_vllm(self)
        self.demonstration_loss = as_choice("demonstration_loss", self.demonstration_loss)
        check_demonstrations(self)
        check_adapter_dtype(self)
        check_guard(self)
        check_determinism(self)
        check_pass_at_k(self)
        schedule = as_dictionary("reward_weight_schedule", self.reward_weight_schedule)
        self.reward_weight_schedule = check_schedule(schedule)
        check_refills(self)
        check_prompt_sampler(self)
        check_advantages(self)
        check_kl_in_reward(self)

    def describe(self) -> str:
        """What is active, in one line."""
        if self.advantage_estimator is None:
            advantages = f"TRL's (scale_rewards={self.scale_rewards}, {self.multi_objective_aggregation})"
        else:
            given = as_dictionary("advantage_kwargs", self.advantage_kwargs)
            keywords = ", ".join(f"{name}={value}" for name, value in given.items())
            advantages = " + ".join((f"{self.advantage_estimator}({keywords})", *(self.advantage_modifiers or {})))
        refills = f"; up to {self.max_refills} refills" if self.max_refills else ""
        refills += f"; groups of the last {self.refill_buffer} batches" if self.refill_buffer else ""
        prompts = f"; prompts by {', '.join(self.prompt_sampler)}" if self.prompt_sampler else ""
        return (
            f"grpo_plus {__version__}: advantages {advantages}; loss {self.loss_type}; packing {self.packing}{refills}"
            f"{prompts}"
        )
