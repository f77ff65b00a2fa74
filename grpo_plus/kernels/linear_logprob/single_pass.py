"""Frozen head in torch: each tile of logits is built once, and its softmax is computed in place.

For a tile of rows, over the whole vocabulary at once:
    logits = transform(states @ W.T + bias);  p = softmax(logits);  logp, entropy = logits' own
    vectors = (onehot(targets) - p) * slope @ W * logit_scale / temperature
"""

from functools import partial

import torch
from torch import Tensor

from grpo_plus.kernels.linear_logprob.frozen import Head, frozen_logprob
from grpo_plus.kernels.linear_logprob.kept import LEFT_OUT, Kept
from grpo_plus.kernels.products import add_product, compute_dtype

# Bytes of the logits that live at a time. TRL's tile of 4096 x 32768 has as many bytes in bf16.
TILE_BYTES = 2**28
# Columns of the weight per product. They are copied where autocast or a float32 head asks for another dtype.
VOCAB_CHUNK = 32768
# The softmax goes through a tile in blocks. On a CPU a block fits the cache; elsewhere blocks are few and large.
BLOCK_BYTES = {"cpu": 2**20}
LARGE_BLOCK_BYTES = 2**26


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    kept: Kept | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.linear_logprob` without the (N, V) logits. Only `hidden` gets a gradient.

    Computes in autocast's dtype where autocast is on, else in the dtype of `hidden`. The softmax is always in float32.

    Raises:
        ValueError: the weight or the bias trains, or the weight is not a plain floating tensor.
    """
    score = partial(_score, kept)
    return frozen_logprob(score, hidden, targets, Head(weight, bias, temperature, softcap, logit_scale))


def _score(
    kept: Kept | None, hidden: Tensor, targets: Tensor, head: Head, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities (N,), entropies (N,) and derivatives of the log-probabilities (N, H), tile by tile."""
    device, dtype = hidden.device, compute_dtype(hidden)
    count, vocab = hidden.shape[0], head.weight.shape[0]
    most = max(1, TILE_BYTES // (vocab * dtype.itemsize))
    rows = -(-count // max(1, -(-count // most)))  # tiles of one height, so that the last is no remnant
    logps = torch.empty(count, dtype=torch.promote_types(dtype, torch.float32), device=device)
    entropy = torch.empty_like(logps)
    vectors = torch.empty_like(hidden) if with_gradient else None
    tiles = torch.empty((rows, vocab), dtype=dtype, device=device)
    for start in range(0, count, max(1, rows)):
        part = slice(start, start + rows)
        states = hidden[part].to(dtype)
        tile = tiles[: states.shape[0]]
        _project(states, head, tile)
        left_out = None if kept is None else kept.left_out(part, vocab)
        _fold(tile, targets[part], left_out, head, logps[part], entropy[part], with_gradient)
        if vectors is not None:
            vectors[part] = _times_weight(tile, head)
    return logps, entropy, vectors


def _project(states: Tensor, head: Head, tile: Tensor) -> None:
    """Write states Wᵀ + bias into the tile."""
    for chunk in _vocab_chunks(head):
        torch.mm(states, head.weight[chunk].to(tile.dtype).t(), out=tile[:, chunk])
    if head.bias is not None:
        tile.add_(head.bias.to(tile.dtype))


def _fold(
    tile: Tensor,
    targets: Tensor,
    left_out: Tensor | None,
    head: Head,
    logps: Tensor,
    entropy: Tensor,
    with_gradient: bool,
) -> None:
    """Read log-probabilities and entropies off the tile. With a gradient to form, leave d(-logp)/dz in the tile."""
    vocab = tile.shape[1]
    rows = max(1, BLOCK_BYTES.get(tile.device.type, LARGE_BLOCK_BYTES) // (vocab * logps.itemsize))
    scratch = torch.empty((min(rows, tile.shape[0]), vocab), dtype=logps.dtype, device=tile.device)
    for start in range(0, tile.shape[0], rows):
        part = slice(start, start + rows)
        target = targets[part].unsqueeze(1)
        logits = tile[part].to(logps.dtype)  # float32 tiles are worked on in place
        slope = _transform(logits, head, with_gradient)
        if left_out is not None:
            logits.masked_fill_(left_out[part], LEFT_OUT)
        logits.sub_(logits.amax(-1, keepdim=True))
        if left_out is not None:
            logits.masked_fill_(left_out[part], 0.0)  # on a CPU exp takes ten times as long where it underflows
        probs = torch.exp(logits, out=scratch[: logits.shape[0]])
        if left_out is not None:
            probs.masked_fill_(left_out[part], 0.0)
        total = probs.sum(-1)  # torch.softmax sums less accurately
        logps[part] = logits.gather(1, target).squeeze(1) - total.log()
        entropy[part] = total.log() - logits.mul_(probs).sum(-1) / total
        if with_gradient:
            # Before rounding to bf16, which would lose the small 1 - p of an almost certain token.
            probs.div_(total.unsqueeze(1)).scatter_add_(1, target, torch.full_like(target, -1, dtype=probs.dtype))
            if slope is not None:
                probs.mul_(slope)
            tile[part] = probs


def _transform(logits: Tensor, head: Head, with_gradient: bool) -> Tensor | None:
    """Scale, cap and temper the logits in place. Returns the slope of the cap, None where no slope is needed."""
    slope = None
    if head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        if with_gradient:
            slope = 1 - logits.square()
        logits.mul_(head.softcap)
    if head.temperature != 1.0:
        logits.mul_(1 / head.temperature)
    return slope


def _times_weight(tile: Tensor, head: Head) -> Tensor:
    """Derivatives of the log-probabilities, (n, H), from d(-logp)/dz. The sum over the vocabulary is in float32."""
    wide = torch.promote_types(tile.dtype, torch.float32)
    total = torch.zeros((tile.shape[0], head.weight.shape[1]), dtype=wide, device=tile.device)
    for chunk in _vocab_chunks(head):
        add_product(total, tile[:, chunk], head.weight[chunk].to(tile.dtype))
    return total.mul_(-head.logit_scale / head.temperature)


def _vocab_chunks(head: Head) -> list[slice]:
    vocab = head.weight.shape[0]
    return [slice(start, min(start + VOCAB_CHUNK, vocab)) for start in range(0, vocab, VOCAB_CHUNK)]
