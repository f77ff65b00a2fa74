"""Where a run stands between two optimizer steps: all that the next step depends on, beside weights and optimizer.

TRL generates a batch for several optimizer steps, and transformers saves none of it. A checkpoint of ours holds the
batch, the place in it, the figures that the next log will average, and what the estimator remembers.
"""

import json
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from trl import GRPOTrainer

from grpo_plus.config.kl import IN_REWARD
from grpo_plus.trainer.batches.refill_buffer import Held
from grpo_plus.trainer.saving.plain import plain

# Attributes of TRL's and transformers' trainer that a step moves. A trainer of another version may lack some.
OF_TRAINER = ("entropy_coef", "_last_world_entropy", "current_flos")
OF_STATE = ("num_input_tokens_seen", "total_flos")
# The loss that was not logged yet, and since when. Older versions of transformers keep it in a local variable.
OF_LOSS = ("_tr_loss", "_globalstep_last_logged")
# What decides which rows a generation batch has, and what is in its dictionaries.
SETTINGS = (
    "steps_per_generation",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
    "num_iterations",
    "num_generations",
    "loss_type",
    "use_vllm",
    "vllm_importance_sampling_correction",
    "truncated_sampling",
    "demonstration_column",
    "demonstration_loss",
)


@dataclass(frozen=True)
class RandomStates:
    """The random states of the process."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> "RandomStates":
        """As they are. The states of a CUDA generator lie on the host: nothing waits for the device."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make them the process's."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)

    @classmethod
    @contextmanager
    def kept(cls) -> Iterator[None]:
        """Leave them as they were."""
        states = cls.now()
        try:
            yield
        finally:
            states.restore()


@dataclass
class Position:
    """Attributes:
    global_step: optimizer steps that are finished.
    micro_steps: micro-batches that TRL has counted.
    batch: the micro-batches of the generation batch that the next step goes on with. None: the next step generates.
    table: the columns of TRL's table of completions, which belong to `batch`.
    metrics: the figures since the last log.
    loss: the loss since the last log, by the trainer's attributes.
    counters: what else of the trainer and of its state a step moves.
    running: a copy of the hook's `running_state`. pickle is faster than JSON and than a deep copy, which counts where
        an estimator remembers a hundred thousand prompts.
    held: the groups of older batches that later ones may train on.
    random: the random states.
    """

    global_step: int
    micro_steps: int
    batch: list[dict[str, Any]] | None
    table: dict[str, Any] | None
    metrics: dict[str, list[float]]
    loss: dict[str, Any]
    counters: dict[str, Any]
    running: bytes
    held: Held
    random: RandomStates

    @classmethod
    def of(cls, trainer: GRPOTrainer, running: dict[str, Any], held: Held) -> "Position":
        """Where the trainer stands. Keeps references to the batch, and copies what the next step writes to."""
        goes_on = trainer._buffered_inputs is not None and trainer._step % _micro_steps_per_batch(trainer) != 0
        return cls(
            global_step=trainer.state.global_step,
            micro_steps=trainer._step,
            batch=list(trainer._buffered_inputs) if goes_on else None,
            table=_copied({k: v for k, v in trainer._logs.items() if k != "images"}) if goes_on else None,
            metrics=_copied(trainer._metrics["train"]),
            loss=loss_of(trainer),
            counters=_counters(trainer),
            running=pickle.dumps(running),
            held=held,
            random=RandomStates.now(),
        )

    def running_state(self) -> str:
        """What the hook `running_state` returned, as JSON."""
        return _json(pickle.loads(self.running))

    def is_logged(self, trainer: GRPOTrainer, *, at_rest: bool) -> None:
        """Forget the figures that were written to the log.

        Args:
            at_rest: the trainer stands here, so that its loss is that of finished steps.
        """
        self.metrics = {}
        if at_rest:
            self.loss = loss_of(trainer)

    @contextmanager
    def in_place(self, trainer: GRPOTrainer) -> Iterator[None]:
        """Let the trainer stand here while a checkpoint is written."""
        counters = _counters(trainer)
        _set_counters(trainer, self.counters)
        try:
            with RandomStates.kept():
                self.random.restore()
                yield
        finally:
            _set_counters(trainer, counters)

    def save(self, path: Path, settings: dict[str, Any], *, with_table: bool) -> None:
        """Write the file of this process, for `torch.load(weights_only=True)`.

        The random states have a file of transformers' own, `running` and the counters are in files for all processes.
        """
        content = {
            "global_step": self.global_step,
            "micro_steps": self.micro_steps,
            "batch": self.batch,
            "table": self.table if with_table else None,
            "metrics": self.metrics,
            "loss": self.loss,
            "held": self.held.state(),
            "settings": settings,
        }
        partial = path.with_suffix(".partial")
        torch.save(plain(content), partial)
        partial.replace(path)


def saved_position(path: Path) -> dict[str, Any] | None:
    """The content of a file that `Position.save` wrote; None where there is none.

    Raises:
        ValueError: the file cannot be read.
    """
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
            raise ValueError("it holds something else")
        return content
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}). Resume from an older checkpoint, or delete the file to "
            "go on with a fresh generation batch."
        ) from error


def take_up(trainer: GRPOTrainer, saved: dict[str, Any] | None) -> None:
    """Let the trainer stand where it stood when `saved` was written; None: at the beginning of a generation batch."""
    saved = saved or {}
    batch = saved.get("batch")
    trainer._step = saved.get("micro_steps", 0)
    trainer._buffered_inputs = None if batch is None else send_to_device(batch, trainer.accelerator.device)
    trainer._metrics["train"].clear()
    trainer._metrics["train"].update(saved.get("metrics", {}))
    # A training that ended in an error leaves a part of a step behind.
    trainer._pending_extra_logs.clear()
    trainer._pending_metrics.clear()
    trainer._current_train_step_time = 0.0
    if (loss := saved.get("loss")) and loss_of(trainer):
        trainer._tr_loss, trainer._globalstep_last_logged = (
            loss["_tr_loss"].to(trainer._tr_loss),
            loss["_globalstep_last_logged"],
        )
        # The loss of the whole call is the mean over its own steps.
        trainer._total_loss_scalar -= trainer._tr_loss.item()
    for column in trainer._logs.values():
        column.clear()
    _extend(trainer._logs, saved.get("table") or {})


def settings_of(trainer: GRPOTrainer) -> dict[str, Any]:
    """What a generation batch depends on."""
    values = {name: plain(getattr(trainer.args, name, None)) for name in SETTINGS}
    estimator = getattr(trainer.args, "advantage_estimator", None)
    modifiers = getattr(trainer.args, "advantage_modifiers", None) or {}
    return {
        **values,
        "num_processes": trainer.accelerator.num_processes,
        "beta above 0": trainer.args.beta != 0,
        IN_REWARD: IN_REWARD in modifiers or None,  # a checkpoint of another version does not say
        "advantage_estimator": plain(estimator) if estimator is None or isinstance(estimator, str) else repr(estimator),
    }


def why_another_batch(saved: dict[str, Any] | None, settings: dict[str, Any]) -> str | None:
    """Why a run cannot go on with a saved generation batch; None where it can."""
    if saved is None:
        return "the checkpoint has no generation batch for every process"
    before = saved["settings"]
    changed = [name for name, value in settings.items() if before.get(name) != value]
    return ", ".join(f"{name} was {before.get(name)!r} and is {settings[name]!r}" for name in changed) or None


def within_batch(trainer: GRPOTrainer) -> bool:
    """Whether the last finished step was followed by another one on the same generation batch."""
    micro_steps = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    return micro_steps % _micro_steps_per_batch(trainer) != 0


def loss_of(trainer: GRPOTrainer) -> dict[str, Any]:
    """The loss since the last log, as a copy, because transformers adds to it in place."""
    values = {name: vars(trainer).get(name) for name in OF_LOSS}
    return values | {"_tr_loss": values["_tr_loss"].clone()} if None not in values.values() else {}


def _micro_steps_per_batch(trainer: GRPOTrainer) -> int:
    return trainer.args.steps_per_generation * trainer.num_iterations


def _json(state: dict[str, Any]) -> str:
    try:
        return json.dumps(state)
    except TypeError as error:
        raise ValueError(
            f"running_state returned what a checkpoint cannot hold: {error}. Return numbers, strings, lists and "
            "dictionaries: a tensor's .tolist() or .item()."
        ) from error


def _copied(columns: Any) -> Any:
    """A table with columns of its own, as dictionaries and lists."""
    return {name: _copied(part) if isinstance(part, dict) else list(part) for name, part in columns.items()}


def _extend(columns: Any, values: dict[str, Any]) -> None:
    for name, part in values.items():
        if isinstance(part, dict):
            _extend(columns[name], part)
        else:
            columns[name].extend(part)


def _counters(trainer: GRPOTrainer) -> dict[str, Any]:
    own = {name: vars(trainer)[name] for name in OF_TRAINER if name in vars(trainer)}
    return own | {name: getattr(trainer.state, name) for name in OF_STATE}


def _set_counters(trainer: GRPOTrainer, counters: dict[str, Any]) -> None:
    for name, value in counters.items():
        setattr(trainer.state if name in OF_STATE else trainer, name, value)
