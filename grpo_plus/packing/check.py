"""The start-up self-check: a form is used on a model only after it gave what plain rows give, on real tokens.

Three small rows, two of them of one prompt, go through the model one by one without padding: that is the truth. A form
must reproduce their log-probabilities, and the gradient of the first trainable parameter, to a small multiple of what
padding a row alone changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_plus.packing.forward import Form, Head, install_packed_forward
from grpo_plus.packing.layout import Group

PROMPT, COMPLETION, PADDING = 96, 32, 8  # tokens of the probes
NOISE_FACTOR = 3.0
# Root mean square of log-prob differences, and relative gradient error, that count as rounding.
FLOORS = {True: (2e-5, 1e-3), False: (2e-2, 0.1)}
# What a model that was not made for a form may raise.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, LookupError)

PaddedLogps = Callable[[Tensor, Tensor, int], Tensor]  # input_ids, attention_mask, completion length -> (B, T)


@dataclass(frozen=True)
class Verdict:
    """The form that passed, None if none did; and why those before it did not."""

    form: Form | None
    reasons: tuple[str, ...]


def choose(
    forms: Sequence[Form],
    model: PreTrainedModel,
    groups: Sequence[Group],
    padded_logps: PaddedLogps,
    head: Head | None,
    *,
    gradient: bool,
) -> Verdict:
    """The first form that is exact on this model.

    Args:
        model: the base model, without wrappers.
        groups: rows of the batch at hand, to take real tokens from.
        padded_logps: the forward to agree with.
        gradient: whether to compare a gradient too; a reentrant checkpoint cannot give one to a check.
    """
    probes = _probes(groups)
    parameter = next((p for p in model.parameters() if p.requires_grad), None) if gradient else None
    with torch.enable_grad():
        truth, padded = (_plain_rows(probes, padded_logps, model.device, padding) for padding in (0, PADDING))
        gradients = _gradient(truth, parameter)
        floor, gradient_floor = FLOORS[_full_precision(model)]
        allowed = max(NOISE_FACTOR * _rms(padded - truth), floor)
        install_packed_forward(model)
        reasons: list[str] = []
        for form in forms:
            try:
                logps = _in_form(form, probes, head, model)
                error, gradient_error = _rms(logps - truth), _relative(_gradient(logps, parameter), gradients)
            except FAILURES as failure:
                reasons.append(f"{form.name} ({form.detail}) failed: {type(failure).__name__}: {failure}")
                continue
            if error <= allowed and gradient_error <= gradient_floor:
                return Verdict(form, tuple(reasons))
            reasons.append(
                f"{form.name} ({form.detail}) is not exact on {type(model).__name__}: log-probabilities differ by "
                f"{error:.1e} (allowed {allowed:.1e}), gradients by {gradient_error:.1e}"
            )
    return Verdict(None, tuple(reasons))


def _probes(groups: Sequence[Group]) -> list[Group]:
    """Two rows of one prompt and, in another group, one of a shorter prompt; from the first and the last group."""
    first, last = groups[0], groups[-1]
    prompt, completion = first.prompt[-PROMPT:], first.completions[0][:COMPLETION]
    other = last.prompt[-PROMPT:][1:] if len(last.prompt) > 1 else last.prompt
    half = last.completions[-1][: max(1, COMPLETION // 2)]
    return [Group(prompt, (0, 1), (completion, half)), Group(other, (2,), (completion,))]


def _plain_rows(probes: Sequence[Group], padded_logps: PaddedLogps, device: torch.device, padding: int) -> Tensor:
    parts = []
    for group in probes:
        for completion in group.completions:
            ids = nn.functional.pad(torch.cat([group.prompt, completion]), (0, padding))[None].to(device)
            mask = torch.ones_like(ids)
            mask[:, ids.shape[1] - padding :] = 0
            parts.append(padded_logps(ids, mask, len(completion) + padding)[0, : len(completion)])
    return torch.cat(parts)


def _in_form(form: Form, probes: Sequence[Group], head: Head | None, model: PreTrainedModel) -> Tensor:
    groups = probes if form.share else [Group(g.prompt, (0,), (c,)) for g in probes for c in g.completions]
    logps, _ = model(packed=lambda base, forward: form.run(groups, head, base, forward))
    return logps


def _gradient(logps: Tensor, parameter: nn.Parameter | None) -> Tensor | None:
    if parameter is None:
        return None
    weights = torch.arange(len(logps), device=logps.device, dtype=logps.dtype).cos()  # no two rows alike
    return torch.autograd.grad((logps * weights).sum(), parameter)[0].detach()


def _relative(gradient: Tensor | None, expected: Tensor | None) -> float:
    if gradient is None or expected is None:
        return 0.0
    return float((gradient - expected).float().norm() / expected.float().norm().clamp(min=1e-30))


def _rms(difference: Tensor) -> float:
    return float(difference.detach().float().square().mean().sqrt())


def _full_precision(model: PreTrainedModel) -> bool:
    floats = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    return floats <= {torch.float32, torch.float64} and not torch.is_autocast_enabled(model.device.type)
