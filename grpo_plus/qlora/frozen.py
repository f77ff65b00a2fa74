"""Find a run whose adapters do not move. Its log looks normal: rewards vary, losses and gradient norms are printed."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grpo_plus.models.adapters import adapter_parameters
from grpo_plus.qlora.precision import require_trainable

logger = logging.getLogger("grpo_plus")

SAMPLED = 256  # elements of each weight that are watched
STOPS, WARNS = 0.01, 0.5  # shares of moved elements below which the run stops and warns


@dataclass
class Watched:
    """Evenly spaced elements of one weight: their values at the start, and which of them have had a gradient."""

    kind: str
    weight: nn.Parameter
    start: Tensor
    touched: Tensor

    @classmethod
    def of(cls, name: str, weight: nn.Parameter) -> "Watched":
        """Remember the elements of a weight. `kind` is PEFT's name of its part, such as lora_A."""
        parts = [part for part in name.split(".") if part.startswith("lora_")]
        start = sample(weight.detach()).clone()
        return cls(parts[-1] if parts else "others", weight, start, torch.zeros_like(start, dtype=torch.bool))

    def moved(self) -> Tensor:
        """Whether each element that has had a gradient has left its value at the start."""
        return sample(self.weight.detach()).ne(self.start)[self.touched]


def sample(values: Tensor) -> Tensor:
    """Take at most SAMPLED elements, evenly spaced."""
    return values.flatten()[:: -(-values.numel() // SAMPLED)]


class FrozenAdapterCallback(TrainerCallback):
    """Stops a run whose trainable weights do not move, and warns where a part of the weights does not move.

    The callback watches a sample of each weight over the first steps that have a gradient and a learning rate. Its
    message says which part has stayed (lora_A, lora_B) and why. GRPOPlusTrainer adds the callback for adapters, and
    `trl.GRPOTrainer` can take it too. Under DeepSpeed and FSDP no process sees whole weights and their gradients, so
    the callback says so and watches nothing.

    Args:
        steps: number of such steps before the verdict.
    """

    def __init__(self, steps: int = 10) -> None:
        self.steps = steps
        self.watched: list[Watched] = []
        self.counted = 0
        self.live = False

    def on_train_begin(
        self, args: Arguments, state: State, control: Control, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Remember where the weights start."""
        self.counted = 0
        require_trainable(model)
        spread = PartialState().distributed_type
        if spread in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            # DeepSpeed steps and drops the gradients within the backward: a healthy run would look frozen.
            logger.warning(f"Frozen adapters are not looked for under {spread.value}, which spreads the weights.")
            return
        weights = [] if model is None else list(adapter_parameters(model))
        self.watched = [Watched.of(name, weight) for name, weight in weights if weight.numel() > 0]

    def on_pre_optimizer_step(
        self, args: Arguments, state: State, control: Control, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Note which elements this step is going to move."""
        self.live = False
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.watched and all(entry.weight.grad is None for entry in self.watched):
            raise RuntimeError(
                f"Step {state.global_step + 1}: no gradient reaches any of the {len(self.watched)} trainable weights, "
                "so nothing would be learned. The adapter that is active is merged, disabled, or another one than "
                "the one that requires gradients."
            )
        touches = []
        for entry in self.watched:
            if entry.weight.grad is not None:
                gradient = sample(entry.weight.grad)
                touched = gradient.ne(0) & gradient.isfinite()
                entry.touched |= touched
                touches.append(touched.any().to(self.watched[0].weight.device))
        # One wait for the device, not one for each weight.
        self.live = max(rates) > 0 and bool(touches) and bool(torch.stack(touches).any())

    def on_step_end(
        self, args: Arguments, state: State, control: Control, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Judge once, after enough steps."""
        self.counted += self.live
        self.live = False
        if self.watched and self.counted >= self.steps:
            self._judge(args, state, optimizer)
            self.watched = []

    def _judge(self, args: Arguments, state: State, optimizer: Any) -> None:
        shares = moved_shares(self.watched)
        if not shares:
            return
        lowest = min(shares, key=lambda kind: shares[kind])
        figures = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(shares.items()))
        what = f"After {self.counted} optimizer steps with a gradient, of the elements moved: {figures}. "
        if max(shares.values()) < STOPS:
            raise RuntimeError(f"{what}Nothing is learned. {self._cause(lowest, args, optimizer)}")
        if shares[lowest] < WARNS:
            logger.warning(f"{what}{self._cause(lowest, args, optimizer)}")

    def _cause(self, kind: str, args: Arguments, optimizer: Any) -> str:
        weights = [entry.weight for entry in self.watched if entry.kind == kind]
        held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
        if not any(id(weight) in held for weight in weights):
            return (
                f"The optimizer does not hold the weights of {kind}. Create it from the model that the trainer trains, "
                "or leave `optimizers` unset."
            )
        dtype, rate = weights[0].dtype, args.learning_rate
        if dtype == torch.float32:
            return f"A step of learning_rate={rate} is below the rounding of {kind}. Set a larger learning_rate."
        if kind == "others":
            return (
                f"Weights of saved modules are {str(dtype).removeprefix('torch.')}, the dtype of the base, where a "
                f"step of learning_rate={rate} rounds to nothing. Set a larger learning_rate, or load the base in "
                "float32."
            )
        return (
            f"{kind} is {str(dtype).removeprefix('torch.')}, where a step of learning_rate={rate} rounds to nothing. "
            "Set adapter_dtype='float32' in GRPOPlusConfig (the default above a quantized base), or a larger "
            "learning_rate."
        )


def moved_shares(watched: list[Watched]) -> dict[str, float]:
    """Share of moved elements by kind of weight, among the elements that have had a gradient."""
    shares = {}
    for kind in {entry.kind for entry in watched}:
        moved = torch.cat([entry.moved().cpu() for entry in watched if entry.kind == kind])
        if moved.numel() > 0:
            shares[kind] = moved.float().mean().item()
    return shares
