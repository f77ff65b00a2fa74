"""What TRL's own tests of vision-language models ask for, asked of our trainer.

TRL's tests train tiny models from the hub with mixed precision and checkpointing, at a learning rate of 0.1.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from tests.close import differing
from tests.training import weights_of
from tests.vision import make_vision_trainer, pictured
from tests.vision.following import save_reference

OURS: dict[str, Any] = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
# As in TRL's tests, except for the number of steps.
LIKE_TRLS: dict[str, Any] = {
    "learning_rate": 0.1,
    "per_device_train_batch_size": 2,
    "num_generations": 2,
    "max_completion_length": 8,
    "gradient_checkpointing": True,
    "bf16": True,
    "max_steps": 3,
}
# LLaVA's language model reads the last layer but one of the tower.
UNREAD = ("vision_tower.encoder.layers.2.", "post_layernorm")


def longer(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


def trained(
    output_dir: Any, name: str, counts: tuple[int, ...] = (1, 1), **config: Any
) -> tuple[GRPOTrainer, set[str]]:
    """The trainer, and the names of the weights that it has changed."""
    defaults = OURS | LIKE_TRLS | {"reward_funcs": [longer], "train_dataset": pictured(counts)}
    trainer = make_vision_trainer(output_dir, name, **(defaults | config))
    start = weights_of(trainer)
    trainer.train()
    return trainer, set(differing(weights_of(trainer), start))


@pytest.mark.parametrize("name", ["gemma3", "internvl", "llava_next", "qwen3_5"])
def test_every_weight_that_is_read_changes(tmp_path, name):
    trainer, changed = trained(tmp_path, name)
    read = {key for key, _ in trainer.model.named_parameters() if not any(part in key for part in UNREAD)}
    assert changed == read if name == "llava_next" else changed == set(weights_of(trainer))


def test_adapters_change_and_nothing_else(tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"])
    trainer, changed = trained(tmp_path, "qwen2_5_vl", trainer_arguments={"peft_config": lora})
    assert changed == {key for key in weights_of(trainer) if "lora_" in key}


def test_several_images_train_every_weight(tmp_path):
    trainer, changed = trained(tmp_path, "idefics3", (2, 1, 0, 2), max_steps=4)
    assert changed == set(weights_of(trainer))


def test_a_reference_model_trains_every_weight(tmp_path):
    def prepare(model):
        save_reference(model, tmp_path / "reference")

    trainer, changed = trained(tmp_path, "qwen2_5_vl", beta=0.1, prepare=prepare)
    assert changed == set(weights_of(trainer))
    assert trainer.state.log_history[-2]["kl"] > 0


@pytest.mark.parametrize("log_multimodal", [True, False])
def test_images_are_logged_where_asked_for(tmp_path, log_multimodal):
    trainer, _ = trained(tmp_path, "smolvlm", (1, 2), log_completions=True, log_multimodal=log_multimodal, max_steps=1)
    assert [len(images) for images in trainer._logs["images"]] in ([[1, 1], [2, 2]] if log_multimodal else [[]])


def test_one_batch_has_no_rows_with_and_without_images(tmp_path):
    # TRL's limit, of which docs/vision.md tells.
    with pytest.raises(TypeError, match="only a single or a list of entries is supported"):
        trained(tmp_path, "qwen2_5_vl", (1, 0), per_device_train_batch_size=4)


def screenshot() -> list:
    """
    Take a screenshot.

    Returns:
        The screenshot.
    """
    return [{"type": "image", "image": Image.new("RGB", (16, 24), "red")}, {"type": "text", "text": "There."}]


def spoken() -> str:
    """
    Say what the screen shows.

    Returns:
        What it shows.
    """
    return "A red square."


@pytest.mark.parametrize(("tool", "images"), [(screenshot, 2), (spoken, 1)])
def test_a_tool_answers_with_an_image_or_with_text(tmp_path, tool, images):
    call = f'<call>{{"name": "{tool.__name__}", "arguments": {{}}}}</call><eos>'
    logs = []
    for classes in ({}, OURS):
        config = (
            LIKE_TRLS
            | classes
            | {"max_completion_length": 512, "reward_funcs": [longer], "bf16": False, "optim": "sgd"}
        )
        trainer = make_vision_trainer(
            tmp_path, "qwen3_5", trainer_arguments={"tools": [tool]}, train_dataset=pictured((1, 1)), **config
        )
        seen = []

        def generate(input_ids, *, tokenizer=trainer._tokenizer, seen=seen, **given):
            seen.append(len(given["image_grid_thw"]))
            texts = [call, "I know no tool.<eos>"] if len(input_ids) == 2 else ["Done!<eos>"]
            ids = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
            return torch.cat([input_ids, pad_sequence(ids, batch_first=True)], dim=1)

        start = weights_of(trainer)
        with patch.object(trainer.model, "generate", side_effect=generate):
            trainer.train()
        assert seen == [2, images] * 3
        assert len(differing(weights_of(trainer), start)) == len(start)
        logs.append(trainer.state.log_history[:-1])
        assert logs[-1][0]["tools/call_frequency"] == 0.5
        assert logs[-1][0]["tools/failure_frequency"] == 0
    for mine, theirs in zip(*reversed(logs), strict=True):
        for key in ("loss", "grad_norm", "reward", "completions/mean_length"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
