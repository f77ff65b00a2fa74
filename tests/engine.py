"""An engine with noise that TRL sends merged weights. TRL's own code drives it as it drives vLLM beside a trainer."""

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

from tests.sampling import sampled

UNSCORED = 3  # the token of each completion for which the engine has no log-probability


class Engine:
    """`vllm.LLM` as far as TRL uses it: samples, and gives log-probabilities that are a little off, as vLLM's are.

    It knows the model by its config; weights come from TRL, by name.
    """

    def __init__(self, config, noise: float):
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.noise, self.calls, self.loaded = noise, 0, 0
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)

    def load_weights(self, weights):
        state = self.model.state_dict()
        for name, weight in weights:
            state[name].copy_(weight)
            self.loaded += 1

    def reset_prefix_cache(self):
        pass

    def generate(self, prompts, *, sampling_params, use_tqdm):
        assert self.loaded, "TRL has loaded no weights"
        rows = [torch.tensor(prompt["prompt_token_ids"]) for prompt in prompts]
        answers = sampled(self.model, rows, sampling_params, seed=self.calls)
        self.calls += 1
        return [self._output(row, *answer) for row, answer in zip(rows, answers, strict=True)]

    def _output(self, prompt, tokens, logps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(tokens))
            noisy = torch.tensor(logps) + self.noise * torch.randn(len(logps))
        noisy[UNSCORED : UNSCORED + 1] = float("nan")
        entries = [{t: SimpleNamespace(rank=1, logprob=lp)} for t, lp in zip(tokens, noisy.tolist(), strict=True)]
        return SimpleNamespace(
            prompt_token_ids=prompt.tolist(), outputs=[SimpleNamespace(token_ids=tokens, logprobs=entries)]
        )


def install_engine(monkeypatch, *, noise: float = 0.2) -> None:
    """Let trainers with `use_vllm=True` generate with an `Engine`."""

    class Generation(vllm_generation.VLLMGeneration):
        def _init_vllm(self):
            self.llm = Engine(self.model.config, noise)

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", Generation)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
