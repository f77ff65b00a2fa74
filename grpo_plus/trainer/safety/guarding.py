"""What of the seam watches over a run: see `guard.py`."""

import math
from typing import Any

from torch import Tensor

from grpo_plus.trainer.safety.guard import Guard
from grpo_plus.trainer.update.retrying import RetryingSeam


class GuardedSeam(RetryingSeam):
    """A trainer that skips what is not finite, never saves what is not finite, and leaves in good order on a signal.

    It looks at gradients after all tries of a micro-batch, when those of earlier micro-batches are back.
    """

    _guard: Guard

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. SIGTERM and Ctrl-C end the training after the step that runs, with a checkpoint."""
        self._guard.reset()
        self._guard.refuse_nonfinite_start()
        # The last of the callbacks: what others do to a gradient or to `control` comes before.
        self.add_callback(self._guard)
        try:
            with self._guard.signals.listening():
                result = super().train(*args, **kwargs)
                self._guard.finish()
        finally:
            self.is_in_train = False  # transformers leaves it at True after an error
            self.remove_callback(self._guard)
        return result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch."""
        loss = self._guard.finite(super().training_step(model, inputs, num_items_in_batch))
        self._guard.look_before_clipping()
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of a micro-batch."""
        if self.model.training:
            self._guard.keep(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a loss that is not finite as it was."""
        self._guard.complete(logs)
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Evaluate. Within a training, NaN stands for a figure that no completion gave: a schedule compares numbers."""
        metrics = super().evaluate(*args, **kwargs)
        if not self.is_in_train:
            return metrics
        return {name: math.nan if value is None else value for name, value in metrics.items()}

    def _determine_best_metric(self, metrics: dict[str, Any], trial: Any) -> bool:
        # TRL's figure is None where no completion was judged; transformers would compare None with a number.
        worst = -math.inf if self.args.greater_is_better else math.inf
        missing = {name: worst for name, value in metrics.items() if value is None or value != value}
        return super()._determine_best_metric(metrics | missing, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, unless a trained weight is not finite."""
        # Spread weights are gathered by all processes. Elsewhere one process may save alone, and would wait forever.
        self._guard.refuse_nonfinite_weights(agreeing=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._guard.refuse_nonfinite_weights(agreeing=True)
        super()._save_checkpoint(model, trial)
