import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig

from grpo_plus import AdvantageTableCallback, GRPOPlusConfig, GRPOPlusTrainer, RewardHealthCallback
from tests.training import PROMPTS, brevity, make_trainer, vowels

HEALTHY = {
    "frac_reward_zero_std": 0.25,
    "rewards/correct/mean": 0.5,
    "rewards/correct/std": 0.5,
    "rewards/format/mean": 0.8,
    "rewards/format/std": 0.4,
    "reward": 1.3,
    "entropy": 2.0,
    "completions/mean_length": 100.0,
    "completions/clipped_ratio": 0.1,
    "advantages/zero_spread/correct": 0.5,
    "advantages/zero_spread/format": 0.6,
    "advantages/dead_groups": 0.25,
    "advantages/reward_share/correct": 0.6,
    "advantages/reward_share/format": 0.4,
    "advantages/length_correlation": 0.3,
}
SICK = [
    pytest.param({"advantages/dead_groups": 1.0}, "100% of the groups", id="dead"),
    pytest.param({"advantages/zero_spread/format": 1.0}, "reward 'format'", id="constant in each group"),
    pytest.param({"advantages/reward_share/correct": 0.96}, "reward 'correct' makes up 96%", id="dominant"),
    pytest.param({"completions/mean_length": 201.0}, "201 tokens on average and had 100", id="longer"),
    pytest.param({"completions/mean_length": 49.0}, "49 tokens on average and had 100", id="shorter"),
    pytest.param({"advantages/length_correlation": 0.81}, r"\+0.81.*longer", id="longer is better"),
    pytest.param({"advantages/length_correlation": -0.81}, r"-0.81.*shorter", id="shorter is better"),
    pytest.param({"entropy": 0.19}, "entropy fell to 0.19 from 2", id="entropy"),
]
ALMOST_SICK = {
    "advantages/dead_groups": 0.94,
    "rewards/format/std": 1e-3,
    "advantages/zero_spread/format": 0.99,
    "advantages/reward_share/correct": 0.95,
    "completions/mean_length": 200.0,
    "advantages/length_correlation": -0.8,
    "entropy": 0.2,
}


def warnings_of(callback: RewardHealthCallback, logs: list[dict[str, Any]], **state: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for entry in logs:
            callback.on_log(GRPOConfig, TrainerState(**state), TrainerControl(), logs=entry)
    return [str(warning.message) for warning in caught]


def on_main(callback: RewardHealthCallback, logs: list[dict[str, Any]]) -> list[str]:
    return warnings_of(callback, logs, is_world_process_zero=True)


@pytest.mark.parametrize(("change", "message"), SICK)
def test_each_cause_warns_once_after_patience_logs(change, message):
    callback = RewardHealthCallback(patience=3)
    assert on_main(callback, [HEALTHY] * 3 + [HEALTHY | change] * 2) == []
    with pytest.warns(UserWarning, match=message):
        callback.on_log(None, TrainerState(), TrainerControl(), logs=HEALTHY | change)
    assert on_main(callback, [HEALTHY | change] * 4 + [HEALTHY] + [HEALTHY | change] * 4) == []


@pytest.mark.parametrize(("change", "message"), SICK)
def test_a_healthy_log_restarts_the_count(change, message):
    callback = RewardHealthCallback(patience=3)
    assert on_main(callback, [HEALTHY] * 3 + ([HEALTHY | change] * 2 + [HEALTHY]) * 3) == []


def test_values_at_the_harmless_side_of_each_threshold_are_silent():
    assert on_main(RewardHealthCallback(patience=2), [HEALTHY] * 2 + [HEALTHY | ALMOST_SICK] * 6) == []


def test_without_our_figures_trls_share_of_dead_groups_decides():
    stock = {key: value for key, value in HEALTHY.items() if not key.startswith("advantages/")}
    (message,) = on_main(RewardHealthCallback(patience=2), [stock | {"frac_reward_zero_std": 0.95}] * 4)
    assert "95% of the groups" in message


@pytest.mark.parametrize(("std", "warned"), [(0.0, 1), (6e-8, 1), (1e-3, 0)])
def test_without_our_figures_trls_std_tells_a_constant_reward(std, warned):
    stock = {key: value for key, value in HEALTHY.items() if not key.startswith("advantages/")}
    messages = on_main(RewardHealthCallback(patience=2), [stock | {"rewards/format/std": std}] * 4)
    assert len([message for message in messages if "reward 'format'" in message]) == warned


def test_constant_returns_beside_varied_steps_are_healthy():
    # Under advantage_estimator="process" zero_spread is that of the steps.
    steps = HEALTHY | {"rewards/format/std": 0.0, "advantages/zero_spread/format": 0.2}
    assert on_main(RewardHealthCallback(patience=2), [steps] * 4) == []


@pytest.mark.parametrize(
    ("settings", "suggested"),
    [
        ({"advantage_estimator": "rloo"}, True),
        ({"advantage_estimator": "gdpo"}, False),
        ({"multi_objective_aggregation": "normalize_then_sum"}, False),
        ({}, True),
    ],
)
def test_normalizing_is_not_suggested_to_a_run_that_does(tmp_path, settings, suggested):
    callback = RewardHealthCallback(patience=1)
    dominated = HEALTHY | {"advantages/reward_share/correct": 0.99}
    config = GRPOPlusConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
    with pytest.warns(UserWarning, match="makes up 99%.*in reward_weights") as caught:
        callback.on_log(config, TrainerState(), TrainerControl(), logs=dominated)
    assert ("gdpo" in str(caught[0].message)) == suggested


def test_two_causes_are_two_warnings():
    sick = HEALTHY | {"advantages/zero_spread/format": 1.0, "advantages/zero_spread/correct": 1.0}
    assert len(on_main(RewardHealthCallback(patience=2), [sick] * 5)) == 2


def test_a_log_without_the_figure_neither_counts_nor_restarts():
    dead = {"frac_reward_zero_std": 1.0}
    others = [{"train_runtime": 3.0}, {"eval_frac_reward_zero_std": 0.0}, {"frac_reward_zero_std": None}]
    assert on_main(RewardHealthCallback(patience=3), [dead, *others, dead, *others]) == []
    assert len(on_main(RewardHealthCallback(patience=3), [dead, *others, dead, *others, dead])) == 1


def test_evaluation_logs_are_ignored():
    sick = {f"eval_{key}": value for key, value in HEALTHY.items()}
    sick |= {"eval_frac_reward_zero_std": 1.0, "eval_rewards/format/std": 0.0, "eval_entropy": 0.0}
    assert on_main(RewardHealthCallback(patience=1), [HEALTHY, sick, sick]) == []


def test_a_resumed_run_compares_with_the_first_logs_of_the_checkpoint():
    callback = RewardHealthCallback(patience=2)
    state = TrainerState(log_history=[HEALTHY, HEALTHY])
    callback.on_train_begin(None, state, TrainerControl())
    (message,) = on_main(callback, [HEALTHY | {"entropy": 0.1}] * 2)
    assert "from 2" in message


def test_only_the_main_process_warns():
    dead = {"frac_reward_zero_std": 1.0}
    assert warnings_of(RewardHealthCallback(patience=1), [dead], is_world_process_zero=False) == []
    assert len(on_main(RewardHealthCallback(patience=1), [dead])) == 1


@pytest.mark.parametrize(
    "wrong", [{"patience": 0}, {"length_ratio": 1.0}, {"dead_groups": 0.0}, {"reward_share": 95}, {"entropy_ratio": -1}]
)
def test_a_wrong_threshold_is_refused_at_construction(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RewardHealthCallback(**wrong)


def constant(completions: list[str], **_: Any) -> list[float]:
    return [0.7] * len(completions)


@pytest.mark.parametrize("ours", [False, True])
def test_a_training_with_a_constant_reward_warns(tmp_path, ours):
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig, "advantage_estimator": "rloo"}
    trainer = make_trainer(
        tmp_path,
        reward_funcs=(vowels, constant),
        trainer_arguments={"callbacks": [RewardHealthCallback(patience=3, length_correlation=1.0)]},
        **(classes if ours else {}),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    messages = [str(warning.message) for warning in caught if "logs in a row" in str(warning.message)]
    assert len([message for message in messages if "reward 'constant'" in message]) == 1
    # Beside a constant, the other reward makes all the difference; only our log says so.
    assert len([message for message in messages if "reward 'vowels' makes up 100%" in message]) == ours
    assert len(messages) == 1 + ours


def tables(output_dir: Path) -> dict[str, dict[str, list[Any]]]:
    files = sorted((output_dir / "completions").iterdir())
    return {file.name: pq.ParquetFile(file).read().to_pydict() for file in files}


def train_with_tables(output_dir: Path, callback: AdvantageTableCallback | None, **config: Any) -> None:
    callbacks = [] if callback is None else [callback]
    config = {"log_completions": True, "num_completions_to_print": 1} | config
    make_trainer(output_dir, trainer_arguments={"callbacks": callbacks}, **config).train()


def test_every_table_of_a_training_gets_its_groups_and_keeps_the_rest(tmp_path):
    train_with_tables(tmp_path / "stock", None)
    train_with_tables(tmp_path / "with", AdvantageTableCallback(task_of=lambda prompt: prompt[0]))
    stock, completed = tables(tmp_path / "stock"), tables(tmp_path / "with")
    assert sorted(completed) == [f"completions_0000{step}.parquet" for step in (1, 2, 3)]
    for name, table in completed.items():
        # 8 rows, 4 generations
        assert table.pop("group") == [0, 0, 0, 0, 1, 1, 1, 1]
        assert table.pop("task") == [prompt[0] for prompt in table["prompt"]]
        assert table == stock[name]


def test_groups_are_right_with_accumulation_and_sparse_logs(tmp_path):
    train_with_tables(tmp_path, AdvantageTableCallback(), gradient_accumulation_steps=2, logging_steps=2, max_steps=4)
    completed = tables(tmp_path)
    assert sorted(completed) == ["completions_00002.parquet", "completions_00004.parquet"]
    assert [table["group"] for table in completed.values()] == [[0] * 4 + [1] * 4 + [2] * 4 + [3] * 4] * 2


def test_pandas_reads_the_completed_table(tmp_path):
    pandas = pytest.importorskip("pandas")
    train_with_tables(tmp_path, AdvantageTableCallback(), max_steps=1)
    frame = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(frame.groupby("group")["prompt"].nunique()) == [1, 1]
    assert frame.groupby("group")["advantage"].mean().abs().max() < 1e-5


def write(output_dir: Path, columns: dict[str, list[Any]]) -> Path:
    path = output_dir / "completions" / "completions_00005.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table(columns), path)
    return path


def arguments(output_dir: Path, **config: Any) -> GRPOConfig:
    defaults = {"log_completions": True, "num_generations": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    return GRPOConfig(str(output_dir), **({"bf16": False, "gradient_checkpointing": False} | defaults | config))


@pytest.mark.parametrize(
    ("prompts", "reason"), [(["a", "b", "b", "a"], "not blocks of"), (["a", "a", "b"], "3 rows are not a multiple")]
)
def test_rows_that_are_not_groups_are_a_warning_and_no_column(tmp_path, prompts, reason):
    path = write(tmp_path, {"prompt": prompts})
    callback = AdvantageTableCallback(task_of=str.upper)
    with pytest.warns(UserWarning, match=reason):
        callback.on_step_begin(arguments(tmp_path), TrainerState(global_step=5), TrainerControl())
    assert pq.ParquetFile(path).read().to_pydict() == {"prompt": prompts, "task": [text.upper() for text in prompts]}


def test_a_column_that_is_there_is_left_alone(tmp_path):
    path = write(tmp_path, {"prompt": ["a", "a"], "group": [7, 7], "task": ["x", "y"]})
    before = path.read_bytes(), path.stat().st_mtime_ns
    callback = AdvantageTableCallback(task_of=str.upper)
    callback.on_train_end(arguments(tmp_path), TrainerState(global_step=5), TrainerControl())
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_missing_column_is_added_beside_the_one_that_is_there(tmp_path):
    path = write(tmp_path, {"prompt": ["a", "a"], "group": [7, 7]})
    callback = AdvantageTableCallback(task_of=str.upper)
    callback.on_train_end(arguments(tmp_path), TrainerState(global_step=5), TrainerControl())
    assert pq.read_schema(path).names == ["prompt", "group", "task"]
    assert pq.ParquetFile(path).read()["group"].to_pylist() == [7, 7]


def test_another_process_does_not_touch_the_table(tmp_path):
    path = write(tmp_path, {"prompt": ["a", "a"]})
    state = TrainerState(global_step=5, is_world_process_zero=False)
    AdvantageTableCallback().on_train_end(arguments(tmp_path), state, TrainerControl())
    assert pq.read_schema(path).names == ["prompt"]


def test_a_conversation_is_a_prompt(tmp_path):
    first, second = ([{"role": "user", "content": text}] for text in ("1+1", "2+2"))
    path = write(tmp_path, {"prompt": [first, first, second, second]})
    callback = AdvantageTableCallback(task_of=lambda messages: messages[-1]["content"])
    callback.on_train_end(arguments(tmp_path), TrainerState(global_step=5), TrainerControl())
    table = pq.ParquetFile(path).read().to_pydict()
    assert (table["group"], table["task"]) == ([0, 0, 1, 1], ["1+1", "1+1", "2+2", "2+2"])


def test_a_table_that_an_evaluation_wrote_gets_groups_unless_its_groups_have_another_size(tmp_path):
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1, "per_device_eval_batch_size": 8}
    for size in (4, 2):
        callback = AdvantageTableCallback()
        trainer = make_trainer(
            tmp_path / str(size),
            trainer_arguments={"callbacks": [callback], "eval_dataset": PROMPTS.select(range(4))},
            log_completions=True,
            num_completions_to_print=1,
            num_generations_eval=size,
            **evaluation,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        (table,) = tables(tmp_path / str(size)).values()
        assert table.get("group") == ([0] * 4 + [1] * 4 if size == 4 else None)
        assert any("num_generations_eval=2" in str(warning.message) for warning in caught) == (size == 2)


@pytest.mark.parametrize(
    ("settings", "grouped"),
    [
        # Three steps use one generation, so the table of step 3 still holds the evaluation of step 2.
        ({"num_iterations": 3, "eval_steps": 2}, {1: True, 2: False, 3: False, 4: False, 5: False, 6: False}),
        ({"num_iterations": 3, "eval_steps": 5}, {1: True, 2: True, 3: True, 4: True, 5: False, 6: False}),
        ({"num_iterations": 1, "eval_steps": 2}, {1: True, 2: False, 3: True, 4: False, 5: True, 6: False}),
        # The log of step 3 tells of the generation of step 1, from before the evaluation of step 2.
        ({"num_iterations": 4, "eval_steps": 2, "logging_steps": 3}, {2: False, 3: False, 4: False, 6: False}),
    ],
)
def test_tables_that_may_hold_rows_of_an_evaluation_get_no_groups(tmp_path, settings, grouped):
    trainer = make_trainer(
        tmp_path,
        trainer_arguments={"callbacks": [AdvantageTableCallback()], "eval_dataset": PROMPTS.select(range(2))},
        log_completions=True,
        num_completions_to_print=1,
        num_generations=2,
        num_generations_eval=4,
        eval_strategy="steps",
        max_steps=6,
        **settings,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    found = {int(name[12:17]): "group" in table for name, table in tables(tmp_path).items()}
    assert found == grouped
    refused = [str(warning.message) for warning in caught if "gets no column 'group'" in str(warning.message)]
    assert len(refused) == len(set(refused)) == list(grouped.values()).count(False)


def test_without_log_completions_it_says_so(tmp_path):
    with pytest.warns(UserWarning, match="log_completions=True"):
        AdvantageTableCallback().on_train_begin(
            arguments(tmp_path, log_completions=False), TrainerState(), TrainerControl()
        )


def test_nothing_unfinished_is_left(tmp_path):
    train_with_tables(tmp_path, AdvantageTableCallback(), reward_funcs=(brevity,), max_steps=2)
    assert {file.suffix for file in (tmp_path / "completions").iterdir()} == {".parquet"}
