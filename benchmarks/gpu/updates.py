"""Updates of real shapes: stock TRL beside every way that grpo_plus can go, what they hold, launch and wait for."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import update as bench
from benchmarks.gpu.gauges import clean, host_waits, median_s, peak_gib, profile, relative
from benchmarks.gpu.record import OutOfTimeError, Setting, Stage, described
from benchmarks.memory_run import MODELS, TINY
from grpo_plus.packing import single_pass_head
from grpo_plus.packing.candidates import base_model
from grpo_plus.packing.choice import Choice
from grpo_plus.packing.forward import Form, install_packed_forward
from grpo_plus.packing.packer import Packer
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.rows import CASCADE, PADDING_FREE, PADDING_FREE_FLASH, SEGMENTS

FORMS: dict[str, Form] = {
    "cascade": CASCADE,
    "segments": SEGMENTS,
    "padding_free": PADDING_FREE_FLASH,
    "padding_free segments": PADDING_FREE,
    "cached": CACHED,
}
# "auto" takes what the run itself measures. "rows": padded as TRL's. "+head": its single-pass head. "-lora": PEFT's
# layers. A way starts from the same weights and rows as all others.
WAYS = (
    "trl",
    "auto",
    "cascade",
    "segments",
    "padding_free",
    "cached",
    "rows",
    "cascade-lora",
    "cascade+torch",
    "cascade+triton",
)
FEW = ("trl", "auto", "cascade", "segments", "cascade+triton")
CASES = (  # model, variant of `benchmarks.update`, shape, ways, whether to count launches and waits
    ("Qwen3-1.7B", "lora", (512, 256, 8), WAYS, True),
    ("Qwen3-4B", "nf4-checkpointing", (512, 256, 8), WAYS, True),
    ("Qwen3-4B", "lora-checkpointing", (512, 256, 8), FEW, False),
    ("Qwen3-1.7B", "lora", (64, 512, 8), FEW, False),
    ("Qwen3-4B", "nf4-checkpointing", (16384, 64, 8), ("auto", "cascade", "segments"), False),
    ("Qwen3-1.7B", "full", (512, 256, 8), ("trl", "auto", "cascade"), False),
)
TINY_CASES = (
    ("Qwen3-1.7B", "lora", (24, 12, 4), ("trl", "auto", "cascade"), True),
    ("Qwen3-4B", "nf4-checkpointing", (24, 12, 4), ("cascade+torch", "auto", "cached", "rows", "cascade-lora"), False),
)
SLOW = 6.0  # seconds: what takes so long when it is cold is not called again


def updates(stage: Stage, setting: Setting) -> None:
    """Run every case: its models are gone before the next one's are made."""
    cases = TINY_CASES if setting.tiny else CASES
    for model, variant, shape, ways, counted in cases:
        title = f"{model} {variant} {','.join(map(str, shape))}"
        stage.item(title, _case, stage, setting, title, model, variant, shape, ways, counted, quiet=True)
        clean()


def real(setting: Setting, model: str) -> dict[str, Any]:
    """Configuration of a model of that name, or of a tiny one in a rehearsal."""
    if not setting.tiny:
        return MODELS[model]
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    return TINY | small | {"num_hidden_layers": 2, "vocab_size": 8000}


class Pair:
    """Stock TRL's trainer and ours on equal models, and the rows that both train on."""

    def __init__(
        self, setting: Setting, model: str, variant: str, shape: tuple[int, int, int], sides: tuple[str, ...]
    ) -> None:
        config = real(setting, model)
        self.trainers = {side: bench.trainer_of(side, shape, variant, setting.device, config) for side in sides}
        if len(self.trainers) == 2:
            for ours, trls in zip(*(self.trained(self.trainers[side]) for side in ("plus", "trl")), strict=True):
                ours.data.copy_(trls.data)
        self.batches = [bench.rows_of(shape, setting.device, 0, dead=False)]

    @staticmethod
    def trained(trainer: Any) -> list[Tensor]:
        """What trains."""
        return [weight for weight in trainer.model.parameters() if weight.requires_grad]

    def gradient(self, trainer: Any) -> Tensor:
        """All gradients in one vector."""
        bench.run(trainer, self.batches)
        return torch.cat([weight.grad.flatten().float() for weight in self.trained(trainer)])  # type: ignore[union-attr]

    @contextmanager
    def way(self, name: str) -> Iterator[Any]:
        """The trainer that goes this way, as within its `train()`."""
        if name == "trl":
            yield self.trainers["trl"]
            return
        trainer = self.trainers["plus"]
        before = trainer.speed
        if name != "auto":
            trainer.speed = _speed(trainer, name)
        try:
            with trainer.speed.around_training(trainer.model):
                yield trainer
        finally:
            trainer.speed = before
            trainer.model.zero_grad()


def _speed(trainer: Any, name: str) -> Any:
    way, _, layers = name.partition("-")
    form, _, head = way.partition("+")
    packer = None
    if form != "rows":
        packer = Packer("auto")
        made = single_pass_head(head, temperature=trainer.temperature) if head else None
        base = base_model(trainer.model)
        install_packed_forward(base)  # the self-check does it, which a forced choice leaves out
        packer._choices[base] = Choice(FORMS[form], made)
    fuses = trainer.speed.fuses_lora and layers != "lora"
    return dataclasses.replace(trainer.speed, measure=None, packer=packer, fuses_lora=fuses)


def _case(
    stage: Stage,
    setting: Setting,
    title: str,
    model: str,
    variant: str,
    shape: tuple[int, int, int],
    ways: tuple[str, ...],
    counted: bool,
) -> dict[str, Any]:
    with ExitStack() as scope:
        if setting.tiny:  # TRL's head scores valid positions only, as on a GPU
            scope.enter_context(patch("trl.trainer.utils._use_triton", return_value=True))
        pair = Pair(setting, model, variant, shape, ("trl", "plus") if "trl" in ways else ("plus",))
        gradients: dict[str, Tensor] = {}
        rows: dict[str, dict[str, Any]] = {}
        for way in ways:
            rows[way] = row = {"label": f"{title} {way}"}
            stage.rows.append(row)
            try:
                row |= _measured(setting, pair, way, gradients, counted)
            except OutOfTimeError:
                row["failure"] = "out of time"
                raise
            except (Exception, SystemExit) as failure:  # the other ways are wanted all the same
                row |= described(failure)
                clean()
            if "s" in rows[ways[0]] and "s" in row:
                row["speed_up"] = round(rows[ways[0]]["s"] / row["s"], 2)
            told = {
                key: value for key, value in row.items() if key not in ("label", "trace", "profile", "log", "places")
            }
            stage.record.say(f"  {title} {way:<16} {told}"[:400])
            stage.record.save()
    return {"seconds": {way: row.get("s") for way, row in rows.items()}}


def _measured(setting: Setting, pair: Pair, way: str, gradients: dict[str, Tensor], counted: bool) -> dict[str, Any]:
    row: dict[str, Any] = {}
    with messages() as lines, pair.way(way) as trainer:
        call = partial(bench.run, trainer, pair.batches)
        row["first_s"] = row["s"] = median_s(
            dataclasses.replace(setting, repeats=1), lambda: gradients.update({way: pair.gradient(trainer)})
        )
        if row["first_s"] < SLOW:
            row |= {"peak_gib": peak_gib(setting, call), "s": median_s(setting, call)}
        first = next(iter(gradients))
        if way != first:
            row["gradient_error"] = relative(gradients.pop(way), gradients[first])
        if way != "trl" and trainer.speed.packer is not None:
            row["form"] = trainer.speed.packer.describe()
        if counted and row["s"] < SLOW:
            row |= {"profile": profile(setting, call)} | host_waits(setting, call)
            row["launches"] = row["profile"]["launches"]
        if lines:
            row["log"] = lines
    return row


@contextmanager
def messages() -> Iterator[list[str]]:
    """What grpo_plus logs inside: the form that was chosen, and why others were not."""
    lines: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage()[:400])

    logger, handler = logging.getLogger("grpo_plus"), Keeps(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
