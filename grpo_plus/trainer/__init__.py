"""GRPOPlusTrainer, and everything that knows TRL's private names."""

from grpo_plus.trainer.trainer import GRPOPlusTrainer

__all__ = ["GRPOPlusTrainer"]
