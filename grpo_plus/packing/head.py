"""The frozen head in a single pass, with a model's own scale and cap; what `Form.run` takes as its head."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grpo_plus.kernels.linear_logprob import linear_logprob, why_not
from grpo_plus.packing.forward import Head, Logps


def single_pass_head(*, temperature: float, float32: bool) -> Head:
    """Log-probabilities and entropies of a frozen head, as TRL's fused head gives them.

    Args:
        temperature: that of the logits.
        float32: whether the head computes in float32 whatever the model's dtype.
    """

    def head(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Logps:
        config, lm_head = model.config.get_text_config(), model.get_output_embeddings()
        scale: float | None = getattr(config, "logit_scale", None)
        cap: float | None = getattr(config, "final_logit_softcapping", None)
        context: Any = torch.autocast(hidden.device.type, enabled=False) if float32 else nullcontext()
        with context:
            return linear_logprob(
                hidden.float() if float32 else hidden,
                lm_head.weight,
                targets,
                bias=lm_head.bias,
                temperature=temperature,
                softcap=cap,
                logit_scale=1.0 if scale is None else scale,
            )

    return head


def why_not_single_pass(model: PreTrainedModel) -> str | None:
    """Why the model's head needs more than a single pass; None where nothing is known against it."""
    return why_not(model.get_output_embeddings())
