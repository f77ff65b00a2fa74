"""Bytes of scoring and of an update: forward and backward of the rows that go through the layers together."""

from grpo_plus.planner.activations import (
    attention_activations,
    attention_derivatives,
    feed_forward_activations,
    forward_activations,
    forwarded_tokens,
    layer_activations,
    mlp_derivatives,
    norm_derivatives,
    row_masks,
    tiled_activations,
    tiled_tokens,
    weight_copies,
)
from grpo_plus.planner.constants import Bytes, Constants
from grpo_plus.planner.run import FULL, MIXED, Run
from grpo_plus.planner.shapes import Layer, ModelShape

INPUTS_ON_THE_CARD = 3  # layer inputs under offload_activations: one in use, one on each way


def scoring_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Bytes of log-probabilities without gradients, one part of a micro-batch at a time."""
    tokens, scored = forwarded_tokens(run), run.rows_per_pass * run.max_completion_length
    size = MIXED if run.autocast else run.weight_size
    layer = max(
        forward_activations(shape, layer, run, size, tokens=tokens, in_mlp=tiled_tokens(layer, run, tokens))
        for layer in shape.layers
    )
    layer += row_masks(shape, run, size)
    final = tokens * shape.hidden * (run.weight_size + FULL)
    head = _tile(shape, run, scored, constants) + scored * shape.hidden * run.weight_size
    if layer > final + head:
        return {"activations": layer}
    return {"activations": final, "logits": head}


def update_bytes(shape: ModelShape, run: Run, constants: Constants) -> Bytes:
    """Bytes of forward and backward of one part of a micro-batch, without the gradients of weights.

    With checkpointing, the inputs of all layers live while one layer after the other is computed again. Without
    checkpointing, everything lives that the layers save. The head's tiles are gone before the first backward of a
    layer, so the larger of head and layer counts. The parts of a micro-batch follow each other, and a part leaves
    nothing but its log-probabilities.
    """
    tokens, scored = forwarded_tokens(run), run.rows_per_pass * run.max_completion_length
    saved = [_saved(shape, layer, run, constants) for layer in shape.layers]
    masks = row_masks(shape, run, MIXED if run.autocast else run.weight_size)
    residual = tokens * shape.hidden * run.weight_size
    layer = max(_layer_backward(shape, layer, run, constants) for layer in shape.layers) + residual
    final = tokens * shape.hidden * (FULL + 2 * run.weight_size)
    head = final + _head_backward(shape, run, scored, constants)
    if run.lora_r is None and run.weight_size == FULL and run.autocast:
        # Autocast remembers the half-precision copy of each trained weight until the forward ends.
        copies = MIXED * (shape.linear + shape.experts) if run.gradient_checkpointing else 0
        layer = max(layer, copies)
    larger = {"one layer": layer} if layer >= head else {"logits": head}
    if not run.gradient_checkpointing:
        return {"saved activations": sum(saved) + masks} | larger
    on_the_card = INPUTS_ON_THE_CARD if run.offload_activations else len(shape.layers)
    return {"layer inputs": min(on_the_card, len(shape.layers)) * residual + masks} | larger


def host_inputs(shape: ModelShape, run: Run) -> float:
    """Bytes of layer inputs that wait in the host's memory for their backward: of all passes of a micro-batch."""
    if not (run.offload_activations and run.gradient_checkpointing):
        return 0
    passes, rest = divmod(run.per_device_train_batch_size, run.rows_per_pass)
    tokens = passes * forwarded_tokens(run) + run.tokens_of(rest)
    return len(shape.layers) * tokens * shape.hidden * run.weight_size


def _layer_backward(shape: ModelShape, layer: Layer, run: Run, constants: Constants) -> float:
    """Bytes of one layer at the fullest moment of its backward: in the MLP, in a norm, or in attention.

    Without checkpointing, what the layer saves counts elsewhere.
    """
    tokens, inside_mlp, dequantized = forwarded_tokens(run), mlp_derivatives(layer, run), _dequantized(shape, run)
    saved = _saved(shape, layer, run, constants) if run.gradient_checkpointing else 0
    in_attention = tokens * attention_derivatives(shape, layer, run)
    in_tile = tiled_tokens(layer, run, tokens)
    if in_tile < tokens:
        tile = in_tile * (feed_forward_activations(layer, run) + inside_mlp) + dequantized
        tile += 2 * tokens * shape.hidden * run.weight_size  # derivatives of the MLP's output and input
        return saved + max(tile, in_attention)
    in_mlp = saved + max(tokens * inside_mlp, in_attention) + dequantized
    if not run.gradient_checkpointing:
        return in_mlp
    norm, widest = norm_derivatives(shape, layer, run)
    without_mlp = saved - tokens * feed_forward_activations(layer, run) * constants.activations
    return max(in_mlp, without_mlp + tokens * norm, tokens * widest)


def _saved(shape: ModelShape, layer: Layer, run: Run, constants: Constants) -> float:
    """Bytes that autograd saves in one layer. Of what is in tiles, the inputs."""
    tokens = forwarded_tokens(run)
    saves = tiled_activations if tiled_tokens(layer, run, tokens) < tokens else layer_activations
    activations = tokens * saves(shape, layer, run) * constants.activations
    return activations + attention_activations(shape, layer, run) + weight_copies(shape, layer, run)


def _dequantized(shape: ModelShape, run: Run) -> float:
    """Bytes of the largest quantized weight, dequantized twice: for the product, and once more for its transpose."""
    if not run.quantized:
        return 0
    return 2 * run.weight_size * max((lin.weights for layer in shape.layers for lin in layer.linears), default=0)


def _tile(shape: ModelShape, run: Run, scored: int, constants: Constants) -> float:
    """Bytes of a tile of logits, and of the head's weights for it where these are cast."""
    size = MIXED if run.autocast else run.weight_size
    columns = min(shape.vocab, constants.head_vocab)
    cast = columns * shape.hidden * size if run.weight_size != size else 0
    return min(scored, constants.head_tokens) * columns * size + cast


def _head_backward(shape: ModelShape, run: Run, scored: int, constants: Constants) -> float:
    """Bytes of TRL's head: hidden states of scored positions, their float32 gradient, a tile, a weight that trains."""
    hidden = scored * shape.hidden * (2 * run.weight_size + FULL)
    head_trains = not run.lora_r or (shape.counted is not None and shape.counted.head_trains)
    weight = shape.embedding * (FULL + run.weight_size) if head_trains else 0
    return hidden + _tile(shape, run, scored, constants) + weight
