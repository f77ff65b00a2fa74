"""Settings of a run that decide its memory, under TRL's names, and sizes such as 24GB as bytes."""

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from grpo_plus.registry import suggestion

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIXED = 2  # bytes of an element under autocast, in either half precision
FULL = 4  # float32
PACKING = ("auto", "shared_prompt", "padding_free", "none")
GENERATION_LOOPS = ("auto", "grouped", "trl")

# By optimizer: states per parameter, and bytes of an element of a state. None means as many bytes as the parameter has.
# bitsandbytes keeps 8-bit states in blocks of 256 elements with one float32 maximum each, other states in float32.
BLOCKWISE_8BIT = 1 + 4 / 256
OPTIMIZERS: dict[str, tuple[int, float | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_8bit": (2, BLOCKWISE_8BIT),
    "adamw_bnb_8bit": (2, BLOCKWISE_8BIT),
    "paged_adamw_8bit": (2, BLOCKWISE_8BIT),
    "paged_adamw_32bit": (2, 4),
    "lion_8bit": (1, BLOCKWISE_8BIT),
    "lion_32bit": (1, 4),
    "paged_lion_8bit": (1, BLOCKWISE_8BIT),
    "paged_lion_32bit": (1, 4),
    "sgd": (0, None),
}
# Optimizers whose states move to the host's memory where the card is full, and the elements from which a tensor's do.
PAGED = tuple(name for name in OPTIMIZERS if name.startswith("paged_"))
PAGED_FROM = 1e5

QLORA: dict[str, Any] = {
    "load_in_4bit": True,
    "use_bnb_nested_quant": True,
    "dtype": "bfloat16",
    "lora_r": 16,
    "adapter_dtype": "float32",
    "optim": "adamw_8bit",
}
"""What `grpo_plus.qlora.qlora()` and `grpo-plus train --qlora` set, as fields of `Run`."""

_POSITIVE = ("prompt_length", "max_completion_length", "per_device_train_batch_size", "gradient_accumulation_steps",
             "num_generations", "num_iterations")  # fmt: skip
_POSITIVE_OR_NONE = ("steps_per_generation", "generation_chunk_size", "max_tokens_per_pass", "mlp_tile_tokens",
                     "cache_bits", "lora_r")  # fmt: skip
_AUTO = ("generation_chunk_size", "max_tokens_per_pass", "mlp_tile_tokens")
AUTO = "auto"
TILE = 4096  # tokens of a tile where mlp_tile_tokens is "auto"
CHOICES: dict[str, Collection[str]] = {
    "dtype": DTYPES,
    "adapter_dtype": DTYPES,
    "packing": PACKING,
    "generation_loop": GENERATION_LOOPS,
    "optim": OPTIMIZERS,
}


@dataclass(frozen=True)
class Run:
    """Settings of a run on one GPU that generates with transformers. Defaults are TRL's, `lora_dropout` PEFT's.

    Attributes:
        prompt_length: tokens of the longest prompt. Every completion is taken to have `max_completion_length` tokens.
        lora_r: rank of LoRA on all linear layers. None trains all weights.
        dtype: dtype of the loaded weights. With `load_in_4bit`, of the products and of what is not quantized.
        bf16: whether the training's forward runs under autocast, TRL's default.
        fp16: the same for older cards.
        adapter_dtype: dtype of the adapters. None means float32. TRL alone casts adapters of a quantized base to
            "bfloat16".
        packing: as in GRPOPlusConfig. "none" plans trl.GRPOTrainer. "auto" is taken to find shared_prompt exact.
        generation_loop: as in GRPOPlusConfig. "auto" is taken to find the grouped loop exact.
        cache_bits: of an element of a quantized cache, 8 or 4, as `generation_kwargs` asks for it. None: not quantized.
        generation_chunk_size: as in GRPOPlusConfig. "auto" is planned as one row at a time, the least that the run
            needs.
        max_tokens_per_pass: as in GRPOPlusConfig. "auto" is planned as one row at a time, too.
        mlp_tile_tokens: as in GRPOPlusConfig. "auto" is 4096 tokens under checkpointing. An "auto" has no effect under
            packing="none", because trl.GRPOTrainer has neither passes nor tiles.
    """

    prompt_length: int = 512
    max_completion_length: int = 512
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    steps_per_generation: int | None = None
    num_generations: int = 8
    num_iterations: int = 1
    generation_loop: str = "auto"
    generation_chunk_size: int | str | None = None
    cache_bits: int | None = None
    max_tokens_per_pass: int | str | None = AUTO
    offload_activations: bool = False
    mlp_tile_tokens: int | str | None = AUTO
    beta: float = 0.0
    gradient_checkpointing: bool = True
    packing: str = "auto"
    optim: str = "adamw_torch_fused"
    dtype: str = "float32"
    bf16: bool = True
    fp16: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    use_bnb_nested_quant: bool = False
    lora_r: int | None = None
    lora_dropout: float = 0.0
    adapter_dtype: str | None = None

    def __post_init__(self) -> None:
        """Refuse settings that no run can have. Each message names the field, its value and what to write."""
        for name in _POSITIVE + _POSITIVE_OR_NONE:
            value = getattr(self, name)
            if (value is None and name in _POSITIVE_OR_NONE) or (value == AUTO and name in _AUTO):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                other = ", or auto" if name in _AUTO else ""
                raise ValueError(f"{name}={value!r} is not a positive whole number. Write 1 or more{other}.")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known and not (name == "adapter_dtype" and value is None):
                raise ValueError(f"Unknown {name} {value!r}.{suggestion(str(value), known)}")
        if self.beta < 0 or not 0 <= self.lora_dropout < 1:
            name = "beta" if self.beta < 0 else "lora_dropout"
            raise ValueError(f"{name}={getattr(self, name)!r} is out of range. Write 0, or what the run will use.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit=True and load_in_8bit=True: a base is loaded in one of the two. Drop one.")
        if self.quantized and self.lora_r is None:
            name = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise ValueError(f"{name}=True trains nothing without adapters. Set lora_r, for example to 16.")
        if self.lora_dropout and self.packing == "shared_prompt":
            raise ValueError(
                f"packing='shared_prompt' is not exact with lora_dropout={self.lora_dropout}. Set lora_dropout=0."
            )
        if self.generation_rows % self.num_generations:
            raise ValueError(
                f"A generation batch of {self.generation_rows} rows (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x {self.generation_rows // self.per_device_train_batch_size}) "
                f"does not hold whole groups of num_generations={self.num_generations}. Change "
                "gradient_accumulation_steps or num_generations."
            )

    def changed_from(self, other: "Run") -> dict[str, Any]:
        """Settings that this run has and another has not."""
        names = [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(other, entry.name)]
        return {name: getattr(self, name) for name in names}

    @property
    def quantized(self) -> bool:
        """Whether the base holds codes of bitsandbytes, in 4 or 8 bits."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def generation_rows(self) -> int:
        """Completions of one generation batch."""
        return self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)

    @property
    def generated_at_once(self) -> int:
        """Completions that are generated together."""
        size = 1 if isinstance(self.generation_chunk_size, str) else self.generation_chunk_size
        return min(self.generation_rows, size or self.generation_rows)

    @property
    def rows_per_pass(self) -> int:
        """Rows that go through the layers together in scoring and update: as many as the bound allows, at least one."""
        rows, bound = self.per_device_train_batch_size, self.max_tokens_per_pass
        if bound is None or (bound == AUTO and self.packing == "none"):
            return rows
        if isinstance(bound, str):
            return 1
        return max((some for some in range(1, rows + 1) if self.tokens_of(some) <= bound), default=1)

    @property
    def tile_tokens(self) -> int | None:
        """Most tokens that an MLP or a norm sees at a time in scoring and update. None: all."""
        if self.mlp_tile_tokens == AUTO:
            return TILE if self.gradient_checkpointing and self.packing != "none" else None
        return None if self.mlp_tile_tokens is None else int(self.mlp_tile_tokens)

    def tokens_of(self, rows: int) -> int:
        """Tokens of so many rows of full length, as they go through the layers."""
        prompts = -(-rows // self.num_generations) if self.rows == "shared_prompt" else rows
        return prompts * self.prompt_length + rows * self.max_completion_length

    @property
    def decodes_in_groups(self) -> bool:
        """Whether each prompt goes through the model once for all of its completions."""
        return self.generation_loop != "trl" and self.packing != "none" and self.cache_bits is None

    @property
    def prompts_at_once(self) -> int:
        """Distinct prompts of the completions that are generated together, at most: the first and last may be cut."""
        whole, rest = divmod(self.generated_at_once, self.num_generations)
        return whole + min(rest, 2)

    @property
    def rows(self) -> str:
        """Form of the rows: "shared_prompt", "padding_free" or "none"."""
        if self.packing != "auto":
            return self.packing
        return "padding_free" if self.lora_dropout else "shared_prompt"

    @property
    def _passes_per_generation(self) -> int:
        """Micro-batches from one generation to the next."""
        return (self.steps_per_generation or self.gradient_accumulation_steps) * self.num_iterations

    @property
    def scores(self) -> bool:
        """Whether log-probabilities of a reference or of an older policy are computed before the update."""
        return self.beta > 0 or self.gradient_accumulation_steps % self._passes_per_generation != 0

    @property
    def generates_within_a_step(self) -> bool:
        """Whether a generation falls between two passes of one optimizer step, where gradients already exist."""
        return self._passes_per_generation % self.gradient_accumulation_steps != 0

    @property
    def autocast(self) -> bool:
        """Whether the training's forward runs in half precision, bf16 or fp16."""
        return self.bf16 or self.fp16

    @property
    def weight_size(self) -> int:
        """Bytes of an element of the weights that are not quantized."""
        return DTYPES[self.dtype]

    @property
    def adapter_size(self) -> int:
        """Bytes of an element of the adapters."""
        return DTYPES[self.adapter_dtype or "float32"]


def flags(given: dict[str, Any]) -> str:
    """Write settings as flags of the command line."""
    return " ".join(
        f"--{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()
    )


def parse_bytes(text: str) -> int:
    """Convert a size such as "24GB" to bytes. A card's GB are 2³⁰ bytes, and so are GB here; MB and TB likewise.

    Raises:
        ValueError: the number has no unit, or is not above 0.
    """
    match = re.fullmatch(r"\s*([-+]?\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    units = {"m": 2**20, "g": 2**30, "t": 2**40}
    unit = match[2].lower().removesuffix("b").removesuffix("i") if match else ""
    if match is None or (unit not in units):
        hint = f" Write {match[1]}GB." if match is not None and not match[2] else " Write for example 24GB."
        raise ValueError(f"gpu={text!r} is not a size with a unit.{hint}")
    size = round(float(match[1]) * units[unit])
    if size <= 0:
        raise ValueError(f"gpu={text!r} is not above 0. Write the card's memory, for example 24GB.")
    return size
