"""What of the seam saves a run and takes it up again, so that it goes on as if it had never stopped."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import Sampler
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from trl import GRPOTrainer

from grpo_plus.config import GRPOPlusConfig
from grpo_plus.models.adapters import has_adapters
from grpo_plus.models.finite import has_nonfinite_state, nonfinite_weights
from grpo_plus.qlora.checks import check_adapter_folder, load_best_adapter, load_default_adapter
from grpo_plus.qlora.precision import (
    check_saved_modules,
    chosen_dtype,
    keep_gradients_on_the_cpu,
    let_the_head_be_read,
    restore_adapters,
)
from grpo_plus.qlora.reloaded import write_record
from grpo_plus.trainer.batches.refill_buffer import RefillBuffer
from grpo_plus.trainer.hooks import Hooks
from grpo_plus.trainer.saving.checkpoints import chosen_checkpoint, rotate, saved_state, why_unusable, write_state
from grpo_plus.trainer.saving.manifest import begin, seal
from grpo_plus.trainer.saving.position import (
    Position,
    saved_position,
    settings_of,
    take_up,
    why_another_batch,
    within_batch,
)
from grpo_plus.trainer.saving.renamed import load_renamed
from grpo_plus.trainer.saving.rescue import OptimizerWatch, all_are_there, why_not_rescued

REFERENCE_FILE = "grpo_plus_reference.pt"

logger = logging.getLogger("grpo_plus")


class SavingSeam(Hooks, GRPOTrainer):
    """GRPOTrainer that asks the hooks what a checkpoint must hold.

    Attributes:
        plus: the configuration with our fields; under a plain GRPOConfig a view in which all of them are off.
    """

    plus: GRPOPlusConfig
    _began: float
    _optimizer_watch: OptimizerWatch
    _position: Position | None = None  # after the last finished step; None where nothing is ever saved
    _at_rest = False  # between two steps, where the trainer itself stands at the position
    _whole: Path | None = None  # the last checkpoint that was sealed
    _seals: Path | None = None  # the folder that is being written
    _buffered_inputs: list[dict[str, Any]] | None
    _buffer: RefillBuffer
    _train_sampler: Sampler | None = None

    @property
    def has_own_fields(self) -> bool:
        """Whether `args` is a GRPOPlusConfig; a plain GRPOConfig trains what TRL trains to the last bit."""
        return self.plus is self.args

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. Where an error ends the training, the last finished step is saved first, and can be resumed."""
        self._position, self._at_rest, self._whole = None, False, None
        self._began, self._optimizer_watch = time.time(), OptimizerWatch()
        self._begins_training()
        try:
            return super().train(self._checked(resume_from_checkpoint), *args, **kwargs)
        except BaseException as error:  # whatever leaves the training: Ctrl-C is none of Exception's
            self._rescue(error)
            raise
        finally:
            self._optimizer_watch.release()

    def _begins_training(self) -> None:
        """Forget what an earlier training has collected of a step that it did not finish."""

    def _checked(self, asked: Any) -> str | None:
        """The checkpoint to resume from, after the main process has compared it with its manifest."""
        if asked is None or asked is False:
            return None
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = str(chosen_checkpoint(asked, self.args.output_dir))
            except (ValueError, OSError) as error:  # the other processes wait for an answer
                answer[1] = str(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step. None for a run that resumes after its end, which would take one more step."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._step_is_finished()
        self._at_rest = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._at_rest = False
        self._step_is_finished()

    def _step_is_finished(self) -> None:
        if self.args.save_strategy != SaveStrategy.NO or self.args.enable_jit_checkpoint:
            self._position = Position.of(self, self.running_state(), self._buffer.held)
            self._optimizer_watch.step_is_finished(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log. What was written must not be counted again by a run that resumes."""
        training, written = self.model.training, len(self.state.log_history)
        try:
            super().log(logs, start_time)
        finally:  # a callback may have raised after the figures were written
            if training and self._position is not None and len(self.state.log_history) > written:
                self._position.is_logged(self, at_rest=self._at_rest)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._write_checkpoint(model, trial)

    def _write_checkpoint(self, model: Any, trial: Any, *, rescues: bool = False) -> None:
        """Seal the new checkpoint, then delete older ones: a kill at any moment leaves a checkpoint to go on from.

        Args:
            rescues: other processes may be gone. They are not waited for, and nothing is uploaded.
        """
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        position = self._position
        stands_there = self._at_rest or position is None or position.global_step != self.state.global_step
        if position is None or stands_there:
            position = Position.of(self, self.running_state(), self._buffer.held)
        others = _files_of_others(folder, self.accelerator.num_processes)
        if self.args.should_save:
            begin(folder, keep={path.name for path in others} if rescues else ())
            write_state(folder, position.running_state())
        if not rescues:
            self.accelerator.wait_for_everyone()
        with nullcontext() if stands_there else position.in_place(self), self._older_kept(folder):
            super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            self._save_position(folder, position)
        if not rescues:
            self.accelerator.wait_for_everyone()
        elif self.args.should_save and not all_are_there(others, self._began):
            raise TimeoutError("another process did not write its part")
        if self.args.should_save:
            self._seal(folder)
        self._whole = folder
        if self.args.push_to_hub and not rescues:
            super()._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(folder.parent, self.args.save_total_limit, keep={folder, *([Path(best)] if best else [])})

    def _rescue(self, error: BaseException) -> None:
        """Save the last finished step, unless its checkpoint is there already."""
        position, step = self._position, self.state.global_step
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if position is None or self._whole == folder or self.hp_search_backend is not None:
            return
        reason = why_not_rescued(self, self._optimizer_watch, step_ended=step > position.global_step)
        try:
            if reason is None:
                self._at_rest = False
                self._write_checkpoint(self.model, None, rescues=True)
        except Exception as other:  # whatever it is, the user has to see the first error and not this one
            reason = f"{type(other).__name__}: {other}"
        if self.accelerator.is_main_process:
            outcome = f"is in {folder}" if reason is None else f"could not be saved: {reason}"
            name = type(error).__name__
            logger.warning(f"{name} ends the training after step {step}. That step {outcome}.")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside adapters what they were trained above, for `grpo_plus.qlora.load_trained`."""
        super().save_model(output_dir, _internal_call)
        if self.has_own_fields and self.args.should_save and has_adapters(self.model):
            write_record(self.model, output_dir or self.args.output_dir)

    @contextmanager
    def _older_kept(self, folder: Path) -> Iterator[None]:
        """Keep transformers from deleting older checkpoints, and from uploading this one, before it is sealed."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._seals = folder
        try:
            yield
        finally:
            self.args.save_total_limit = limit
            self._seals = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._seals is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_position(self, folder: Path, position: Position) -> None:
        rank, main = self.accelerator.process_index, self.args.should_save
        position.save(_position_file(folder, rank), settings_of(self), with_table=main)
        if main and self._moves_reference:
            torch.save(self.accelerator.unwrap_model(self.ref_model).state_dict(), folder / REFERENCE_FILE)

    def _seal(self, folder: Path) -> None:
        if (folder / TRAINING_ARGS_NAME).exists():
            torch.save(self.args, folder / TRAINING_ARGS_NAME)  # it was saved while `save_total_limit` was unset
        facts = {"global_step": self.state.global_step, "num_processes": self.accelerator.num_processes}
        weights = seal(folder, **facts, save_only_model=self.args.save_only_model)
        if self.plus.deterministic and weights is not None:
            logger.info(f"deterministic: the weights of {folder.name} have the SHA-256 {weights}.")

    @property
    def _moves_reference(self) -> bool:
        """Whether the reference follows the policy, and can be saved whole."""
        return self.args.sync_ref_model and self.ref_model is not None and not self._spreads_weights

    @property
    def _spreads_weights(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _warn_of_what_no_checkpoint_holds(self) -> None:
        """Say at construction what a run that resumes will lack."""
        if self.args.sync_ref_model and self._spreads_weights and self.args.save_strategy != SaveStrategy.NO:
            warnings.warn(
                "sync_ref_model=True: FSDP and DeepSpeed spread the weights of the reference, and no checkpoint holds "
                "them. A run that resumes begins with the initial model as reference, so it goes on otherwise than it "
                "would have. Set sync_ref_model=False for a run that may have to resume.",
                stacklevel=2,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_adapter_folder(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_default_adapter(resume_from_checkpoint, self.model)
        load_renamed(resume_from_checkpoint, self.model)
        if names := nonfinite_weights(self.model):
            raise ValueError(
                f"The weight {names[0]!r} (one of {len(names)}) in {resume_from_checkpoint} is not finite. Resume from "
                "an older checkpoint."
            )
        self._adapters_as_trained({})

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if reason := self._agreed_reason(best):
            logger.warning(f"The best checkpoint {best} {reason}. The model keeps its last weights.")
            return
        super()._load_best_model()
        load_renamed(best, self.model)
        load_best_adapter(self.state.best_model_checkpoint, self.model)
        self._adapters_as_trained({})

    def _agreed_reason(self, folder: Path) -> str | None:
        """`why_unusable`, asked by the main process for all."""
        answer = [why_unusable(folder) if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(answer)
        return answer[0]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if has_nonfinite_state(self.optimizer):
            raise ValueError(
                f"The optimizer's state in {checkpoint} is not finite, and would make the weights so. Resume from an "
                "older checkpoint, or delete its file to begin with an empty state."
            )
        self.load_running_state(saved_state(checkpoint))
        if self._moves_reference:
            self._load_reference(Path(checkpoint) / REFERENCE_FILE)
        # The sampler shuffles with a generator of its own, which every epoch moves on.
        if (sampler := self._train_sampler) is not None:
            for _ in range(int(self.state.epoch or 0)):
                next(iter(sampler), None)

    def _load_reference(self, path: Path) -> None:
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state)
        else:
            logger.warning(f"{path} does not exist: the reference of sync_ref_model starts from the initial model.")

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load the random states, and go on inside the generation batch. transformers calls it once, before a step."""
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        saved, error = None, None
        try:
            saved = saved_position(_position_file(Path(checkpoint), self.accelerator.process_index))
        except ValueError as reason:
            error = str(reason)
        # A process with a batch does not generate: either all have one, or all generate.
        told = gather_object([(error, why_another_batch(saved, settings_of(self)), saved is not None)])
        for text in (error for error, _, _ in told if error):
            raise ValueError(text)
        problem = next((text for _, text, _ in told if text), None)
        saved = saved if problem is None else None
        take_up(self, saved)
        self._buffer.load(saved and saved.get("held"))
        if self._buffered_inputs is not None:
            self._resumes_within_batch(self._buffered_inputs[0])
        # A checkpoint of stock TRL has no batch, and loses nothing where a batch ended.
        lost = any(exists for _, _, exists in told) or within_batch(self)
        if problem is not None and lost and self.accelerator.is_main_process:
            logger.warning(f"Resuming from {checkpoint} with a fresh generation batch: {problem}.")

    def _resumes_within_batch(self, inputs: dict[str, Any]) -> None:
        """Do what a generation would have done to the model, with a micro-batch of the batch that is taken up."""

    def _adapters_as_trained(self, exact: dict[str, Tensor]) -> None:
        """Bring the adapters to `adapter_dtype`. TRL casts them at construction, and PEFT when it loads a checkpoint.

        Args:
            exact: trainable weights by name, as they were before TRL rounded them. Empty for adapters that TRL
                created, and after a checkpoint.
        """
        keep_gradients_on_the_cpu(self.model)
        let_the_head_be_read(self.model)
        if self.has_own_fields and (dtype := chosen_dtype(self.plus.adapter_dtype, self.model)):
            check_saved_modules(self.model, self.args.fp16)
            restore_adapters(self.model, dtype, exact)


def _position_file(folder: Path, rank: int) -> Path:
    return folder / f"grpo_plus_position_{rank}.pt"


def _files_of_others(folder: Path, processes: int) -> list[Path]:
    """What the other processes write into a checkpoint."""
    ranks = range(1, processes)
    return [*(folder / f"rng_state_{rank}.pth" for rank in ranks), *(_position_file(folder, rank) for rank in ranks)]
