"""Head over short lists of kept tokens: reads only the rows of the weight that a list names.

A softmax over the k tokens of a list needs k products of a hidden state with a row of the weight, where the vocabulary
has V. Lists have different lengths, so that all of them are laid end to end, and sums go by the position of each entry.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grpo_plus.kernels.linear_logprob.kept import Kept
from grpo_plus.kernels.linear_logprob.single_pass import TILE_BYTES
from grpo_plus.kernels.products import compute_dtype

# Entries of a matrix product with the whole vocabulary that take as long as an entry of a list. Measured on a CPU. On a
# GPU it is the quotient of a product's operations and of the bytes that an entry moves, for cards of 2022 to 2024.
PER_ENTRY = {"cpu": 64}
PER_ENTRY_ELSEWHERE = 512


def pays(kept: Kept, vocab: int) -> bool:
    """Whether the lists, with what pads them, are short enough. Asks no device."""
    factor = PER_ENTRY.get(kept.ids.device.type, PER_ENTRY_ELSEWHERE)
    return factor * len(kept.ids) <= len(kept.are_kept) * vocab


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
    """Compute `reference.linear_logprob` where every list holds what is kept. Everything takes part in the gradient."""
    dtype = compute_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    states = F.pad(hidden, (0, 0, 0, 1))  # a last row for entries that belong to no position
    size = max(1, TILE_BYTES // (wide.itemsize * hidden.shape[1]))

    def tile(start: int) -> Tensor:
        part = slice(start, start + size)
        ids, owners = kept.ids[part], kept.owners[part]
        # Products of rounded factors, summed in float32.
        logits = (states[owners].to(dtype).to(wide) * weight[ids].to(dtype)).sum(-1)
        logits = logit_scale * (logits if bias is None else logits + bias[ids].to(dtype))
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature

    starts = range(0, max(1, len(kept.ids)), size)
    logits = torch.cat([checkpoint(tile, start, use_reentrant=False, preserve_rng_state=False) for start in starts])
    return _softmax(logits, targets, kept)


def _softmax(logits: Tensor, targets: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets and entropies, (N,) each, from the logits (E,) of all entries."""
    owners, count = kept.owners, len(targets)
    zeros = logits.new_zeros(count + 1)
    largest = zeros.scatter_reduce(0, owners, logits.detach(), "amax", include_self=False)
    shifted = logits - largest[owners]
    logps = shifted - zeros.index_add(0, owners, shifted.exp()).log()[owners]
    drawn = kept.ids == F.pad(targets, (0, 1))[owners]
    scores = (zeros.index_add(0, owners, values) for values in (torch.where(drawn, logps, 0.0), -logps.exp() * logps))
    logp, entropies = (score[:count] for score in scores)
    return logp, entropies
