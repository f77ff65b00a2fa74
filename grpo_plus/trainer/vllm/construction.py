"""Let TRL build classes of ours in place of its own, for as long as it builds a trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from trl import GRPOTrainer

from grpo_plus.trainer.vllm.calling import calling


@contextmanager
def adapters_alone(config: Any) -> Iterator[None]:
    """While TRL builds a trainer: its vLLM gets the adapters alone, where `vllm_lora_sync` asks for it.

    Args:
        config: the arguments of the trainer; None where it makes its own.
    """
    if not getattr(config, "vllm_lora_sync", False):
        yield
        return
    from grpo_plus.trainer.vllm.generation import LoRAGeneration

    folder = Path(config.output_dir).absolute()
    with calling(GRPOTrainer.__init__, VLLMGeneration=partial(LoRAGeneration, folder=folder)):
        yield
