"""What `grpo-plus plan` is asked: a YAML file of `grpo-plus train`, under the flags of the command line.

The file is read without TRL's parser, because `plan` answers without loading torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from grpo_plus.planner import QLORA, Run
from grpo_plus.planner.run import AUTO

# TRL's ModelConfig has these where use_peft is set and the file does not say more.
TRL_LORA: dict[str, Any] = {"lora_r": 16, "lora_dropout": 0.05}
FLAGS_OF_THE_PLAN = ("prompt_length", "cache_bits")  # no flags of `grpo-plus train`
# Settings that take memory which no plan counts, with the values that take none.
NOT_PLANNED: dict[str, tuple[Any, ...]] = {
    "attn_implementation": (None, "sdpa", "flash_attention_2"),
    "cache_implementation": (None, "dynamic"),
    "deepspeed": (None,),
    "eval_strategy": (None, "no", False),
    "fsdp": (None, "", [], False),
    "generation_kwargs": (None, {}),
    "gradient_checkpointing_kwargs": (None, {}),
    "logprob_backend": (None, "auto", "torch", "triton"),
    "lora_backend": (None, "auto", "torch"),
    "lora_modules_to_save": (None, []),
    "lora_target_modules": ("all-linear", ["all-linear"]),
    "lora_target_parameters": (None, []),
    "model_init_kwargs": (None, {}),
    "optim_target_modules": (None,),
    "reward_model_name_or_path": (None,),
    "sync_ref_model": (None, False),
    "torch_compile": (None, False),
    "use_dora": (None, False),
    "use_transformers_continuous_batching": (None, False),
    "use_transformers_paged": (None, False),
    "use_vllm": (None, False),
}


@dataclass(frozen=True)
class Asked:
    """What is to be planned.

    Attributes:
        model: a folder, a config.json, or a name on the hub.
        revision: of the model on the hub. None: the newest.
        run: the settings.
        notes: sentences about what the plan leaves out.
    """

    model: str
    revision: str | None
    run: Run
    notes: tuple[str, ...]


def asked(path: str | None, given: Mapping[str, Any], *, model: str | None, revision: str | None, qlora: bool) -> Asked:
    """Read the file, and let the command line go before it.

    Args:
        path: of the file. None: there is none.
        given: fields of `Run` that the command line sets.
        model: of the command line, like `revision` and `qlora`.

    Raises:
        ValueError: the file cannot be read, or neither names a model.
    """
    if model is not None and model.endswith((".yaml", ".yml")):
        raise ValueError(f"A file of settings needs its flag. Write --config {model}.")
    file = read_yaml(path) if path is not None else {}
    model = model or file.get("model_name_or_path")
    if not model:
        where = f", and {path!r} has no model_name_or_path" if path is not None else " or a --config file that names it"
        raise ValueError(f"plan needs a model{where}. Write for example grpo-plus plan Qwen/Qwen3-4B.")
    qlora = qlora or bool(file.get("qlora"))
    settings = (QLORA if qlora else {}) | _settings(file, qlora=qlora) | dict(given)
    return Asked(str(model), revision or file.get("model_revision"), Run(**settings), _notes(path, file, qlora=qlora))


def read_yaml(path: str) -> dict[str, Any]:
    """Read the flags of a file by name."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"config={path!r} cannot be read as YAML: {error}. Name a file of `grpo-plus train`."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"config={path!r} holds no flags. Write one per line, such as max_completion_length: 512.")
    return content


def _settings(file: Mapping[str, Any], *, qlora: bool) -> dict[str, Any]:
    """The file's settings as fields of `Run`."""
    adapters = qlora or bool(file.get("use_peft"))
    file = (TRL_LORA if adapters and not qlora else {}) | dict(file)
    names = {entry.name: entry for entry in fields(Run) if entry.name not in FLAGS_OF_THE_PLAN}
    settings = {
        name: float(file[name]) if entry.type is float else file[name]  # YAML reads 4e-2 as a word
        for name, entry in names.items()
        if name in file and (file[name] is not None or "None" in str(entry.type))
    }
    if not adapters:  # --lora_r alone trains all weights
        settings.pop("lora_r", None)
        settings.pop("lora_dropout", None)
    fixed = file.get("deterministic") or file.get("full_determinism")
    if fixed and settings.get("max_tokens_per_pass", AUTO) == AUTO:  # as GRPOPlusConfig has it
        settings["max_tokens_per_pass"] = None
    if settings.get("mlp_tile_tokens") == 0:
        settings["mlp_tile_tokens"] = None
    if rows := file.get("generation_batch_size"):
        settings["steps_per_generation"] = rows // file.get(
            "per_device_train_batch_size", Run.per_device_train_batch_size
        )
    return settings


def _notes(path: str | None, file: Mapping[str, Any], *, qlora: bool) -> tuple[str, ...]:
    left_out = [name for name, free in NOT_PLANNED.items() if name in file and file[name] not in free]
    # TRL leaves it to PEFT, which adapts some layers only.
    if file.get("use_peft") and not qlora and "lora_target_modules" not in file:
        left_out.append("lora_target_modules (the plan has adapters on all linear layers)")
    if not left_out:
        return ()
    return (f"Not planned, though in {path}, and it changes the memory: {', '.join(left_out)}.",)
