"""Bytes of what trains: weights, the optimizer's state on the card and on the host, and copies of adapters."""

from dataclasses import dataclass
from itertools import groupby

from grpo_plus.planner.run import MIXED, OPTIMIZERS, PAGED, PAGED_FROM, Run
from grpo_plus.planner.shapes import Counted, ModelShape


@dataclass(frozen=True)
class Trained:
    """Bytes of the weights that train, and of what belongs to them.

    size: of the weights, and of their gradients.
    state: of the optimizer's state on the card.
    paged: of the optimizer's state that moves to the host's memory where the card is full.
    copies: of what `lora_backend` keeps of the adapters.
    stepping: of what lives in a step of the optimizer alone.
    """

    size: float
    state: float
    paged: float
    copies: float
    stepping: float


def trained_bytes(shape: ModelShape, run: Run, counted: Counted | None) -> Trained:
    """Count what trains, from the counts of a loaded model where there are any."""
    elements = shape.lora(run.lora_r) if run.lora_r else shape.parameters
    size: float = elements * (run.adapter_size if run.lora_r else run.weight_size)
    copies = adapter_copies(shape, run)
    if counted is not None:
        copies *= min(1, counted.trained / elements)  # of fewer or smaller adapters than on all layers
        elements, size = counted.trained, counted.trained_bytes
    count, state_size = OPTIMIZERS[run.optim]
    state = count * (size if state_size is None else elements * state_size)
    paged = _paged_share(shape, run) * state if run.optim in PAGED else 0
    # A step brings back the paged state of one tensor at a time. The unfused AdamW works on copies: one list of all
    # denominators.
    stepping = size if run.optim == "adamw_torch" else min(paged, state * largest_tensor(shape) / elements)
    return Trained(size, state - paged, paged, copies, stepping)


def _paged_share(shape: ModelShape, run: Run) -> float:
    """Share of the trained weights whose state bitsandbytes pages: of tensors above a size."""
    if run.lora_r is None:
        return 1 - shape.others / shape.parameters
    linears = [linear for layer in shape.layers for linear in layer.linears if linear.adapted]
    sizes = [run.lora_r * width for linear in linears for width in (linear.inputs, linear.outputs)]
    return sum(size for size in sizes if size >= PAGED_FROM) / shape.lora(run.lora_r)


def largest_tensor(shape: ModelShape) -> int:
    """Elements of the largest tensor. It exists twice while it is cast, quantized or, for experts, stacked."""
    linears = (linear.weights for layer in shape.layers for linear in layer.linears)
    return max(shape.embedding, shape.outside_small or 0, *linears, *(layer.experts for layer in shape.layers))


def adapter_copies(shape: ModelShape, run: Run) -> float:
    """Bytes of what `lora_backend` keeps of the adapters for their products. 0 for TRL's trainer and with a dropout.

    All A and B in autocast's dtype; of adapters that have it already, the A of layers that share an input, stacked.
    """
    if run.lora_r is None or run.packing == "none" or run.lora_dropout:
        return 0
    size = MIXED if run.autocast else run.adapter_size
    adapted = [[linear for linear in layer.linears if linear.adapted] for layer in shape.layers]
    if size != run.adapter_size:
        return run.lora_r * size * sum(linear.inputs + linear.outputs for linears in adapted for linear in linears)
    runs = [list(same) for linears in adapted for _, same in groupby(linears, key=lambda linear: linear.inputs)]
    return run.lora_r * size * sum(linear.inputs for same in runs if len(same) > 1 for linear in same)
