"""Head of any kind over kept sets: autograd over tiles of logits, which backward builds again."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_plus.kernels.linear_logprob.kept import Kept
from grpo_plus.kernels.linear_logprob.reference import log_softmax, negative_entropy
from grpo_plus.kernels.linear_logprob.single_pass import TILE_BYTES


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    kept: Kept,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.linear_logprob` tile by tile. Weight, bias and entropies take part in the gradient."""
    count, vocab = len(targets), len(weight)
    rows = max(1, TILE_BYTES // (4 * vocab))

    def tile(start: int) -> tuple[Tensor, Tensor]:
        part = slice(start, start + rows)
        left_out = kept.left_out(part, vocab)
        logps = log_softmax(hidden[part], weight, left_out, bias, temperature, softcap, logit_scale)
        return logps.gather(1, targets[part].unsqueeze(1)).squeeze(1), -negative_entropy(logps)

    # Without a token there is one empty tile, so that a gradient of 0 exists.
    starts = range(0, max(1, count), rows)
    scores = [checkpoint(tile, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
    logps, entropies = zip(*scores, strict=True)
    return torch.cat(logps), torch.cat(entropies)
