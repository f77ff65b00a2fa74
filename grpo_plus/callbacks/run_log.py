"""Write the log of any GRPO run, TRL's or ours, to a file that `grpo-plus watch` follows."""

import time
import warnings
from typing import Any

from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grpo_plus.report.run_log import BEGIN, END, LOG, append_line

Logs = dict[str, Any]


class RunLogCallback(TrainerCallback):
    """Appends every log of a training to output_dir/grpo_plus_log.jsonl, a line of JSON each.

    GRPOPlusTrainer adds one by itself. A run of TRL's can be watched with it, too. A file that cannot be written to
    is warned about once, and the training goes on.
    """

    def __init__(self) -> None:
        self._writes = True

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Begin the file, or go on with the file of the run that is resumed."""
        self._writes = state.is_world_process_zero
        self._write(args, state, BEGIN, anew=state.global_step == 0)

    def on_log(self, args: Arguments, state: State, control: Control, logs: Logs | None = None, **kwargs: Any) -> None:
        """Add a line."""
        self._write(args, state, LOG, figures=logs or {})

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Say that no line will follow."""
        self._write(args, state, END)

    def _write(self, args: Arguments, state: State, event: str, *, anew: bool = False, **more: Any) -> None:
        if not self._writes:
            return
        line = {"event": event, "step": state.global_step, "max_steps": state.max_steps, "time": time.time(), **more}
        try:
            append_line(str(args.output_dir), line, anew=anew)
        except OSError as error:
            self._writes = False
            warnings.warn(f"The log of the run cannot be written for `grpo-plus watch`: {error}", stacklevel=2)
