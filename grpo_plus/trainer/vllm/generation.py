"""TRL's generation with vLLM, which sends the adapters alone."""

import warnings
from pathlib import Path
from typing import Any

from trl.generation.vllm_generation import VLLMGeneration, empty_cache

from grpo_plus.models.adapters import bits_of
from grpo_plus.trainer.vllm.calling import calling
from grpo_plus.trainer.vllm.client import LoRAClient
from grpo_plus.trainer.vllm.files import AdapterFiles
from grpo_plus.trainer.vllm.servable import check_servable, served_rank

FOLDER = "_vllm_lora"  # TRL does not push what begins with "_" to the hub

NOT_RUN = (
    "vllm_lora_sync=True sends vLLM the adapters alone. It was tested with a stand-in for vLLM's engine and server, "
    "and not run against vLLM. The log's sampling/sampling_logp_difference says whether vLLM answers with the policy."
)


class LoRAGeneration(VLLMGeneration):
    """TRL's, above a base that vLLM loaded itself.

    Args:
        folder: where the folders of the adapter's files go. A server must be able to read them there.
    """

    def __init__(self, *args: Any, folder: Path, **keywords: Any) -> None:
        self._folder = folder
        super().__init__(*args, **keywords)

    def _init_vllm(self) -> None:
        check_servable(self.model, self._dist)
        self._rank = served_rank(self.model)
        own = {"VLLMClient": LoRAClient} if self.mode == "server" else {"LLM": self._engine}
        with calling(VLLMGeneration._init_vllm, **own):
            super()._init_vllm()
        main = self.accelerator.is_main_process
        if self.mode == "server" and main:
            self.vllm_client.check(rank=self._rank, quantized=bits_of(self.model) == 4)
        # Each process beside an engine writes its own files: no process waits, and nodes share no disk.
        self._files = AdapterFiles(
            self.model,
            self._folder / f"{FOLDER}_{self.accelerator.process_index}",
            writes=main or self.mode == "colocate",
            device=self.accelerator.device,
        )
        if main:
            warnings.warn(NOT_RUN, stacklevel=2)

    def _engine(self, **trls: Any) -> Any:
        from grpo_plus.trainer.vllm.engine import LoRAEngine

        return LoRAEngine(**trls, enable_lora=True, max_lora_rank=self._rank, max_loras=1)

    def sync_weights(self) -> None:
        """Send vLLM the adapter as it is."""
        if self.mode == "colocate" and self.enable_sleep_mode:
            empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        if (adapter := self._files.write()) is not None:
            (self.vllm_client if self.mode == "server" else self.llm).use(adapter)
            self._files.keep_only(adapter)
