"""Shape of a model: layers, widths and parameter counts, no weights."""

from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Linear:
    """One nn.Linear of a layer, which nf4 quantizes. LoRA's "all-linear" adapts it where `adapted`."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    adapted: bool = True

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
    state: int = 0
    mixer: int = 0  # width of what a linear-attention layer projects

    @cached_property
    def weights(self) -> int:
        """Elements of the weights of the nn.Linear modules."""
        return sum(linear.weights for linear in self.linears)

    @cached_property
    def others(self) -> int:
        """Parameters that are neither a linear weight nor an expert."""
        return self.small + sum(linear.outputs for linear in self.linears if linear.bias)


@dataclass(frozen=True)
class ModelShape:
    """A causal language model as the planner sees it."""

    name: str
    model_type: str
    hidden: int
    vocab: int
    heads: int
    layers: tuple[Layer, ...] = field(repr=False)
    tied: bool
    eager: bool = False
    float_norms: bool = False

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the LM head. 0 where the embedding is the head."""
        return 0 if self.tied else self.vocab * self.hidden

    @cached_property
    def linear(self) -> int:
        """Parameters that nf4 quantizes: the weights of nn.Linear modules other than the LM head."""
        return sum(layer.weights for layer in self.layers)

    @cached_property
    def experts(self) -> int:
        """Parameters of routed experts."""
        return sum(layer.experts for layer in self.layers)

    @cached_property
    def others(self) -> int:
        """Norms, biases, routers, sinks, convolutions."""
        return self.hidden + sum(layer.others for layer in self.layers)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.linear + self.experts + self.others

    def lora(self, rank: int) -> int:
        """Parameters of LoRA adapters on "all-linear", without the LM head: rank * Σ (inputs + outputs)."""
        linears = (linear for layer in self.layers for linear in layer.linears if linear.adapted)
        dense = sum(linear.inputs + linear.outputs for linear in linears)
        return rank * (dense + sum(layer.expert_lora for layer in self.layers))
