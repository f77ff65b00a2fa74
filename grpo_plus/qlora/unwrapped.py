"""The weights of the base under a model's adapters, under the names of a model without adapters.

PEFT wraps modules: a layer with an adapter, a module that is saved whole, an embedding with trained tokens. Each
wrapper adds words to the names. No name is edited here. The modules are walked, and a wrapper stands for the module
that it wraps, however deep the wrappers are nested.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def dequantized(model: Any, device: str = "cpu") -> PreTrainedModel:
    """Build an ordinary model from the base of a model with adapters, with the weights that its codes stand for.

    Buffers come along: those that are saved, as a router's biases are, and the others.

    Raises:
        ValueError: the ordinary model lacks a place for a weight, or has a place that nothing fills.
    """
    quantized = model.get_base_model()
    config = copy.deepcopy(quantized.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        dense = type(quantized)._from_config(config, dtype=dtype_of(quantized))
    dense.generation_config = copy.deepcopy(quantized.generation_config)
    untie_as(quantized, dense)
    unknown = []
    for name, tensor in plain_tensors(quantized):
        # A copy, because the merge adds to it in place, and the trained model must stay as it is.
        if not _assign(dense, name, tensor.to(device, copy=True)):
            unknown.append(name)
    dense.tie_weights()
    empty = [name for name, tensor in plain_tensors(dense) if tensor.is_meta]
    if unknown or empty:
        what = f"has no place for {', '.join(unknown[:3])}" if unknown else f"would lack {', '.join(empty[:3])}"
        raise ValueError(f"{type(dense).__name__} {what}, so the export would not be the trained model. "
                         "Use method='adapter'.")  # fmt: skip
    return dense


def plain_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and values of all parameters and buffers, with wrappers undone and codes of bitsandbytes dequantized."""
    module = unwrapped(module)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield prefix + name, _numbers(module, name, tensor)
    for name, child in module._modules.items():
        if child is not None:
            yield from plain_tensors(child, f"{prefix}{name}.")


def unwrapped(module: Any) -> Any:
    """The module of the base that a wrapper of PEFT stands for. Any other module is returned as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    layer: Any = module
    while isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        layer = getattr(layer, "base_layer" if isinstance(layer, BaseTunerLayer) else "original_module")
    return layer


def is_coded(weight: Any) -> bool:
    """Whether a weight holds codes of bitsandbytes, not numbers."""
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def dtype_of(model: Any) -> torch.dtype:
    """Dtype of the weights that are not quantized, taken from the embeddings."""
    return unwrapped(model.get_input_embeddings()).weight.dtype


def _numbers(module: Any, name: str, tensor: Tensor) -> Tensor:
    kind = type(tensor).__name__
    if kind == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(tensor.data, tensor.quant_state)  # type: ignore[attr-defined]
    if kind == "Int8Params":
        # The scales move from the weight to the layer's state in the first forward. Nothing of either is changed here:
        # PEFT's own function moves the weight, after which the live layer has no scales.
        coded: Any = tensor
        scales = coded.SCB if coded.SCB is not None else module.state.SCB
        return tensor.data * scales.to(tensor.device).view(-1, 1) / 127
    return tensor.detach()


def _assign(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Put a tensor in the place of this name. False where the model has no such place."""
    path, _, last = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return False
    if owner._parameters.get(last) is not None:
        owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    elif last in owner._buffers:
        owner._buffers[last] = tensor
    else:
        return False
    return True


def untie_as(trained: Any, model: PreTrainedModel) -> None:
    """Untie the head of `model` where only one of the trained model's embedding and head has an adapter.

    A merge into a weight that both share would change the other one too.
    """
    from peft.tuners.lora import LoraLayer

    first, last = trained.get_input_embeddings(), trained.get_output_embeddings()
    if last is None or unwrapped(first).weight is not unwrapped(last).weight:
        return
    if isinstance(first, LoraLayer) == isinstance(last, LoraLayer):
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
