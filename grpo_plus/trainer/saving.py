"""What of the seam saves a run and takes it up again: the checkpoint's own files, and the dtype of loaded adapters."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from grpo_plus.config import GRPOPlusConfig
from grpo_plus.models.adapters import has_adapters
from grpo_plus.qlora.checks import check_adapter_folder, load_best_adapter
from grpo_plus.qlora.precision import (
    check_saved_modules,
    chosen_dtype,
    keep_gradients_on_the_cpu,
    let_the_head_be_read,
    restore_adapters,
)
from grpo_plus.qlora.reloaded import write_record
from grpo_plus.trainer.checkpoints import begin_checkpoint, refuse_unfinished, saved_state
from grpo_plus.trainer.hooks import Hooks


class SavingSeam(Hooks, GRPOTrainer):
    """GRPOTrainer that asks the hooks what a checkpoint must hold.

    Attributes:
        plus: the configuration with our fields; under a plain GRPOConfig a view in which all of them are off.
    """

    plus: GRPOPlusConfig

    @property
    def has_own_fields(self) -> bool:
        """Whether `args` is a GRPOPlusConfig; a plain GRPOConfig trains what TRL trains to the last bit."""
        return self.plus is self.args

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            begin_checkpoint(folder, self.running_state())
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside adapters what they were trained above, for `grpo_plus.qlora.load_trained`."""
        super().save_model(output_dir, _internal_call)
        if self.has_own_fields and self.args.should_save and has_adapters(self.model):
            write_record(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        refuse_unfinished(resume_from_checkpoint)
        check_adapter_folder(resume_from_checkpoint, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._adapters_as_trained({})

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_best_adapter(self.state.best_model_checkpoint, self.model)
        self._adapters_as_trained({})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_running_state(saved_state(checkpoint))

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
