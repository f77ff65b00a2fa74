"""Rows with images train as stock TRL trains them: gradients of the first step, every number of the log, weights.

`python -m tests.vision` prints the same for every family and setting.
"""

import pytest

from tests.vision.following import EVERY_LORA, LANGUAGE_LORA, Run, changed, log_difference, relative, train

SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2}
CHECKPOINTED = SPLIT | {"gradient_checkpointing": True}
ONE_PROMPT = {"per_device_train_batch_size": 4, "max_steps": 4}  # a batch has either images or none
RUNS = {
    "reference-checkpointed": Run("qwen2_5_vl", config=CHECKPOINTED | {"beta": 0.1}),
    "adapters": Run("qwen3_vl", lora=LANGUAGE_LORA, config=SPLIT),
    "shuffled": Run("gemma3", config=SPLIT | {"steps_per_generation": 4, "pad_to_multiple_of": 7}),
    "frozen-tower": Run("smolvlm", frozen_tower=True, config=CHECKPOINTED),
    "iterations": Run("llava_next", config=SPLIT | {"num_iterations": 2, "max_steps": 3}),
    "text-between": Run("gemma3", (1, 0, 2, 0), lora=EVERY_LORA, config=ONE_PROMPT),
}


def assert_same_training(tmp_path, run: Run, *, log: float) -> None:
    stock, ours = (train(tmp_path / side, run, ours=side == "ours") for side in ("stock", "ours"))
    difference = relative(ours.gradients, stock.gradients)
    assert difference < 2e-6
    difference, where = log_difference(ours, stock)
    assert difference < log, where
    # Each group's images went through the model once.
    assert min(entry["packing/token_ratio"] for entry in ours.log) > 1.5
    difference = relative(ours.weights, stock.weights)
    assert difference < 1e-3 * changed(stock)


@pytest.mark.parametrize("run", [pytest.param(run, id=f"{run.name}-{name}") for name, run in RUNS.items()])
def test_steps_are_trls(tmp_path, run):
    assert_same_training(tmp_path, run, log=1e-4)


def test_twenty_steps_follow_trls_log(tmp_path):
    config = {"max_steps": 20, "learning_rate": 0.1, "beta": 0.1, "steps_per_generation": 2}
    config |= {"max_completion_length": 8}
    assert_same_training(tmp_path, Run("qwen2_5_vl", lora=LANGUAGE_LORA, config=config), log=1e-3)
