"""The switches of the speed-ups: what they refuse and when, what they say, and what falls back."""

import logging
import pickle
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, IntervalStrategy, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from tests.training import logs_of, make_trainer, weights_of

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
PROMPT_TUNING = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")


def trainer(output_dir, adapter=None, **config) -> GRPOPlusTrainer:
    return make_trainer(
        output_dir,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        trainer_arguments={"peft_config": adapter},
        **config,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": "shared"}, "Unknown packing 'shared'. Did you mean 'shared_prompt'"),
        ({"lora_backend": "triton"}, "Unknown lora_backend 'triton'"),
        ({"logprob_backend": "tritn"}, "Unknown logprob_backend 'tritn'. Did you mean 'triton'"),
        ({"skip_zero_advantage": True, "beta": 0.1}, "with beta=0.1 every completion has a KL gradient"),
        ({"skip_zero_advantage": True, "entropy_coef": 0.1}, "the entropy bonus is a mean over the micro-batch"),
        ({"skip_zero_advantage": True, "top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5 compares the tokens"),
        ({"skip_zero_advantage": True, "loss_type": "kl_to_old"}, "under loss_type='kl_to_old' a completion"),
        ({"skip_zero_advantage": True, "loss_type": "clip_cov"}, "under loss_type='clip_cov' a completion"),
        ({"generation_chunk_size": 0}, "generation_chunk_size=0 must be a whole number of rows, 1 or more"),
        ({"generation_chunk_size": "automatic"}, "1 or more, 'auto' or unset"),
        (
            {"generation_chunk_size": "auto", "use_transformers_continuous_batching": True},
            "size their batches themselves",
        ),
        ({"generation_chunk_size": 4, "use_transformers_continuous_batching": True}, "size their batches themselves"),
        (
            {"max_tokens_per_pass": 0},
            "max_tokens_per_pass=0 must be a whole number of tokens, 1 or more, 'auto' or None",
        ),
        ({"max_tokens_per_pass": "all"}, "max_tokens_per_pass='all' must be a whole number of tokens"),
        ({"logprob_backend": "torch", "packing": "none"}, "packing='none'. Set packing='auto'"),
        ({"logprob_backend": "torch", "entropy_coef": 0.1}, "no gradient of the entropy"),
        (
            {"logprob_backend": "triton", "entropy_coef": 0.1},
            "logprob_backend='triton' gives no gradient of the entropy",
        ),
        ({"logprob_backend": "torch", "cast_lm_head_to_fp32": True}, "the head that cast_lm_head_to_fp32=True makes"),
    ],
)
def test_a_switch_that_cannot_be_is_refused_with_the_configuration(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        GRPOPlusConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=2, **fields)


def test_the_trainer_refuses_what_only_the_model_tells(tmp_path):
    with pytest.raises(ValueError, match="packing='padding_free' is not possible: prompt-learning PEFT"):
        trainer(tmp_path, PROMPT_TUNING, packing="padding_free")
    with pytest.raises(ValueError, match="max_tokens_per_pass=64 is not possible: prompt-learning PEFT"):
        trainer(tmp_path, PROMPT_TUNING, packing="none", max_tokens_per_pass=64)
    with pytest.raises(ValueError, match="logprob_backend='torch' is for a frozen head, but its weight would get no"):
        trainer(tmp_path, logprob_backend="torch")
    with pytest.raises(
        ValueError, match="logprob_backend='triton' cannot run here: Triton .* Leave logprob_backend unset"
    ):
        trainer(tmp_path, LORA, logprob_backend="triton")
    with pytest.raises(ValueError, match=r"skip_zero_advantage=True is not possible: dropout 0.3 in"):
        trainer(tmp_path, LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear"), skip_zero_advantage=True)


def test_adapters_that_are_more_than_lora_stay_pefts_with_one_warning(tmp_path):
    dora = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.warns(
        UserWarning, match="lora_backend: PEFT's own forward in all layers. DoraLinearVariant is no plain"
    ):
        assert not trainer(tmp_path, dora).speed.fuses_lora
    with pytest.raises(ValueError, match="lora_backend='torch' is not possible: DoraLinearVariant"):
        trainer(tmp_path, dora, lora_backend="torch")
    with pytest.raises(ValueError, match="lora_backend='torch' is not possible: the model has no adapters"):
        trainer(tmp_path, lora_backend="torch")
    assert not trainer(tmp_path, LORA, lora_backend="peft").speed.fuses_lora
    assert trainer(tmp_path, LORA, lora_backend="torch").speed.fuses_lora


def test_activated_adapters_and_compiled_models_stay_padded(tmp_path):
    activated = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    with pytest.warns(UserWarning, match="LORA adapters of this kind look for tokens in the padded rows"):
        assert trainer(tmp_path, activated).speed.packer is None
    with pytest.warns(UserWarning, match="torch_compile would compile every length"):
        assert trainer(tmp_path, torch_compile=True).speed.packer is None


def test_a_head_that_was_asked_for_is_not_dropped_with_the_packing(tmp_path):
    with pytest.raises(
        ValueError, match="logprob_backend='torch' is a part of the packed forward.*torch_compile would"
    ):
        trainer(tmp_path, LORA, logprob_backend="torch", torch_compile=True)


def test_a_router_loss_keeps_trls_micro_batches(tmp_path):
    # It is not linear in what meets in a micro-batch.
    tokenizer = tiny_tokenizer()
    shape = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "output_router_logits": True}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape, **experts))
    made = make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, model=model)
    assert made.aux_loss_enabled
    assert made.speed.packer is not None
    assert not made.speed.keeps_prompts_together


def test_prompt_learning_stays_padded_with_one_warning(tmp_path):
    stock = make_trainer(tmp_path / "stock", trainer_arguments={"peft_config": PROMPT_TUNING})
    stock.train()
    with pytest.warns(UserWarning, match="packing: none, rows stay padded. prompt-learning PEFT") as said:
        ours = trainer(tmp_path / "ours", PROMPT_TUNING, skip_zero_advantage=False)
    assert not [warning for warning in said if "lora_backend" in str(warning.message)]  # there are no LoRA layers
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        ours.train()
    assert not [warning for warning in later if "packing" in str(warning.message)]
    for name, weight in weights_of(stock).items():
        assert torch.equal(weights_of(ours)[name], weight), name


def test_a_run_says_in_one_line_what_is_active(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "grpo_plus"):
        trainer(tmp_path, LORA, max_steps=2, temperature=0.9).train()
    lines = [record.getMessage() for record in caplog.records if "packing" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("packing: shared_prompt (segment attention), single-pass head, 1.")
    assert lines[0].endswith("x fewer tokens in the first rows; skipping zero-advantage rows")


def test_a_reference_model_of_its_own_is_packed_too(tmp_path):
    tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2).save_pretrained(tmp_path / "base")
    config = {"beta": 0.1, "optim": "sgd", "learning_rate": 0.1, "packing": "shared_prompt"}
    off = config | {"packing": "none"}
    trained = []
    for name, settings in (("off", off), ("on", config)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        made = make_trainer(
            tmp_path / name, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, model=model, **settings
        )
        assert made.ref_model is not None
        made.train()
        trained.append(weights_of(made))
    for name, weight in trained[0].items():
        torch.testing.assert_close(trained[1][name], weight, rtol=1e-5, atol=1e-6, msg=name)


def test_the_model_leaves_the_training_with_its_own_attention(tmp_path):
    made = trainer(tmp_path, max_steps=1)
    made.train()
    assert "segment attention" in made.speed.packer.describe()
    assert made.model.config._attn_implementation == "sdpa"
    made.save_model()
    assert "grpo_plus" not in (tmp_path / "config.json").read_text()


def test_every_use_outside_of_a_training_gives_the_attention_back(tmp_path):
    class Watching(TrainerCallback):
        def on_evaluate(self, *_: Any, model: Any, **__: Any) -> None:
            during.append(model.config._attn_implementation)

    during: list[str] = []
    made = trainer(tmp_path, max_steps=2, num_iterations=2)
    made.eval_dataset = rows = made.train_dataset.select(range(2))
    made.args.eval_strategy, made.args.eval_steps = IntervalStrategy.STEPS, 1
    made.add_callback(Watching())
    uses = {
        "evaluate": lambda: made.evaluate(rows),
        "predict": lambda: made.predict(rows),
        "generation batch": lambda: made._generate_and_score_completions([rows[0]] * 8),
        "train": made.train,
        "evaluate after": lambda: made.evaluate(rows),
    }
    for name, use in uses.items():
        use()
        assert made.model.config._attn_implementation == "sdpa", name
        assert b"grpo_plus" not in pickle.dumps(made.model.config), name
        assert "segment attention" in made.speed.packer.describe()
    assert during[1:3] == ["grpo_plus_sdpa"] * 2, "the attention left in the middle of the training"

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    made.compute_loss = broken
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert made.model.config._attn_implementation == "sdpa"


def test_a_loss_outside_of_a_training_keeps_the_attention_only_for_checkpointed_layers(tmp_path):
    for checkpointing in (False, True):
        made = trainer(tmp_path)
        if checkpointing:
            made.model.gradient_checkpointing_enable()
        made.model.train()
        rows = made._generate_and_score_completions([made.train_dataset[0]] * 8)
        made.current_gradient_accumulation_steps = 1
        made.compute_loss(made.model, rows).backward()
        kept = made.model.config._attn_implementation.startswith("grpo_plus")
        assert kept == checkpointing
        made.evaluate(made.train_dataset.select(range(2)))
        assert made.model.config._attn_implementation == "sdpa"


def test_continuous_batching_keeps_the_attention_that_it_knows(tmp_path):
    made = trainer(tmp_path, use_transformers_continuous_batching=True)
    assert "continuous batching" in made.speed.packer.no_segments


def test_the_log_shows_what_was_saved(tmp_path):
    # Every other prompt's group has no spread, and with it no advantage: half of the rows.
    def constant_for_some(prompts, completions, **_):
        return [float(len(c)) if p.startswith(("0", "2")) else 1.0 for p, c in zip(prompts, completions, strict=True)]

    made = trainer(tmp_path, reward_funcs=[constant_for_some], advantage_estimator="dr_grpo", max_steps=4)
    made.train()
    logs = [entry for entry in logs_of(made) if "packing/live_fraction" in entry]
    assert len(logs) == 4
    for entry in logs:
        # One row goes through where there is none with an advantage.
        assert entry["packing/live_fraction"] == pytest.approx(max(1 - entry["advantages/frac_zero"], 1 / 8))
        assert entry["packing/token_ratio"] >= 1 / entry["packing/live_fraction"]


def test_generation_in_chunks_gives_the_same_greedy_completions(tmp_path):
    rows = []

    class Spy(GRPOPlusTrainer):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            completions, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            completed.append(completions)
            return completions, logprobs

    completed: list[list[list[int]]] = []
    config = {"generation_kwargs": {"do_sample": False}, "max_steps": 1}
    for size in (None, 3):
        made = make_trainer(
            tmp_path, trainer_class=Spy, config_class=GRPOPlusConfig, generation_chunk_size=size, **config
        )
        generate = made.model.generate
        made.model.generate = lambda *args, generate=generate, **kwargs: (
            rows.append(len(kwargs["input_ids"])) or generate(*args, **kwargs)
        )
        made.train()
    assert rows == [8, 3, 3, 2]
    assert completed[0] == completed[1]


def test_completions_of_a_prompt_meet_in_one_micro_batch(tmp_path):
    met = []

    class Spy(GRPOPlusTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            met.append(len({tuple(prompt) for prompt in inputs["prompt_ids"].tolist()}))
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 2, "num_generations": 4}
    for packing in ("shared_prompt", "padding_free"):
        make_trainer(tmp_path, trainer_class=Spy, config_class=GRPOPlusConfig, packing=packing, **config).train()
    assert met[:8] == [1] * 8
    assert max(met[8:]) > 1  # as TRL shuffles them


def test_resuming_in_packed_form_gives_the_uninterrupted_weights(tmp_path):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "packing": "shared_prompt"}
    whole = trainer(tmp_path / "whole", **config)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name
