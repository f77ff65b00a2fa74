"""Liger's layer kernels, switched on as TRL does, go together with packing and adapters: the gradients stay."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations.liger import apply_liger_kernel

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from tests.close import assert_close
from tests.training import make_trainer

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def liger(monkeypatch):
    """Liger's kernels under Triton's interpreter, and transformers' module as it was afterwards."""
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from transformers.models.qwen3 import modeling_qwen3
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(arg):
        # To the compiler a float is a float32 value; the interpreter leaves Python's, which has no `.to`.
        handle = interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32) if type(arg) is float else None
        return convert(arg) if handle is None else tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))  # of a device library, which is not there
    for name, value in vars(modeling_qwen3).copy().items():
        monkeypatch.setattr(modeling_qwen3, name, value)


def rows() -> dict[str, torch.Tensor]:
    """Two prompts, of three tokens and of two, with two completions each of up to three; few, for the interpreter."""
    ids = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, 5, 9, 0, 0], [0, 6, 4, 5, 3, 0], [0, 6, 4, 8, 8, 7]])
    mask = (ids > 0).long()
    return {
        "prompt_ids": ids[:, :3],
        "prompt_mask": mask[:, :3],
        "completion_ids": ids[:, 3:],
        "completion_mask": mask[:, 3:],
        "advantages": torch.tensor([1.0, -0.5, 0.3, -0.8]),
        "num_items_in_batch": mask[:, 3:].sum(),
    }


def gradient(output_dir, **config) -> tuple[torch.Tensor, GRPOPlusTrainer]:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(tiny_tokenizer(), hidden_size=16, num_layers=1, num_heads=1), LORA)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    made = make_trainer(
        output_dir, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, model=model, num_generations=2, **config
    )
    if made.args.use_liger_kernel:  # as train() begins
        apply_liger_kernel(made.model, made.args.liger_kernel_config)
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    made._compute_loss(made.model, rows()).backward()
    return torch.cat([weight.grad.flatten() for weight in made.model.parameters() if weight.requires_grad]), made


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:.*use_liger_kernel.*:FutureWarning")
def test_packed_rows_through_ligers_layers_give_the_gradients_of_padded_ones_without_them(tmp_path, liger):
    plain, _ = gradient(tmp_path, packing="none")
    packed, made = gradient(tmp_path, packing="shared_prompt", use_liger_kernel=True)
    layer = made.model.base_model.model.model.layers[0]
    homes = [module.forward.__module__ for module in (layer.input_layernorm, layer.mlp)]
    assert [home for home in homes if "liger" not in home] == []
    assert "segment attention" in made.speed.packer.describe()
    assert_close("packed", packed, plain, rtol=2e-6)
