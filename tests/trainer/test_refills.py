"""Dynamic sampling in a training: what is trained on, what is logged, and what it costs."""

import warnings

import pandas as pd
import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.advantages import estimate
from tests.advantages.cases import rewards_of
from tests.refilling import MIXED, Judge, expected_batches, is_dead
from tests.training import PROMPTS, logs_of, make_trainer, weights_of


class Recorder(GRPOPlusTrainer):
    """Keeps every batch as it leaves generation, beside log-probabilities computed anew from it."""

    batches: list

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        with torch.no_grad():
            arguments = ids, mask, output["completion_ids"].shape[1]
            logps = self._get_per_token_logps_and_entropies(self.model, *arguments)[0]
            with self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else warnings.catch_warnings():
                ref_logps = self._get_per_token_logps_and_entropies(self.model, *arguments)[0]
        self.batches = [*getattr(self, "batches", []), (output, logps, ref_logps)]
        return output

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.filled_up = set()
        join = self._refills.join_outputs

        def recorded(old, new, rows):
            self.filled_up |= {n for n in ("prompt_ids", "completion_ids") if old[n].shape[1] != new[n].shape[1]}
            return join(old, new, rows)

        self._refills.join_outputs = recorded


def refilling(output_dir, judge, **arguments):
    defaults = {
        "trainer_class": Recorder,
        "config_class": GRPOPlusConfig,
        "reward_funcs": [judge],
        "train_dataset": MIXED,
        "advantage_estimator": "dr_grpo",
        "max_refills": 2,
        "gradient_accumulation_steps": 2,
        "log_completions": True,
    }
    return make_trainer(output_dir, **(defaults | arguments))


def tables(output_dir) -> list[pd.DataFrame]:
    return [pd.read_parquet(path) for path in sorted((output_dir / "completions").glob("*.parquet"))]


def sampling(trainer, name: str) -> list:
    return [entry[f"sampling/{name}"] for entry in trainer.state.log_history if f"sampling/{name}" in entry]


@pytest.mark.newest_trl
@pytest.mark.parametrize("estimator", ["dr_grpo", "batch_std", "gdpo", None])
def test_dead_slots_are_filled_and_the_final_batch_is_trained_and_shown(tmp_path, estimator, capsys):
    judge = Judge()
    trainer = refilling(tmp_path, judge, advantage_estimator=estimator)
    trainer.train()
    refills = [int(count) for count in sampling(trainer, "refills")]
    assert sum(refills) > 0
    batches = expected_batches(judge, refills)
    for table, rows, (output, _, _) in zip(tables(tmp_path), batches, trainer.batches, strict=True):
        assert list(zip(table["prompt"], table["completion"], strict=True)) == rows
        decode = trainer.processing_class.batch_decode
        assert decode(output["prompt_ids"], skip_special_tokens=True) == [prompt for prompt, _ in rows]
        assert decode(output["completion_ids"], skip_special_tokens=True) == [completion for _, completion in rows]
        assert output["advantages"].tolist() == pytest.approx(table["advantage"].tolist())
        rewards = rewards_of(torch.tensor(table["judge"].to_numpy()).view(-1, 4).tolist())
        expected = estimate(estimator or "grpo", rewards).flatten().tolist()
        assert table["advantage"].tolist() == pytest.approx(expected, abs=1e-4)
        assert [reward == judge.dead for reward in table["judge"]] == [is_dead(prompt) for prompt in table["prompt"]]


@pytest.mark.newest_trl
def test_the_cost_is_logged_and_refills_stop_when_no_group_is_dead(tmp_path, capsys):
    judge = Judge()
    trainer = refilling(tmp_path, judge, max_refills=5, max_steps=4)
    trainer.train()
    shares = [sum(is_dead(p) for p in table["prompt"]) / len(table) for table in tables(tmp_path)]
    refills = sampling(trainer, "refills")
    assert sampling(trainer, "dead_groups") == shares
    assert {count for count, share in zip(refills, shares, strict=True) if share > 0} <= {5}
    assert any(share == 0 and 0 < count < 5 for count, share in zip(refills, shares, strict=True))
    ratios = [(1 + count) / (1 - share) for count, share in zip(refills, shares, strict=True)]
    assert sampling(trainer, "generated_ratio") == pytest.approx(ratios)
    tokens = trainer.state.log_history[-2]["num_tokens"]
    assert len(judge.calls) == 4 + sum(refills)
    assert tokens >= sum(len(trainer.processing_class(p)["input_ids"]) for call in judge.calls for p, _ in call)
    of_all = [{**{k: v for k, v in entry.items() if k == "rewards/judge/mean"}} for entry in trainer.state.log_history]
    calls = iter(judge.calls)
    for entry, count in zip(of_all, refills, strict=False):
        means = [pd.Series(values_of(judge, next(calls))).mean() for _ in range(1 + int(count))]
        assert entry["rewards/judge/mean"] == pytest.approx(sum(means) / len(means), rel=1e-5)


def values_of(judge: Judge, rows: list) -> list[float]:
    return Judge(judge.dead)([p for p, _ in rows], [c for _, c in rows])


def masked_rollout(prompts, trainer):
    """Completions of different lengths, each with a last token that its environment wrote."""
    tokenizer = trainer.processing_class
    lengths = torch.randint(2, 12, (len(prompts),)).tolist()
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [torch.randint(5, 20, (length,)).tolist() for length in lengths],
        "logprobs": [[-float(length)] * length for length in lengths],
        "env_mask": [[1] * (length - 1) + [0] for length in lengths],
        "score": [float(length) for length in lengths],
    }


def scored(prompts, score, **_):
    return [0.0 if is_dead(prompt) else value for prompt, value in zip(prompts, score, strict=True)]


def test_joined_rows_keep_what_belongs_to_them(tmp_path, capsys):
    """Log-probabilities, masks and counts of the joined batch are those of a batch generated in one piece."""
    arguments = {"rollout_func": masked_rollout, "peft_config": LoraConfig(r=4, target_modules="all-linear")}
    settings = {"num_iterations": 2, "beta": 0.1, "max_steps": 8, "trainer_arguments": arguments}
    trainer = refilling(tmp_path, scored, **settings)
    trainer.train()
    assert sum(sampling(trainer, "refills")) > 0
    for output, logps, ref_logps in trainer.batches:
        mask, lengths = output["completion_mask"], output["completion_mask"].sum(-1)
        torch.testing.assert_close(output["old_per_token_logps"], logps, rtol=0, atol=2e-5)
        torch.testing.assert_close(output["ref_per_token_logps"], ref_logps, rtol=0, atol=2e-5)
        assert (output["sampling_per_token_logps"] == -(lengths.unsqueeze(1) * mask)).all()
        assert (output["tool_mask"].sum(-1) == mask.shape[1] - 1).all()
        assert output["num_items_in_batch"] == (lengths - 1).sum()
        pad = trainer.processing_class.pad_token_id
        assert (output["completion_ids"][mask == 0] == pad).all()
        assert (output["prompt_ids"][output["prompt_mask"] == 0] == pad).all()
    assert trainer.filled_up == {"prompt_ids", "completion_ids"}, "the lengths never differed"
    last, _, _ = trainer.batches[-1]
    assert (last["old_per_token_logps"] - last["ref_per_token_logps"]).abs().max() > 1e-4


@pytest.mark.newest_trl
def test_refills_leave_the_order_of_the_data_alone(tmp_path, capsys):
    without, with_refills = Judge(), Judge()
    refilling(tmp_path / "without", without, max_refills=0).train()
    trainer = refilling(tmp_path / "with", with_refills)
    trainer.train()
    firsts, position = [], 0
    for count in sampling(trainer, "refills"):
        firsts.append([prompt for prompt, _ in with_refills.calls[position]])
        position += 1 + int(count)
    assert position > len(firsts)
    assert firsts == [[prompt for prompt, _ in call] for call in without.calls]


@pytest.mark.newest_trl
def test_several_generation_batches_of_one_step_draw_different_prompts(tmp_path, capsys):
    judge = Judge()
    arguments = {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "max_steps": 1, "max_refills": 1}
    refilling(tmp_path, judge, train_dataset=MIXED.select(range(1, 24, 2)), **arguments).train()
    first, drawn, second, drawn_again = ({prompt for prompt, _ in call} for call in judge.calls)
    assert len(first) == len(drawn) == len(second) == 2
    assert drawn != drawn_again


@pytest.mark.newest_trl
def test_a_hopeless_run_stops_at_the_bound_and_warns_once(tmp_path, capsys):
    judge = Judge()
    trainer = refilling(tmp_path, judge, train_dataset=MIXED.select(range(1, 24, 2)))
    with pytest.warns(UserWarning, match="4 of 4 groups are dead after max_refills=2") as caught:
        trainer.train()
    assert sum("groups are dead" in str(warning.message) for warning in caught) == 1
    assert len(judge.calls) == 3 * (1 + 2)
    assert sampling(trainer, "dead_groups") == [1.0] * 3
    assert sampling(trainer, "generated_ratio") == [None] * 3
    assert [set(table["advantage"]) for table in tables(tmp_path)] == [{0.0}] * 3
    assert [list(table["prompt"]) for table in tables(tmp_path)] == [[p for p, _ in judge.calls[i]] for i in (0, 3, 6)]


@pytest.mark.newest_trl
def test_rounding_in_trls_advantages_is_no_life(tmp_path, capsys):
    # In float32 eight rewards of 0.7 have a std of 6e-8, and TRL's advantages are not 0.
    arguments = {"num_generations": 8, "max_steps": 1, "train_dataset": MIXED.select(range(1, 24, 2))}
    trainer = refilling(tmp_path, Judge(), advantage_estimator=None, **arguments)
    trainer.train()
    assert tables(tmp_path)[0]["advantage"].abs().max() > 0
    assert sampling(trainer, "dead_groups") == [1.0]


@pytest.mark.newest_trl
def test_a_modifier_decides_what_is_dead(tmp_path, capsys):
    def brief(completions, **_):
        return [-float(len(text)) for text in completions]

    judge = Judge()
    arguments = {"advantage_modifiers": {"filter_zero_std": {"by": "judge"}}, "max_completion_length": 48}
    trainer = refilling(tmp_path, judge, reward_funcs=[judge, brief], max_refills=5, **arguments)
    trainer.train()
    assert sum(sampling(trainer, "refills")) > 0
    batches = expected_batches(judge, [int(count) for count in sampling(trainer, "refills")])
    assert [list(table["completion"]) for table in tables(tmp_path)] == [[c for _, c in rows] for rows in batches]


@pytest.mark.newest_trl
def test_a_group_of_equal_steps_is_dead_and_steps_move_with_their_completions(tmp_path, capsys):
    judge = Judge()

    def halves(prompts, completions, completion_ids, log_extra, **_):
        judge(prompts, completions)
        values = [0.5 if is_dead(p) else float(sum(ids) % 97) for p, ids in zip(prompts, completion_ids, strict=True)]
        log_extra("step_rewards", [[value] for value in values])
        log_extra("step_ends", [[len(ids) - 1] for ids in completion_ids])
        return [0.0] * len(prompts)

    trainer = refilling(tmp_path, halves, advantage_estimator="process")
    trainer.train()
    assert sum(sampling(trainer, "refills")) > 0
    batches = expected_batches(judge, [int(count) for count in sampling(trainer, "refills")])
    assert [list(table["completion"]) for table in tables(tmp_path)] == [[c for _, c in rows] for rows in batches]
    for table, (output, _, _) in zip(tables(tmp_path), trainer.batches, strict=True):
        steps = [
            0.5 if is_dead(p) else float(s[0]) for p, s in zip(table["prompt"], table["step_rewards"], strict=True)
        ]
        expected = estimate("grpo", rewards_of(torch.tensor(steps).view(-1, 4).tolist())).flatten()
        per_token = expected.unsqueeze(1) * output["completion_mask"]
        torch.testing.assert_close(output["advantages"].double(), per_token.double(), rtol=0, atol=1e-4)


@pytest.mark.newest_trl
def test_memory_is_of_the_final_batches_only(tmp_path, capsys):
    trainer = refilling(tmp_path, Judge(), advantage_estimator="ema_task", task_column="task")
    trainer.train()
    assert sum(sampling(trainer, "refills")) > 0
    state: dict = {}
    for table in tables(tmp_path):
        plain = rewards_of(torch.tensor(table["judge"].to_numpy()).view(-1, 4).tolist())
        tasks = tuple("1" if is_dead(prompt) else "0" for prompt in table["prompt"][::4])
        rewards = type(plain)(plain.values, plain.weights, plain.names, plain.lengths, tasks)
        expected = estimate("ema_task", rewards, state=state).flatten()
        assert table["advantage"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert trainer.estimator_state == {task: pytest.approx(moments) for task, moments in state.items()}


@pytest.mark.newest_trl
def test_a_run_with_refills_resumes_to_the_same_weights(tmp_path, capsys):
    settings = {"advantage_estimator": "ema_task", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = refilling(tmp_path / "whole", Judge(), **settings)
    whole.train()
    assert sum(sampling(whole, "refills")[2:]) > 0
    resumed = refilling(tmp_path / "resumed", Judge(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logs_of(resumed)[:4] == logs_of(whole)[:4]
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


@pytest.mark.newest_trl
def test_evaluation_does_not_refill(tmp_path, capsys):
    judge = Judge()
    trainer = refilling(tmp_path, judge, trainer_arguments={"eval_dataset": MIXED.select(range(4))})
    trainer.evaluate()
    assert len(judge.calls) == 2  # four prompts of four completions, eight at a time


@pytest.mark.newest_trl
def test_reward_functions_see_the_same_columns_in_a_refill(tmp_path, capsys):
    judge = Judge()
    refilling(tmp_path, judge, remove_unused_columns=True, max_steps=1).train()
    assert len(judge.calls) > 1
    assert [columns for columns in judge.columns if columns != judge.columns[0]] == []
    assert "other" not in judge.columns[0]


@pytest.mark.newest_trl
def test_batches_that_hold_anything_but_text_are_refused_by_name(tmp_path):
    trainer = refilling(tmp_path, Judge(), trainer_class=GRPOPlusTrainer)
    batch = {"advantages": torch.zeros(4), "pixel_values": torch.zeros(9, 3)}
    with pytest.raises(ValueError, match="max_refills=2 cannot join batches that hold pixel_values"):
        trainer._refills.join_outputs(batch, batch, torch.arange(4))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (MIXED.to_iterable_dataset(), "max_refills=2 draws rows of train_dataset by index, but a IterableDataset"),
        (PROMPTS.add_column("image", ["none"] * 20), "max_refills=2 moves rows of text only.*'image'"),
    ],
)
def test_a_dataset_that_cannot_be_drawn_from_is_refused_at_construction(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        refilling(tmp_path, Judge(), train_dataset=dataset)


def test_a_buffer_of_groups_refuses_pictures_too(tmp_path):
    pictured = PROMPTS.add_column("image", ["none"] * 20)
    with pytest.raises(ValueError, match="refill_buffer=1 moves rows of text only.*'image'.*Set refill_buffer=0"):
        refilling(tmp_path, Judge(), train_dataset=pictured, max_refills=0, refill_buffer=1)
