"""Choose the rows of each micro-batch: prompts together, tokens spread evenly. Index arithmetic only."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_plus.packing.transfer import on_device


def regroup(prompts: Sequence[Hashable], tokens: Sequence[int], micro_batches: int) -> list[int]:
    """Order the rows so that equal micro-batches keep prompts together and tokens balanced.

    Every micro-batch keeps its number of rows, so that a loss that averages over the rows keeps its value. Groups go,
    the largest first, to the micro-batch with the fewest tokens that has room. A group that fits nowhere is split.

    Args:
        prompts: a key for the prompt of each row.
        tokens: the cost of each row.
        micro_batches: number of micro-batches, a divisor of the number of rows.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    room = len(prompts) // micro_batches
    batches: list[list[int]] = [[] for _ in range(micro_batches)]
    loads = [0] * micro_batches
    waiting = sorted(groups.values(), key=lambda rows: -sum(tokens[row] for row in rows))
    while waiting:
        # The next group, and the micro-batches with room for all of it.
        rows = waiting.pop(0)
        open_batches = [index for index in range(micro_batches) if len(batches[index]) < room]
        fitting = [index for index in open_batches if len(batches[index]) + len(rows) <= room]
        # Without a fitting micro-batch, the emptiest takes what it can, and the rest of the group waits its turn.
        target = (
            min(fitting, key=lambda index: loads[index])
            if fitting
            else min(open_batches, key=lambda index: len(batches[index]))
        )
        taken, rest = rows[: room - len(batches[target])], rows[room - len(batches[target]) :]
        batches[target] += taken
        loads[target] += sum(tokens[row] for row in taken)
        if rest:
            waiting.insert(0, rest)
    return [row for batch in batches for row in batch]


def reorder(batches: Sequence[dict[str, Any]], order: Sequence[int]) -> list[dict[str, Any]]:
    """Put the rows of all batches into another order. Each batch stays as large as before.

    Args:
        batches: batches of equal numbers of rows. Tensors and lists have an entry per row. Any other value, such as a
            count or None, is the same in all batches.
        order: for each new row, its index among the rows of all batches.
    """
    size = len(order) // len(batches)
    places = torch.tensor(order)
    indices: dict[torch.device, Tensor] = {}  # one copy for each device, not one for each tensor
    reordered: list[dict[str, Any]] = [dict(batch) for batch in batches]
    for name, value in batches[0].items():
        if isinstance(value, list):
            entries = [entry for batch in batches for entry in batch[name]]
            parts = [[entries[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
        elif isinstance(value, Tensor) and value.dim() > 0:
            if value.device not in indices:
                indices[value.device] = on_device(places, value.device)
            rows = torch.cat([batch[name] for batch in batches]).index_select(0, indices[value.device])
            parts = list(rows.split(size))
        else:
            continue
        for batch, part in zip(reordered, parts, strict=True):
            batch[name] = part
    return reordered
