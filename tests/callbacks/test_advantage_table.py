import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig

from grpo_plus import AdvantageTableCallback
from tests.training import PROMPTS, brevity, make_trainer


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
