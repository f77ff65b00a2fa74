"""A stand-in for vLLM, which the suite does not install: TRL's own code drives it as it drives vLLM beside a trainer."""

from types import SimpleNamespace

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer

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
        length = max(map(len, rows))
        ids = torch.stack([pad(row, (length - len(row), 0), value=0) for row in rows])
        mask = torch.stack([pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.calls)
            self.calls += 1
            output = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                temperature=sampling_params.temperature,
                max_new_tokens=sampling_params.max_tokens,
                output_scores=True,
                return_dict_in_generate=True,
            )
            tokens = output.sequences[:, length:]
            logps = torch.stack(output.scores, 1).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            logps = logps + self.noise * torch.randn(logps.shape)
        logps[:, UNSCORED : UNSCORED + 1] = float("nan")
        return [self._output(*row) for row in zip(rows, tokens.tolist(), logps.tolist(), strict=True)]

    def _output(self, prompt, tokens, logps):
        end = self.model.config.eos_token_id
        tokens = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        entries = [{t: SimpleNamespace(rank=1, logprob=lp)} for t, lp in zip(tokens, logps, strict=False)]
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
