"""GRPOPlusConfig, and what it refuses.

`fields` holds the fields; `advantages`, `losses` and `speed` check them at construction, and `run` once the trainer
knows its reward functions, dataset and model. To add a field, write it in `fields` with its line of documentation and
its `help`, check it in the file of its kind, and say in docs/ who needs it.
"""

from grpo_plus.config.fields import GRPOPlusConfig

__all__ = ["GRPOPlusConfig"]
