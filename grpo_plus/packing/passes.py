"""Form of two passes through the model's own cache: prompts first, then completions in parts of similar length.

Where the tokens of a pass are bounded, a longer prompt goes through in parts. Each part reads what the parts before it
have recorded, and the backward computes one part again at a time. Their gradients meet in the records.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from grpo_plus.models.caches import CACHE
from grpo_plus.packing.cached import PartReader, PromptReader, PromptRecord, States, checkpoints_with_cache
from grpo_plus.packing.forward import Form, Head, Logps, Pass, Ready, Tokens, joined, score
from grpo_plus.packing.layout import IGNORED, Group, passes, runs, scored
from grpo_plus.packing.recomputed import recomputed
from grpo_plus.packing.seen import joined_images

CARRIES_STATE = frozenset({"linear_attention", "conv", "mamba"})
STATES_SINCE = Version("5.21")


@dataclass(frozen=True)
class _Prompts:
    """Prompts of several groups without their last tokens, padded on the left to one length.

    input_ids: (prompts, length).
    position_ids: (prompts, length), or (3, prompts, length).
    mask: (prompts, length), 0 at padding. None where all prompts have this length.
    types: for each argument that names kinds of tokens, (prompts, length).
    images: of each prompt, by argument of the model's forward.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor | None
    types: tuple[tuple[str, Tensor], ...] = ()
    images: tuple[Mapping[str, Tensor], ...] = ()


@dataclass(frozen=True)
class _Completions:
    """Completions padded on the right to one length, each after its prompt.

    prompts: (rows,) index of each row's prompt. None where all rows have the same.
    mask: (rows, prompt length + length), 0 at the prompt's padding. None where no prompt is padded.
    """

    tokens: Tokens
    prompts: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class _Part:
    """Groups whose prompts go through the model together, and their completions.

    prompts: None for prompts of one token, of which no token precedes the completions.
    """

    prompts: _Prompts | None
    completions: tuple[_Completions, ...]


@dataclass(frozen=True)
class _Long:
    """One group whose completions take several passes. What its prompt has recorded is kept for all of them.

    prompts: the parts in which the prompt goes through. Empty for a prompt of one token.
    """

    part: _Part
    prompts: tuple[_Prompts, ...]


def pass_tokens(device: torch.device) -> int:
    """Cost of a pass beside its tokens, counted in tokens, forward and backward.

    Prompts and completions go through the model in parts of similar length, where a further part saves more padding.
    """
    # A pass through 36 layers issues about 9,000 launches of 6 us, in which a GPU gets through some thousand tokens.
    return 64 if device.type == "cpu" else 4096


def why_not_cached(model: PreTrainedModel) -> str | None:
    """Reason why the cache cannot carry a prompt to its completions. With None it may; the self-check decides."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds & CARRIES_STATE and Version(transformers.__version__) < STATES_SINCE:
        return (
            f"layers of type {', '.join(sorted(kinds & CARRIES_STATE))} continue from a cache since transformers "
            f"{STATES_SINCE}, found {transformers.__version__}: pip install -U transformers"
        )
    return None


def _lay_out(groups: Sequence[Group], device: torch.device) -> Ready:
    groups, parts = list(groups), []
    order: list[Group] = []  # rows in the order in which they are scored
    for members in _parts(groups, device):
        some = [groups[index] for index in members]
        length = max(len(group.prompt) for group in some) - 1
        rows = [(which, row) for which, group in enumerate(some) for row in range(len(group.rows))]
        completions = []
        for chosen in passes([_length(some[which], row) for which, row in rows], pass_tokens(device)):
            taken = [rows[index] for index in chosen]
            completions.append(_completions(some, taken, length))
            order += [some[which].apart()[row] for which, row in taken]
        parts.append(_Part(_prompts(some, length) if length else None, tuple(completions)))
    return Ready(tuple(parts), *scored(order), _tokens(groups, device))


def _parts(groups: Sequence[Group], device: torch.device) -> list[list[int]]:
    """Choose which groups go through the model together."""
    short = [index for index, group in enumerate(groups) if len(group.prompt) == 1]
    others = [index for index, group in enumerate(groups) if len(group.prompt) > 1]
    parts = passes([len(groups[index].prompt) - 1 for index in others], pass_tokens(device))
    return [*([short] if short else []), *([others[index] for index in part] for part in parts)]


def _length(group: Group, row: int) -> int:
    # A recurrent layer takes a single token for a step of generation and writes to its cache.
    return max(2, len(group.completions[row]))


def _prompts(groups: Sequence[Group], length: int) -> _Prompts:
    padding = [length - len(group.prompt) + 1 for group in groups]
    ids = torch.stack([pad(group.prompt[:-1], (left, 0)) for group, left in zip(groups, padding, strict=True)])
    positions = [pad(group.positions[..., :-1], (left, 0)) for group, left in zip(groups, padding, strict=True)]
    inside = torch.arange(length) >= torch.tensor(padding).unsqueeze(1)
    seen = [group.seen for group in groups if group.seen is not None]
    types = {
        name: torch.stack([pad(one.types[name][:-1], (left, 0)) for one, left in zip(seen, padding, strict=True)])
        for name in (seen[0].types if seen else ())
    }
    return _Prompts(
        ids,
        torch.stack(positions, dim=-2),
        inside.long() if any(padding) else None,
        tuple(types.items()),
        tuple(one.images for one in seen),
    )


def _completions(groups: Sequence[Group], rows: Sequence[tuple[int, int]], prompt_length: int) -> _Completions:
    """Lay out rows, each a completion of one of the groups, behind prompts padded to one length."""
    length = max(_length(groups[which], row) for which, row in rows)
    shared = torch.tensor([len(groups[which].prompt) - 1 for which, _ in rows]).unsqueeze(1)
    texts = [groups[which].continuation(row) for which, row in rows]
    labels = [groups[which].completions[row] for which, row in rows]
    ids = torch.stack([pad(text, (0, length - len(text))) for text in texts])
    targets = torch.stack([pad(label, (0, length - len(label)), value=IGNORED) for label in labels])
    padded = prompt_length - shared
    mask = (torch.arange(prompt_length + length) >= padded).long() if bool(padded.any()) else None
    prompts = torch.tensor([which for which, _ in rows]) if len(groups) > 1 else None
    positions = [groups[which].positions[..., -1:] + torch.arange(length) for which, _ in rows]
    return _Completions(Tokens.of(ids, torch.stack(positions, dim=-2), targets), prompts, mask)


def _lay_out_long(group: Group, device: torch.device, max_tokens: int) -> Ready:
    """Lay out one group, its completions at most `max_tokens` at a time, or one where that is longer."""
    length = len(group.prompt) - 1
    lengths = [_length(group, row) for row in range(len(group.rows))]
    chosen = [
        part
        for same in passes(lengths, pass_tokens(device))
        for part in runs(same, lambda rows: len(rows) * max(lengths[row] for row in rows) <= max_tokens)
    ]
    completions = [_completions([group], [(0, row) for row in rows], length) for rows in chosen]
    prompt = _prompts([group], length) if length else None
    long = _Long(_Part(prompt, tuple(completions)), _in_parts(prompt, max_tokens) if prompt else ())
    apart = group.apart()
    places = scored([apart[row] for rows in chosen for row in rows])
    tokens = length + sum(completion.tokens.input_ids.numel() for completion in completions)
    sizes = tuple(len(completion.tokens.places) for completion in completions)
    return Ready(long, *places, tokens, sizes)


def _in_parts(prompt: _Prompts, max_tokens: int) -> tuple[_Prompts, ...]:
    """Cut a prompt into parts of nearly one size."""
    length = prompt.input_ids.shape[1]
    if any(prompt.images):  # the tokens of an image see each other, and the image goes through the model once
        return (prompt,)
    # Two tokens at least: a recurrent layer takes a single token for a step of generation.
    count = max(1, min(-(-length // max_tokens), length // 2))
    parts = zip(*(ids.tensor_split(count, dim=-1) for ids in (prompt.input_ids, prompt.position_ids)), strict=True)
    return tuple(_Prompts(ids, positions, None) for ids, positions in parts)


def _passes(
    call: tuple[_Part, ...] | _Long, head: Head | None, model: PreTrainedModel, forward: Callable[..., Any]
) -> Iterator[Pass]:
    if not isinstance(call, _Long):
        yield partial(_run, call, head, model, forward)
        return
    recorded = _read_in_parts(call.prompts, model)
    for rows in call.part.completions:
        yield partial(_continue, call.part, recorded, rows, head, model, forward)


def _read_in_parts(prompts: Sequence[_Prompts], model: PreTrainedModel) -> States:
    """Run the parts of a prompt through the model. Returns what the layers have written."""
    config, recorded, length = model.config.get_text_config(), States(), 0
    for number, part in enumerate(prompts):
        record = PromptRecord(config, part=number)
        cache = PartReader(config, recorded, length, record) if number else record
        read = partial(_read, part, cache, model)
        if len(prompts) > 1 and torch.is_grad_enabled():
            recomputed(read, model.device)
        else:
            read()
        recorded = recorded | record.take()
        length += part.input_ids.shape[1]
    return recorded


def _run(parts: Sequence[_Part], head: Head | None, model: PreTrainedModel, forward: Callable[..., Any]) -> Logps:
    with checkpoints_with_cache(model):
        pairs = ((part, _recorded(part, model)) for part in parts)
        return joined(
            _score(part, recorded, rows, head, model, forward) for part, recorded in pairs for rows in part.completions
        )


def _continue(part: _Part, recorded: States, *rest: Any) -> Logps:
    with checkpoints_with_cache(rest[2]):
        return _score(part, recorded, *rest)


def _recorded(part: _Part, model: PreTrainedModel) -> States:
    """What the layers write while the prompts of a part go through the model."""
    record = PromptRecord(model.config.get_text_config())
    if part.prompts is not None:
        _read(part.prompts, record, model)
    return record.take()


def _read(prompts: _Prompts, cache: DynamicCache, model: PreTrainedModel) -> None:
    with checkpoints_with_cache(model):
        model.base_model(
            input_ids=prompts.input_ids,
            attention_mask=prompts.mask,
            position_ids=prompts.position_ids,
            **{CACHE: cache},
            use_cache=True,
            **joined_images(prompts.images),
            **dict(prompts.types),
        )


def _score(
    part: _Part,
    recorded: States,
    rows: _Completions,
    head: Head | None,
    model: PreTrainedModel,
    forward: Callable[..., Any],
) -> Logps:
    """Run completions through the model, after their recorded prompts."""
    reader = None
    if part.prompts is not None:
        shape = len(rows.tokens.input_ids), part.prompts.input_ids.shape[1]
        reader = PromptReader(model.config.get_text_config(), recorded, *shape, prompts=rows.prompts)
    return score(model, forward, head, rows.tokens, attention_mask=rows.mask, **{CACHE: reader})


def _tokens(groups: Sequence[Group], device: torch.device) -> int:
    total = 0
    for members in _parts(groups, device):
        some = [groups[index] for index in members]
        lengths = [_length(group, row) for group in some for row in range(len(group.rows))]
        total += len(some) * (max(len(group.prompt) for group in some) - 1)
        total += sum(len(rows) * max(lengths[row] for row in rows) for rows in passes(lengths, pass_tokens(device)))
    return total


CACHED = Form("shared_prompt", "two passes through the model's cache", True, _lay_out, _passes, _tokens, _lay_out_long)
