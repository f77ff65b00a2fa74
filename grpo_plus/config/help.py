"""What `--help` says about each field of GRPOPlusConfig: one sentence, its docstring in short."""

from dataclasses import field
from typing import Any

HELP = {
    "advantage_estimator": (
        "Advantage estimator: a name from `grpo-plus ls advantages` or a dotted path to a function. If unset, "
        "`scale_rewards` and `multi_objective_aggregation` decide."
    ),
    "advantage_kwargs": "Keyword arguments of the advantage estimator, as JSON: '{\"ddof\": 0}'.",
    "advantage_modifiers": (
        'What else happens to rewards and advantages, in order, as JSON: \'{"clip": {"max": 5.0}}\'. Known: gate, '
        "pods, gfpo, alp, kl_in_reward, difficulty, filter_zero_std, clip."
    ),
    "max_refills": (
        "Dynamic sampling: up to how many further generation batches replace groups whose advantages are all 0. 0: off."
    ),
    "refill_buffer": (
        "Let live groups of so many of the last generation batches take the place of dead groups, with exact "
        "importance ratios. 0: off."
    ),
    "prompt_sampler": (
        "What draws the prompts of a batch. pass_rate prefers prompts that are solved at times; with keywords, as "
        'JSON: \'{"pass_rate": {"reward": "accuracy_reward"}}\'. Unset: each prompt once in an epoch, as TRL.'
    ),
    "task_column": "Dataset column with each prompt's task, for estimators and metrics that keep tasks apart.",
    "reward_weight_schedule": (
        "Weights of rewards that change over the run, linearly from first to last, as JSON: "
        "'{\"format\": [1.0, 0.1]}'; unset: `reward_weights` throughout."
    ),
    "demonstration_column": (
        "Dataset column with completions, such as reference solutions, that take the last places of their prompt's "
        "group."
    ),
    "demonstration_loss": (
        "How demonstrations without log-probabilities are trained: imitation, luffy or chord, or one of these with "
        'keywords as JSON: \'{"chord": {"mu": 0.1}}\'. Unset: imitation.'
    ),
    "reward_timeout": (
        "Seconds that one call of a reward function may take before the run ends with its name; unset: no bound."
    ),
    "overlap_rewards": (
        "Let reward functions that wait judge beside the rest of a step. batch: one call, beside the passes for "
        "log-probabilities; groups: a call for each prompt, beside generation, too. For some functions, JSON: "
        '\'{"judge": "groups"}\'.'
    ),
    "health_warnings": (
        "Warn, once per cause and with what to try, where the log says that the run cannot learn, or learns "
        "something else than it should."
    ),
    "truncated_sampling": (
        "correct: take log-probabilities over the tokens that top_p, top_k, min_p and the like have left; unset: "
        "over the whole vocabulary, as in TRL."
    ),
    "eval_pass_at_k": (
        "Log eval_pass@k for these k: the chance that one of k completions is right. Each needs as many "
        "num_generations_eval."
    ),
    "eval_pass_reward": "Reward function that says which completions are right; unset: the only one.",
    "eval_pass_threshold": "Least reward of a completion that is right.",
    "loss_kwargs": "Keyword arguments of a loss that TRL lacks (`grpo-plus ls losses`), as JSON: '{\"c\": 3.0}'.",
    "loss_reduction": (
        "How a loss that TRL lacks is summed; unset: as its authors do. Known: token-mean, global-token-mean, "
        "seq-mean-token-mean, seq-mean-token-sum, seq-mean-token-sum-norm."
    ),
    "kl_estimator": "KL estimator k1, k2 or k3 of a loss that TRL lacks, where beta is not 0. TRL's use k3.",
    "kl_target": "KL per token that beta adapts to; unset: beta stays as it is.",
    "kl_horizon": "Completions after which a KL far from kl_target has changed beta by a fifth.",
    "packing": (
        "How rows go through the model: shared_prompt, padding_free, none (as TRL), or auto: the first of these "
        "that is exact."
    ),
    "skip_zero_advantage": "Skip completions whose advantages are 0; unset: where they have no gradient.",
    "skip_old_policy_pass": (
        "With vLLM: the update's own log-probabilities serve as the old policy's; unset: where they are the same."
    ),
    "vllm_lora_sync": "Send vLLM the adapters alone, above a 4-bit base too; not run against vLLM.",
    "generation_loop": (
        "What decodes where transformers generates: grouped (each prompt once, finished rows leave), trl, or "
        "auto: grouped wherever it gives the same tokens."
    ),
    "generation_chunk_size": (
        "Rows that a process generates for at a time; auto: as many as the free memory of the GPU holds; unset: "
        "its whole generation batch."
    ),
    "offload_activations": (
        "Keep the inputs of checkpointed layers in the host's memory between forward and backward, for longer "
        "rows on a GPU."
    ),
    "max_tokens_per_pass": (
        "Most tokens that an update sends through the model at once; auto: as many as the free memory of the GPU "
        "holds; None: a whole micro-batch."
    ),
    "mlp_tile_tokens": (
        "Most tokens that MLPs and norms see at a time in an update; auto: 4096 under gradient checkpointing that "
        "is not reentrant; 0: all."
    ),
    "adapter_dtype": (
        "Dtype of the adapters and of Adam's state: float32, bfloat16 (as TRL above a quantized base), or unset: "
        "float32 above a quantized base, else as PEFT made them."
    ),
    "logprob_backend": "What computes log-probabilities in packed rows: trl, torch or triton (frozen heads), or auto.",
    "lora_backend": "What computes linear layers with LoRA during training: peft, torch, or auto.",
    "max_nonfinite_steps": (
        "Optimizer steps in a row with a loss or a gradient that is not finite, each of them skipped, that end the run."
    ),
    "deterministic": (
        "Make two runs equal to the last bit: deterministic algorithms, and no choice by time or free memory."
    ),
}


def told(name: str, default: Any) -> Any:
    """A field of a dataclass with its default and its help."""
    return field(default=default, metadata={"help": HELP[name]})
