"""Everything for long rows at once, on QLoRA: TRL's gradients in every step, and a run that resumes bit by bit."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.models.offload import Offload
from grpo_plus.models.tiles import Tiles
from grpo_plus.packing import candidates, packer, passes
from grpo_plus.trainer.update.long_rows import LongRows
from tests.close import assert_close, differing
from tests.qlora.models import lora, save_base
from tests.training import make_trainer, weights_of

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
PROMPTS = Dataset.from_list([{"prompt": f"{digit}+2=" * 5} for digit in range(8)])
FORMS = {"segment attention": ("why_not_cascade", "why_not_cached"), "cache": ("why_not_cascade", "why_not_segments")}


class Gradients(TrainerCallback):
    """Gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.steps.append(torch.cat([weight.grad.flatten() for weight in trained]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), num_layers=2)


def made(folder, base, trainer_class, config_class, **config):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=NF4, dtype=torch.float32)
    trainer = make_trainer(
        folder,
        trainer_class=trainer_class,
        config_class=config_class,
        model=model,
        trainer_arguments={"peft_config": lora()},
        train_dataset=PROMPTS,
        max_steps=2,
        gradient_checkpointing=True,
        max_grad_norm=0.0,
        **config,
    )
    generator = torch.Generator().manual_seed(3)
    for weight in trainer.model.parameters():
        if weight.requires_grad:  # in float32, which TRL rounds to bfloat16 at construction
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return trainer


def ours(folder, base, tiles, offload):
    trainer = made(
        folder,
        base,
        GRPOPlusTrainer,
        GRPOPlusConfig,
        packing="shared_prompt",
        max_tokens_per_pass=8,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.speed = replace(trainer.speed, long_rows=LongRows([tiles.of, offload.of]))
    return trainer


def gradients_of(trainer, resume=None):
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(resume_from_checkpoint=resume)
    return gradients.steps


@pytest.fixture(scope="module")
def expected(tmp_path_factory, base):
    return gradients_of(made(tmp_path_factory.mktemp("stock"), base, GRPOTrainer, GRPOConfig))


@pytest.mark.parametrize("form", FORMS)
def test_everything_for_long_rows_trains_as_trl_and_resumes(tmp_path, base, expected, monkeypatch, form):
    for refused in FORMS[form]:
        for module in (candidates, packer):  # the packer asks for the cache once more, to cut prompts
            if hasattr(module, refused):
                monkeypatch.setattr(module, refused, lambda model: "not in this test")
    cut, sizes = passes._in_parts, []
    monkeypatch.setattr(passes, "_in_parts", lambda *inputs: sizes.append(len(cut(*inputs))) or cut(*inputs))
    tiles, offload = Tiles(3), Offload(least_bytes=1)
    whole = ours(tmp_path / "run", base, tiles, offload)
    actual = gradients_of(whole)
    assert form in whole.speed.packer.describe()
    assert set(sizes) == ({3} if form == "cache" else set())  # 19 tokens of the prompt in passes of 8
    assert len(actual) == len(expected) == 2
    for found, of_trl in zip(actual, expected, strict=True):
        assert_close("gradients", found, of_trl, rtol=5e-6)
    assert len(tiles._modules) == 1
    assert offload._newest is not None  # inputs have been out
    resumed = ours(tmp_path / "resumed", base, Tiles(3), Offload(least_bytes=1))
    gradients_of(resumed, str(tmp_path / "run/checkpoint-1"))
    assert differing(weights_of(resumed), weights_of(whole)) == []
