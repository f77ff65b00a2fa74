"""What the tests on vision models rest on: pictures reach the models, and prompts are as uneven as in a real run."""

import pytest
import torch

from tests.vision import FAMILIES, QUESTIONS, SIZES, family, pictures

TWO = SIZES[:2]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_moves_the_log_probs(name):
    model, processor = family(name)
    shown = [pictures(*TWO), pictures(*TWO, seed=1), pictures(SIZES[4])]
    asked = {"type": "text", "text": QUESTIONS[0]}
    prompts = [[{"role": "user", "content": [*({"type": "image"} for _ in images), asked]}] for images in shown]
    texts = processor.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=texts, images=shown, padding=True, return_tensors="pt")
    first, other, _ = model.eval()(**inputs).logits[:, -1].log_softmax(-1)
    assert torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])
    assert (first - other).abs().max() > 0.1
    tokens = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert 4 <= tokens.min() < tokens.max() <= 140
