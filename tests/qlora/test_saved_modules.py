"""Weights of the base that train beside the adapters: modules that are saved whole, biases, tokens of tied embeddings."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.models.adapters import adapter_parameters
from grpo_plus.trainer.probe import logps_of
from tests.close import assert_close
from tests.qlora.models import NF4, lora, make_qlora_trainer
from tests.training import make_trainer

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    model = tiny_model(tiny_tokenizer(), hidden_size=64, num_heads=2)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def one_step(tmp_path, base, bf16, **adapters):
    """A trainer after a step, which begins with a generation, and after two more generations by hand."""
    trainer = make_qlora_trainer(
        tmp_path, base, max_steps=1, bf16=bf16, trainer_arguments={"peft_config": lora(**adapters)}
    )
    trainer.train()
    trainer.model.generate(input_ids=IDS, max_new_tokens=2)
    trainer.model.eval().generate(input_ids=IDS, max_new_tokens=2)
    return trainer


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["norm"]], ids=str)
def test_a_saved_module_computes_in_the_dtype_of_the_base(tmp_path, base, modules, bf16):
    trainer = one_step(tmp_path, base, bf16, modules_to_save=modules)
    for name, weight in adapter_parameters(trainer.model):
        assert weight.dtype == (torch.bfloat16 if "modules_to_save" in name else torch.float32), name


@pytest.mark.parametrize("bf16", [False, True])
def test_trained_tokens_of_tied_embeddings_train_and_generate(tmp_path, tied, bf16):
    """TRL reads the head's bias, which PEFT's wrapper of the head lacks."""
    trainer = one_step(tmp_path, tied, bf16, trainable_token_indices=[3, 5])
    (delta,) = [weight for name, weight in adapter_parameters(trainer.model) if "trainable_tokens" in name]
    assert delta.dtype == torch.float32
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_trained_tokens_of_tied_embeddings_have_the_gradient_of_the_logits(tmp_path, tied):
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    model = get_peft_model(loaded, lora(trainable_token_indices=[5, 6]))
    trainer = make_trainer(
        tmp_path, model=model, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, temperature=1.0
    )
    (delta,) = [weight for name, weight in adapter_parameters(model) if "trainable_tokens" in name]
    prompt, completion = torch.tensor([[5, 8]]), torch.tensor([[6, 7, 5]])
    rows = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
    }
    logps, _ = logps_of(trainer, rows)
    (gradient,) = torch.autograd.grad(logps.sum(), [delta])
    logits = model(input_ids=torch.cat([prompt, completion], 1)).logits.log_softmax(-1)[:, 1:-1]
    expected = logits.gather(-1, completion.unsqueeze(-1)).squeeze(-1)
    assert_close("log-probabilities", logps, expected, rtol=1e-5)
    assert_close("gradient", gradient, torch.autograd.grad(expected.sum(), [delta])[0], rtol=1e-4)


def test_saved_modules_in_float16_are_refused_where_gradients_are_scaled(tmp_path, base):
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.float16)
    model = get_peft_model(loaded, lora(modules_to_save=["lm_head"]))
    from grpo_plus.qlora.precision import check_saved_modules

    check_saved_modules(model, fp16=False)
    with pytest.raises(ValueError, match=r"lm_head.*float16.*Load the base with dtype='float32'.*modules_to_save"):
        check_saved_modules(model, fp16=True)
