"""The shape of a model that transformers builds from its config on the meta device, where weights take no memory.

This serves nested configs (a model that also reads images or sound) and every architecture without a row in
`families.FAMILIES`. Counts are exact, because they are counts of the model itself. What a layer computes is told by the
names of its modules; `decoder.py` reads them.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_plus.planner.decoder import layer_of, linear_modules
from grpo_plus.planner.families import FAMILIES
from grpo_plus.planner.shapes import Layer, Linear, ModelShape
from grpo_plus.registry import suggestion

MOST_LAYERS = 2000

# Types whose built shape is tested, by the type of the text part. Another type is planned with a line that says so.
TESTED = frozenset(
    (
        *("deepseek_v3", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4", "granite", "granitemoe"),
        *("granitemoehybrid", "lfm2", "llama4_text", "ministral3", "olmo3", "qwen2_5_vl_text", "qwen3_5_text"),
        *("qwen3_next", "qwen3_vl_text"),
    )
)


class Built(NamedTuple):
    """A model on the meta device, the config of its text part, and what is to be said about it."""

    model: Any
    text: Any
    notes: tuple[str, ...]


def built_shape(config: Mapping[str, Any], name: str, *, skipped: tuple[str, ...] | None = None) -> ModelShape:
    """Get the shape of the model that transformers builds for a config.

    Args:
        skipped: names of modules that a saved quantization has left out. None: those that bitsandbytes leaves out.

    Raises:
        ValueError: transformers knows no class for the config, the class cannot be built from it, or the planner finds
            no layers in it.
    """
    built = _built(config, name)
    # Anything may be missing from a class that nobody has tried, and the planner answers with one kind of error.
    try:
        return _read(built, config, name, skipped)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"The planner cannot read the shape of {name!r} off transformers' {type(built.model).__name__} "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}). Plan a model of another "
            "architecture of the same size."
        ) from error


def _read(built: Built, config: Mapping[str, Any], name: str, skipped: tuple[str, ...] | None) -> ModelShape:
    model, text, notes = built
    prefix, modules = _decoder_layers(model, text, name)
    quantized = _quantized(model, skipped)
    adapters = _adapters(model)
    kinds = _kinds(text, len(modules))
    layers = tuple(
        layer_of(module, text, kind, path=f"{prefix}.{index}", quantized=quantized, adapters=adapters)
        for index, (module, kind) in enumerate(zip(modules, kinds, strict=True))
    )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    vocab, hidden = embedding.weight.shape[0], text.hidden_size
    tied = head is None or head.weight is embedding.weight
    inside = {id(module) for layer in modules for module in layer.modules()}
    ends = {id(embedding), id(head)}
    outside = tuple(
        Linear(
            path.rpartition(".")[2],
            *sizes,
            module.bias is not None,
            adapted=path in adapters,
            quantized=path in quantized,
        )
        for path, module, sizes in linear_modules(model)
        if id(module) not in inside | ends
    )
    counted = sum(_parameters(layer) for layer in layers) + vocab * hidden * (1 if tied else 2)
    counted += sum(linear.weights for linear in outside)
    return ModelShape(
        name=name,
        model_type=str(config["model_type"]),
        hidden=hidden,
        vocab=vocab,
        heads=getattr(text, "num_attention_heads", None) or 1,
        layers=layers,
        tied=tied,
        eager=text._attn_implementation == "eager",
        float_norms="Gemma" in type(model).__name__,
        outside=outside,
        outside_small=sum(weight.numel() for weight in model.parameters()) - counted,
        notes=notes + _towers(model),
    )


def _parameters(layer: Layer) -> int:
    return layer.weights + layer.others + layer.experts


def _built(config: Mapping[str, Any], name: str) -> Built:
    import torch
    import transformers
    from transformers import CONFIG_MAPPING

    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name!r} has model_type={model_type!r}, an architecture that neither the planner nor transformers "
            f"{transformers.__version__} knows.{suggestion(model_type, FAMILIES)} A newer transformers may know it."
        )
    plain = _decoded({key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")})
    notes: tuple[str, ...] = ()
    # A class may raise anything about a config that it was not made for; the planner answers with one kind of error.
    try:
        whole = CONFIG_MAPPING[model_type].from_dict(plain)
        text = whole.get_text_config()
        if not 0 < (text.num_hidden_layers or 0) <= MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {text.num_hidden_layers}")
        kind = _class_of(whole, text)
        with torch.device("meta"):
            try:
                model = kind._from_config(whole)
            except ImportError as error:
                if text is whole:
                    raise
                package = (re.findall(r"pip install ([\w-]+)", str(error)) or ["a package"])[0]
                notes = (f"Only the text part is planned: the parts for images and sound need {package} to be built.",)
                model = _class_of(text, text)._from_config(text)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise ValueError(
            f"{name!r} has model_type={model_type!r}, which transformers {transformers.__version__} cannot build from "
            f"this config ({reason}). Fetch the model's config.json again."
        ) from error
    if text.model_type not in {*TESTED, *FAMILIES}:
        notes = (
            *notes,
            f"The planner is not tested on model_type={model_type!r}. Its shape was read off transformers' "
            f"{type(model).__name__}: counts are exact, activations an estimate.",
        )
    return Built(model, text, notes)


def _decoded(value: Any) -> Any:
    """Infinities as numbers. transformers writes them into JSON as objects."""
    if isinstance(value, Mapping):
        return (
            float(value["__float__"]) if "__float__" in value else {key: _decoded(item) for key, item in value.items()}
        )
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _class_of(config: Any, text: Any) -> Any:
    """The class that TRL loads: the one that the config names, else the one that transformers has for the type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    named = [getattr(transformers, str(given), None) for given in config.architectures or ()]
    for kind in named:
        if isinstance(kind, type) and hasattr(kind, "_from_config") and re.search(r"For(Causal|Cond)", kind.__name__):
            return kind
    text_first = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for mapping in text_first if config is text else reversed(text_first):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ValueError(f"no class of transformers generates text from a {type(config).__name__}")


def _decoder_layers(model: Any, text: Any, name: str) -> tuple[str, list[Any]]:
    """Path and modules of the decoder's layers: the list of that length which is not inside a tower."""
    from torch import nn

    count = text.num_hidden_layers
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not re.search(r"vision|visual|audio", path)
    ]
    if not lists:
        raise ValueError(
            f"The planner finds no list of {count} layers in transformers' {type(model).__name__} for {name!r}. "
            "Plan a model of another architecture of the same size."
        )
    path, modules = max(lists, key=lambda pair: sum(weight.numel() for weight in pair[1].parameters()))
    return path, list(modules)


def _kinds(text: Any, count: int) -> list[Any]:
    """What the cache of transformers keeps of each layer."""
    from transformers import DynamicCache

    cached = list(DynamicCache(config=text).layers)
    return cached if len(cached) == count else [None] * count


def _quantized(model: Any, skipped: tuple[str, ...] | None) -> frozenset[str]:
    """Paths of the linear modules that bitsandbytes quantizes, by transformers' own rules: no subclass is replaced."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(
        model, None if skipped is None else list(skipped), getattr(model, "_keep_in_fp32_modules", None)
    )
    plain = ((path, module) for path, module, _ in linear_modules(model) if type(module) in (nn.Linear, Conv1D))
    return frozenset(path for path, _ in plain if should_convert_module(path, kept))


def _adapters(model: Any) -> dict[str, int]:
    """Parameters of LoRA of rank 1 on "all-linear", by the path of the module, as PEFT makes them."""
    import torch
    from transformers.utils import is_peft_available

    head = model.get_output_embeddings()
    everywhere = {path: sum(sizes) for path, module, sizes in linear_modules(model) if module is not head}
    if not is_peft_available():
        return everywhere
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=1, lora_alpha=1, target_modules="all-linear")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # PEFT asks the model by a name that transformers deprecates. No reader of a plan can change that.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped: Any = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    except (
        ValueError
    ):  # PEFT takes no "all-linear" for this architecture, and a list of modules would be about as large
        return everywhere
    sizes: dict[str, int] = {}
    for name, weight in wrapped.base_model.model.named_parameters():
        if weight.requires_grad:
            path = re.sub(r"(\.base_layer)*\.lora_.*", "", name)
            sizes[path] = sizes.get(path, 0) + weight.numel()
    return sizes


def _towers(model: Any) -> tuple[str, ...]:
    """Say which parts of the model lie outside the text part, and how large they are."""
    towers = [
        (path, sum(weight.numel() for weight in module.parameters()))
        for path, module in model.named_modules()
        if re.fullmatch(r"(.*\.)?(vision_tower|visual|vision_model|audio_tower|audio_model)", path)
    ]
    outer = [(path, size) for path, size in towers if not any(path.startswith(f"{other}.") for other, _ in towers)]
    return tuple(
        f"The model's part {path.rpartition('.')[2]!r} has {size / 1e6:,.0f} M parameters, which are planned as "
        "weights. What images and sound take beside them is not planned."
        for path, size in outer
    )
