"""GRPOPlusConfig: TRL's GRPOConfig with a handful of fields more, checked at construction."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from grpo_plus.advantages import ESTIMATORS
from grpo_plus.config.advantages import check_advantages, check_refills
from grpo_plus.config.determinism import check_determinism
from grpo_plus.config.evaluation import check_pass_at_k
from grpo_plus.config.guard import check_guard
from grpo_plus.config.keywords import as_dictionary
from grpo_plus.config.losses import check_kl_target, check_loss
from grpo_plus.config.numbers import check_numbers, check_reward_timeout
from grpo_plus.config.sampling import check_truncated_sampling
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
        task_column: the dataset column that names each prompt's task. `ema_task` and `popart` then keep one scale per
            task, and the log shows each task's share of the advantages. None: the whole run is one task.
        reward_timeout: seconds that one call of a reward function may take. A call that takes longer ends the run with
            an error that names the function. The functions then run in a thread of their own, where timeouts by
            signals (SIGALRM) do not work. Reward models are not timed. None: no bound, and no thread.
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

    advantage_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Advantage estimator: a name from `grpo-plus ls advantages` or a dotted path to a function. If "
            "unset, `scale_rewards` and `multi_objective_aggregation` decide."
        },
    )
    advantage_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of the advantage estimator, as JSON: '{\"ddof\": 0}'."},
    )
    advantage_modifiers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'What else happens to rewards and advantages, in order, as JSON: \'{"clip": {"max": 5.0}}\'. '
            "Known: gate, pods, difficulty, filter_zero_std, clip."
        },
    )
    max_refills: int = field(
        default=0,
        metadata={
            "help": "Dynamic sampling: up to how many further generation batches replace groups whose advantages are "
            "all 0. 0: off."
        },
    )

    task_column: str | None = field(
        default=None,
        metadata={"help": "Dataset column with each prompt's task, for estimators and metrics that keep tasks apart."},
    )
    reward_timeout: float | None = field(
        default=None,
        metadata={
            "help": "Seconds that one call of a reward function may take before the run ends with its name; unset: no "
            "bound."
        },
    )
    health_warnings: bool = field(
        default=True,
        metadata={
            "help": "Warn, once per cause and with what to try, where the log says that the run cannot learn, or "
            "learns something else than it should."
        },
    )
    truncated_sampling: str | None = field(
        default=None,
        metadata={
            "help": "correct: take log-probabilities over the tokens that top_p, top_k, min_p and the like have left; "
            "unset: over the whole vocabulary, as in TRL."
        },
    )
    eval_pass_at_k: list[int] | None = field(
        default=None,
        metadata={
            "help": "Log eval_pass@k for these k: the chance that one of k completions is right. Each needs as many "
            "num_generations_eval."
        },
    )
    eval_pass_reward: str | None = field(
        default=None,
        metadata={"help": "Reward function that says which completions are right; unset: the only one."},
    )
    eval_pass_threshold: float = field(default=1.0, metadata={"help": "Least reward of a completion that is right."})
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of a loss that TRL lacks (`grpo-plus ls losses`), as JSON: '{\"c\": 3.0}'."
        },
    )
    loss_reduction: str | None = field(
        default=None,
        metadata={
            "help": "How a loss that TRL lacks is summed; unset: as its authors do. Known: token-mean, "
            "global-token-mean, seq-mean-token-mean, seq-mean-token-sum, seq-mean-token-sum-norm."
        },
    )
    kl_estimator: str = field(
        default="k3",
        metadata={"help": "KL estimator k1, k2 or k3 of a loss that TRL lacks, where beta is not 0. TRL's use k3."},
    )

    kl_target: float | None = field(
        default=None, metadata={"help": "KL per token that beta adapts to; unset: beta stays as it is."}
    )
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Completions after which a KL far from kl_target has changed beta by a fifth."},
    )

    packing: str = field(
        default="auto",
        metadata={
            "help": "How rows go through the model: shared_prompt, padding_free, none (as TRL), or auto: the first of "
            "these that is exact."
        },
    )
    skip_zero_advantage: bool | None = field(
        default=None,
        metadata={"help": "Skip completions whose advantages are 0; unset: where they have no gradient."},
    )
    skip_old_policy_pass: bool | None = field(
        default=None,
        metadata={
            "help": "With vLLM: the update's own log-probabilities serve as the old policy's; unset: where they are "
            "the same."
        },
    )
    generation_loop: str = field(
        default="auto",
        metadata={
            "help": "What decodes where transformers generates: grouped (each prompt once, finished rows leave), trl, "
            "or auto: grouped wherever it gives the same tokens."
        },
    )
    generation_chunk_size: int | str | None = field(
        default=None,
        metadata={
            "help": "Rows that a process generates for at a time; auto: as many as the free memory of the GPU holds; "
            "unset: its whole generation batch."
        },
    )
    offload_activations: bool = field(
        default=False,
        metadata={
            "help": "Keep the inputs of checkpointed layers in the host's memory between forward and backward, for "
            "longer rows on a GPU."
        },
    )
    max_tokens_per_pass: int | str | None = field(
        default="auto",
        metadata={
            "help": "Most tokens that an update sends through the model at once; auto: as many as the free memory of "
            "the GPU holds; None: a whole micro-batch."
        },
    )
    mlp_tile_tokens: int | str | None = field(
        default="auto",
        metadata={
            "help": "Most tokens that MLPs and norms see at a time in an update; auto: 4096 under gradient "
            "checkpointing that is not reentrant; 0: all."
        },
    )
    adapter_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Dtype of the adapters and of Adam's state: float32, bfloat16 (as TRL above a quantized base), or "
            "unset: float32 above a quantized base, else as PEFT made them."
        },
    )

    logprob_backend: str = field(
        default="auto",
        metadata={
            "help": "What computes log-probabilities in packed rows: trl, torch or triton (frozen heads), or auto."
        },
    )

    lora_backend: str = field(
        default="auto",
        metadata={"help": "What computes linear layers with LoRA during training: peft, torch, or auto."},
    )

    max_nonfinite_steps: int = field(
        default=5,
        metadata={
            "help": "Optimizer steps in a row with a loss or a gradient that is not finite, each of them skipped, that "
            "end the run."
        },
    )
    deterministic: bool = field(
        default=False,
        metadata={
            "help": "Make two runs equal to the last bit: deterministic algorithms, and no choice by time or free "
            "memory."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields of ours and those of TRL's that they meet."""
        check_numbers(self)
        if self.advantage_estimator is not None:
            self.advantage_estimator = ESTIMATORS.name_of(self.advantage_estimator)
        self.loss_type: str = LOSSES.name_of(self.loss_type)
        super().__post_init__()
        check_reward_timeout(self)
        self.loss_kwargs = as_dictionary("loss_kwargs", self.loss_kwargs)
        check_loss(self)
        check_kl_target(self)
        check_speed(self)
        check_liger(self)
        check_truncated_sampling(self)
        check_adapter_dtype(self)
        check_guard(self)
        check_determinism(self)
        check_pass_at_k(self)
        self.advantage_kwargs = as_dictionary("advantage_kwargs", self.advantage_kwargs)
        self.advantage_modifiers = as_dictionary("advantage_modifiers", self.advantage_modifiers)
        check_refills(self)
        check_advantages(self)

    def describe(self) -> str:
        """What is active, in one line."""
        if self.advantage_estimator is None:
            advantages = f"TRL's (scale_rewards={self.scale_rewards}, {self.multi_objective_aggregation})"
        else:
            given = as_dictionary("advantage_kwargs", self.advantage_kwargs)
            keywords = ", ".join(f"{name}={value}" for name, value in given.items())
            advantages = " + ".join((f"{self.advantage_estimator}({keywords})", *(self.advantage_modifiers or {})))
        refills = f"; up to {self.max_refills} refills" if self.max_refills else ""
        return (
            f"grpo_plus {__version__}: advantages {advantages}; loss {self.loss_type}; packing {self.packing}{refills}"
        )
