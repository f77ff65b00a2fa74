"""Refuse what cannot work with a quantized base, before anything is loaded."""

import json
import re
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from grpo_plus.models.adapters import bits_of, changed_by_init, has_adapters
from grpo_plus.planner import read_config
from grpo_plus.qlora.precision import require_trainable

INSTALL = "pip install bitsandbytes peft"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def require_bitsandbytes(what: str) -> None:
    """Raise an ImportError with the install line where bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"{what} needs bitsandbytes, which is not installed: {INSTALL}")


def check_run(model: Any, args: Any, quantization_config: Any, peft_config: Any) -> None:
    """Refuse arguments of a trainer that would fail late, or would train something else than they say.

    Args:
        model: a name, a model, or a model with adapters.
        args: the configuration, or None.

    Raises:
        ImportError: bitsandbytes is missing.
        ValueError: the arguments cannot work. The message has the argument's name and value.
    """
    in_args = {} if isinstance(model, nn.Module) else (getattr(args, "model_init_kwargs", None) or {})
    wanted = quantization_config or in_args.get("quantization_config")
    require_one_width(_get(wanted, "load_in_4bit"), _get(wanted, "load_in_8bit"))
    if _bits_of_config(wanted):
        require_bitsandbytes("quantization_config")
    if quantization_config is not None and isinstance(model, nn.Module):
        state = f"is quantized to {bits_of(model)} bits" if bits_of(model) else "is loaded without quantization"
        raise ValueError(
            f"quantization_config={type(quantization_config).__name__} would be ignored: the model that was passed "
            f"{state} already. Pass the model's name together with quantization_config, or the model alone."
        )
    _check_target_modules(peft_config)
    bits = bits_of(model) or _bits_of_config(wanted)
    uses_vllm = getattr(args, "use_vllm", False)
    if isinstance(model, str) and (wanted is not None or uses_vllm) and not (bits and uses_vllm):
        saved = saved_quantization(model, in_args.get("revision"))
        _check_second(model, saved, wanted)
        bits = bits or _bits_of_config(saved)
    if bits is not None and uses_vllm and not (bits == 4 and getattr(args, "vllm_lora_sync", False)):
        alone = "vllm_lora_sync=True, which sends the adapters alone (not run against vLLM), or " if bits == 4 else ""
        raise ValueError(
            f"use_vllm=True does not work with a base in {bits} bits: TRL sends vLLM the packed bytes of the weights "
            "without their scales, so that completions come from the starting policy and not from the one that is "
            f"trained. Set {alone}use_vllm=False, or train LoRA on a bf16 base (drop load_in_4bit and "
            "quantization_config)."
        )
    require_trainable(model)
    _check_reference(model, getattr(args, "beta", 0.0), peft_config)


def _check_reference(model: Any, beta: float, peft_config: Any) -> None:
    """Refuse a model without a name, and adapters that TRL cannot copy for the reference or would start anew."""
    if not beta:
        return
    if not has_adapters(model):
        if isinstance(model, nn.Module) and peft_config is None and not _get(model.config, "_name_or_path"):
            raise ValueError(
                f"beta={beta} needs a reference, which TRL loads by the name of the model, and the model that was "
                "passed has no name. Save it with model.save_pretrained(folder) and pass the folder, or set beta=0.0."
            )
        return
    if "default" not in model.peft_config:
        raise ValueError(
            f"beta={beta} with the adapter {model.active_adapters[0]!r}: TRL copies the adapter named 'default' as the "
            "reference. Load the adapter under that name (PeftModel.from_pretrained without adapter_name), or set "
            "beta=0.0."
        )
    if init := changed_by_init(model.peft_config["default"]):
        raise ValueError(
            f"beta={beta} with init_lora_weights={init!r}: TRL starts a second adapter the same way as the reference, "
            "which changes the base of both. Set model.peft_config['default'].init_lora_weights = True before the "
            "trainer is made, or set beta=0.0."
        )


def require_one_width(load_in_4bit: bool, load_in_8bit: bool) -> None:
    """Refuse a base in 4 bits and 8 bits at once."""
    if load_in_4bit and load_in_8bit:
        raise ValueError(
            "load_in_4bit=True and load_in_8bit=True: a base is loaded in one of the two. Drop load_in_8bit for QLoRA."
        )


def _get(config: Any, name: str) -> bool:
    return bool(config.get(name) if isinstance(config, dict) else getattr(config, name, False))


def saved_quantization(model: str, revision: str | None) -> Any:
    """Quantization that the model was saved with. None without one, and where TRL is about to say what is wrong."""
    try:
        return read_config(model, revision=revision).get("quantization_config")
    except ValueError:
        return None


def _check_second(model: str, saved: Any, wanted: Any) -> None:
    if saved is not None and wanted is not None:
        raise ValueError(
            f"quantization_config={type(wanted).__name__} would be ignored: {model!r} was saved quantized "
            f"(quant_method={saved.get('quant_method')!r}), and transformers keeps its settings. Drop "
            "quantization_config (on the command line: --load_in_4bit false), or name the unquantized model."
        )


def _bits_of_config(config: Any) -> int | None:
    if _get(config, "load_in_4bit"):
        return 4
    return 8 if _get(config, "load_in_8bit") else None


def _check_target_modules(peft_config: Any) -> None:
    targets = getattr(peft_config, "target_modules", None) or ()
    excluded = getattr(peft_config, "exclude_modules", None) or ()
    if _names_the_head(targets) and not _names_the_head(excluded):
        named = targets if isinstance(targets, str) else sorted(targets)
        raise ValueError(
            f"target_modules={named!r} contains 'lm_head', which TRL reads directly: an adapter there would "
            "never be trained. Remove 'lm_head', or add it to exclude_modules; target_modules='all-linear' leaves it "
            "out by itself."
        )


def _names_the_head(modules: Any) -> bool:
    """Whether PEFT finds "lm_head" by a list of names' ends, or by a string, which is a regular expression."""
    if isinstance(modules, str):
        return bool(re.fullmatch(modules, "lm_head")) or modules.split(".")[-1] == "lm_head"
    return any(name.split(".")[-1] == "lm_head" for name in modules)


def check_adapter_folder(folder: str | Path, model: Any) -> None:
    """Refuse a folder whose adapter was trained on another base than `model`, or with other LoRA settings.

    Raises:
        ValueError: names the folder, both bases and the first weight whose shape differs.
    """
    if not has_adapters(model):
        return
    folder = saved_adapter(folder, model.active_adapters[0])
    config, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    if not (config.exists() and weights.exists()):
        return
    saved = _shapes(weights)
    from peft import get_peft_model_state_dict

    # Names as in PEFT's files, where DoRA's magnitudes and an embedding's adapters are called otherwise.
    own = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    here = {name: tuple(value.shape) for name, value in own.items()}
    wrong = [name for name, shape in saved.items() if here.get(name, shape) != shape]
    missing = [name for name in saved if ".lora_" in name and name not in here]
    if wrong or missing:
        name = (wrong or missing)[0]
        base = json.loads(config.read_text()).get("base_model_name_or_path")
        raise ValueError(
            f"The adapter in {folder} was trained on {base!r} and does not fit {model.config.name_or_path!r}: {name} "
            f"is {saved[name]} in the folder and {here.get(name, 'absent')} in the model. Choose the folder of this "
            "model's run, or the base and lora_r that the adapter was trained with."
        )


def saved_adapter(checkpoint: str | Path, name: str) -> Path:
    """Folder of an adapter's files in a checkpoint. PEFT gives every adapter but "default" a folder of its own."""
    own = Path(checkpoint) / name
    return own if (own / ADAPTER_CONFIG).exists() else Path(checkpoint)


def load_best_adapter(checkpoint: str | Path | None, model: Any) -> None:
    """Load the best weights of an adapter that has a name. transformers looks for them in the checkpoint's top only."""
    if checkpoint is None or not has_adapters(model):
        return
    name = model.active_adapters[0]
    folder = saved_adapter(checkpoint, name)
    if folder != Path(checkpoint):
        model.load_adapter(folder, name, is_trainable=True)


def load_default_adapter(checkpoint: str | Path, model: Any) -> None:
    """Load the adapter in a checkpoint's top where others lie below it. transformers before 5.23 leaves it out."""
    if not has_adapters(model) or len(model.peft_config) == 1:
        return
    name = model.active_adapters[0]
    if saved_adapter(checkpoint, name) == Path(checkpoint):
        model.load_adapter(checkpoint, name, is_trainable=True)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes from the header of a safetensors file. The weights stay on the disk."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
