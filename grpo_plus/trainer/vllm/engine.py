"""vLLM's engine beside the trainer, which answers with the newest adapter."""

from typing import Any

from vllm import LLM
from vllm.lora.request import LoRARequest

from grpo_plus.trainer.vllm.files import Adapter


class LoRAEngine(LLM):
    """`vllm.LLM` above the base that it loaded itself. A request without an adapter of its own gets the newest."""

    _newest: LoRARequest | None = None

    def use(self, adapter: Adapter) -> None:
        """Answer with this adapter. vLLM reads the files at the next request."""
        # vLLM would take a version that it knows by the number, and cached prompts by the name, from its memory.
        self._newest = LoRARequest(lora_name=adapter.name, lora_int_id=adapter.version, lora_path=adapter.path)
        self.reset_prefix_cache()

    def generate(self, *args: Any, **keywords: Any) -> Any:
        """As vLLM's, with the newest adapter."""
        return super().generate(*args, **{"lora_request": self._newest} | keywords)

    def chat(self, *args: Any, **keywords: Any) -> Any:
        """As vLLM's, with the newest adapter."""
        return super().chat(*args, **{"lora_request": self._newest} | keywords)

    def sleep(self, level: int = 1, *args: Any, **keywords: Any) -> None:
        """Sleep, and keep the base. Level 2 would throw its weights away, which nobody sends again."""
        super().sleep(min(level, 1), *args, **keywords)
