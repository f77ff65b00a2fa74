"""Self-check at the start: a form is used on a model only after it gave what plain rows give, on real tokens.

Three small rows, two of them of one prompt, go through the model one by one without padding. Their results are the
truth. A form must reproduce their log-probabilities, up to a small multiple of what padding alone changes. It must also
reproduce the gradient at the embeddings of their tokens, which has come through every layer whatever trains, and the
gradient at the pixels where the rows have images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_plus.models.rounding import precision_of_products
from grpo_plus.packing.forward import Form, Head, install_packed_forward
from grpo_plus.packing.input_gradients import Gradients, pixels_of, relative_error, results
from grpo_plus.packing.layout import Group
from grpo_plus.packing.seen import seen_probes

PROMPT, COMPLETION, PADDING = 96, 32, 8  # tokens of the probes
NOISE_FACTOR = 3.0
# For each precision of products: the root mean square of log-prob differences that is rounding, the most that noise may
# excuse, and the relative error of gradients. On a model that draws random numbers, no form passes: there a right form
# cannot be told from a wrong form. A wrong form is off by 0.05 to 4.
LIMITS = {"float32": (2e-5, 1e-3, 1e-3), "tf32": (1e-3, 1e-2, 1e-2), "half": (2e-2, 0.1, 0.1)}
# A model that was not made for a form may raise anything, and so may the compiler of a kernel: the errors of Triton and
# of a C compiler have no class in common but this.
FAILURES = (Exception,)


Agreed = Callable[[str | None], str | None]  # from what one process has found to what all processes go by


def alone(reason: str | None) -> str | None:
    """The reason of a run's only process."""
    return reason


class PaddedLogps(Protocol):
    """A trainer's forward of padded rows."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, completion_length: int, /, **seen: Any) -> Tensor:
        """Log-probabilities (B, T). What the rows have beside their tokens has the names of a model's forward."""


@dataclass(frozen=True)
class Verdict:
    """The form that passed and its head, and reasons why other forms did not.

    form: None if no form passed.
    head: None for the model's own head.
    """

    form: Form | None
    head: Head | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class SelfCheck:
    """What plain rows give on one model.

    called: what is called in place of `model`: the wrapper, where the model's weights cannot be had without it.
    truth: (M,) log-probabilities of the probes.
    gradients: at the tokens' embeddings. None where no gradient is compared.
    allowed: root mean square of log-prob differences that passes.
    gradient_limit: relative error of the gradient that passes.
    """

    model: PreTrainedModel
    called: nn.Module
    probes: Sequence[Group]
    truth: Tensor
    gradients: Gradients | None
    allowed: float
    gradient_limit: float

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        groups: Sequence[Group],
        padded_logps: PaddedLogps,
        *,
        gradient: bool,
        called: nn.Module | None = None,
    ) -> "SelfCheck":
        """Run plain rows.

        Args:
            model: the base model, without wrappers.
            groups: rows of the batch at hand, as a source of real tokens.
            padded_logps: the forward to agree with.
            gradient: whether to compare a gradient too. A check cannot get a gradient from a reentrant checkpoint.
            called: the wrapper to call. None calls the base model.
        """
        probes = _probes(model, groups)
        floor, ceiling, gradient_limit = LIMITS[precision_of_products(model)]
        install_packed_forward(model)
        pixels = pixels_of(probes)
        padded, _ = results(model, _plain_rows(probes, padded_logps, model.device, PADDING), None)
        truth, gradients = results(
            model, _plain_rows(probes, padded_logps, model.device, 0), pixels if gradient else None
        )
        allowed = min(max(NOISE_FACTOR * _rms(padded - truth), floor), ceiling)
        return cls(model, called or model, probes, truth, gradients, allowed, gradient_limit)

    def why_not(self, form: Form, head: Head | None) -> str | None:
        """Reason why a form fails or is not exact with this head. None where it is."""
        try:
            return self.why_not_exact(form, head)
        except FAILURES as failure:
            return f"{_named(form, head)} failed: {type(failure).__name__}: {failure}"

    def why_not_exact(self, form: Form, head: Head | None) -> str | None:
        """Reason why a form is not exact with this head. None where it is. A form that fails raises."""
        name = _named(form, head)
        pixels = None if self.gradients is None else pixels_of(self.probes)
        forward = partial(_in_form, form, self.probes, head, self.model, self.called)
        logps, found = results(self.model, [forward], pixels)
        error, gradient_error = _rms(logps - self.truth), relative_error(found, self.gradients)
        if error <= self.allowed and gradient_error <= self.gradient_limit:
            return None
        return (
            f"{name} is not exact on {type(self.model).__name__}: log-probabilities differ by {error:.1e} (allowed "
            f"{self.allowed:.1e}), gradients by {gradient_error:.1e}"
        )


def choose(
    forms: Sequence[Form],
    model: PreTrainedModel,
    groups: Sequence[Group],
    padded_logps: PaddedLogps,
    heads: Sequence[Head | None],
    *,
    gradient: bool,
    agreed: Agreed = alone,
) -> Verdict:
    """Choose the first form that is exact on this model, with the first head under which a form is exact.

    Args:
        agreed: is asked about the plain rows, and about each form and head that is tried. With several processes, all
            of them try the same forms and heads.
    """
    check, reason = None, None
    try:
        check = SelfCheck.of(model, groups, padded_logps, gradient=gradient)
    except FAILURES as failure:
        reason = f"the self-check failed on plain rows: {type(failure).__name__}: {failure}"
    if (reason := agreed(reason)) is not None or check is None:
        return Verdict(None, None, (reason,) if reason else ())
    reasons: list[str] = []
    for head, form in product(heads, forms):
        reason = agreed(check.why_not(form, head))
        if reason is None:
            return Verdict(form, head, tuple(reasons))
        reasons.append(reason)
    return Verdict(None, None, tuple(reasons))


def why_not_close(model: PreTrainedModel, logps: Tensor, expected: Tensor) -> str | None:
    """Reason why log-probabilities of the same rows differ by more than rounding. None where they do not."""
    error, allowed = _rms(logps - expected), LIMITS[precision_of_products(model)][0]
    return None if error <= allowed else f"log-probabilities differ by {error:.1e} (allowed {allowed:.1e})"


def _probes(model: PreTrainedModel, groups: Sequence[Group]) -> list[Group]:
    """Two rows of one prompt, and a row of a shorter prompt in another group, from the first and the last group."""
    first, last = groups[0], groups[-1]
    if first.seen is None:
        return _forked(first, last)
    first, last = seen_probes(model, groups)
    completion, half = first.completions[0][:COMPLETION], last.completions[-1][: max(1, COMPLETION // 2)]
    return [
        replace(first, rows=(0, 1), completions=(completion, half)),
        replace(last, rows=(2,), completions=(completion,)),
    ]


def _forked(first: Group, last: Group) -> list[Group]:
    """Probes of which the two that share a prompt share half a completion, too.

    A completion that is too short to fork takes the end of its prompt along: all that rows may share at some later step
    is checked here.
    """
    half = COMPLETION // 2
    text = torch.cat([first.prompt[-PROMPT:], first.completions[0][:COMPLETION]])
    text = text.repeat(1 + (COMPLETION + 1) // len(text))  # once, where that leaves two tokens for the prompt
    prompt, completion = text[:-COMPLETION], text[-COMPLETION:]
    forked = torch.cat([completion[:half], completion[: half // 2].flip(0)])
    other = last.prompt[-PROMPT:][1:] if len(last.prompt) > 1 else last.prompt
    return [Group(prompt, (0, 1), (completion, forked)), Group(other, (2,), (completion,))]


def _plain_rows(
    probes: Sequence[Group], padded_logps: PaddedLogps, device: torch.device, padding: int
) -> list[Callable[[], Tensor]]:
    """A forward of each row alone, with some padding."""
    pairs = [(group, completion) for group in probes for completion in group.completions]
    return [partial(_plain_row, *pair, padded_logps, device, padding) for pair in pairs]


def _plain_row(
    group: Group, completion: Tensor, padded_logps: PaddedLogps, device: torch.device, padding: int
) -> Tensor:
    ids = nn.functional.pad(torch.cat([group.prompt, completion]), (0, padding))[None].to(device)
    mask = torch.ones_like(ids)
    mask[:, ids.shape[1] - padding :] = 0
    seen = {} if group.seen is None else group.seen.arguments(ids.shape[1], device)
    return padded_logps(ids, mask, len(completion) + padding, **seen)[0, : len(completion)]


def _named(form: Form, head: Head | None) -> str:
    return f"{'with the single-pass head, ' if head else ''}{form}"


def _in_form(
    form: Form, probes: Sequence[Group], head: Head | None, model: PreTrainedModel, called: nn.Module
) -> Tensor:
    ready = form.ready(form.arrange(probes), model.device)
    logps: Tensor
    logps, _ = called(packed=partial(form.run, ready.call, head))
    return logps.index_select(0, (ready.rows * COMPLETION + ready.columns).argsort())


def _rms(difference: Tensor) -> float:
    return float(difference.detach().float().square().mean().sqrt())
