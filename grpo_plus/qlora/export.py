"""Export the trained model to a folder that loads without bitsandbytes, and check the folder against the model.

Adapters learn on top of the weights that the 4-bit codes stand for. "dequantize" writes out these weights with the
adapters merged in, which gives the trained model to rounding. "base" merges into the original weights, which the
adapters never saw, so that the result is off by what quantization changed. "adapter" leaves the adapters apart. A merge
into the 4-bit codes themselves would round away most of what was learned, and is refused.
"""

import copy
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grpo_plus.models.adapters import bits_of, has_adapters
from grpo_plus.qlora.precision import keep_gradients_on_the_cpu

logger = logging.getLogger("grpo_plus")

METHODS = ("dequantize", "base", "adapter")
MAX_KL = 1e-3


@dataclass(frozen=True)
class Export:
    """An exported model, and its distance from the trained model.

    kl:                 mean KL(trained || exported) of the probed tokens, with the folder read back from the disk.
    kl_without_adapter: mean KL of the base without adapters, which a merge that loses everything would have.
    """

    path: Path
    method: str
    kl: float
    kl_without_adapter: float

    def __str__(self) -> str:
        return (
            f"{self.path}: method={self.method!r}, KL to the trained model {self.kl:.2g} per token "
            f"(without any adapter: {self.kl_without_adapter:.2g})"
        )


def save_merged(
    model: Any,
    path: str | Path,
    *,
    method: str = "dequantize",
    tokenizer: PreTrainedTokenizerBase | None = None,
    input_ids: Tensor | None = None,
    base: str | None = None,
    max_kl: float = MAX_KL,
    device: str = "cpu",
) -> Export:
    """Save a trained model with adapters to `path`, check its KL to the trained model, and print the KL.

    Args:
        model: a model with adapters, such as `trainer.model`. It stays as it is.
        path: a folder that does not exist or is empty. A failure leaves nothing there.
        method: "dequantize", "base" or "adapter"; see the module.
        tokenizer: saved beside the model.
        input_ids: (B, L) tokens to compare on, best of your own prompts and completions. None takes random tokens.
        base: name or folder of the unquantized base, for method="base". None takes the name of the quantized base.
        max_kl: limit for method="dequantize". Above it nothing is saved.
        device: where the merged model is built and checked, in the dtype of the trained model.

    Raises:
        ValueError: an unknown or lossy method, or a model without adapters.
        FileExistsError: the folder holds something.
        RuntimeError: the exported model is further than `max_kl` from the trained model.
    """
    _check_method(method)
    if not has_adapters(model):
        raise ValueError(f"{type(model).__name__} has no adapters to merge. Save it with save_pretrained.")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"path={str(path)!r} exists and is not an empty folder. Choose another one.")
    keep_gradients_on_the_cpu(model)
    ids = _random_ids(model) if input_ids is None else input_ids
    trained = token_logps(model, ids)
    with model.disable_adapter():
        without = kl_divergence(trained, token_logps(model, ids))
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write(model, unfinished, method, base, device)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        export = Export(path, method, _kl_of_folder(unfinished, method, model, trained, ids, device), without)
        _check_export(export, max_kl)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.replace(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(export)
    return export


def dequantized(model: Any, device: str = "cpu") -> PreTrainedModel:
    """Build an ordinary model from the base of a model with adapters, with the weights that its codes stand for."""
    from peft.utils.integrations import dequantize_module_weight

    quantized = model.get_base_model()
    config = copy.deepcopy(quantized.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=_dtype_of(quantized)).to(device)
    dense.generation_config = copy.deepcopy(quantized.generation_config)
    layers = dict(quantized.named_modules())
    weights = {}
    for name, weight in quantized.named_parameters():
        if model.base_model.prefix in name or ".modules_to_save." in name:
            continue
        layer, _, part = name.rpartition(".")
        value = dequantize_module_weight(layers[layer]) if part == "weight" and bits_of_layer(weight) else weight
        weights[name.replace(".base_layer.", ".").replace(".original_module.", ".")] = value.detach().to(device)
    unexpected = dense.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise ValueError(f"{type(dense).__name__} has no place for {', '.join(unexpected[:3])}. Use method='adapter'.")
    dense.tie_weights()
    return dense


def bits_of_layer(weight: Tensor) -> bool:
    """Whether a weight holds codes of bitsandbytes, not numbers."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def token_logps(model: Any, input_ids: Tensor) -> Tensor:
    """Log-probabilities (B, L, V) in float32 on the CPU, without dropout, row by row. The model's mode stays."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            rows = [
                model(input_ids=row.to(model.device)).logits.float().log_softmax(-1).cpu() for row in input_ids.split(1)
            ]
    finally:
        model.train(training)
    return torch.cat(rows)


def kl_divergence(trained: Tensor, exported: Tensor) -> float:
    """Mean over the tokens of Σ_v p(v) (log p(v) − log q(v)), with p of the trained and q of the exported model."""
    rows = ((p.double(), q.double()) for p, q in zip(trained, exported, strict=True))
    return torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in rows]).mean().item()


def _check_method(method: str) -> None:
    if method in ("4bit", "merge_and_unload", "merged_4bit", "merge"):
        raise ValueError(
            f"method={method!r} would merge into the 4-bit codes, whose steps are larger than most updates: measured, "
            "the result is about as far from the trained model as the base without any adapter. Use "
            "method='dequantize' and quantize the saved model anew where it must be small, or method='adapter'."
        )
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}. Known: {', '.join(METHODS)}.")


def _check_export(export: Export, max_kl: float) -> None:
    if export.method == "base":
        if export.kl > export.kl_without_adapter:
            logger.warning(
                f"{export}. Quantizing the base has changed it by more than the training did: the original weights "
                "are not those that the adapters were trained above. method='dequantize' keeps what was trained."
            )
    elif not export.kl <= max_kl:
        raise RuntimeError(f"{export} is more than max_kl={max_kl}, so nothing was saved.")


def _write(model: Any, folder: Path, method: str, base: str | None, device: str) -> None:
    adapter = model.active_adapters[0]
    if method == "adapter":
        model.save_pretrained(folder, selected_adapters=[adapter])
        return
    if method == "dequantize":
        dense = dequantized(model, device)
    else:
        name = base or model.peft_config[adapter].base_model_name_or_path
        dense = AutoModelForCausalLM.from_pretrained(name, dtype=_dtype_of(model.get_base_model())).to(device)
        if bits_of(dense):
            raise ValueError(
                f"base={name!r} is quantized itself. Give the unquantized one, or use method='dequantize'."
            )
    _merged(dense, model, adapter).save_pretrained(folder)


def _merged(dense: PreTrainedModel, model: Any, adapter: str) -> PreTrainedModel:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[adapter])
    config.init_lora_weights = True  # any other choice computes a start from the base, or changes the base
    wrapped = get_peft_model(dense, config, adapter_name=adapter)
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    set_peft_model_state_dict(wrapped, weights, adapter_name=adapter)
    return wrapped.merge_and_unload()


def _kl_of_folder(folder: Path, method: str, model: Any, trained: Tensor, ids: Tensor, device: str) -> float:
    """Read the folder back and compare. Adapters are compared weight by weight."""
    if method != "adapter":
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype_of(model.get_base_model())).to(device)
        return kl_divergence(trained, token_logps(dense, ids))
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    adapter = model.active_adapters[0]
    written = load_file(next(iter(folder.rglob("adapter_model.safetensors"))))
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    same = all(name in written and torch.equal(written[name], weight.cpu()) for name, weight in weights.items())
    return 0.0 if same else float("nan")


def _dtype_of(model: Any) -> torch.dtype:
    """Dtype of the weights that are not quantized, taken from the embeddings."""
    return model.get_input_embeddings().weight.dtype


def _random_ids(model: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
