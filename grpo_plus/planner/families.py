"""Turn a model's config into its shape without torch, for the architectures in `FAMILIES`.

A row holds facts that a config may leave out, such as which linear layers have a bias, or how many norms a layer has.
`built.py` reads the shape of any other architecture off the model that transformers builds.

To add an architecture, put a tiny model of it into `tests/planner/configs.py`, which the tests compare with the model
that transformers builds, and its type into `TESTED` of `built.py`. A row in `FAMILIES` spares the import of torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_plus.planner.shapes import Layer, Linear, ModelShape


@dataclass(frozen=True)
class Family:
    """Facts that the models of one `model_type` share and their config.json does not say.

    sliding: the layers that attend to a window where the config has no `layer_types`. "none", "all", "upper" (from
        `max_window_layers` on, with `use_sliding_window`), or n for all but each n-th layer (2: every other layer).
    expert_adapters: whether PEFT's "all-linear" includes the experts and the router. PEFT does so for old checkpoints,
        of models that had a linear layer for each expert.
    eager: whether there is no fused attention, so that the scores of every head exist.
    float_norms: whether norms scale in float32, whatever the dtype of the weights.
    """

    head_dim: int | None = None
    qkv_bias: bool = False
    output_bias: bool = True  # whether attention_bias covers o_proj
    attention_bias: bool = False
    qk_norm: bool = False
    norms: int = 2
    tied: bool = False
    fused: bool = False
    sliding: str | int = "none"
    experts: bool = False
    expert_bias: bool = False
    expert_adapters: bool = False
    expert_width: str = "intermediate_size"
    sinks: bool = False
    eager: bool = False
    float_norms: bool = False
    gated_attention: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family(sliding="all"),
    "mixtral": Family(sliding="all", experts=True, expert_adapters=True),
    "qwen2": Family(qkv_bias=True, output_bias=False, sliding="upper"),
    "qwen3": Family(qk_norm=True, head_dim=128, sliding="upper"),
    "qwen3_moe": Family(qk_norm=True, experts=True, expert_adapters=True, expert_width="moe_intermediate_size"),
    "qwen3_5_text": Family(qk_norm=True, head_dim=256, gated_attention=True),
    "gemma": Family(head_dim=256, float_norms=True, tied=True),
    "gemma2": Family(head_dim=256, float_norms=True, norms=4, tied=True, sliding=2, eager=True),
    "gemma3_text": Family(head_dim=256, float_norms=True, norms=4, qk_norm=True, tied=True, sliding=6),
    "phi3": Family(fused=True, sliding="all"),
    "smollm3": Family(tied=True),
    "gpt_oss": Family(
        head_dim=64,
        attention_bias=True,
        sliding=2,
        experts=True,
        expert_bias=True,
        sinks=True,
        eager=True,
    ),
}


def shape_by_row(config: Mapping[str, Any], name: str) -> ModelShape | None:
    """Shape by the row in FAMILIES. None without a row, and where the config leaves out a size."""
    model_type = str(config["model_type"])
    family = FAMILIES.get(model_type)
    if family is None:
        return None
    read = _Reader(config, name)
    try:
        layers = read.size("num_hidden_layers")
        return ModelShape(
            name=name,
            model_type=model_type,
            hidden=read.size("hidden_size"),
            vocab=read.size("vocab_size"),
            heads=read.size("num_attention_heads"),
            layers=tuple(_layer(read, family, index, kind) for index, kind in enumerate(_kinds(read, family, layers))),
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            eager=family.eager,
            float_norms=family.float_norms,
        )
    except _SizeError:
        return None


class _SizeError(Exception):
    """A size that a config leaves to its class."""


class _Reader:
    """Reads sizes from a config, and names a size that is wrong."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name

    def size(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if value is None:
            raise _SizeError
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ValueError(
                f"{key} is {value!r}, not a positive whole number in the config of {self.name!r}. Fetch the model's "
                "config.json again."
            )
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.config.get(key, default))


def _kinds(read: _Reader, family: Family, count: int) -> list[str]:
    """Kind of each layer: "full_attention", "sliding_attention" or "linear_attention"."""
    listed = read.config.get("layer_types")
    if listed is not None:
        known = {"full_attention", "sliding_attention", "linear_attention"}
        if not isinstance(listed, list) or len(listed) != count or not known >= set(listed):
            raise ValueError(
                f"layer_types={listed!r} of {read.name!r} does not name {count} layers, each one of "
                f"{', '.join(sorted(known))}."
            )
        return listed
    if family.gated_attention:
        every = read.size("full_attention_interval", 4)
        return ["full_attention" if (index + 1) % every == 0 else "linear_attention" for index in range(count)]
    if read.config.get("sliding_window") is None:
        return ["full_attention"] * count
    if family.sliding == "all":
        return ["sliding_attention"] * count
    if family.sliding == "upper" and read.flag("use_sliding_window"):
        first = read.size("max_window_layers", 28)
        return ["sliding_attention" if index >= first else "full_attention" for index in range(count)]
    if isinstance(family.sliding, int):
        every = read.size("sliding_window_pattern", family.sliding)
        return ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(count)]
    return ["full_attention"] * count


def _layer(read: _Reader, family: Family, index: int, kind: str) -> Layer:
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    norms = (hidden,) * family.norms
    feed = _feed_forward(read, family, index, hidden)
    if kind == "linear_attention":
        linears, mixer, extra, state = _gated_delta_net(read, hidden)
        return Layer(
            linears=(*linears, *feed.linears),
            query=0,
            keys=0,
            window=None,
            feed_forward=feed.width,
            norms=norms,
            small=sum(norms) + feed.small + extra,
            state=state,
            mixer=mixer,
        )
    head_dim = read.size("head_dim", family.head_dim or hidden // heads)
    query, keys = heads * head_dim, read.size("num_key_value_heads", heads) * head_dim
    bias = family.qkv_bias or read.flag("attention_bias", family.attention_bias)
    projected = 2 * query if family.gated_attention else query
    attention: tuple[Linear, ...] = (
        Linear("q_proj", hidden, projected, bias),
        Linear("k_proj", hidden, keys, bias),
        Linear("v_proj", hidden, keys, bias),
    )
    if family.fused:
        attention = (Linear("qkv_proj", hidden, query + 2 * keys),)
    attention = (*attention, Linear("o_proj", query, hidden, bias and family.output_bias))
    per_head = 2 * head_dim if family.qk_norm else 0
    return Layer(
        linears=(*attention, *feed.linears),
        query=query,
        keys=keys,
        window=read.size("sliding_window") if kind == "sliding_attention" else None,
        feed_forward=feed.width,
        norms=(*norms, query, keys) if family.qk_norm else norms,
        small=sum(norms) + per_head + (heads if family.sinks else 0) + feed.small,
        experts=feed.experts,
        routed=feed.routed,
        expert_lora=feed.lora,
    )


class _FeedForward(NamedTuple):
    """Facts about an MLP or a mixture of experts, for `Layer`."""

    linears: tuple[Linear, ...]
    width: int
    small: int = 0
    experts: int = 0
    routed: int = 0
    lora: int = 0


def _feed_forward(read: _Reader, family: Family, index: int, hidden: int) -> _FeedForward:
    if not family.experts or not _is_sparse(read, index):
        width, bias = read.size("intermediate_size"), read.flag("mlp_bias")
        adapted = not family.expert_adapters  # PEFT looks for these names among the experts only
        gates: tuple[Linear, ...] = (
            Linear("gate_proj", hidden, width, bias, adapted),
            Linear("up_proj", hidden, width, bias, adapted),
        )
        if family.fused:
            gates = (Linear("gate_up_proj", hidden, 2 * width),)
        return _FeedForward((*gates, Linear("down_proj", width, hidden, bias, adapted)), width)
    number = "num_experts" if "num_experts" in read.config else "num_local_experts"  # transformers 5 renames some
    width, count = read.size(family.expert_width), read.size(number)
    routed = read.size("num_experts_per_tok")
    biases = 2 * width + hidden if family.expert_bias else 0
    # transformers keeps gate and up in one parameter, which PEFT gives adapters of twice the rank.
    lora = count * (2 * (hidden + 2 * width) + width + hidden) + hidden + count if family.expert_adapters else 0
    return _FeedForward(
        linears=(),
        width=routed * width,
        small=count * hidden + (count if family.expert_bias else 0),
        experts=count * (3 * hidden * width + biases),
        routed=routed,
        lora=lora,
    )


def _is_sparse(read: _Reader, index: int) -> bool:
    dense = read.config.get("mlp_only_layers") or []
    return index not in dense and (index + 1) % read.size("decoder_sparse_step", 1) == 0


def _gated_delta_net(read: _Reader, hidden: int) -> tuple[tuple[Linear, ...], int, int, int]:
    """Qwen's linear attention: linear modules, projected width, small parameters, elements of the state."""
    heads = read.size("linear_num_value_heads", 32)
    key_dim, value_dim = read.size("linear_key_head_dim", 128), read.size("linear_value_head_dim", 128)
    keys, values = read.size("linear_num_key_heads", 16) * key_dim, heads * value_dim
    kernel = read.size("linear_conv_kernel_dim", 4)
    mixed = 2 * keys + values
    linears = (
        Linear("in_proj_qkv", hidden, mixed),
        Linear("in_proj_z", hidden, values),
        Linear("in_proj_b", hidden, heads),
        Linear("in_proj_a", hidden, heads),
        Linear("out_proj", values, hidden),
    )
    return linears, mixed + values, mixed * kernel + 2 * heads + value_dim, mixed * kernel + heads * key_dim * value_dim
