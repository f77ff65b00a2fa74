"""What a decoder layer of a built model holds: linear modules, experts, norms, and what it remembers of a token."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from grpo_plus.planner.shapes import Layer, Linear

MIXER = re.compile(r"attn|attention|mamba|conv|mixer|ssm|recurrent|temporal", re.IGNORECASE)
FEED_FORWARD = re.compile(r"mlp|feed_forward|ffn|moe|expert|ffw|fc1|fc2", re.IGNORECASE)
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # close a mixer
DOWN = ("down_proj", "w2", "fc2", "output_linear", "dense_4h_to_h", "c_proj", "wo")  # close a feed-forward
ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def linear_modules(module: Any) -> Iterator[tuple[str, Any, tuple[int, int]]]:
    """Path, module, and widths of input and output of every linear module, GPT-2's transposed ones included."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for path, part in module.named_modules():
        if isinstance(part, nn.Linear):
            yield path, part, (part.in_features, part.out_features)
        elif isinstance(part, Conv1D):
            yield path, part, (part.weight.shape[0], part.weight.shape[1])


def layer_of(
    module: Any, text: Any, cached: Any, *, path: str, quantized: frozenset[str], adapters: Mapping[str, int]
) -> Layer:
    """Read one layer.

    Args:
        text: config of the text part.
        cached: what transformers' cache keeps of the layer, or None where that is not known.
        path: of the layer in the model, with which the names in `quantized` and `adapters` begin.
    """
    hidden = text.hidden_size
    mixer, feed, extra = _linears(module, path, quantized, adapters)
    experts, width = _experts(module, hidden)
    routed = _routed(text) if experts else 0
    dense = sum(linear.inputs for linear in feed if linear.name in DOWN or linear.name == "down_proj")
    linears = (*mixer, *feed, *extra)
    attends = cached is None or type(cached).__name__ != "LinearAttentionLayer"
    query = next((linear.inputs for linear in reversed(mixer) if linear.name in OUTPUTS), hidden) if attends else 0
    keys = _keys(text, mixer, query) if attends else 0
    weights = sum(linear.weights for linear in linears)
    biases = sum(linear.outputs for linear in linears if linear.bias)
    under = sum(size for name, size in adapters.items() if name == path or name.startswith(f"{path}."))
    return Layer(
        linears=linears,
        query=query,
        keys=keys,
        window=getattr(cached, "sliding_window", None),
        feed_forward=dense + routed * width,
        norms=_norms(module, query, keys),
        small=sum(weight.numel() for weight in module.parameters()) - weights - biases - experts,
        experts=experts,
        routed=routed,
        expert_lora=under - sum(linear.inputs + linear.outputs for linear in linears if linear.adapted),
        cached=_cached(text, cached, mixer),
        state=0 if attends else _state(module),
        mixer=0 if attends else sum(linear.outputs for linear in mixer if linear.name not in OUTPUTS),
    )


def _linears(
    module: Any, path: str, quantized: frozenset[str], adapters: Mapping[str, int]
) -> tuple[list[Linear], list[Linear], list[Linear]]:
    """Linear modules of the mixer (attention and the like), of the feed-forward, and the others."""
    parts: tuple[list[Linear], list[Linear], list[Linear]] = [], [], []
    for below, part, sizes in linear_modules(module):
        place = 0 if MIXER.search(below) else 1 if FEED_FORWARD.search(below) else 2
        name = below.rpartition(".")[2]
        full = f"{path}.{below}"
        parts[place].append(
            Linear(
                ROLES.get(name, name),
                *sizes,
                part.bias is not None,
                adapted=full in adapters,
                quantized=full in quantized,
            )
        )
    return parts


def _experts(module: Any, hidden: int) -> tuple[int, int]:
    """Parameters of all routed experts, and the width of one. Experts are where matrices are stacked."""
    from torch import nn

    total = width = 0
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        stacked = [weight for weight in own if weight.dim() >= 3]
        if stacked and not isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            total += sum(weight.numel() for weight in own if weight.shape[0] == stacked[0].shape[0])
            # Gate, up and down have 3 * hidden * width weights, in one parameter, in two or in three.
            width += sum(weight[0].numel() for weight in stacked) / (3 * hidden)
    return total, round(width)


def _routed(text: Any) -> int:
    names = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "moe_k", "top_k")
    return next((value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0), 1)


def _keys(text: Any, mixer: list[Linear], query: int) -> int:
    """Mean width of the keys and the values of a token."""
    by_name = {linear.name: linear.outputs for linear in mixer}
    if "kv_b_proj" in by_name:  # latent attention
        return text.num_attention_heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim) // 2
    if "k_proj" in by_name:
        return (by_name["k_proj"] + by_name.get("v_proj", by_name["k_proj"])) // 2
    heads = getattr(text, "num_attention_heads", None) or 1
    return query // heads * (getattr(text, "num_key_value_heads", None) or heads)


def _cached(text: Any, cached: Any, mixer: list[Linear]) -> int | None:
    """What a token leaves in the cache where that is not its keys and values. None where it is."""
    if type(cached).__name__ == "DummyLayer":  # reads the cache of an earlier layer
        return 0
    latent = any(linear.name == "kv_b_proj" for linear in mixer)
    return text.kv_lora_rank + text.qk_rope_head_dim if latent else None


def _norms(module: Any, query: int, keys: int) -> tuple[int, ...]:
    """Widths of the norms, per token. A norm of heads normalizes all heads."""
    widths = []
    for path, part in module.named_modules():
        name = path.rpartition(".")[2]
        weight = getattr(part, "weight", None)
        if "norm" not in type(part).__name__.lower() or weight is None or weight.dim() != 1:
            continue
        heads = {"q": query, "k": keys}.get(name[0]) if re.fullmatch(r"[qk]_(layer)?norm", name) else None
        widths.append(heads or weight.numel())
    return tuple(widths)


def _state(module: Any) -> int:
    """Elements that a layer without attention remembers of a row: of its convolution, and of its recurrence."""
    from torch import nn

    convolved = sum(
        part.weight.shape[0] * part.kernel_size[0] for part in module.modules() if isinstance(part, nn.Conv1d)
    )
    recurrent = 0
    for part in module.modules():
        if isinstance(keys := getattr(part, "head_k_dim", None), int):  # the gated delta rule
            recurrent += part.num_v_heads * keys * part.head_v_dim
        elif isinstance(size := getattr(part, "ssm_state_size", None), int):  # Mamba
            recurrent += part.intermediate_size * size
    return convolved + recurrent
