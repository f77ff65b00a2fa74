"""The passes of a prefill: what several prompts begin with goes through the model once.

After a tool's reply hardly two prompts of a batch are equal: each is a prompt, what the policy wrote, and the reply.
The prompts of a group begin alike all the same. Their beginning goes through the model in a first pass. The rests go
through in a second pass, each behind a copy of its beginning's keys and values. Beginnings may begin alike, too, as
under one system prompt, so there may be more passes.

Beginnings and rests of unequal lengths are padded on the left, so padding may stand between them. Masks hide padding
anywhere, and positions do not count it. A sliding window would count it, and a recurrent state would go through it.
After the last pass, keys and values move together, and everything is as after one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grpo_plus.models.caches import CACHE
from grpo_plus.models.pictures import reads_images
from grpo_plus.rollout.prefix import KEYS_AND_VALUES

# Tokens that a further pass must save, since it reads all weights and launches all kernels once more.
LEAST_SAVED = {"cpu": 64}
LEAST_SAVED_ELSEWHERE = 512


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model at once.

    Attributes:
        rows: token ids of each row on the host, without padding.
        parents: the row of the pass before that each row goes on from. Empty in the first pass.
    """

    rows: tuple[Tensor, ...]
    parents: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Columns, of which the longest row needs all."""
        return max(map(len, self.rows))

    @property
    def tokens(self) -> int:
        """Tokens that the model sees, with padding."""
        return len(self.rows) * self.width


def passes_of(prompts: Sequence[Tensor], device_type: str) -> tuple[Pass, ...]:
    """The passes in which fewest tokens go through the model. Empty where these are as few in one pass."""
    passes = _cut_up(Pass(tuple(prompts)), LEAST_SAVED.get(device_type, LEAST_SAVED_ELSEWHERE))
    return passes if len(passes) > 1 else ()


def why_not_passes(model: PreTrainedModel, passes: Sequence[Pass], arguments: dict[str, Any]) -> str | None:
    """Reason why prompts cannot go through the model in several passes. With None they may; the self-check decides.

    Args:
        arguments: of transformers, with an empty cache.
    """
    layers = arguments[CACHE].layers
    others = {type(layer).__name__ for layer in layers if type(layer) not in KEYS_AND_VALUES}
    if others:
        return f"a cache with {', '.join(sorted(others))} does not hold keys and values alone"
    if reads_images(model):
        return "the model reads more than text"
    mask = arguments.get("attention_mask")
    if mask is not None and not mask[:, -1].all():
        return "a prompt ends with padding"
    columns = sum(one.width for one in passes)
    if any(layer.is_sliding and layer.sliding_window <= columns for layer in layers):
        return "a sliding window would count the padding between a beginning and a rest"
    return None


def prefill(model: PreTrainedModel, passes: Sequence[Pass], arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Call the model for each pass, on the empty cache in transformers' `arguments`.

    Returns:
        Outputs of the last pass, and mask and positions (prompts, columns) of what the cache holds then.
    """
    device, cache = model.device, arguments[CACHE]
    lengths, mask = [0], torch.empty(len(passes[0].rows), 0, dtype=torch.long, device=device)
    for one in passes:
        parents = one.parents or [0] * len(one.rows)
        lengths = [lengths[parent] + len(row) for parent, row in zip(parents, one.rows, strict=True)]
        if one.parents:
            index = torch.tensor(parents).to(device, non_blocking=True)
            cache.reorder_cache(index)
            mask = mask.index_select(0, index)
        ids, real = (padded.to(device, non_blocking=True) for padded in _padded(one))
        mask = torch.cat([mask, real], 1)
        columns = {"attention_mask": mask}
        if arguments.get("position_ids") is not None:
            columns["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = model.prepare_inputs_for_generation(ids, **arguments | columns)
        outputs = model(**inputs, return_dict=True)
    order = mask.argsort(dim=1, stable=True)[:, -max(lengths) :]
    _close(cache, order)
    return outputs, {name: values.gather(1, order) for name, values in columns.items()}


def _close(cache: DynamicCache, order: Tensor) -> None:
    """Put the columns in `order` (prompts, columns), in which padding comes first, in place of all."""
    for layer in cache.layers:  # one by one, so that one layer at a time is held twice
        if layer.is_initialized:
            layer.keys, layer.values = (
                states.gather(2, order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )
        if layer.is_sliding:
            layer.cumulative_length = order.shape[1]


def _padded(one: Pass) -> tuple[Tensor, Tensor]:
    """Ids and mask (rows, width), padded on the left."""
    ids, mask = torch.zeros(2, len(one.rows), one.width, dtype=torch.long)
    for row, tokens in enumerate(one.rows):
        ids[row, one.width - len(tokens) :] = tokens
        mask[row, one.width - len(tokens) :] = 1
    return ids, mask


@dataclass(frozen=True)
class _Cut:
    """Where to cut rows in two. Rows that are cut at the same end of one beginning are a run.

    Attributes:
        runs: the rows of each run.
        ends: tokens of each run's beginning.
        tokens: that the model sees in the two passes, with padding.
        rest: those of the second pass.
    """

    runs: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    tokens: int
    rest: int

    @classmethod
    def of(cls, order: Sequence[int], common: Sequence[int], lengths: Sequence[int], least: int) -> "_Cut":
        """Sorted rows, of which neighbors with `least` common tokens stay together.

        A row that stays alone shares no beginning. It is cut where the longest of the others ends.
        """
        runs: list[list[int]] = [[order[0]]]
        shared: list[list[int]] = [[]]  # tokens that neighbors of a run have in common
        for row, tokens in zip(order[1:], common, strict=True):
            if tokens < least:
                runs.append([])
                shared.append([])
            else:
                shared[-1].append(tokens)
            runs[-1].append(row)
        longest = max(min(tokens) for tokens in shared if tokens)
        ends = [min(tokens or [longest, lengths[run[0]] - 1]) for run, tokens in zip(runs, shared, strict=True)]
        rest = len(order) * max(lengths[row] - end for run, end in zip(runs, ends, strict=True) for row in run)
        return cls(tuple(map(tuple, runs)), tuple(ends), len(runs) * max(ends) + rest, rest)

    def passes(self, rows: Sequence[Tensor]) -> tuple[Pass, Pass]:
        """The beginnings, and the rests in the order of the rows."""
        parents = {row: number for number, run in enumerate(self.runs) for row in run}
        beginnings = tuple(rows[run[0]][:end] for run, end in zip(self.runs, self.ends, strict=True))
        rests = tuple(row[self.ends[parents[number]] :] for number, row in enumerate(rows))
        return Pass(beginnings), Pass(rests, tuple(parents[number] for number in range(len(rows))))


def _cut_up(whole: Pass, least_saved: int) -> tuple[Pass, ...]:
    """Cut rows, and their beginnings again, where each cut saves `least_saved` tokens or more."""
    rows, lengths = whole.rows, [len(row) for row in whole.rows]
    if min(lengths) < 2:  # nothing would be left for one of two passes
        return (whole,)
    order = sorted(range(len(rows)), key=lambda row: rows[row].numpy().tobytes())  # rows that begin alike: neighbors
    common = [_common(rows[row], rows[after]) for row, after in pairwise(order)]
    cuts = [_Cut.of(order, common, lengths, least) for least in {*common} - {0}]
    # Of cuts that are as good, the one with longer beginnings, which may be cut again.
    best = min(cuts, key=lambda cut: (cut.tokens, cut.rest), default=None)
    if best is None or whole.tokens - best.tokens < least_saved:
        return (whole,)
    beginnings, rests = best.passes(rows)
    return (*_cut_up(beginnings, least_saved), rests)


def _common(one: Tensor, other: Tensor) -> int:
    """Tokens with which both begin. Each keeps a token for its rest."""
    longest = min(len(one), len(other)) - 1
    differing = (one[:longest] != other[:longest]).nonzero()
    return int(differing[0]) if len(differing) else longest
