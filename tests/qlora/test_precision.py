"""Adapters above a real nf4 base: the dtype they train in, what survives a checkpoint, and gradients on the CPU."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.qlora import qlora
from grpo_plus.qlora.precision import keep_gradients_on_the_cpu
from tests.close import differing
from tests.qlora.models import load_nf4, lora, make_qlora_trainer, trained_weights
from tests.training import make_trainer


def adam_dtypes(trainer):
    return {state["exp_avg"].dtype for state in trainer.optimizer.state.values()}


@pytest.mark.parametrize(
    ("adapter_dtype", "expected"),
    [(None, torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_adapters_and_adams_state_have_the_dtype_that_was_asked_for(tmp_path, base, adapter_dtype, expected):
    trainer = make_qlora_trainer(tmp_path, base, adapter_dtype=adapter_dtype, max_steps=1)
    trainer.train()
    assert {weight.dtype for weight in trained_weights(trainer).values()} == {expected}
    assert adam_dtypes(trainer) == {expected}


def test_a_plain_config_keeps_what_trl_does(tmp_path, base):
    trainer = make_qlora_trainer(tmp_path, base, config_class=GRPOConfig)
    assert {weight.dtype for weight in trained_weights(trainer).values()} == {torch.bfloat16}


def test_bfloat16_trains_what_trl_trains_to_the_last_bit(tmp_path, base):
    off = {"adapter_dtype": "bfloat16", "packing": "none", "skip_zero_advantage": False, "lora_backend": "peft"}
    ours = make_qlora_trainer(tmp_path / "ours", base, **off)
    ours.train()
    trls = make_qlora_trainer(tmp_path / "trl", base, config_class=GRPOConfig, trainer_class=GRPOTrainer)
    trls.train()
    theirs = trained_weights(trls)
    assert differing(trained_weights(ours), theirs) == []


def test_adapters_that_were_passed_keep_every_digit(tmp_path, base):
    model = get_peft_model(load_nf4(base), lora())
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    after = trained_weights(make_qlora_trainer(tmp_path, model))
    assert differing(before, after) == []
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in before.values())


def test_without_a_quantized_base_nothing_changes_unless_asked(tmp_path):
    dtypes = {}
    for adapter_dtype in (None, "bfloat16"):
        trainer = make_trainer(
            tmp_path,
            trainer_class=GRPOPlusTrainer,
            config_class=GRPOPlusConfig,
            trainer_arguments={"peft_config": lora()},
            adapter_dtype=adapter_dtype,
        )
        dtypes[adapter_dtype] = {weight.dtype for weight in trained_weights(trainer).values()}
    assert dtypes == {None: {torch.float32}, "bfloat16": {torch.bfloat16}}


def test_an_adapter_dtype_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="adapter_dtype='float32', but the model has no adapters"):
        make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, adapter_dtype="float32")


def test_an_unknown_adapter_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown adapter_dtype 'float16'. Did you mean 'bfloat16'"):
        GRPOPlusConfig(str(tmp_path), adapter_dtype="float16", use_cpu=True, bf16=False)


def test_adapters_in_bfloat16_are_refused_where_gradients_are_scaled(tmp_path):
    with pytest.raises(ValueError, match="adapter_dtype='bfloat16' with fp16=True.*Set adapter_dtype='float32'"):
        GRPOPlusConfig(str(tmp_path), adapter_dtype="bfloat16", use_cpu=True, fp16=True)


def test_a_float16_base_trains_float32_adapters_under_a_gradient_scaler(tmp_path, base):
    """What a card without bfloat16 does; the trainer itself cannot run it on a CPU, where accelerate refuses fp16."""
    recipe = qlora(r=4, dtype="float16")
    quantized = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=recipe.quantization_config, **recipe.config["model_init_kwargs"]
    )
    config = {
        name: value for name, value in recipe.config.items() if name not in ("model_init_kwargs", "fp16", "optim")
    }
    trainer = make_qlora_trainer(tmp_path, get_peft_model(quantized, recipe.peft_config), **config)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in weights]
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0)
    ids = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # lora_A has no gradient before lora_B has moved
        with torch.autocast("cpu", torch.float16):
            output = trainer.model(input_ids=ids, labels=ids)
        scaler.scale(output.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert output.logits.dtype == torch.float16
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float16, torch.uint8, torch.float32}
    moved = torch.cat([weight.ne(before).flatten() for weight, before in zip(weights, start, strict=True)])
    assert moved.float().mean() > 0.99


@pytest.mark.parametrize(
    "config",
    [{}, {"adapter_dtype": "bfloat16"}, {"optim": "adamw_8bit"}, {"beta": 0.1, "gradient_checkpointing": True}],
    ids=["float32", "bfloat16", "adamw_8bit", "beta-checkpointing"],
)
def test_stopping_and_resuming_gives_the_weights_of_the_uninterrupted_run(tmp_path, base, config):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None} | config
    whole = make_qlora_trainer(tmp_path, base, **config)
    whole.train()
    resumed = make_qlora_trainer(tmp_path, base, **config)
    start = trained_weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = trained_weights(whole)
    for name, weight in trained_weights(resumed).items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name
        assert not torch.equal(weight, start[name]), name


def test_resuming_passed_adapters_with_a_reference_copy(tmp_path, base):
    def passed():
        torch.manual_seed(1)
        return get_peft_model(load_nf4(base), lora())

    config = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "beta": 0.1}
    whole = make_qlora_trainer(tmp_path, passed(), **config)
    whole.train()
    resumed = make_qlora_trainer(tmp_path, passed(), **config)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = trained_weights(whole)
    assert differing(trained_weights(resumed), expected) == []


class Moved(TrainerCallback):
    """Which elements of lora_A have had another value than at the start after any step so far."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.weights = [weight for name, weight in model.named_parameters() if "lora_A" in name]
        self.start = [weight.detach().clone() for weight in self.weights]
        self.ever = [torch.zeros_like(weight, dtype=torch.bool) for weight in self.weights]

    def on_step_end(self, args, state, control, **kwargs):
        for ever, weight, start in zip(self.ever, self.weights, self.start, strict=True):
            ever |= weight.ne(start)


def test_every_element_of_lora_a_moves_at_trls_learning_rate(tmp_path, base):
    shares = {}
    for adapter_dtype in ("float32", "bfloat16"):
        trainer = make_qlora_trainer(tmp_path, base, adapter_dtype=adapter_dtype, learning_rate=1e-6, max_steps=10)
        moved = Moved()
        trainer.add_callback(moved)
        trainer.train()
        shares[adapter_dtype] = torch.cat([ever.flatten() for ever in moved.ever]).float().mean().item()
    assert shares["float32"] == 1.0
    assert shares["bfloat16"] < 0.05


def gradients_and_evaluation(model):
    ids = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients():
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}

    def evaluate():
        model.eval()
        with torch.no_grad():
            model(input_ids=ids)

    return gradients, evaluate


def test_gradients_after_an_evaluation_are_those_of_before(base):
    """On a CPU with AVX512-BF16, bitsandbytes packs the weights in the first forward in eval mode."""
    model = get_peft_model(load_nf4(base), lora(init_lora_weights=False))
    gradients, evaluate = gradients_and_evaluation(model)
    expected = gradients()
    keep_gradients_on_the_cpu(model)
    evaluate()
    assert differing(gradients(), expected) == []


def test_a_model_whose_weights_are_packed_already_is_refused(tmp_path, base):
    model = get_peft_model(load_nf4(base), lora())
    if not any(getattr(layer, "support_avx512bf16_for_cpu", False) for layer in model.modules()):
        pytest.skip("this CPU has no AVX512-BF16, so bitsandbytes packs nothing")
    gradients_and_evaluation(model)[1]()
    with pytest.raises(ValueError, match="was evaluated on the CPU"):
        make_qlora_trainer(tmp_path, model)


def test_an_adapter_reloaded_for_more_training_goes_on_in_float32(tmp_path, base):
    first = make_qlora_trainer(tmp_path / "first", base)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(load_nf4(base), tmp_path / "adapter", is_trainable=True)
    second = make_qlora_trainer(tmp_path / "second", model)
    assert {weight.dtype for weight in trained_weights(second).values()} == {torch.float32}
    expected = trained_weights(first)
    assert differing(trained_weights(second), expected) == []
