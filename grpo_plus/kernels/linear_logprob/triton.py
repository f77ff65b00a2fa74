"""Frozen head on a GPU: the vendor's library computes the products, and one Triton pass over each tile does the rest.

For a tile of rows, chunk after chunk of the vocabulary. m is the largest logit so far, y the target; e leaves y out:
    z = transform(states @ W[chunk].T + bias[chunk]);  e = exp(z - m) * slope;  total = total * rescale + e @ W[chunk]
    vectors = ((1 - p[y]) * slope[y] * W[y] - total / sum(exp(z - m))) * logit_scale / temperature

Why not one kernel for all of it: `total` takes a row of H float32 per token, 10 KB at H = 2560. No block of rows that
is large enough for the tensor cores keeps that in registers or shared memory.
Why chunks and not whole rows of logits: with an online softmax, a tile may be as tall as TRL's. Such a tile fills the
GPU in the second product too, reads W once for each product, has aligned rows at any vocabulary, and takes half the
memory.
Why the target stays out of the sums until the end: 1 - p[y] is then a sum of small numbers. bf16 would lose 1 - p[y] as
a difference of large numbers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_plus.kernels.linear_logprob.frozen import Head, frozen_logprob
from grpo_plus.kernels.products import add_product, compute_dtype

# Size of a tile of logits: 128 MiB in bf16, half of TRL's. Multiples of 64 columns keep its rows aligned. Multiples of
# 16 rows align the slices of the other tensors, because Triton compiles anew for pointers that 16 does not divide.
ROWS = 4096
COLUMNS = 16384
ALIGNMENT = (16, 64)
# A finite stand-in for the largest of no logits at all. With an infinite one the first rescaling would be NaN.
LOWEST = tl.constexpr(-1e30)


class Blocks(NamedTuple):
    """Walk of a program along its row of a tile: columns at a time, and warps that share them."""

    columns: int
    warps: int


# By compute capability. Memory bounds these kernels. 16 columns per thread are two loads of 16 bytes in bf16. With the
# registers that the compiler reports, a multiprocessor of every card since Ampere has 20 KB or more of loads under way,
# and 8 KB keep a consumer card's memory busy. Turing's 1024 threads all fit with 8 columns each. These sizes are
# derived from the compiler's reports, not measured on a GPU; `python -m benchmarks.kernels --blocks` measures other
# sizes.
DEFAULT_BLOCKS = Blocks(2048, 4)
BLOCKS = {(7, 5): Blocks(1024, 4)}


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.linear_logprob` without the (N, V) logits. Only `hidden` gets a gradient.

    Dtypes and errors as in `single_pass.linear_logprob`.
    """
    return frozen_logprob(_score, hidden, targets, Head(weight, bias, temperature, softcap, logit_scale))


def why_not_on(device: torch.device | str) -> str | None:
    """Reason why these kernels cannot run on a device. None if they can."""
    interpreted = not isinstance(_fold, triton.runtime.JITFunction)
    kind = torch.device(device).type
    return None if interpreted or kind in ("cuda", "xpu") else f"Triton compiles no kernels for the device {kind!r}"


class Sums(NamedTuple):
    """Sums of each row over the vocabulary so far, (n,) each. The first three leave the target out.

    highest: the largest logit, after scale, cap and temperature.
    total: sum of exp(logit - highest).
    weighted: sum of exp(logit - highest) * (logit - highest).
    target: the target's own logit.
    """

    highest: Tensor
    total: Tensor
    weighted: Tensor
    target: Tensor


def _score(hidden: Tensor, targets: Tensor, head: Head, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities (N,), entropies (N,) and derivatives of the log-probabilities (N, H), tile by tile."""
    device, dtype = hidden.device, compute_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    (count, width), vocab = hidden.shape, head.weight.shape[0]
    rows, columns = _even(count, ROWS, ALIGNMENT[0]), _even(vocab, COLUMNS, ALIGNMENT[1])
    targets = targets.contiguous()
    logps = torch.empty(count, dtype=wide, device=device)
    entropy = torch.empty_like(logps)
    vectors = torch.empty((count, width), dtype=hidden.dtype, device=device) if with_gradient else None
    tile = torch.empty((rows, columns), dtype=dtype, device=device)
    products = torch.empty((rows, width) if with_gradient else (0, 0), dtype=wide, device=device)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        states = hidden[part].to(dtype)
        sums = _pass(states, targets[part], head, tile[: len(states)], products[: len(states)], with_gradient)
        _finish[(len(states),)](
            *sums,
            logps[part],
            entropy[part],
            targets[part],
            head.weight,
            head.weight.stride(0),
            head.weight.stride(1),
            products,
            hidden if vectors is None else vectors[part],
            width,
            SCALE=head.logit_scale,
            CAP=head.softcap,
            TEMPERATURE=head.temperature,
            WITH_GRADIENT=with_gradient,
            BLOCK=1024,
        )
    return logps, entropy, vectors


def _pass(states: Tensor, targets: Tensor, head: Head, tile: Tensor, products: Tensor, with_gradient: bool) -> Sums:
    """Go through the vocabulary, chunk by chunk, for one tile of rows. Leaves the sum of e @ W in `products`."""
    blocks = _blocks(states.device)
    sums = Sums(*(torch.empty(len(states), dtype=products.dtype, device=states.device) for _ in Sums._fields))
    vocab, columns = head.weight.shape[0], tile.shape[1]
    products.zero_()
    for start in range(0, vocab, columns):
        weight = head.weight[start : start + columns].to(states.dtype)
        logits = tile[:, : len(weight)]
        torch.mm(states, weight.t(), out=logits)
        _fold[(len(states),)](
            logits,
            tile.stride(0),
            targets,
            logits if head.bias is None else head.bias,
            *sums,
            products,
            start,
            len(weight),
            states.shape[1],
            FIRST=start == 0,
            HAS_BIAS=head.bias is not None,
            SCALE=head.logit_scale,
            CAP=head.softcap,
            TEMPERATURE=head.temperature,
            WITH_GRADIENT=with_gradient,
            BLOCK=blocks.columns,
            num_warps=blocks.warps,
        )
        if with_gradient:
            add_product(products, logits, weight)
    return sums


def _even(count: int, most: int, multiple: int) -> int:
    """Size of equal steps of about `most` at a time, so that the last step is no remnant."""
    steps = max(1, -(-count // most))
    return max(1, -(-count // (steps * multiple))) * multiple


def _blocks(device: torch.device) -> Blocks:
    if device.type != "cuda":
        return DEFAULT_BLOCKS
    return BLOCKS.get(torch.cuda.get_device_capability(device), DEFAULT_BLOCKS)


@triton.jit
def _logits(projected, bias, offsets, inside, wide, HAS_BIAS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
            TEMPERATURE: tl.constexpr):  # fmt: skip
    """Tempered logits of a projection, and the derivative of capped logits by uncapped logits."""
    z = projected.to(wide)
    if HAS_BIAS:
        z += tl.load(bias + offsets, mask=inside, other=0.0).to(wide)
    z = z * SCALE
    slope = tl.full(z.shape, 1.0, wide)
    if CAP is not None:
        rest = 2.0 / (1.0 + tl.exp(2.0 * z / CAP))  # 1 - tanh(z / CAP)
        slope = rest * (2.0 - rest)
        z = CAP * (1.0 - rest)
    return z / TEMPERATURE, slope


@triton.jit
def _fold(tile, tile_stride, targets, bias, highest_ptr, total_ptr, weighted_ptr, target_ptr, products,
          start, columns, width, FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
          TEMPERATURE: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Fold the logits of one row of a tile into the sums. With a gradient to form, put e in their place."""
    row = tl.program_id(0).to(tl.int64)
    wide: tl.constexpr = highest_ptr.dtype.element_ty
    tile += row * tile_stride
    bias += start
    target = (tl.load(targets + row) - start).to(tl.int32)
    if (target >= 0) & (target < columns):
        own, _ = _logits(tl.load(tile + target), bias, target, True, wide, HAS_BIAS, SCALE, CAP, TEMPERATURE)
        tl.store(target_ptr + row, own)

    peaks = tl.full((BLOCK,), LOWEST, wide)
    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        counted = (offsets < columns) & (offsets != target)
        projected = tl.load(tile + offsets, mask=offsets < columns, other=0.0)
        z, _ = _logits(projected, bias, offsets, offsets < columns, wide, HAS_BIAS, SCALE, CAP, TEMPERATURE)
        peaks = tl.maximum(peaks, tl.where(counted, z, LOWEST))
    highest = tl.max(peaks, axis=0)
    total = tl.zeros((BLOCK,), wide)
    weighted = tl.zeros((BLOCK,), wide)
    rescale = 1.0
    if not FIRST:
        before = tl.load(highest_ptr + row)
        highest = tl.maximum(highest, before)
    tl.debug_barrier()  # every thread has read what the loop below overwrites

    for first in range(0, columns, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        inside = offsets < columns
        projected = tl.load(tile + offsets, mask=inside, other=0.0)
        z, slope = _logits(projected, bias, offsets, inside, wide, HAS_BIAS, SCALE, CAP, TEMPERATURE)
        e = tl.where(inside & (offsets != target), tl.exp(z - highest), 0.0)
        total += e
        weighted += tl.where(e > 0, e * (z - highest), 0.0)
        if WITH_GRADIENT:
            tl.store(tile + offsets, (e * slope).to(tile.dtype.element_ty), mask=inside)
    total = tl.sum(total, axis=0)
    weighted = tl.sum(weighted, axis=0)

    if not FIRST:
        rescale = tl.exp(before - highest)
        total_before = tl.load(total_ptr + row)
        weighted += rescale * (tl.load(weighted_ptr + row) + total_before * (before - highest))
        total += rescale * total_before
        if WITH_GRADIENT:
            # The largest logit of a row is seldom in a later chunk, so that few rows of the products are touched.
            if highest > before:
                products += row * width
                for first in range(0, width, BLOCK):
                    offsets = first + tl.arange(0, BLOCK)
                    product = tl.load(products + offsets, mask=offsets < width, other=0.0)
                    tl.store(products + offsets, product * rescale, mask=offsets < width)
    tl.store(highest_ptr + row, highest)
    tl.store(total_ptr + row, total)
    tl.store(weighted_ptr + row, weighted)


@triton.jit
def _finish(highest_ptr, total_ptr, weighted_ptr, target_ptr, logps, entropy, targets, weight, weight_stride,
            column_stride, products, vectors, width, SCALE: tl.constexpr, CAP: tl.constexpr,
            TEMPERATURE: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Bring the target of one row into the sums, and turn its products into the derivative."""
    row = tl.program_id(0).to(tl.int64)
    highest, own = tl.load(highest_ptr + row), tl.load(target_ptr + row)
    others, weighted = tl.load(total_ptr + row), tl.load(weighted_ptr + row)
    peak = tl.maximum(highest, own)
    rescale, of_target = tl.exp(highest - peak), tl.exp(own - peak)
    total = rescale * others + of_target
    weighted = rescale * (weighted + others * (highest - peak)) + of_target * (own - peak)
    tl.store(logps + row, own - peak - tl.log(total))
    tl.store(entropy + row, tl.log(total) - weighted / total)
    if WITH_GRADIENT:
        p = rescale / total  # the probability that e = 1 stands for
        at_target = p * others
        if CAP is not None:
            tanh = own * TEMPERATURE / CAP
            at_target *= 1.0 - tanh * tanh
        weight += tl.load(targets + row) * weight_stride
        products += row * width
        vectors += row * width
        for first in range(0, width, BLOCK):
            offsets = first + tl.arange(0, BLOCK)
            inside = offsets < width
            own_weight = tl.load(weight + offsets * column_stride, mask=inside, other=0.0).to(products.dtype.element_ty)
            product = tl.load(products + offsets, mask=inside, other=0.0)
            vector = (at_target * own_weight - p * product) * (SCALE / TEMPERATURE)
            tl.store(vectors + offsets, vector.to(vectors.dtype.element_ty), mask=inside)
