"""Read trained adapters back from the disk, above the base that they were trained above.

An adapter folder names its base, and nothing else of it. Above the same base in another precision the adapter is
another model. A small file beside the adapter, RECORD, says how the base was loaded. GRPOPlusTrainer writes it into
every checkpoint, and `save_merged(method="adapter")` into its folder.
"""

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from transformers import BitsAndBytesConfig, PreTrainedModel

from grpo_plus.models.adapters import bits_of
from grpo_plus.planner import read_config
from grpo_plus.qlora.checks import ADAPTER_CONFIG, require_bitsandbytes, saved_quantization
from grpo_plus.qlora.originals import name_of, revision_of
from grpo_plus.qlora.precision import keep_gradients_on_the_cpu
from grpo_plus.qlora.unwrapped import dtype_of, unwrapped

logger = logging.getLogger("grpo_plus")

RECORD = "grpo_plus_base.json"
_KEYS = {"base": str, "revision": str, "class": str, "dtype": str, "quantization": dict, "vocabulary": int}


def write_record(model: Any, folder: str | Path) -> None:
    """Write beside the adapters of a model what they were trained above."""
    base = model.get_base_model()
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    record = {
        "base": name_of(model),
        "revision": revision_of(model),
        "class": type(base).__name__,
        "dtype": str(dtype_of(base)).removeprefix("torch."),
        "quantization": quantization,
        "vocabulary": unwrapped(base.get_input_embeddings()).weight.shape[0] or None,  # DeepSpeed may hold it apart
    }
    (Path(folder) / RECORD).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def described_base(model: Any) -> str:
    """Say in words what the adapters of a model stand above: its name and its precision."""
    base = model.get_base_model()
    bits = f"in {bits_of(model)} bits" if bits_of(model) else f"in {str(dtype_of(base)).removeprefix('torch.')}"
    return f"{name_of(model) or type(base).__name__} {bits}"


def load_trained(
    folder: str | Path,
    *,
    base: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    device: str | None = None,
) -> Any:
    """Load a folder of adapters above its base as it was in training: same precision, class and vocabulary.

    Args:
        folder: a checkpoint, or a folder that `save_merged(method="adapter")` or PEFT's `save_pretrained` wrote.
        base: name or folder of the base, where it has moved. None takes the name in the folder.
        quantization_config: how the base was quantized, for folders without a record. None takes the record.
        device: where the model goes. None: the first GPU, or the CPU where there is none.

    Raises:
        ImportError: the base was in 4 or 8 bits, and bitsandbytes is missing.
        ValueError: the folder holds no adapter, or names no base.
    """
    from peft import PeftModel

    folder = adapter_folder(folder)
    record = _record_of(folder)
    name = base or record.get("base")
    if not name:
        raise ValueError(
            f"The adapter in {str(folder)!r} names no base: it was trained above a model that was made in memory. Save "
            "that model, and name its folder as base (on the command line: --base)."
        )
    model: Any = _load_base(
        name, record, quantization_config, device, revision=None if base else record.get("revision")
    )
    rows = record.get("vocabulary")
    if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = PeftModel.from_pretrained(model, folder)
    keep_gradients_on_the_cpu(model)
    return model


def adapter_folder(folder: str | Path) -> Path:
    """The folder with the adapter's files: this one, or the one below that PEFT makes for an adapter with a name."""
    found = sorted(
        path.parent for path in (*Path(folder).glob(ADAPTER_CONFIG), *Path(folder).glob(f"*/{ADAPTER_CONFIG}"))
    )
    if Path(folder) in found:
        return Path(folder)
    if len(found) != 1:
        what = f"the adapters {', '.join(path.name for path in found)}" if found else f"no {ADAPTER_CONFIG}"
        raise ValueError(f"The folder {str(folder)!r} holds {what}. Name the folder of one adapter.")
    return found[0]


def _record_of(folder: Path) -> dict[str, Any]:
    """What the folder says about the base. Without a record: the name alone, with a warning."""
    path = next((path for path in (folder / RECORD, folder.parent / RECORD) if path.exists()), None)
    if path is None:
        name = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
        return {"base": name}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}. Delete it, and say how the base was loaded.") from error
    wrong = [name for name, kind in _KEYS.items() if not isinstance(record.get(name), (kind, type(None)))]
    if wrong:
        raise ValueError(
            f"{str(path)!r} has {wrong[0]}={record[wrong[0]]!r}. Delete it, and say how the base was loaded."
        )
    return record


def _load_base(
    name: str, record: dict[str, Any], given: BitsAndBytesConfig | None, device: str | None, *, revision: str | None
) -> PreTrainedModel:
    quantization = given or record.get("quantization")
    saved = saved_quantization(name, revision)
    if quantization is None and saved is None and "class" not in record:
        logger.warning(
            f"{RECORD} is not there, so nothing says in which precision the adapter was trained. The base {name!r} is "
            "loaded as it was saved. Above a base in 4 bits, give quantization_config (on the command line: "
            "--load_in_4bit)."
        )
    if "bitsandbytes" in str((saved or {}).get("quant_method", "")) or (quantization is not None and saved is None):
        require_bitsandbytes(f"The base {name!r}")
    kind = record.get("class") or (read_config(name, revision=revision).get("architectures") or [""])[0]
    loader: Any = getattr(transformers, str(kind), None)
    if not (isinstance(loader, type) and issubclass(loader, PreTrainedModel)):
        loader = transformers.AutoModelForCausalLM
    computed = getattr(given, "bnb_4bit_compute_dtype", None)  # in training commonly that of the other weights too
    arguments: dict[str, Any] = {"dtype": record.get("dtype") or computed or "auto", "revision": revision}
    if quantization is not None and saved is None:
        arguments["quantization_config"] = quantization
    if device is not None:
        arguments["device_map"] = {"": device}
    return loader.from_pretrained(name, **arguments)
