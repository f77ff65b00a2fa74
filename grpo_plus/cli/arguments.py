"""TRL's flags, read by TRL's parser and checked, and what they name: the model, the data and the rewards.

`grpo-plus train` and `grpo-plus compare` share this file.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from grpo_plus.cli.columns import Columns
from grpo_plus.cli.own_arguments import OwnArguments
from grpo_plus.cli.own_modules import search_own_modules
from grpo_plus.cli.reward_functions import REWARD_NAMES, check_keywords, named_rewards
from grpo_plus.registry import suggestion

if TYPE_CHECKING:
    from trl import DatasetMixtureConfig, ModelConfig
    from trl.scripts.grpo import GRPOScriptArguments

    from grpo_plus.config import GRPOPlusConfig


def parse(verb: str, rest: list[str], config_class: type["GRPOPlusConfig"], **defaults: Any) -> tuple[Any, ...]:
    """Our own, the script's, the model's, the mixture's and the training's arguments, read by TRL and checked.

    Args:
        defaults: of flags, for this verb; what the user gives wins.
    """
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser
    from trl.scripts.grpo import GRPOScriptArguments

    from grpo_plus.cli.flags_help import USAGE, help_of
    from grpo_plus.qlora.recipe import qlora_flags

    arguments = _with_config_file(rest)
    inputs: list[Any] = [OwnArguments, GRPOScriptArguments, ModelConfig, DatasetMixtureConfig]
    parser = TrlParser([*inputs, config_class], prog=f"grpo-plus {verb}", usage=USAGE)
    if {"-h", "--help"} & set(arguments):
        print(help_of(parser, inputs), end="")
        raise SystemExit(0)
    search_own_modules(_typed_names(arguments))
    _check_width(arguments)
    # GRPOPlusConfig comes later: its own complaint (no GPU, say) would hide the more basic one.
    early = TrlParser(inputs, add_help=False).parse_args_and_config(arguments, return_remaining_strings=True)
    _check(verb, *early[:4])
    # As defaults, so that every flag on the command line or in the file still has the last word.
    parser.set_defaults_with_config(**defaults, **(qlora_flags() if early[0].qlora else {}))
    *parsed, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    _refuse(verb, unknown)
    return tuple(parsed)


def loading(model: "ModelConfig", config: "GRPOPlusConfig") -> dict[str, Any]:
    """The trainer's arguments that say which model it loads, and how; the rest of it goes into `config`."""
    from trl import get_peft_config, get_quantization_config

    given: dict[str, Any] = {
        "revision": model.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    config.model_init_kwargs = given | dict(config.model_init_kwargs or {})
    return {
        "model": str(model.model_name_or_path),
        "quantization_config": get_quantization_config(model),
        "peft_config": get_peft_config(model),
    }


def load(script: "GRPOScriptArguments", mixture: "DatasetMixtureConfig") -> Any:
    """The dataset that the arguments name, with its splits."""
    from datasets import load_dataset
    from trl import get_dataset

    if mixture.datasets:
        return get_dataset(mixture)
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def split(dataset: Any, name: str, flag: str) -> Any:
    """One split of the dataset; `flag` is what chooses it."""
    if name not in dataset:
        raise ValueError(f"The dataset has no split {name!r}.{suggestion(name, dataset)} Choose one with {flag}.")
    return dataset[name]


def shaping(own: OwnArguments, model: "ModelConfig", *, trust_remote_code: bool) -> Callable[[Any], Any]:
    """What gives the rows of a split the columns that TRL and the reward functions read."""
    columns = Columns(**{entry.name: getattr(own, entry.name) for entry in fields(Columns)})
    chat = columns.makes_prompts and _has_chat_template(model, trust_remote_code)
    return functools.partial(columns.shape, chat=chat)


def _has_chat_template(model: "ModelConfig", trust_remote_code: bool) -> bool:
    """As TRL will find it: beside the processor, of models that read pictures too."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=trust_remote_code
    )
    return getattr(processor, "chat_template", None) is not None


@dataclass(frozen=True)
class RewardFunctions:
    """The functions of the training, behind the path of the reward model, and those of the evaluations."""

    train: list[str | Callable[..., Any]]
    evaluation: list[Callable[..., Any]]


def reward_functions(own: OwnArguments, script: "GRPOScriptArguments") -> RewardFunctions:
    """The functions that the arguments name, with their keywords."""
    from grpo_plus.config.keywords import as_dictionary

    train, evaluation = script.reward_funcs or [], own.eval_reward_funcs or []
    keywords = as_dictionary("reward_kwargs", own.reward_kwargs)
    check_keywords(keywords, [*train, *evaluation])
    model = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    return RewardFunctions([*model, *named_rewards(train, keywords)], named_rewards(evaluation, keywords))


def _with_config_file(arguments: list[str]) -> list[str]:
    """`arguments` with --config=FILE as two words, which is how TRL's parser looks for it."""
    words = [word for argument in arguments for word in _split_config(argument)]
    if words and words[0].endswith((".yaml", ".yml")):
        raise ValueError(f"A file of settings needs its flag. Write --config {' '.join(words)}.")
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if word == "--config" and following.startswith("--"):
            raise ValueError("--config needs a file: --config run.yaml.")
    return words


def _split_config(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _refuse(verb: str, unknown: list[str]) -> None:
    """Say what to do about words that nobody takes; those of `accelerate launch` have their place before the module."""
    if not unknown:
        return
    words = " ".join(unknown)
    if unknown[0].endswith((".yaml", ".yml")):
        raise ValueError(f"{verb} does not take {words}. Write --config {unknown[0]}.")
    raise ValueError(
        f"Neither TRL nor grpo_plus takes {words}. If that is for the launcher, run "
        f"`accelerate launch {words} -m grpo_plus {verb} ...`."
    )


@dataclass
class Named:
    """The flags whose values may be dotted paths to functions of the user's."""

    reward_funcs: list[str] = field(default_factory=list)
    eval_reward_funcs: list[str] = field(default_factory=list)
    advantage_estimator: str | None = None
    loss_type: str | None = None


def _typed_names(arguments: list[str]) -> list[str | None]:
    """What the command line and its --config file name by these flags."""
    from trl import TrlParser

    named = TrlParser([Named], add_help=False).parse_args_and_config(arguments, return_remaining_strings=True)[0]
    functions = [*(named.reward_funcs or ()), *(named.eval_reward_funcs or ())]
    return [*functions, named.advantage_estimator, named.loss_type]


@dataclass
class Width:
    """The flags of which only one can be: TRL's own complaint names neither."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    qlora: bool = False


def _check_width(arguments: list[str]) -> None:
    from trl import TrlParser

    from grpo_plus.qlora.checks import require_one_width

    width = TrlParser([Width], add_help=False).parse_args_and_config(arguments, return_remaining_strings=True)[0]
    if width.qlora and width.load_in_8bit:
        raise ValueError("--qlora loads the base in 4 bits, but load_in_8bit=True. Drop one of the two.")
    require_one_width(width.load_in_4bit, width.load_in_8bit)


def _check(
    verb: str,
    own: OwnArguments,
    script: "GRPOScriptArguments",
    model: "ModelConfig",
    mixture: "DatasetMixtureConfig",
) -> None:
    """Refuse what cannot train before anything is loaded."""
    from grpo_plus.qlora.checks import require_bitsandbytes

    if own.qlora or model.load_in_4bit or model.load_in_8bit:
        require_bitsandbytes("A quantized base (--qlora, --load_in_4bit, --load_in_8bit)")
    if (own.qlora or model.load_in_4bit) and model.dtype == "auto":
        raise ValueError(
            "--dtype auto with a base in 4 bits: its products need a dtype of their own. Write --dtype bfloat16, or "
            "--dtype float16 --fp16 on cards before Ampere."
        )
    if model.model_name_or_path is None:
        raise ValueError(
            f"{verb} needs --model_name_or_path: a hub name or a local folder. To see GRPO at work without a model, "
            "run `grpo-plus demo`."
        )
    if not (script.dataset_name or mixture.datasets):
        raise ValueError(f"{verb} needs --dataset_name, or `datasets:` in the --config file.")
    if not (script.reward_funcs or script.reward_model_name_or_path):
        raise ValueError(
            f"{verb} needs --reward_funcs ({', '.join(REWARD_NAMES)}, or a dotted path to a function of yours) or "
            "--reward_model_name_or_path."
        )
