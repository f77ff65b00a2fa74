"""Columns and reward functions are compared before a model is loaded."""

import functools

import pytest
from datasets import Dataset, IterableDataset
from trl import GRPOConfig
from trl.rewards import accuracy_reward, get_cosine_scaled_reward, think_format_reward

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.config import data
from grpo_plus.config.data import check_data

GSM8K = Dataset.from_dict({"question": ["1+1=", "2+2="], "answer": ["2", "4"]})
TALK = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1+1="}]], "answer": ["2"]})


def right(completions, answer, *, scale=1.0, **_):
    return [scale] * len(completions)


def check(dataset, *functions, **given):
    check_data({"train_dataset": dataset, "reward_funcs": list(functions), "args": None} | given)


@pytest.mark.parametrize("config", [GRPOConfig, GRPOPlusConfig])
def test_a_trainer_says_so_before_it_looks_for_the_model(tmp_path, config):
    with pytest.raises(ValueError, match=r"no column 'prompt', .* Its columns: question, answer\. .*rename_column\('question', 'prompt'\)"):  # fmt: skip
        GRPOPlusTrainer(
            model=str(tmp_path / "no model"), reward_funcs=right, args=config(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=GSM8K,
        )  # fmt: skip


def test_a_column_that_a_reward_function_takes_is_missing():
    check(GSM8K.rename_column("question", "prompt"), right)
    with pytest.raises(ValueError, match=r"no column 'solution', which the reward function 'accuracy_reward' takes\. Its columns: prompt, answer\. .*rename_column\('answer', 'solution'\)"):  # fmt: skip
        check(TALK, accuracy_reward)
    with pytest.raises(ValueError, match=r"eval_dataset has no column 'answer', .*rename_column\(OLD_NAME, 'answer'\)"):
        check(TALK, right, eval_dataset={"one": TALK, "two": TALK.remove_columns("answer")})


WORLDS = {"sea": dict, "land": dict}


def test_prompts_may_come_from_an_environment():
    levels = Dataset.from_dict({"level": [1]})
    check(levels, environment_factory=dict)
    with pytest.raises(ValueError, match="no column 'prompt'"):
        check(levels)


@pytest.mark.parametrize(
    ("columns", "unused", "message"),
    [
        (
            {"level": [1]},
            False,
            r"no column 'environment', .* environment_factory: 'sea', 'land'\. Its columns: level\.",
        ),
        ({"environment": ["sea", "air"]}, False, r"rows with environment='air', .* It knows 'sea', 'land'\."),
        ({"environment": ["sea"]}, True, "remove_unused_columns=True drops the column 'environment'"),
    ],
)
def test_rows_of_several_environments_name_one_each(tmp_path, columns, unused, message):
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, remove_unused_columns=unused)
    check(Dataset.from_dict({"environment": ["land", "sea"]}), environment_factory=WORLDS)
    with pytest.raises(ValueError, match=message):
        check(Dataset.from_dict(columns), environment_factory=WORLDS, args=config)


class Judge:
    def __call__(self, completions, truth, **_):
        return [1.0] * len(completions)


def named(completions, completion_ids, prompts, trainer_state, log_extra, log_metric, environments, **kwargs):
    return [kwargs.get("anything", 1.0)] * len(completions)


async def later(completions, truth):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    "function", [Judge(), functools.partial(right, scale=2.0), later], ids=["object", "partial", "async"]
)
def test_every_kind_of_function_is_asked(function):
    with pytest.raises(ValueError, match="no column"):
        check(TALK.remove_columns("answer"), function)


@pytest.mark.parametrize(
    "function", [lambda completions: [1.0], lambda completions, prompts, answer: [1.0]], ids=["one", "three"]
)
def test_a_function_without_kwargs_has_no_place_for_what_trl_passes(function):
    with pytest.raises(ValueError, match=r"has no place for .*log_metric, which TRL passes .* Add \*\*kwargs"):
        check(TALK, function)


def test_what_trl_passes_by_itself_is_no_column():
    check(TALK, named, max, lambda completions, **_: [1.0])


def test_what_cannot_be_known_before_is_not_refused():
    check(IterableDataset.from_generator(lambda: iter([{"x": 1}])), right)
    check(TALK.remove_columns("answer"), right, rollout_func=lambda prompts, trainer: {})
    check(TALK, "reward-model")
    made = Dataset.from_dict({"n": [1, 2]})
    made.set_transform(lambda rows: {"prompt": [f"{n}=" for n in rows["n"]], "answer": ["1" for _ in rows["n"]]})
    check(made, right)


def test_columns_that_trl_would_drop_are_named():
    args = type("Args", (), {"remove_unused_columns": True})
    with pytest.raises(ValueError, match="remove_unused_columns=True drops the column 'answer'"):
        check(TALK, right, args=args)


def test_the_command_lines_way_is_said():
    with pytest.raises(ValueError, match=r"On the command line: --answer_column OLD_NAME\."):
        check(TALK.remove_columns("answer"), accuracy_reward)
    with pytest.raises(ValueError, match=r"On the command line: save the result, .*--dataset_name data\."):
        check(TALK.remove_columns("answer"), right)


def test_a_function_with_bound_keywords_is_named_as_trl_logs_it():
    with pytest.raises(ValueError, match="which the reward function 'right' takes"):
        check(TALK.remove_columns("answer"), functools.partial(right, scale=2.0))
    with pytest.raises(ValueError, match="'accuracy_reward' reads messages"):
        check(Dataset.from_dict({"prompt": ["1+1="]}), functools.partial(accuracy_reward, solution=["2"]))


@pytest.mark.parametrize("function", [accuracy_reward, think_format_reward, get_cosine_scaled_reward(max_len=8)])
def test_text_where_a_reward_of_trls_reads_messages(function):
    plain = Dataset.from_dict({"prompt": ["1+1="], "solution": ["2"]})
    with pytest.raises(
        ValueError, match=f"{function.__name__!r} reads messages, but the prompts of train_dataset are plain text"
    ):
        check(plain, function)


def test_a_package_that_a_reward_needs_is_asked_for_first(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="'accuracy_reward' needs math-verify.* pip install math-verify"):
        check(GSM8K, accuracy_reward)


@pytest.mark.parametrize("config", [GRPOConfig, GRPOPlusConfig])
def test_ligers_kernels_without_a_gpu_are_refused(tmp_path, config, monkeypatch):
    monkeypatch.setattr("grpo_plus.config.speed.why_not_on", lambda *_: "Triton is not installed")

    def build():
        args = config(str(tmp_path), use_cpu=True, bf16=False, use_liger_kernel=True)
        GRPOPlusTrainer(model="none", reward_funcs=right, args=args, train_dataset=TALK)

    with pytest.raises(ValueError, match="use_liger_kernel=True, but the run is on the CPU .*Triton is not installed"):
        build()
