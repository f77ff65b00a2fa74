"""What we call by TRL's private names, and the versions of TRL in which those names were read.

When TRL moves, this file, `seam.py`, `scoring.py`, `saving.py` and `trl_fingerprints.json` change, and little else
should have to.
"""

import inspect
import math
import operator
import warnings
from collections import deque
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from packaging.specifiers import SpecifierSet
from torch import Tensor
from trl import GRPOTrainer, is_conversational, prepare_multimodal_messages

from grpo_plus.trainer.batches.refill_rows import Padding

TESTED_TRL = SpecifierSet(">=1.15,<1.17")

# Fingerprinted for each tested version. The last is not overridden: it keeps the columns of a reward function. The seam
# assumes of `log` that it writes the advantages out.
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
    "_generate",
    "_generate_single_turn",
    "_determine_best_metric",
    "_get_train_sampler",
    "_load_rng_state",
    "_maybe_log_save_evaluate",
    "_push_from_checkpoint",
    "training_step",
    "log",
    "_log_completion_extra",
)

# Of TRL's classes for vLLM, likewise: `trainer/vllm` derives from both, and replaces what they build.
RELIED_ON_FOR_VLLM = {
    "VLLMGeneration": ("__init__", "_init_vllm", "sync_weights", "generate"),
    "VLLMClient": ("__init__", "generate", "reset_prefix_cache"),
}

# What comes before the loss, for StepProfile to time: the second calls the first once and scores what it returns.
GENERATES, PREPARES = "_generate", "_generate_and_score_completions"

SAMPLER_RATIO = "importance_sampling_ratio"

# Columns of ours in TRL's dictionaries: what the sampler could draw, as `KeptRows` has it. And one value for all rows,
# like `num_items_in_batch`, but on the host: whether all lists hold what is kept.
KEPT_COUNTS, KEPT_LISTS, ONLY_LISTS = "kept_counts", "kept_lists", "kept_only_lists"

# A column of ours in TRL's dictionaries: what transformers' generation gave the tokens it drew. NaN is unknown.
SAMPLED_LOGPS = "sampled_logps"

# A column of ours in TRL's dictionaries: how many generation batches ago a row was sampled, 0 for a fresh one.
REFILL_AGE = "refill_age"

# Columns of ours in TRL's dictionaries: 1 for a completion of the dataset that has no log-probabilities, and those of a
# completion that has. NaN is unknown.
DEMONSTRATED, GIVEN_LOGPS = "demonstrated", "given_logps"

# A column of ours in TRL's dictionaries: the KL of each token to the reference, 0 where the policy did not write.
REFERENCE_KL = "kl_to_reference"

# Images and what belongs to them, under the names that TRL's dictionaries and its forward share.
MULTIMODAL = tuple(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[8:]

# What TRL and we move after each optimizer step, by what the step has measured.
CONTROLLERS = ("beta", "entropy_coef", "_last_world_entropy")

# What TRL moves with each micro-batch.
MOVED_BY_A_LOSS = (*CONTROLLERS, "_entropy_window_stats")

# Of these, a mask that some processors make of the images, and the number of tiles of each row.
PIXEL_MASK, NUM_TILES = "pixel_attention_mask", "num_tiles"

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
    KEPT_COUNTS: Padding("right", 0),
    KEPT_LISTS: Padding("right", 0),
    SAMPLED_LOGPS: Padding("right", math.nan),
    REFERENCE_KL: Padding("right", 0),
    "advantages": None,
    REFILL_AGE: None,
    DEMONSTRATED: None,
    GIVEN_LOGPS: Padding("right", math.nan),
}


def untested_version(installed: str) -> str | None:
    """A warning for a TRL outside the window that the suite runs on; None inside the window."""
    if TESTED_TRL.contains(installed, prereleases=True):
        return None
    return (
        f"grpo_plus was tested with trl {TESTED_TRL}, found {installed}. `grpo-plus doctor` says whether anything "
        "that it relies on has changed."
    )


if message := untested_version(version("trl")):
    warnings.warn(message, stacklevel=2)


def metrics_of(trainer: GRPOTrainer) -> dict[str, list[float]]:
    """What TRL averages for its next log: of the training, or of the evaluation that runs."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def log_value(trainer: GRPOTrainer, name: str, value: float, *, latest: bool = False) -> None:
    """Log a number of the training with TRL's: the mean since the last log, or the latest."""
    if latest:
        trainer._metrics["train"][name] = []
    trainer._metrics["train"][name].append(value)


def table_of(trainer: GRPOTrainer) -> dict[str, Any]:
    """TRL's table of completions."""
    return trainer._logs


def set_table(trainer: GRPOTrainer, table: dict[str, Any]) -> None:
    """Let TRL write into another table of completions."""
    trainer._logs = table


def empty_table(trainer: GRPOTrainer) -> dict[str, Any]:
    """Another table like TRL's, without rows."""
    return {
        name: deque(maxlen=column.maxlen) if isinstance(column, deque) else type(column)(column.default_factory)
        for name, column in trainer._logs.items()
    }


def logged_columns(trainer: GRPOTrainer) -> dict[tuple[str, ...], deque]:
    """The columns of TRL's table of completions, each as long as one generation batch."""
    columns: dict[tuple[str, ...], deque] = {}
    for name, column in trainer._logs.items():
        columns |= {(name, k): v for k, v in column.items()} if isinstance(column, dict) else {(name,): column}
    return columns


def logged_advantages(trainer: GRPOTrainer, judged: Tensor) -> Tensor | None:
    """(P, G) of all processes, out of TRL's log; None where the log is too short for an evaluation's batch."""
    logged = list(trainer._logs["advantages"])[-judged.numel() :]
    return torch.tensor(logged, dtype=torch.float64).view_as(judged) if len(logged) == judged.numel() else None


def logged_texts(trainer: GRPOTrainer, count: int) -> list[tuple[Any, Any]]:
    """The last prompts and completions of TRL's log, of all processes, as texts or messages."""
    return list(zip(trainer._logs["prompt"], trainer._logs["completion"], strict=True))[-count:]


def log_advantages_anew(trainer: GRPOTrainer, per_completion: Tensor) -> None:
    """Replace the last advantages of TRL's log."""
    in_log, logged = per_completion.flatten().tolist(), trainer._logs["advantages"]
    for _ in range(min(len(in_log), len(logged))):
        logged.pop()
    logged.extend(in_log)


def tokenizer_of(trainer: GRPOTrainer) -> Any:
    """The tokenizer, where the processor is more than one."""
    return trainer._tokenizer


def gathered_labels(labels: list[str | None]) -> list[str] | None:
    """The rows' labels of all processes, in the order of the reward table; None where they have none."""
    if None in labels:
        return None
    return gather_object(labels)


def gathered_lengths(
    trainer: GRPOTrainer, completion_ids: list[list[int]], tool_masks: list[list[int]] | None
) -> tuple[Tensor, Tensor | None]:
    """Tokens (B,) that the policy wrote in the completions of all processes, and all tokens where others wrote too.

    Args:
        tool_masks: of the completions, 0 where a tool or an environment wrote. None where the policy wrote everything.
    """
    full = [len(ids) for ids in completion_ids]
    written = full if tool_masks is None else [sum(mask) for mask in tool_masks]
    device = trainer.accelerator.device
    lengths, full_lengths = gather(torch.tensor(list(zip(written, full, strict=True)), device=device)).unbind(1)
    return lengths, None if torch.equal(lengths, full_lengths) else full_lengths


def dataset_prompts(trainer: GRPOTrainer, rows: list[dict[str, Any]], prompts: list) -> list:
    """The prompts of the dataset: `prompts` without what an environment said in reply to its reset.

    Each rollout's environment may say something else. A row without a prompt stands for itself.
    """
    if not trainer.environments:
        return prompts
    return [_with_images(row) if "prompt" in row else row for row in rows]


def _with_images(row: dict[str, Any]) -> Any:
    images = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
    return prepare_multimodal_messages(row["prompt"], images=images) if images else row["prompt"]


def reported(trainer: GRPOTrainer, column: str) -> list | None:
    """What this process's reward functions passed to `log_extra` for a column in this batch; None for nothing."""
    return trainer._pending_extra_logs.get(column)


def set_reported(trainer: GRPOTrainer, column: str, values: list) -> None:
    """Show these values in a column of the table of completions, in place of what a reward function reported."""
    trainer._pending_extra_logs[column] = values


def complete_table_columns(trainer: GRPOTrainer, rows: int) -> list[str]:
    """Give TRL's table of completions one value per row in every column that a reward function fills.

    TRL keeps an old batch's values where a column gets none, and cannot write a table of unequal columns.

    Returns:
        The columns that got too few or too many values in this batch.
    """
    pending = trainer._pending_extra_logs
    wrong = sorted(name for name, values in pending.items() if len(values) != rows)
    for name in wrong:
        pending[name] = [*pending[name], *[None] * rows][:rows]
    for name in trainer._logs["extra"]:
        pending.setdefault(name, [None] * rows)
    return wrong


def generations_of(trainer: GRPOTrainer) -> int:
    """Completions of each prompt, in the training or the evaluation that runs."""
    return trainer.num_generations if trainer.model.training else trainer.num_generations_eval


def reward_columns(
    trainer: GRPOTrainer,
    rows: range,
    inputs: list[dict[str, Any]],
    prompts: list,
    completions: list,
    completion_ids: list[list[int]],
) -> dict[str, Any]:
    """What TRL calls a reward function with, for some rows of a generation batch; without the functions for the log.

    Args:
        inputs: all rows of the dataset. Prompts, completions and their ids are those of `rows` alone.
    """
    of_rows = slice(rows.start, rows.stop)
    names = [name for name in inputs[0] if name not in ("prompt", "completion", "completion_ids")]
    columns: dict[str, Any] = {name: [example[name] for example in inputs[of_rows]] for name in names}
    columns |= {"trainer_state": trainer.state}
    if trainer.environments is not None:
        columns["environments"] = trainer.environments[of_rows]
    return columns | {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}


def same_reward_columns(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two calls of a reward function are the same. Values of the dataset are the same as objects, or not."""
    if one.keys() != other.keys():
        return False
    written = {"prompts", "completions", "completion_ids"}
    listed = [(one[name], other[name]) for name in one.keys() - written - {"trainer_state"}]
    return all(one[name] == other[name] for name in written) and all(
        len(mine) == len(theirs) and all(map(operator.is_, mine, theirs)) for mine, theirs in listed
    )


def why_not_decoded(trainer: GRPOTrainer, prompts: list) -> str | None:
    """Reason why a completion is not final when its last token is drawn, or not known before TRL has read it."""
    if trainer.rollout_func is not None:
        return "A rollout function generates"
    if trainer.tools:
        return "A tool may still answer"
    templates = (getattr(trainer._tokenizer, f"response_{kind}", None) for kind in ("template", "schema"))
    if is_conversational({"prompt": prompts[0]}) and any(template is not None for template in templates):
        return "The tokenizer's response template takes completions apart"
    return None


def decoded_completions(trainer: GRPOTrainer, prompts: list, completion_ids: list[list[int]]) -> list:
    """Completions as TRL hands them to reward functions: texts, or messages where the prompts are messages."""
    texts = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
    if not is_conversational({"prompt": prompts[0]}):
        return texts
    return [[{"role": "assistant", "content": text}] for text in texts]


def until_end(trainer: GRPOTrainer, ids: list[int]) -> list[int]:
    """Token ids up to the first one that ends a completion. Empty where none does."""
    end = next((place for place, token in enumerate(ids, 1) if token in trainer.eos_token_ids), 0)
    return ids[:end]


def whole_rows(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Ids and attention mask (B, L) of prompts with their completions, and how many of the tokens are completion's."""
    ids, mask = (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))
    return ids, mask, inputs["completion_ids"].shape[1]


def multimodal(inputs: dict[str, Any]) -> dict[str, Any]:
    """Images and what belongs to them, as TRL's forward takes them. Empty for rows of text."""
    return {name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None}


def scored(trainer: GRPOTrainer, inputs: dict[str, Any]) -> Tensor:
    """Log-probabilities (B, T) of whole rows under the policy, in passes of TRL's size."""
    args = trainer.args
    rows = args.per_device_train_batch_size if trainer.model.training else args.per_device_eval_batch_size
    return trainer._get_per_token_logps_and_entropies(
        trainer.model, *whole_rows(inputs), batch_size=rows, **multimodal(inputs)
    )[0]


def trained_tokens(inputs: dict[str, Any]) -> Tensor:
    """(B, T), 1 at the tokens that the policy sampled and the loss counts: neither padding nor a tool's."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def overflow_found(trainer: GRPOTrainer) -> bool | None:
    """Whether fp16's scaler found a gradient that is not finite in this step; None where it has not looked."""
    scaler = trainer.accelerator.scaler
    found = {} if scaler is None else scaler._found_inf_per_device(trainer.optimizer.optimizer)
    return any(value.item() > 0 for value in found.values()) if found else None
