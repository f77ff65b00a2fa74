"""Which modules of a model compute each token by itself: MLPs and norms, found by how they are built."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers.utils import is_peft_available

from grpo_plus.models.dropout import dropout_of

NORMS = ("RMSNorm", "LayerNorm")
MLP_LINEARS = (2, 3)  # up and down, or gate, up and down


def row_wise_modules(model: nn.Module, why_not: Callable[[nn.Module], str | None]) -> list[nn.Module]:
    """MLPs and norms of a model, without those of a mixture's experts, which see few tokens each.

    Args:
        why_not: reason against a module that is built like one. Asked once for all modules of one build.
    """
    verdicts: dict[Any, bool] = {}
    found = []
    for name, module in model.named_modules():
        if "experts" in name.split(".") or not _takes_one_tensor(module) or not (is_norm(module) or is_mlp(module)):
            continue
        build = _build(module)
        if build not in verdicts:
            verdicts[build] = why_not(module) is None
        if verdicts[build]:
            found.append(module)
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module is named as a norm of the last dimension, and has a weight for it, and perhaps a bias."""
    weights = [weight.dim() for weight in module.parameters()]
    return type(module).__name__.endswith(NORMS) and not any(module.children()) and weights in ([1], [1, 1])


def is_mlp(module: nn.Module) -> bool:
    """Whether a module is two or three linear layers, with nothing beside them but activations."""
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))) or dropout_of(module):
        return False
    children = list(module.children())
    linears = [child for child in children if is_linear(child)]
    others = [child for child in children if not is_linear(child)]
    return len(linears) in MLP_LINEARS and not any(_has_state(other) for other in others)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, in 4 bits or not quantized, with adapters of plain LoRA or without."""
    base: Any = module
    if _is_lora(module):
        base = module.base_layer
        if module.lora_variant:
            return False
    return type(base) is nn.Linear or type(base).__name__ == "Linear4bit"


def width_of(module: nn.Module) -> int:
    """Features that an MLP or a norm reads."""
    if is_norm(module):
        return len(next(module.parameters()))
    first: Any = next(child for child in module.children() if is_linear(child))
    return int(first.in_features)


def _is_lora(module: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _takes_one_tensor(module: nn.Module) -> bool:
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD


def _has_state(module: nn.Module) -> bool:
    tensors: Iterable[Any] = (*module.parameters(), *module.buffers())
    return any(True for _ in tensors)


def _build(module: nn.Module) -> Any:
    """What modules have in common that compute the same with other weights."""
    weights = [(name, tuple(weight.shape), weight.dtype) for name, weight in module.named_parameters()]
    return type(module), tuple(type(part) for part in module.modules()), tuple(weights)
