"""Shape of a model: layers, widths and parameter counts, no weights."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Linear:
    """One nn.Linear, which bitsandbytes quantizes where `quantized`, and LoRA's "all-linear" adapts where `adapted`."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    adapted: bool = True
    quantized: bool = True

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    linears: nn.Linear modules. The first reads the normed input, and so do all modules of the same input width.
    query, keys: widths of all query heads and of all key heads together. 0 in a linear-attention layer.
    window: tokens back that the layer attends to. None means all tokens.
    feed_forward: width of the MLP that one token goes through. In a mixture, an expert's times `num_experts_per_tok`.
    norms: widths of the norms, per token.
    experts: parameters outside nn.Linear that nf4 leaves as they are.
    cached: elements that a token leaves in the cache. None: its keys and values.
    state: elements that the layer remembers per row whatever the length (linear attention).
    """

    linears: tuple[Linear, ...]
    query: int
    keys: int
    window: int | None
    feed_forward: int
    norms: tuple[int, ...]
    small: int  # norm weights, sinks, routers, convolutions
    experts: int = 0
    routed: int = 0  # experts per token
    expert_lora: int = 0  # parameters of the experts' and the router's adapters, per rank
    cached: int | None = None
    state: int = 0
    mixer: int = 0  # width of what a linear-attention layer projects

    @property
    def cached_per_token(self) -> int:
        """Elements that a token leaves in the cache of this layer."""
        return 2 * self.keys if self.cached is None else self.cached

    @cached_property
    def weights(self) -> int:
        """Elements of the weights of the nn.Linear modules."""
        return sum(linear.weights for linear in self.linears)

    @cached_property
    def others(self) -> int:
        """Parameters that are neither a linear weight nor an expert."""
        return self.small + sum(linear.outputs for linear in self.linears if linear.bias)


@dataclass(frozen=True)
class Saved:
    """How bitsandbytes had quantized the weights when they were saved. transformers keeps these settings."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    use_bnb_nested_quant: bool = False


@dataclass(frozen=True)
class Counted:
    """What a model in memory holds, in place of what its shape and the settings would give.

    settings: of the run that the counts belong to, such as lora_r and dtype. Another run has other counts.
    frozen_bytes: of the weights that do not train, with the scales of quantized ones.
    trained, trained_bytes: elements and bytes of the weights that train.
    """

    settings: tuple[tuple[str, Any], ...]
    frozen_bytes: float
    trained: int
    trained_bytes: float
    head_trains: bool = False

    def belongs_to(self, run: Any) -> bool:
        """Whether a run has the settings that the counts belong to."""
        return all(getattr(run, name) == value for name, value in self.settings)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model as the planner sees it.

    Attributes:
        outside: linear modules outside the layers: of towers that read images or sound, and of embeddings.
        outside_small: parameters outside the layers that are no linear weight, and no weight of embedding, head or last
            norm.
        notes: what to say about the shape, in sentences.
        positions: tokens of the longest row that the model was made for. None where the config does not say.
        saved: the quantization that the weights were saved with. None for plain numbers.
        counted: counts of the model in memory. None for a shape that was read from a config.
    """

    name: str
    model_type: str
    hidden: int
    vocab: int
    heads: int
    layers: tuple[Layer, ...] = field(repr=False)
    tied: bool
    eager: bool = False
    float_norms: bool = False
    outside: tuple[Linear, ...] = field(default=(), repr=False)
    outside_small: int | None = None
    notes: tuple[str, ...] = ()
    positions: int | None = None
    saved: Saved | None = None
    counted: Counted | None = None

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the LM head. 0 where the embedding is the head."""
        return 0 if self.tied else self.vocab * self.hidden

    @property
    def carries_state(self) -> bool:
        """Whether layers of linear attention carry a state from token to token."""
        return any(layer.state for layer in self.layers)

    @cached_property
    def linear(self) -> int:
        """Parameters that bitsandbytes quantizes: the weights of most nn.Linear modules other than the LM head."""
        return sum(linear.weights for linear in self._linears() if linear.quantized)

    @cached_property
    def quantized_rows(self) -> int:
        """Rows of the weights that bitsandbytes quantizes. In 8 bits, a row has a scale."""
        return sum(linear.outputs for linear in self._linears() if linear.quantized)

    @cached_property
    def experts(self) -> int:
        """Parameters of routed experts."""
        return sum(layer.experts for layer in self.layers)

    @cached_property
    def others(self) -> int:
        """Norms, biases, routers, sinks, convolutions, and linear weights that nothing quantizes."""
        outside = self.hidden if self.outside_small is None else self.outside_small
        kept = sum(linear.weights for linear in self._linears() if not linear.quantized)
        return outside + kept + sum(layer.others for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.linear + self.experts + self.others

    def lora(self, rank: int) -> int:
        """Parameters of LoRA adapters on "all-linear", without the LM head: rank * Σ (inputs + outputs)."""
        dense = sum(linear.inputs + linear.outputs for linear in self._linears() if linear.adapted)
        return rank * (dense + sum(layer.expert_lora for layer in self.layers))

    def _linears(self) -> Iterator[Linear]:
        yield from self.outside
        for layer in self.layers:
            yield from layer.linears
