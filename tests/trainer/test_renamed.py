"""Checkpoints that name the weights otherwise than the model."""

import pytest
import torch

from grpo_plus.trainer.saving.renamed import load_renamed
from tests.close import differing
from tests.vision import family


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_weights_under_older_names_are_loaded(tmp_path, shard):
    model, _ = family("qwen2_5_vl")
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path, max_shard_size=shard)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    load_renamed(tmp_path, model)
    assert differing(model.state_dict(), expected) == []
