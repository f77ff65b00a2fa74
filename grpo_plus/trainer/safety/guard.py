"""The guard of a long run: what happens to a step that is not finite, and to a run that is asked to stop.

An optimizer step is not finite where a loss or a gradient is NaN or infinite, on any process. All processes then skip
it: the weights and Adam's moments stay, as do beta and the weight of the entropy bonus. The learning rate's schedule
and `global_step` go on. Under DeepSpeed and with optimizers that step within the backward, nothing can be skipped: the
run stops as soon as a weight is not finite.

A run without such a step computes what it computes without the guard, to the last bit.
"""

import logging
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments
from trl import GRPOTrainer

from grpo_plus.models.finite import gradients_are_finite, nonfinite_weights
from grpo_plus.trainer.names import CONTROLLERS, overflow_found
from grpo_plus.trainer.safety.stopping import StopSignals, leaving

# Where the counts stand in trainer_state.json: transformers saves what it finds there, and asks nobody about it.
COUNTS = "grpo_plus_guard"

STEPS_WITHIN_BACKWARD = ("lomo", "adalomo", "layerwise")

logger = logging.getLogger("grpo_plus")


@dataclass(frozen=True)
class Verdict:
    """What all processes agreed on before an optimizer step.

    Attributes:
        loss: a micro-batch's loss is not finite.
        gradient: a gradient is not finite.
        by_scaling: the gradient is too large for fp16 under the present scale, which is no fault of the run.
        asked: the signal that asks the run to stop; None for none.
    """

    loss: bool = False
    gradient: bool = False
    by_scaling: bool = False
    asked: int | None = None

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return not (self.loss or self.gradient)


class Guard(TrainerCallback):
    """Skips steps that are not finite, ends a run of nothing else, and ends a run that a signal asks to stop.

    Attributes:
        limit: skipped steps in a row that end the run.
        skipped_steps: of the run, over its resumptions.
        in_a_row: the skipped steps since the last one that was taken.
        signals: what asks the run to stop.
    """

    def __init__(self, trainer: GRPOTrainer, limit: int) -> None:
        self.trainer = trainer
        self.limit = limit
        self.signals = StopSignals()
        self.reset()

    def reset(self) -> None:
        """Begin a training."""
        self.skipped_steps = self.in_a_row = 0
        self._verdict = Verdict()
        self._overflows = torch.tensor(False)
        self._losses: list[Tensor] = []
        self._batches: list[dict[str, Any]] = []
        self._controllers: dict[str, float] = {}
        self._loss_of_the_log: float | None = None
        self._leaves_with: BaseException | None = None
        self._saved_step: int | None = None

    def keep(self, inputs: dict[str, Any]) -> None:
        """Remember a micro-batch until the end of its step, in case it has to be written out."""
        if not any(batch is inputs for batch in self._batches):  # a micro-batch may be computed a second time
            self._batches.append(inputs)

    def finite(self, loss: Tensor) -> Tensor:
        """The loss for transformers' sum, which one NaN would spoil for good; `complete` logs the true one."""
        self._losses.append(loss)
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def complete(self, logs: dict[str, float]) -> None:
        """Put the true loss into a log of the training, and the count where there is one."""
        if "loss" not in logs:
            return
        if self._loss_of_the_log is not None:
            logs["loss"], self._loss_of_the_log = self._loss_of_the_log, None
            self._remember(self.trainer.state)
        if self.skipped_steps:
            logs["guard/skipped_steps"] = self.skipped_steps

    def refuse_nonfinite_weights(self, *, agreeing: bool) -> None:
        """Raise RuntimeError where a trained weight is not finite, before anything is written.

        Args:
            agreeing: every process is here and raises where one has to. False asks this process alone.
        """
        if message := self._unsound(agreeing=agreeing):
            raise RuntimeError(
                f"{message} Nothing is saved, and older checkpoints stay: resume from one of them, with a smaller "
                "learning_rate or max_grad_norm."
            )

    def refuse_nonfinite_start(self) -> None:
        """Raise ValueError where a weight is not finite, a frozen one included, before anything is sampled from it."""
        names = nonfinite_weights(self.trainer.model, frozen_too=True)
        if self._agreed([bool(names)])[0]:
            which = f"{names[0]!r} (one of {len(names)})" if names else "of another process"
            raise ValueError(
                f"The weight {which} is not finite before the first step: nothing can be sampled from such a model. "
                "Load it again, in bfloat16 or float32 if it was made in one of them: float16 ends at 65504."
            )

    def look_before_clipping(self) -> None:
        """Notice a gradient whose norm overflows: clipping makes zeros of it, which look sound.

        fp16's scaler finds an overflow by itself, and DeepSpeed clips where nobody can look.
        """
        accelerator = self.trainer.accelerator
        clips = self.trainer.args.max_grad_norm and accelerator.distributed_type != DistributedType.DEEPSPEED
        if clips and accelerator.sync_gradients and accelerator.scaler is None:
            self._overflows = ~self._gradient_is_finite()

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Go on counting where the checkpoint stopped."""
        counts = state.stateful_callbacks.get(COUNTS, {})
        self.skipped_steps, self.in_a_row = counts.get("skipped_steps", 0), counts.get("in_a_row", 0)
        self._loss_of_the_log = counts.get("loss_of_the_log")

    def on_step_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Remember where the step starts."""
        self._leave_between_steps()
        self._overflows = torch.tensor(False)
        self._losses, self._batches = [], []
        self._controllers = {name: vars(self.trainer)[name] for name in CONTROLLERS if name in vars(self.trainer)}

    def on_prediction_step(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Leave an evaluation that a signal came into: the step before it is finished."""
        self._leave_between_steps()

    def on_pre_optimizer_step(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Judge the step, and keep the optimizer from taking one that is not finite."""
        self._verdict = self._judge()
        if not self._verdict.finite and not self._steps_within_backward() and not self._scaler_skips():
            # accelerate's optimizer does nothing between the micro-batches of a step.
            self.trainer.accelerator.gradient_state.sync_gradients = False

    def on_optimizer_step(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Let the next one be taken."""
        accelerator = self.trainer.accelerator
        if not accelerator.gradient_state.sync_gradients:
            accelerator.gradient_state.sync_gradients = True
            if overflow_found(self.trainer) is not None:
                accelerator.scaler.update()  # the optimizer would have closed the scaler's step

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Count the step; end the run after too many, or on a signal."""
        verdict = self._verdict
        if not verdict.finite:
            if not verdict.by_scaling:
                vars(self.trainer).update(self._controllers)
            self._count(state.global_step, control)
        else:
            self.in_a_row = 0
        self._remember(state)
        # What one process has heard since it was asked, it need not ask others about.
        asked = self.signals.received if self._alone else verdict.asked
        if asked is not None and self._leaves_with is None:
            self._leave(leaving(asked), control)
        self._losses, self._batches = [], []

    def on_save(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Remember that this step has its checkpoint."""
        self._saved_step = state.global_step

    def on_epoch_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Leave: the last checkpoint is written, and what a whole training ends with is not for this one."""
        if self._leaves_with is not None:
            raise self._leaves_with

    def finish(self) -> None:
        """Leave after a signal that came when the last step was over, with a checkpoint of that step."""
        asked = self._agreed([self.signals.received == number for number in (signal.SIGTERM, signal.SIGINT)])
        if any(asked):
            # Under load_best_model_at_end the model is the best one by now, which has its checkpoint.
            best = self.trainer.args.load_best_model_at_end
            self._save_and_leave(signal.SIGTERM if asked[0] else signal.SIGINT, saved=best)

    def _leave_between_steps(self) -> None:
        # Several processes would have to agree here too: they leave after the next step.
        if self.signals.received is not None and self._alone:
            self._save_and_leave(self.signals.received)

    def _save_and_leave(self, number: int, *, saved: bool = False) -> None:
        if not saved and self._saved_step != self.trainer.state.global_step:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
        raise leaving(number)

    @property
    def _alone(self) -> bool:
        return self.trainer.accelerator.num_processes == 1

    def _remember(self, state: State) -> None:
        if self.skipped_steps:
            state.stateful_callbacks[COUNTS] = {
                "skipped_steps": self.skipped_steps,
                "in_a_row": self.in_a_row,
                "loss_of_the_log": self._loss_of_the_log,
            }

    def _judge(self) -> Verdict:
        trainer, received = self.trainer, self.signals.received
        losses = torch.stack(self._losses) if self._losses else torch.zeros(1)
        bad_loss = ~losses.isfinite()
        bad_gradient = ~self._gradient_is_finite()
        bad_gradient |= self._overflows.to(bad_gradient.device)
        own = [bad_loss.any(), bad_gradient, received == signal.SIGTERM, received == signal.SIGINT]
        loss, gradient, terminated, interrupted = self._agreed(own)
        if loss:
            bad = torch.where(bad_loss, losses, torch.zeros_like(losses)).sum().float().to(trainer.accelerator.device)
            self._loss_of_the_log = (self._loss_of_the_log or 0.0) + trainer.accelerator.reduce(bad).item()
        scaler = trainer.accelerator.scaler
        return Verdict(
            loss=loss,
            gradient=gradient,
            # A scale above 1 may be what made the gradient overflow: the scaler halves it and tries the next batch.
            by_scaling=gradient and not loss and scaler is not None and scaler.get_scale() > 1.0,
            asked=signal.SIGTERM if terminated else signal.SIGINT if interrupted else None,
        )

    def _agreed(self, flags: list[Any]) -> list[bool]:
        """Each flag, raised where a process raises it. Every process must be here."""
        accelerator = self.trainer.accelerator
        device = accelerator.device
        own = torch.stack([torch.as_tensor(flag, dtype=torch.float32, device=device) for flag in flags])
        return [total > 0 for total in accelerator.reduce(own, reduction="sum").tolist()]

    def _gradient_is_finite(self) -> Tensor:
        if self.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            norm = self.trainer.model_wrapped.get_global_grad_norm()
            return torch.as_tensor(0.0 if norm is None else float(norm)).isfinite()
        return gradients_are_finite(self.trainer.model_wrapped)

    def _steps_within_backward(self) -> bool:
        deepspeed = self.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
        name = str(getattr(self.trainer.args.optim, "value", self.trainer.args.optim))
        return deepspeed or any(part in name for part in STEPS_WITHIN_BACKWARD)

    def _scaler_skips(self) -> bool:
        """Whether fp16's scaler skips the step by itself: it has found the overflow too, or will."""
        if self.trainer.accelerator.scaler is None:
            return False
        found = overflow_found(self.trainer)
        return self._verdict.gradient if found is None else found

    def _unsound(self, *, agreeing: bool) -> str | None:
        """Text that names a trained weight that is not finite; None where there is none."""
        names = nonfinite_weights(self.trainer.model)
        if not (self._agreed([bool(names)])[0] if agreeing else names):
            return None
        which = f"{names[0]!r} (one of {len(names)})" if names else "of another process"
        return f"The trained weight {which} is not finite after step {self.trainer.state.global_step}."

    def _count(self, step: int, control: Control) -> None:
        if self._steps_within_backward() and self._unsound(agreeing=True):
            return self._stop(step, f"Step {step} was taken within the backward, where none can be skipped.", control)
        if self._verdict.by_scaling or (self._steps_within_backward() and not self._verdict.loss):
            return None
        self.skipped_steps += 1
        self.in_a_row += 1
        if self.skipped_steps == 1 and self.trainer.accelerator.is_main_process:
            logger.warning(
                f"Step {step} is skipped: its {self._what()} is not finite. guard/skipped_steps in the log counts such "
                f"steps; {self.limit} in a row (max_nonfinite_steps) end the run."
            )
        if self.in_a_row >= self.limit:
            which = f"Step {step} was" if self.in_a_row == 1 else f"Steps {step - self.in_a_row + 1} to {step} were"
            self._stop(
                step,
                f"{which} skipped, as many in a row as "
                f"max_nonfinite_steps={self.limit} allows: a loss or gradient was not finite. The weights are those "
                f"after step {step - self.in_a_row}.",
                control,
            )
        return None

    def _what(self) -> str:
        return "loss" if self._verdict.loss else "gradient"

    def _stop(self, step: int, reason: str, control: Control) -> None:
        """End the run with an error, after a checkpoint of what is sound."""
        unsound = self._unsound(agreeing=True)
        batch = describe_batch(self.trainer, self._batches, self._losses)
        path = Path(self.trainer.args.output_dir)
        path /= f"nonfinite_step_{step}_rank_{self.trainer.accelerator.process_index}.pt"
        written = write_batch(path, step, self._batches, self._losses)
        self.in_a_row = 0  # whoever resumes has changed something, and gets as many tries
        self._remember(self.trainer.state)
        message = " ".join(filter(None, (reason, unsound, batch, written)))
        logger.error(message)  # the checkpoint comes first, and its own error would be the only one to be seen
        self._leave(RuntimeError(message), control)
        if unsound:
            control.should_save = False

    def _leave(self, error: BaseException, control: Control) -> None:
        self._leaves_with = error
        # Whoever sent the signal may not wait for an evaluation.
        control.should_evaluate = False
        control.should_save = control.should_training_stop = True
        control.should_log = control.should_log or isinstance(error, RuntimeError)


def describe_batch(trainer: GRPOTrainer, batches: list[dict[str, Any]], losses: list[Tensor]) -> str:
    """The losses of a step's micro-batches and the first prompts of the one that is to blame, for an error message."""
    values = [loss.item() for loss in losses]
    text = f"The losses of step {trainer.state.global_step} on this process were {', '.join(map(str, values))}."
    if not batches or len(batches) != len(values):
        return text
    blamed = next((index for index, loss in enumerate(losses) if not loss.isfinite()), 0)
    prompts = trainer.processing_class.batch_decode(batches[blamed]["prompt_ids"], skip_special_tokens=True)
    shown = list(dict.fromkeys(prompt[-80:] for prompt in prompts))
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return f"{text} The prompts of micro-batch {blamed} end in {', '.join(map(repr, shown[:3]))}{more}."


def write_batch(path: Path, step: int, batches: list[dict[str, Any]], losses: list[Tensor]) -> str:
    """Write a step's rows of this process, as tensors, and say how to read them."""
    rows = [{name: value.cpu() for name, value in batch.items() if isinstance(value, Tensor)} for batch in batches]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "losses": [loss.item() for loss in losses], "micro_batches": rows}, path)
    except OSError as error:  # other processes go on to the checkpoint, and would wait for this one
        return f"Its rows could not be written: {error}"
    return f"Its rows are in {path}: torch.load({str(path)!r}, weights_only=True)."
