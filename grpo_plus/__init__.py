"""A drop-in GRPOTrainer for Hugging Face TRL, with advantages you can choose.

    from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer

Importing this package imports neither TRL nor torch and changes nothing in them; the names below load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo_plus.version import __version__

_HOMES = {
    "AdvantageTableCallback": "grpo_plus.callbacks.advantage_table",
    "FrozenAdapterCallback": "grpo_plus.qlora.frozen",
    "GRPOPlusConfig": "grpo_plus.config",
    "GRPOPlusTrainer": "grpo_plus.trainer",
    "RewardHealthCallback": "grpo_plus.callbacks.reward_health",
    "Rewards": "grpo_plus.advantages",
    "RunLogCallback": "grpo_plus.callbacks.run_log",
    "StepProfile": "grpo_plus.trainer.profile",
}

__all__ = [
    "AdvantageTableCallback",
    "FrozenAdapterCallback",
    "GRPOPlusConfig",
    "GRPOPlusTrainer",
    "RewardHealthCallback",
    "Rewards",
    "RunLogCallback",
    "StepProfile",
    "__version__",
]

if TYPE_CHECKING:
    from grpo_plus.advantages import Rewards
    from grpo_plus.callbacks.advantage_table import AdvantageTableCallback
    from grpo_plus.callbacks.reward_health import RewardHealthCallback
    from grpo_plus.callbacks.run_log import RunLogCallback
    from grpo_plus.config import GRPOPlusConfig
    from grpo_plus.qlora.frozen import FrozenAdapterCallback
    from grpo_plus.trainer import GRPOPlusTrainer
    from grpo_plus.trainer.profile import StepProfile


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
