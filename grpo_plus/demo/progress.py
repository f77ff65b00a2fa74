"""What the trainer shows and records while the demo runs."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grpo_plus.demo.task import accuracy

ACCURACY = "held_out_accuracy"
CORRECTNESS, FORMAT = "rewards/correctness_reward/mean", "rewards/format_reward/mean"
SHOWN = {CORRECTNESS: "correct", FORMAT: "format", ACCURACY: "held-out"}


class HeldOutAccuracy(TrainerCallback):
    """Adds the accuracy on held-out rows to the log: about ten times, at even distances, and at the end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> None:
        self.tokenizer = tokenizer
        self.rows = rows

    def on_log(
        self, args: Arguments, state: State, control: Control, model: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        """Measure after the steps that are due."""
        entry = state.log_history[-1]
        every = max(state.max_steps // 10, 1)
        due = state.global_step % every == 0 or state.global_step == state.max_steps
        if due and "reward" in entry:
            entry[ACCURACY] = accuracy(model, self.tokenizer, self.rows)


class RewardsOnTheBar(ProgressCallback):
    """Hugging Face's progress bar, with the rewards beside it in place of a printed dictionary per step."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Open the bar and name it."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("GRPO")

    def on_log(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Show the newest value of each quantity."""
        entry = state.log_history[-1]
        # TRL logs None for a reward that judged no completion.
        self.shown |= {short: f"{entry[name]:.2f}" for name, short in SHOWN.items() if entry.get(name) is not None}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.shown)
