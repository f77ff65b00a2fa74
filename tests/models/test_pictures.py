"""Images by row."""

import torch

from grpo_plus.models import pictures
from grpo_plus.models.pictures import Pictures

SMALL, MOVED = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 1.0], [3.0, 4.0]])
NONE = SMALL[:0]


def _pictures(*rows):
    types = torch.tensor([[0, 1, 1, 0]] * len(rows))
    grids = [torch.tensor([[1, len(row), 1]] * (len(row) > 0)).view(-1, 3) for row in rows]
    return Pictures.of({"pixel_values": list(rows), "image_grid_thw": grids, "token_type_ids": types})


def test_rows_of_equal_images_have_the_number_of_the_first():
    assert _pictures(SMALL, MOVED, SMALL.clone(), NONE, SMALL[:1], NONE).numbers() == [0, 1, 0, 3, 4, 3]


def test_images_of_other_shapes_are_others_whatever_is_in_them():
    black = SMALL * 0
    assert Pictures.of({"pixel_values": [black, NONE, black[:1], black]}).numbers() == [0, 1, 2, 0]


def test_equal_checksums_do_not_make_images_equal(monkeypatch):
    monkeypatch.setattr(pictures, "_checksum", lambda tensor: torch.tensor(7))
    assert _pictures(SMALL, MOVED, SMALL.clone()).numbers() == [0, 1, 0]


def test_zeros_of_either_sign_may_be_apart_but_are_never_mixed_with_others():
    assert _pictures(SMALL * 0, SMALL * -0.0, SMALL).numbers()[2] == 2


def test_some_rows_take_their_images_along_in_the_order_asked():
    taken = _pictures(SMALL, NONE, MOVED[:1]).take([2, 1, 0])
    assert torch.equal(taken["pixel_values"], torch.cat([MOVED[:1], SMALL]))
    assert taken["image_grid_thw"].tolist() == [[1, 1, 1], [1, 2, 1]]
    assert _pictures(SMALL, NONE).take([1]) == {}


def test_a_tensor_has_an_entry_per_row():
    padded = torch.arange(12.0).view(3, 2, 2)  # as models of several padded images per row take them
    assert torch.equal(Pictures.of({"pixel_values": padded}).take([2, 0])["pixel_values"], padded[[2, 0]])
