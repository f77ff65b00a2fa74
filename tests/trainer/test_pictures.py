"""Images of TRL's dictionaries, which lie end to end: cut by row, moved with their rows, and read once."""

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.update.micro_batches import MicroBatches, read
from grpo_plus.trainer.update.pictures import joined_by_row, knows_rows, pictures_of, split_by_row, with_images
from grpo_plus.trainer.update.regrouping import regrouped
from tests.close import differing
from tests.packing.counting import OnDevice
from tests.training import logs_of, weights_of
from tests.vision import make_vision_trainer, pictured

GRID = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 2]])
# By layout: the arguments of TRL's forward for rows of two, no and one images, and the entries that each row has.
LAYOUTS = {
    "patches": ({"pixel_values": torch.arange(20.0)[:, None], "image_grid_thw": GRID}, (12, 0, 8)),
    "tiles": ({"pixel_values": torch.arange(7.0)[:, None], "num_tiles": [5, 0, 2]}, (5, 0, 2)),
    "images": ({"pixel_values": torch.arange(3.0)[:, None], "image_sizes": GRID[:, 1:]}, (2, 0, 1)),
    # Filled up with empty images to two a row, which a mask tells apart. The row without images has empty ones alone.
    "filled": ({"pixel_values": torch.ones(3, 2, 1), "pixel_attention_mask": torch.ones(3, 2, 1)}, (1, 0, 1)),
}


def batch(layout):
    fields, _ = LAYOUTS[layout]
    return {"prompt_ids": torch.zeros(3, 1), "num_images": [2, 0, 1], "mm_token_type_ids": torch.eye(3).long()} | fields


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_cut_by_row_and_joined_again(layout):
    inputs = batch(layout)
    assert knows_rows(inputs)
    pictures = pictures_of(inputs)
    assert tuple(map(len, pictures.images["pixel_values"])) == LAYOUTS[layout][1]
    assert with_images(pictures, [1]) is None
    assert with_images(pictures, [1, 2]) is pictures
    again = joined_by_row(split_by_row(inputs))
    assert again.keys() == inputs.keys()
    for name, value in inputs.items():
        assert torch.equal(again[name], value) if isinstance(value, torch.Tensor) else again[name] == value


def test_rows_whose_images_are_unknown_are_left_to_trl_and_that_is_said(tmp_path):
    unknown = batch("images") | {"pixel_values": torch.zeros(4, 1)}
    assert not knows_rows(unknown)
    made = make_vision_trainer(
        tmp_path, "smolvlm", trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, packing="auto"
    )
    ids = torch.ones(3, 5).long()
    with pytest.warns(UserWarning, match="stay padded where the numbers of images do not tell which row has which"):
        rows = made._padded_rows(ids, ids, 2, unknown)
    assert (rows.pictures, rows.live, rows.layout) == (None, None, None)


def micro_batches():
    """Two micro-batches of two rows: equal tokens everywhere, and of the pictures the first and the last are equal."""
    tokens = {"prompt_ids": torch.tensor([[5, 6, 7]] * 2), "completion_ids": torch.tensor([[8, 9]] * 2)}
    ones = {"prompt_mask": torch.ones(2, 3).long(), "completion_mask": torch.ones(2, 2).long()}
    types = {"mm_token_type_ids": torch.tensor([[0, 1, 0, 0, 0]] * 2)}
    shown = [
        {"pixel_values": torch.tensor([[1.0], [2.0]]), "advantages": torch.tensor([1.0, 2.0])},
        {"pixel_values": torch.tensor([[3.0], [1.0]]), "advantages": torch.tensor([3.0, 4.0])},
    ]
    grids = {"image_grid_thw": torch.tensor([[1, 1, 1]] * 2), "num_images": [1, 1]}
    return [tokens | ones | types | grids | own for own in shown]


def on_device(inputs):
    return {k: v.as_subclass(OnDevice) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def alive(inputs):
    return inputs["advantages"] != 0


def test_rows_of_one_prompt_and_picture_meet_and_are_laid_out_without_another_wait():
    batches = micro_batches()
    moved, rows = regrouped(batches, read(batches, alive), accumulation_steps=2, loss_type="grpo")
    assert [part["pixel_values"].flatten().tolist() for part in moved] == [[1.0, 1.0], [2.0, 3.0]]
    assert [part["advantages"].tolist() for part in moved] == [[1.0, 4.0], [2.0, 3.0]]
    kept = MicroBatches()
    kept.keep([on_device(part) for part in moved], rows)
    OnDevice.waits.clear()
    groups = [[group.rows for group in known.layout.groups] for known in kept._known]
    assert groups == [[(0, 1)], [(0,), (1,)]]
    assert not OnDevice.waits


def test_a_micro_batch_whose_pictures_were_replaced_is_read_anew():
    inputs = micro_batches()[0]
    kept = MicroBatches()
    kept.keep([inputs], read([inputs], alive))
    assert kept.of(dict(inputs), alive) is kept._known[0]
    assert kept.of(inputs | {"pixel_values": inputs["pixel_values"].clone()}, alive) is not kept._known[0]


def test_a_run_with_images_goes_on_within_a_generation_batch(tmp_path):
    settings = {"steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 4, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "max_steps": 4, "train_dataset": pictured((1, 2)), "per_device_train_batch_size": 4}
    settings |= {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    whole = make_vision_trainer(tmp_path, "qwen2_5_vl", **settings)
    whole.train()
    again = make_vision_trainer(tmp_path, "qwen2_5_vl", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logs_of(again)[1:-1] == logs_of(whole)[1:-1]
    assert differing(weights_of(again), weights_of(whole)) == []
