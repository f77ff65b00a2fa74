import pytest
from datasets import Dataset

from grpo_plus.compare.held_out import HeldOutTrainer
from tests.compare.small import ROWS, TOKENIZER, small_task

HELD_OUT = Dataset.from_dict({"prompt": [f"held out {number}" for number in range(6)]})


def number(prompts, **_):
    return [float(prompt.split()[-1]) if "held" in prompt else 0.0 for prompt in prompts]


def even(prompts, **_):
    return [None if prompt[-1] in "135" else 1.0 for prompt in prompts]


def held_out_trainer(tmp_path, **fields):
    task = small_task()
    config = task.config(output_dir=str(tmp_path), **fields)
    return HeldOutTrainer(
        model=task.start(), reward_funcs=[number, even], args=config, train_dataset=ROWS, processing_class=TOKENIZER
    )


def test_scores_are_those_of_the_prompts_in_the_same_order_under_every_seed(tmp_path):
    first, second = (held_out_trainer(tmp_path, seed=seed).held_out_scores(HELD_OUT) for seed in (0, 1))
    assert first["number"] == second["number"]
    assert sorted(first["number"]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    for total, mine, judged in zip(first["reward"], first["number"], first["even"], strict=True):
        assert judged != judged if mine % 2 else judged == 1.0
        assert total == mine + (0.0 if mine % 2 else 1.0)


def test_evaluation_batches_that_hold_parts_of_groups_are_refused(tmp_path):
    with pytest.raises(ValueError, match="per_device_eval_batch_size=6 cannot"):
        held_out_trainer(tmp_path, per_device_eval_batch_size=6)
