import pytest
from datasets import Dataset

from grpo_plus.compare.held_out import HeldOutTrainer
from grpo_plus.report.completions import as_text
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


def test_the_first_prompts_are_kept_with_a_completion_each_and_the_same_ones_under_every_seed(tmp_path):
    kept = []
    for seed in (0, 1):
        trainer = held_out_trainer(tmp_path, seed=seed)
        scores = trainer.held_out_scores(HELD_OUT)
        samples = trainer.samples()
        assert [float(sample.prompt.split()[-1]) for sample in samples] == scores["number"][:3]
        assert [len(sample.completion) > 0 for sample in samples] == [True] * 3
        kept.append([sample.prompt for sample in samples])
    assert kept[0] == kept[1]


def test_messages_are_told_with_their_roles():
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]  # as a dataset gives them
    assert as_text([{"role": "user", "content": parts}, {"role": "assistant", "content": None}]) == (
        "user: [image] What is this?\nassistant: "
    )


def test_evaluation_batches_that_hold_parts_of_groups_are_refused(tmp_path):
    with pytest.raises(ValueError, match="per_device_eval_batch_size=6 cannot"):
        held_out_trainer(tmp_path, per_device_eval_batch_size=6)
