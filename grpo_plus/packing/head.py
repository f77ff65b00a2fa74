"""Frozen head in a single pass, with a model's own scale and cap: a head for `Form.run`."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.kernels.linear_logprob import backend as linear_logprob_of
from grpo_plus.kernels.linear_logprob import why_not
from grpo_plus.packing.forward import Head, Logps


def single_pass_head(backend: str, *, temperature: float) -> Head:
    """Make a head that gives log-probabilities and entropies as TRL's fused head does at this temperature.

    Args:
        backend: name of a backend of `grpo_plus.kernels.linear_logprob`.
    """
    linear_logprob = linear_logprob_of(backend)

    def head(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Logps:
        weight = model.get_output_embeddings().weight
        return linear_logprob(hidden, weight, targets, **head_arguments(model, temperature))

    return head


def head_arguments(model: PreTrainedModel, temperature: float) -> dict[str, Any]:
    """What `linear_logprob` has to know of a model's head beside its weight."""
    config = model.config.get_text_config()
    scale: float | None = getattr(config, "logit_scale", None)
    return {
        "bias": model.get_output_embeddings().bias,
        "temperature": temperature,
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": 1.0 if scale is None else scale,
    }


def why_not_single_pass(model: PreTrainedModel) -> str | None:
    """Reason why the model's head needs more than a single pass. None where no reason is known."""
    return why_not(model.get_output_embeddings())
