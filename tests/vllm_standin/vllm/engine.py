"""`vllm.LLM`, as far as TRL and we use it."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, Logprob, RequestOutput
from vllm.sampling_params import SamplingParams

from tests.sampling import sampled

OTHERS = {  # engine arguments without a meaning here
    *("tensor_parallel_size", "gpu_memory_utilization", "max_model_len", "max_num_seqs", "model_impl"),
    *("distributed_executor_backend", "max_num_batched_tokens", "trust_remote_code"),
}


class LLM:
    """Samples from a base of its own and the adapter that a request names.

    As in vLLM, an adapter is known by its number: the files of a number that is loaded are not read again. Sleep of level 2
    throws the base away.
    """

    def __init__(
        self,
        model: str,
        *,
        quantization: str | None = None,
        seed: int = 0,
        enable_sleep_mode: bool = False,
        logprobs_mode: str = "raw_logprobs",
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        **others: Any,
    ) -> None:
        assert set(others) <= OTHERS, others
        assert logprobs_mode == "processed_logprobs"
        self.base, self.quantization = model, quantization
        self.enable_lora, self.max_loras, self.max_lora_rank = enable_lora, max_loras, max_lora_rank
        self.can_sleep = enable_sleep_mode
        self.asleep: set[str] = set()
        self.levels: list[int] = []  # of sleep
        self.requests: list[LoRARequest | None] = []
        self.resets = 0
        self._draws = seed
        self._loaded: dict[int, str] = {}
        self._model: Any = _load(model, quantization).eval()

    def generate(
        self,
        prompts: Sequence[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        assert not self.asleep, f"asleep: {self.asleep}"
        params = sampling_params or SamplingParams()
        self.requests.append(lora_request)
        self._draws += 1
        rows = [torch.tensor(prompt["prompt_token_ids"]) for prompt in prompts for _ in range(params.n)]
        if lora_request is not None:
            self.add_lora(lora_request)
            self._model.set_adapter(self._loaded[lora_request.lora_int_id])
        bare = lora_request is None and isinstance(self._model, PeftModel)
        with self._model.disable_adapter() if bare else nullcontext():
            answers = sampled(self._model, rows, params, seed=self._draws)
        outputs = [
            CompletionOutput(
                i % params.n, tokens, [{t: Logprob(lp, rank=1)} for t, lp in zip(tokens, logps, strict=True)]
            )
            for i, (tokens, logps) in enumerate(answers)
        ]
        return [
            RequestOutput(prompt["prompt_token_ids"], outputs[i * params.n : (i + 1) * params.n])
            for i, prompt in enumerate(prompts)
        ]

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | None = None,
    ) -> None:
        self.requests.append(lora_request)

    @property
    def llm_engine(self) -> Any:
        """The way by which TRL reaches the weights of the base."""
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load_weights))
        worker = SimpleNamespace(model_runner=runner)
        return SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def _load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        state = self._model.state_dict()
        for name, weight in weights:
            state[name].copy_(weight)

    def add_lora(self, request: LoRARequest) -> None:
        """Read the adapter's files, where its number is not known. The oldest leaves where there are too many."""
        if not self.enable_lora:
            raise ValueError("LoRA is not enabled")
        if request.lora_int_id in self._loaded:
            return
        if not Path(request.lora_path, "adapter_config.json").exists():
            raise FileNotFoundError(f"No adapter found for {request.lora_path}")
        name = f"lora_{request.lora_int_id}"
        if isinstance(self._model, PeftModel):
            self._model.load_adapter(request.lora_path, name)
        else:
            self._model = PeftModel.from_pretrained(self._model, request.lora_path, name)
        if (rank := self._model.peft_config[name].r) > self.max_lora_rank:
            raise ValueError(f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}.")
        for key, weight in self._model.named_parameters():  # vLLM holds adapters in the dtype of the base
            if f".{name}." in key:
                weight.data = weight.data.to(self._model.dtype)
        self._loaded[request.lora_int_id] = name
        while len(self._loaded) > self.max_loras:
            self._model.delete_adapter(self._loaded.pop(next(iter(self._loaded))))

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.resets += 1
        return True

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert self.can_sleep
        self.asleep = {"weights", "kv_cache"}
        self.levels.append(level)
        if level == 2:
            for weight in self._model.parameters():
                weight.data.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.asleep -= set(tags or ("weights", "kv_cache"))


def _load(model: str, quantization: str | None) -> Any:
    dtype = AutoConfig.from_pretrained(model).dtype
    in_flight = None
    if quantization == "bitsandbytes":
        in_flight = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, quantization_config=in_flight)
