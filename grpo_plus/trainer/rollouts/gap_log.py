"""What the log says about the distance between the policy and what samples for it."""

import warnings

from trl import GRPOTrainer

from grpo_plus.losses.sampler import SamplerGap, joined, suspicion
from grpo_plus.trainer.names import log_value


class GapLog:
    """Logs the gap of each generation batch under `sampling/`, and warns once in a run of a gap that is no rounding.

    Attributes:
        gap: of the generation batch, as far as it has been compared.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer
        self._warned = False
        self.reset()

    def reset(self) -> None:
        """Begin a generation batch, or a training: an earlier one may have ended within a step."""
        self.gap = SamplerGap()

    def write(self) -> None:
        """Log the batch, and begin another. Every process takes part, also one that has compared nothing."""
        accelerator = self._trainer.accelerator
        figures = accelerator.gather(self.gap.figures(accelerator.device).unsqueeze(0))
        known = figures[~figures.isnan().any(1)]
        if len(known):
            for name, value in joined(known).items():
                log_value(self._trainer, f"sampling/{name}", value)
        self.warn(self.gap)
        self.reset()

    def warn(self, gap: SamplerGap) -> None:
        """One warning in a run."""
        if not self._warned and (message := suspicion(float(gap.root_mean_square()), self._trainer.state.global_step)):
            warnings.warn(message, stacklevel=2)
            self._warned = True
