"""Gradients at what goes into a model: embeddings of tokens, and pixels. They have come through every layer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_plus.models.pictures import PIXELS
from grpo_plus.packing.layout import Group


@dataclass(frozen=True)
class Gradients:
    """What reaches the inputs.

    ids, embeddings: token ids (N,) and the gradients at their embeddings, (N, H).
    pixels: the gradients at all pixels, (M,). None where there is no image.
    """

    ids: Tensor
    embeddings: Tensor
    pixels: Tensor | None


def pixels_of(probes: Sequence[Group]) -> list[Tensor]:
    """The images of the probes."""
    return [group.seen.images[PIXELS] for group in probes if group.seen and PIXELS in group.seen.images]


def results(
    model: PreTrainedModel, parts: Sequence[Callable[[], Tensor]], pixels: Sequence[Tensor] | None
) -> tuple[Tensor, Gradients | None]:
    """Log-probabilities (M,) of several forwards, and the gradients of their weighted sum at the inputs.

    Args:
        parts: the forwards. What one of them keeps for its backward is gone before the next.
        pixels: the images that go in. None asks for no gradient.
    """
    values: list[Tensor] = []
    found: list[Gradients] = []
    for part in parts:
        try:
            if pixels is None:
                with torch.no_grad():
                    values.append(part())
            else:
                logps, gradients = _differentiated(model, part, pixels, sum(map(len, values)))
                values.append(logps)
                found.append(gradients)
        finally:
            # In older versions of torch, autocast gives a later forward the casts that were made here without a graph,
            # and the weights no gradient.
            torch.clear_autocast_cache()
    return torch.cat(values), _summed(found) if found else None


def _differentiated(
    model: PreTrainedModel, forward: Callable[[], Tensor], pixels: Sequence[Tensor], before: int
) -> tuple[Tensor, Gradients]:
    """Log-probabilities of one forward, and its gradients.

    Args:
        before: number of log-probabilities before these, so that no two of all forwards weigh the same.
    """
    with torch.enable_grad(), _embedded(model) as calls, _asked_for(pixels):
        logps = forward()
        weights = torch.arange(before, before + len(logps), device=logps.device, dtype=logps.dtype).cos()
        leaves = [*(leaf for _, leaf in calls), *pixels]
        # A tower may pass no gradient on to the pixels. The embeddings have one in any case.
        found = torch.autograd.grad((logps * weights).sum(), leaves, allow_unused=bool(pixels))
    pairs = zip(leaves, found, strict=True)
    gradients = [torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in pairs]
    return logps.detach(), Gradients(
        torch.cat([ids.flatten() for ids, _ in calls]),
        torch.cat([gradient.flatten(0, -2) for gradient in gradients[: len(calls)]]).float(),
        torch.cat([gradient.flatten() for gradient in gradients[len(calls) :]]).float() if pixels else None,
    )


def _summed(parts: Sequence[Gradients]) -> Gradients:
    pixels = [part.pixels for part in parts if part.pixels is not None]
    return Gradients(
        torch.cat([part.ids for part in parts]),
        torch.cat([part.embeddings for part in parts]),
        torch.stack(pixels).sum(0) if pixels else None,
    )


@contextmanager
def _asked_for(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Ask for a gradient at tensors inside."""
    for leaf in leaves:
        leaf.requires_grad_()
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)


@contextmanager
def _embedded(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect token ids and embeddings of every call inside. The embeddings are leaves that ask for a gradient."""
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        calls.append((inputs[0], leaf))
        return leaf

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def relative_error(found: Gradients | None, expected: Gradients | None) -> float:
    """Relative error of the gradients: at the pixels, and summed over the places where the same token stands."""
    if found is None or expected is None:
        return 0.0
    tokens, index = torch.cat([found.ids, expected.ids]).unique(return_inverse=True)
    zeros = expected.embeddings.new_zeros(len(tokens), expected.embeddings.shape[-1])
    difference = zeros.index_add(0, index, torch.cat([found.embeddings, -expected.embeddings]))
    total = zeros.index_add(0, index[len(found.ids) :], expected.embeddings)
    pairs = [(difference, total)]
    if found.pixels is not None and expected.pixels is not None:
        pairs.append((found.pixels - expected.pixels, expected.pixels))
    return max(float(difference.norm() / total.norm().clamp(min=1e-30)) for difference, total in pairs)
