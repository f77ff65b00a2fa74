"""Bytes of generation by transformers: in the grouped loop, in transformers' own, and with a quantized cache.

`rows_in` answers the other way round: how many rows a number of bytes holds.
"""

from bisect import bisect_right
from dataclasses import replace

from grpo_plus.planner.activations import forward_activations, mask_bytes
from grpo_plus.planner.constants import Bytes, Constants
from grpo_plus.planner.run import FULL, MIXED, Run
from grpo_plus.planner.shapes import Layer, ModelShape

# Of the grouped loop (`rollout.cache`): a buffer has room for so many more tokens, or for an eighth more.
BLOCK, GROWTH = 64, 8
# Of a quantized cache (transformers' QuantizedCache with hqq): elements that share a scale and a zero, tokens that wait
# unquantized, and bytes per key that live while a layer's keys are quantized anew.
GROUP, RESIDUAL, QUANTIZING = 64, 128, 14
# Of `rollout.prefix` on a GPU: bytes that a layer must not read again for prompts to be kept once.
LEAST_SAVED = 64 * 2**20


def generation_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Bytes of generation by transformers, with rows of full length, at the largest of its moments."""
    moments = _grouped(shape, run, constants) if run.decodes_in_groups else _stock(shape, run, constants)
    return max(moments, key=lambda causes: sum(causes.values()))


def rows_in(free: float, shape: ModelShape, run: Run) -> int:
    """Rows of the generation batch that can be generated at the same time in `free` bytes, at least one."""
    constants = Constants()

    def needed(rows: int) -> float:
        causes = generation_bytes(shape, replace(run, generation_chunk_size=rows), constants)
        return sum(causes.values()) * constants.fragmentation

    return max(1, bisect_right(range(1, run.generation_rows + 1), free, key=needed))


def _stock(shape: ModelShape, run: Run, constants: Constants) -> list[Bytes]:
    """Of transformers' own loop: the last step and the prefill.

    The last step has one layer's keys twice, because the cache grows by concatenation. A quantized cache gives a layer
    all of its keys and values in full, and quantizes them anew every so many tokens.
    """
    rows, prompt, total = run.generated_at_once, run.prompt_length, run.prompt_length + run.max_completion_length
    full, size, kept = run.weight_size, _element(run), _states(shape, rows)
    last = _largest(shape, total) // 2 * rows * full
    if run.cache_bits:
        kept += _elements(shape, min(RESIDUAL, total)) * rows * size
        size = run.cache_bits / 8 + 2 * full / GROUP
        last = int(_largest(shape, total) * rows * (2 * full + QUANTIZING / 2))
    cache = {length: _elements(shape, length) * rows * size for length in (prompt, total)}
    return [
        {"KV cache": cache[total] + kept, "activations": last, "logits": _logits(shape, run, constants)},
        {"KV cache": cache[prompt] + kept, "activations": _prefill(shape, run, rows)},
    ]


def _grouped(shape: ModelShape, run: Run, constants: Constants) -> list[Bytes]:
    """Of the grouped loop, where distinct prompts go through the model once: the steps, and the prefill."""
    prompts = run.prompts_at_once
    kept = _elements(shape, run.prompt_length) * prompts * _element(run) + _states(shape, prompts)
    steps = _prompts_once if keeps_prompts_once(shape, run) else _prompts_copied
    return [*steps(shape, run, constants), {"KV cache": kept, "activations": _prefill(shape, run, prompts)}]


def _prompts_copied(shape: ModelShape, run: Run, constants: Constants) -> list[Bytes]:
    """Every row has a copy of its prompt: the last step, and the moment before the first.

    Buffers have room at their end. At the last step, one of them has moved to a longer one and lives twice. Before the
    first step, a layer's keys and values are copied for all rows, and then into buffers.
    """
    rows, size, prompt = run.generated_at_once, _element(run), run.prompt_length
    moved = _largest(shape, prompt + run.max_completion_length) // 2 * rows * run.weight_size
    last, first = (_buffers(shape, prompt, more) * rows * size for more in (run.max_completion_length, 0))
    states = _states(shape, rows)
    return [
        {"KV cache": last + states, "activations": moved, "logits": _logits(shape, run, constants)},
        {"KV cache": first + states, "activations": _largest(shape, prompt) * rows * size},
    ]


def _prompts_once(shape: ModelShape, run: Run, constants: Constants) -> list[Bytes]:
    """Every row has only its own tokens: the last step, with a moved buffer or one layer's scores."""
    rows, prompt, completion = run.generated_at_once, run.prompt_length, run.max_completion_length
    elements = _elements(shape, prompt) * run.prompts_at_once + _buffers(shape, 0, completion) * rows
    moved = _largest(shape, completion) // 2 * run.weight_size
    scores = shape.heads * (prompt + completion) * (2 * run.weight_size + FULL)
    return [
        {
            "KV cache": elements * _element(run),
            "activations": max(moved, scores) * rows,
            "logits": _logits(shape, run, constants),
        }
    ]


def keeps_prompts_once(shape: ModelShape, run: Run) -> bool:
    """Whether the grouped loop keeps a prompt's keys and values once, by `rollout.prefix` on a GPU."""
    if any(layer.state or layer.cached is not None or not layer.query for layer in shape.layers):
        return False
    saved = (run.generated_at_once - run.prompts_at_once) * run.prompt_length * _largest(shape, 1) * run.weight_size
    return saved >= LEAST_SAVED


def _prefill(shape: ModelShape, run: Run, rows: int) -> float:
    """One layer's activations of all prompts."""
    full, tokens = run.weight_size, rows * run.prompt_length
    layer = max(forward_activations(shape, layer, run, full, tokens=tokens) for layer in shape.layers)
    return layer + mask_bytes(shape, rows, run.prompt_length, full)


def _logits(shape: ModelShape, run: Run, constants: Constants) -> float:
    return run.generated_at_once * shape.vocab * (run.weight_size + constants.sampling_copies * FULL)


def _element(run: Run) -> float:
    """Bytes of an element of the cache, the mean of a key's and a value's.

    PEFT generates outside autocast. Inside, rotary embeddings in float32 still widen the keys, not the values.
    """
    values = run.weight_size if run.lora_r or not run.autocast else MIXED
    return (run.weight_size + values) / 2


def _states(shape: ModelShape, rows: int) -> float:
    return sum(layer.state for layer in shape.layers) * rows * FULL


def _visible(layer: Layer, length: int) -> int:
    # transformers' cache keeps window - 1 positions.
    return length if layer.window is None else min(length, layer.window - 1)


def _elements(shape: ModelShape, length: int) -> int:
    """Keys and values of one row."""
    return sum(layer.cached_per_token * _visible(layer, length) for layer in shape.layers)


def _largest(shape: ModelShape, length: int) -> int:
    """Keys and values of one row in one layer, the largest."""
    return max((layer.cached_per_token * _visible(layer, length) for layer in shape.layers), default=0)


def _buffers(shape: ModelShape, prompt: int, more: int) -> int:
    """Keys and values that the buffers of one row have room for, after `more` tokens behind a prompt."""
    return sum(layer.cached_per_token * _room(layer, prompt, more) for layer in shape.layers)


def _room(layer: Layer, prompt: int, more: int) -> int:
    """Tokens that a layer's buffers have room for after `more` tokens behind a prompt."""
    held = _visible(layer, prompt)
    room = held + BLOCK
    more -= BLOCK
    while more > 0:
        held = _visible(layer, room)
        new = max(BLOCK, held // GROWTH) + 1
        room, more = held + new, more - new
    return room
