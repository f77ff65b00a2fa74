"""Generation by transformers: with the policy as it is trained, and as many rows at a time as the free memory holds."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer

from grpo_plus.models.adapters import adapter_parameters, adapter_values, bits_of
from grpo_plus.models.dropout import without_dropout
from grpo_plus.models.memory import is_out_of_memory
from grpo_plus.planner.generation import rows_in
from grpo_plus.planner.loaded import shape_and_run

logger = logging.getLogger("grpo_plus")

Rows = list[list[int]]


@contextmanager
def generating(trainer: GRPOTrainer) -> Iterator[None]:
    """Let a quantized policy sample as it is trained, and keep the adapters through TRL's casts."""
    model = trainer.model
    exact = adapter_values(model) if trainer.args.use_transformers_continuous_batching else {}
    try:
        with _as_trained(model, trainer.accelerator.autocast) if bits_of(model) else nullcontext():
            yield
    finally:
        for name, weight in adapter_parameters(model) if exact else ():
            weight.data = exact[name]  # TRL casts the whole model to half precision there


@contextmanager
def _as_trained(model: nn.Module, autocast: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Sample without dropout, and in the dtype of the update.

    TRL generates in training mode, where dropout samples every token from another policy. PEFT's `generate` calls the
    base model outside of autocast: adapters in float32 would sample in float32 and train in half precision.
    """
    with without_dropout(model), autocast():
        yield


@dataclass
class Chunks:
    """How many rows to generate for at a time.

    A prompt whose rows come in one part is forwarded once by the decoding loop. Parts are therefore whole groups of
    equal prompts wherever that takes no further part: a part takes as many steps as its longest completion.

    Attributes:
        size: a number of rows. None: as many as `fitting` says, and half as many from then on where torch runs out of
            memory all the same.
        fitting: gives the rows that the free memory holds for some prompts, None where that is not known.
    """

    size: int | None
    fitting: Callable[[Rows], int | None] = lambda prompt_ids: None

    def generate(self, complete: Callable[[slice], Rows], prompt_ids: Rows) -> Rows:
        """The completions of all prompts, in order. `complete` makes the completions of a part of the rows."""
        adapts = self.size is None
        fitting = self.fitting(prompt_ids) if adapts and prompt_ids else None
        size = min(size for size in (self.size, fitting, len(prompt_ids)) if size is not None)
        completion_ids: Rows = []
        while len(completion_ids) < len(prompt_ids):
            start = len(completion_ids)
            try:
                completion_ids += complete(slice(start, start + _first_part(prompt_ids[start:], size)))
                continue
            except RuntimeError as failure:
                if not adapts or size == 1 or not is_out_of_memory(failure):
                    raise
            # Outside the except clause, whose traceback keeps the tensors of the attempt.
            size = self._halve(size)
        return completion_ids

    def _halve(self, size: int) -> int:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = ceil(size / 2)
        logger.warning(
            f"Generating for {size} rows at a time ran out of memory. From here on: {half}. To save the attempt, set "
            f"generation_chunk_size={half}."
        )
        before = self.fitting
        self.fitting = lambda prompt_ids: min(half, before(prompt_ids) or half)
        return half


def _first_part(prompt_ids: Rows, size: int) -> int:
    """Rows of the first part, `size` at most. Whole groups, unless the prompts would then take one part more."""
    parts = _whole_groups(prompt_ids, size)
    return parts[0] if len(parts) <= ceil(len(prompt_ids) / size) else size


def _whole_groups(prompt_ids: Rows, size: int) -> list[int]:
    """Rows of each part where no part cuts a group, except a group of more than `size` rows."""
    parts: list[int] = []
    for _, group in groupby(prompt_ids):
        rows = len(list(group))
        if parts and parts[-1] + rows <= size:
            parts[-1] += rows
        else:
            parts += [size] * (rows // size) + ([rows % size] if rows % size else [])
    return parts


def rows_that_fit(model: Any, args: Any, prompt_ids: Rows) -> int | None:
    """Rows whose cache and logits fit into the free memory of a CUDA device by the planner's count: 1 or more.

    None on other devices, and for an architecture that the planner does not know.
    """
    device = model.device
    if device.type != "cuda":
        return None
    try:
        shape, run = shape_and_run(model, args, max(map(len, prompt_ids)))
    except ValueError:
        return None
    if len(prompt_ids) < run.num_generations * len(list(groupby(prompt_ids))):  # as after a tool
        run = replace(run, num_generations=1)
    free, _ = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return rows_in(free + reusable, shape, run)
