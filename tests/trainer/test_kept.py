"""`truncated_sampling="correct"` in trainings: the log-probabilities are those of the policy that sampled."""

import logging
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, MinPLogitsWarper, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.kernels.linear_logprob import listed
from grpo_plus.trainer.names import trained_tokens
from grpo_plus.trainer.rollouts.kept import KeptSets
from grpo_plus.trainer.rollouts.written import Generation, Written
from tests.calling import asking, called, calling_tokenizer, count, grow
from tests.packing.models import tiny
from tests.refilling import MIXED, Judge
from tests.training import PROMPTS, make_trainer

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
ADAPTED = {"trainer_arguments": {"peft_config": LORA}}
SUPPRESSED = list(range(10, 20))
TOP_P, TOP_K, MIN_P = {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.9, "generation_kwargs": {"suppress_tokens": SUPPRESSED}}


class Watched(GRPOPlusTrainer):
    """Replays the sampler on all logits, and keeps what the update makes of the same tokens.

    Attributes:
        seen: of each micro-batch of the policy that sampled, at trained tokens: log-probabilities of the update, of the
            replayed sampler, and over the whole vocabulary.
        batches: as they leave generation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: list[tuple[Tensor, ...]] = []
        self.batches: list[dict[str, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        ids, mask = (
            torch.cat([output[f"{part}_{what}"] for part in ("prompt", "completion")], 1) for what in ("ids", "mask")
        )
        length = output["completion_ids"].shape[1]
        with torch.no_grad():
            logits = self.model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].float()
        logits = logits.flatten(0, 1) / self.temperature
        picked = output["completion_ids"].flatten().unsqueeze(1)
        for name, scores in {"sampler": self._processed(logits), "whole": logits}.items():
            output[name] = scores.log_softmax(-1).gather(1, picked).view(-1, length)
        output["global_step"] = torch.full((len(ids),), self.state.global_step)
        self.batches.append(output)
        return output

    def _processed(self, scores: Tensor) -> Tensor:
        scores = scores.clone()
        if self.args.generation_kwargs:
            scores[:, SUPPRESSED] = -torch.inf
        warpers = [TopKLogitsWarper(self.top_k)] if self.top_k else []
        warpers += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        warpers += [MinPLogitsWarper(self.min_p)] if self.min_p else []
        for warper in warpers:
            scores = warper(None, scores)
        return scores

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scores = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs = self._micro_batch
        if inputs is not None and inputs["global_step"][0] == self.state.global_step:
            trained = trained_tokens(inputs).bool() & inputs["advantages"].ne(0).unsqueeze(1)
            self.seen.append(
                tuple(values.detach()[trained] for values in (scores[0], inputs["sampler"], inputs["whole"]))
            )
        return scores


def watched(folder: Any, **config: Any) -> Watched:
    defaults = {"trainer_class": Watched, "config_class": GRPOPlusConfig, "truncated_sampling": "correct"}
    return make_trainer(folder, **(defaults | config))


def restrained() -> PreTrainedModel:
    """A model whose own settings rule tokens out: top_p, which TRL sets itself, and typical_p, which it leaves alone."""
    model = tiny("llama")
    model.generation_config.update(top_p=0.5, typical_p=0.5)
    return model


def sampled_by_the_policy(trainer: Watched) -> None:
    """Every ratio of the first update to the replayed sampler is 1; over the whole vocabulary it is the kept mass."""
    assert trainer.seen
    logps, sampler, whole = (torch.cat(parts) for parts in zip(*trainer.seen, strict=True))
    assert len(logps) > 20
    assert (logps - sampler).exp().sub(1).abs().max() < 1e-4
    assert (whole - sampler).exp().mean() < 0.9


@pytest.mark.parametrize(
    ("sampling", "config", "adapter"),
    [
        (TOP_P, {"packing": "shared_prompt", "generation_loop": "grouped"}, None),
        (TOP_K, {"packing": "padding_free", "temperature": 0.8, "loss_type": "gmpo"}, LORA),
        (MIN_P, {"packing": "none", "generation_loop": "trl", "gradient_checkpointing": True}, None),
        (TOP_P | TOP_K, {"packing": "shared_prompt", "generation_chunk_size": 3, "skip_zero_advantage": False}, LORA),
        (MIN_P, {"entropy_coef": 0.01, "pad_to_multiple_of": 8}, LORA),
    ],
    ids=["shared", "padding-free", "padded", "chunks", "entropy"],
)
def test_the_update_starts_from_the_policy_that_sampled(tmp_path, monkeypatch, sampling, config, adapter):
    monkeypatch.setattr(listed, "PER_ENTRY", {"cpu": 0})  # however long the lists are
    trainer = watched(tmp_path, max_steps=2, trainer_arguments={"peft_config": adapter}, **sampling, **config)
    trainer.train()
    sampled_by_the_policy(trainer)
    assert bool(trainer.batches[0]["kept_only_lists"]) == (sampling != TOP_P)
    assert bool(trainer.speed.rollouts) == (config.get("generation_loop") != "trl")


def test_a_run_that_rules_nothing_out_has_the_whole_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(listed, "PER_ENTRY", {"cpu": 0})
    trainer = watched(tmp_path, max_steps=1)
    trainer.train()
    ((logps, _, whole),) = trainer.seen
    assert torch.allclose(logps, whole, atol=1e-5)


@pytest.mark.parametrize(("field", "ratio"), [(None, 0.7), ("correct", 1.0)])
def test_the_log_has_the_kept_mass_as_the_ratio_to_the_sampler_or_1(tmp_path, field, ratio):
    trainer = watched(tmp_path, max_steps=1, truncated_sampling=field, **TOP_P)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    logged = trainer.state.log_history[0]["sampling/importance_sampling_ratio/mean"]
    assert logged == pytest.approx(ratio, abs=0.02 if field is None else 1e-5)
    assert any("see truncated_sampling" in str(warning.message) for warning in caught) == (field is None)


def test_without_the_field_the_ratio_is_the_kept_mass(tmp_path):
    trainer = watched(tmp_path, max_steps=1, truncated_sampling=None, **TOP_P)
    trainer.train()
    ((logps, sampler, whole),) = trainer.seen
    assert torch.allclose(logps, whole, atol=1e-5)
    assert (logps - sampler).exp().mean() < 0.9
    assert "kept_counts" not in trainer.batches[0]


@pytest.mark.parametrize("packing", ["shared_prompt", "none"])
def test_old_policy_and_reference_are_over_the_same_tokens(tmp_path, packing):
    trainer = watched(tmp_path, max_steps=2, num_iterations=2, beta=0.1, packing=packing, **ADAPTED, **TOP_P)
    trainer.train()
    (batch,) = trainer.batches
    mask = batch["completion_mask"].bool()
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        assert torch.allclose(batch[name][mask], batch["sampler"][mask], atol=1e-5), name
    first, second = trainer.state.log_history[:2]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl"] > 1e-6


def test_refilled_rows_bring_what_could_be_drawn(tmp_path):
    trainer = watched(
        tmp_path,
        max_steps=2,
        max_refills=2,
        gradient_accumulation_steps=2,
        reward_funcs=[Judge()],
        train_dataset=MIXED,
        advantage_estimator="dr_grpo",
        **TOP_P,
    )
    trainer.train()
    assert any(entry.get("sampling/refills", 0) > 0 for entry in trainer.state.log_history)
    sampled_by_the_policy(trainer)


@pytest.mark.parametrize("config", [{"packing": "shared_prompt"}, {"packing": "none", "generation_chunk_size": 3}])
def test_turns_with_a_tool_start_from_the_policy_that_sampled(tmp_path, config):
    tokenizer = calling_tokenizer()
    trainer = watched(
        tmp_path,
        max_steps=2,
        model=tiny_model(tokenizer, hidden_size=16, num_heads=2),
        processing_class=tokenizer,
        train_dataset=asking(*"0123"),
        reward_funcs=[called],
        trainer_arguments={"tools": [count, grow]},
        max_completion_length=20,
        **TOP_P,
        **config,
    )
    trainer.train()
    assert any((batch["tool_mask"] == 0).any() for batch in trainer.batches)
    sampled_by_the_policy(trainer)


def test_evaluation_is_over_the_same_tokens(tmp_path):
    trainer = watched(
        tmp_path, trainer_arguments={"eval_dataset": PROMPTS.select(range(2)), "peft_config": LORA}, beta=0.1, **TOP_P
    )
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] == pytest.approx(0.0, abs=1e-6)
    sampled_by_the_policy(trainer)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (TOP_P, "top_p=0.7"),
        (TOP_K | MIN_P, "top_k=5, min_p=0.9, suppress_tokens="),
        ({"top_p": 1.0, "top_k": 0}, None),
        (TOP_P | {"repetition_penalty": 1.1}, None),  # for which it would be refused
        ({"trainer_arguments": {"peft_config": LORA}, "model": restrained()}, "typical_p=0.5: "),
    ],
    ids=["top_p", "many", "none", "refused", "model"],
)
def test_a_run_without_the_field_says_once_what_it_would_do(tmp_path, caplog, config, names):
    with caplog.at_level(logging.INFO, "grpo_plus"):
        watched(tmp_path, truncated_sampling=None, **config)
    lines = [record.message for record in caplog.records if "truncated_sampling" in record.message]
    assert len(lines) == (names is not None)
    assert names is None or lines[0].startswith(names)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"truncated_sampling": "corect"}, "Did you mean 'correct'"),
        ({"use_vllm": True}, "use_vllm=True, and vLLM does not say"),
        ({"use_transformers_continuous_batching": True}, "continuous batching does not say"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 changes the odds"),
        ({"generation_kwargs": {"temperature": 0.5}}, "temperature=0.5 changes the odds"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True"),
        ({"torch_compile": True}, "torch_compile=True"),
    ],
    ids=str,
)
def test_settings_that_it_cannot_correct_for_are_refused(config, message):
    defaults = {"use_cpu": True, "bf16": False, "truncated_sampling": "correct"}
    with pytest.raises(ValueError, match=message):
        GRPOPlusConfig("unused", **(defaults | config))


def rollout(prompts, trainer):
    raise AssertionError


IMAGES = Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}], "image": None, "answer": ""}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainer_arguments": {"rollout_func": rollout}}, "a rollout function samples"),
        ({"train_dataset": IMAGES}, "the dataset has images"),
    ],
    ids=["rollout", "images"],
)
def test_runs_that_it_cannot_follow_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        watched(tmp_path, **arguments)


def test_a_head_of_another_kind_ends_the_run_at_its_first_batch(tmp_path):
    config = tiny("granite").config
    config.vocab_size = len(tiny_tokenizer())
    trainer = watched(tmp_path, model=AutoModelForCausalLM.from_config(config), beta=0.0, **TOP_P)
    with pytest.raises(ValueError, match="does not know the head of GraniteForCausalLM: log-probabilities differ"):
        trainer.train()


def test_what_only_the_trainer_knows_is_refused_by_name(tmp_path, monkeypatch):
    trainer = watched(tmp_path)
    for name, value, message in (
        ("is_fsdp_enabled", True, "FSDP spreads the weights"),
        ("aux_loss_enabled", True, "router loss"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, value)
            with pytest.raises(ValueError, match=message):
                KeptSets(trainer, "correct", tells=True)
    kept = KeptSets(trainer, "correct", tells=True)
    written = Written.of([Generation([[1], [1]], [[2], [3]])], [[1], [1]], [[2], [3]], None)
    with pytest.raises(ValueError, match="make 0 rows, and these are not what TRL has made its completions of"):
        kept.take([], written, None)
