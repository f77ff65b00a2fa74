"""Stock TRL and our trainer on the same pictures, compared: the gradients of the first step, the log and the weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.training import logs_of, weights_of
from tests.vision import make_vision_trainer, pictured

TOWERS = ("visual", "vision_tower", "vision_model")
LANGUAGE_LORA = LoraConfig(r=4, lora_alpha=8, target_modules=r".*(language_model|text_model)\..*_proj")
EVERY_LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
# TRL logs the mean of its micro-batches' means, we the mean over the step's tokens.
OF_MICRO_BATCHES = ("entropy", "kl", "clip_ratio/")


@dataclass(frozen=True)
class Run:
    """What both trainers train.

    Attributes:
        name: of the family.
        counts: of pictures, for each row of the dataset.
        equal: pictures of one size. Otherwise sizes differ.
        lora: what carries adapters. None: all weights are trained.
        frozen_tower: the vision tower is not trained.
        config: of both trainers.
    """

    name: str
    counts: tuple[int, ...] = (1, 1, 2, 2)
    equal: bool = False
    lora: LoraConfig | None = None
    frozen_tower: bool = False
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a training leaves: gradients before the first optimizer step, its log, and weights before and after."""

    trainer: GRPOTrainer
    gradients: dict[str, Tensor]
    log: list[dict[str, Any]]
    start: dict[str, Tensor]
    weights: dict[str, Tensor]


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_: Any) -> None:
        if not self.kept:
            parameters = model.named_parameters()
            self.kept = {name: weight.grad.clone() for name, weight in parameters if weight.grad is not None}


def freeze_tower(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if any(f"{tower}." in name for tower in TOWERS):
            parameter.requires_grad_(False)


def save_reference(model: PreTrainedModel, folder: Path) -> None:
    """Save the model where TRL looks for the reference of a model that is trained without adapters."""
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)


def train(output_dir: Path, run: Run, *, ours: bool, **more: Any) -> Trained:
    """Train with our trainer or with TRL's.

    Plain SGD: Adam divides gradients near zero by their own size, and rounding would look like a difference.
    """
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig} if ours else {}
    config: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.3, "max_completion_length": 12} | run.config | more

    def prepare(model: PreTrainedModel) -> None:
        if run.frozen_tower:
            freeze_tower(model)
        if config.get("beta") and run.lora is None:
            save_reference(model, output_dir / "reference")

    trainer = make_vision_trainer(
        output_dir,
        run.name,
        train_dataset=pictured(run.counts, equal=run.equal),
        prepare=prepare,
        trainer_arguments={"peft_config": run.lora},
        **classes,
        **config,
    )
    gradients = FirstGradients()
    trainer.add_callback(gradients)
    start = weights_of(trainer)
    trainer.train()
    return Trained(trainer, gradients.kept, logs_of(trainer)[:-1], start, weights_of(trainer))


def relative(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of the difference of all tensors together, as a part of the norm of what is expected."""
    assert actual.keys() == expected.keys()
    flat = [torch.cat([tensor.flatten().double() for tensor in tensors.values()]) for tensors in (actual, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def log_difference(ours: Trained, stock: Trained) -> tuple[float, str]:
    """The largest difference of a logged number, relative where numbers are above 1, and the number's name."""
    different = OF_MICRO_BATCHES if stock.trainer.args.gradient_accumulation_steps > 1 else ()
    worst, where = 0.0, ""
    for step, (mine, theirs) in enumerate(zip(ours.log, stock.log, strict=True), start=1):
        for key in (key for key in theirs if not key.startswith(different)):
            difference = abs(mine[key] - theirs[key]) / max(1.0, abs(theirs[key]))
            if not difference <= worst:
                worst, where = difference, f"{key} of step {step}"
    return worst, where


def changed(trained: Trained) -> float:
    """How far the weights have moved, as a part of their norm."""
    return relative(trained.weights, trained.start)
