"""A data set's own columns become `prompt` and `solution`, as text or as messages."""

import pytest
from datasets import Dataset, IterableDataset

from grpo_plus.cli.columns import Columns
from grpo_plus.cli.own_task import own_task
from tests.cli.test_compare import OWN
from tests.cli.test_train import NAMES

GSM8K = Dataset.from_dict({"question": ["6 * 3?", "2 + 2?"], "answer": ["#### 18", "#### 4"]})
TALKS = Dataset.from_dict(
    {
        "messages": [[{"role": "system", "content": "Be long."}, {"role": "user", "content": "6 * 3?"}]],
        "prompt": ["old"],
    }
)


def first(rows, *, chat=True, **flags):
    return next(iter(Columns(**flags).shape(rows, chat=chat)))


def user(content):
    return {"role": "user", "content": content}


def test_no_flag_leaves_the_rows_alone():
    assert Columns().shape(GSM8K, chat=True) is GSM8K


def test_question_and_answer_become_prompt_and_solution_and_stay():
    row = first(GSM8K, prompt_column="question", answer_column="answer")
    assert row == {**GSM8K[0], "prompt": [user("6 * 3?")], "solution": "#### 18"}
    assert first(GSM8K, prompt_column="question", chat=False)["prompt"] == "6 * 3?"


def test_the_answer_alone_leaves_the_prompt_alone():
    rows = GSM8K.rename_column("question", "prompt")
    assert first(rows, answer_column="answer") == {**rows[0], "solution": "#### 18"}


def test_another_solution_gives_way_to_the_answer():
    rows = Dataset.from_dict({"prompt": ["1+1="], "solution": ["a long one"], "answer": [2]})
    assert first(rows, answer_column="answer")["solution"] in (2, "2")


def test_a_template_fills_columns_and_leaves_other_braces():
    template = "{question}\nWrite \\frac{1}{2} as \\boxed{}, not { so }."
    text = "6 * 3?\nWrite \\frac{1}{2} as \\boxed{}, not { so }."
    assert first(GSM8K, prompt_template=template, chat=False)["prompt"] == text
    assert first(GSM8K, prompt_template=template, answer_column="answer")["prompt"] == [user(text)]


def test_a_column_that_looks_like_a_field_is_not_filled_in_again():
    rows = Dataset.from_dict({"question": ["What is {answer}?"], "answer": ["18"]})
    assert (
        first(rows, prompt_template="{question}", answer_column="answer", chat=False)["prompt"] == "What is {answer}?"
    )


def test_a_system_prompt_goes_first_and_takes_the_place_of_another():
    system = {"role": "system", "content": "Be brief."}
    assert first(GSM8K, prompt_column="question", system_prompt="Be brief.")["prompt"] == [system, user("6 * 3?")]
    assert first(TALKS, prompt_column="messages", system_prompt="Be brief.")["prompt"] == [system, user("6 * 3?")]
    assert first(TALKS, prompt_column="messages")["prompt"] == TALKS[0]["messages"]
    assert first(TALKS, system_prompt="Be brief.")["prompt"] == [system, user("old")]


@pytest.mark.parametrize("known", [True, False], ids=["columns known", "columns unknown"])
def test_a_stream_is_shaped_as_it_comes(known):
    rows = GSM8K.to_iterable_dataset() if known else IterableDataset.from_generator(lambda: iter(GSM8K))
    assert first(rows, prompt_column="question", answer_column="answer")["prompt"] == [user("6 * 3?")]
    with pytest.raises(ValueError, match="Known: question, answer"):
        first(rows, prompt_column="qestion")


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (GSM8K, {"prompt_column": "qestion"}, "prompt_column='qestion' is no column of the dataset. Did you mean 'question'. Known: question, answer"),
        (GSM8K, {"prompt_template": "{question}", "answer_column": "solution"}, "answer_column='solution' is no column"),
        (GSM8K, {"prompt_template": "{qestion}"}, r"names {qestion}, .* Did you mean 'question'.* put a space inside: { qestion }"),
        (GSM8K, {"prompt_template": "Think."}, "does not show the question. Put {question} into it"),
        (GSM8K, {"prompt_template": "{answer}?", "prompt_column": "question"}, "does not show the question. Put {question}"),
        (GSM8K, {"prompt_template": "{question} {answer}", "answer_column": "answer"}, "shows the model its answer_column"),
        (GSM8K, {"prompt_column": "question", "system_prompt": "Be brief.", "chat": False}, "system_prompt needs a model with a chat template"),
        (GSM8K, {"system_prompt": "Be brief."}, "no column 'prompt'. Name another prompt_column. Known: question, answer."),
        (TALKS, {"prompt_template": "{messages}"}, "the column 'messages' holds a list"),
        (Dataset.from_dict({"question": ["1", None]}), {"prompt_column": "question"}, "nothing in its column 'question'"),
    ],
)  # fmt: skip
def test_what_cannot_be_shaped_says_what_to_write(rows, flags, message):
    with pytest.raises(ValueError, match=message):
        first(rows, **flags)


def test_a_comparison_takes_the_same_flags(workplace):
    (workplace / "data" / "train.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n' * 16)
    rest = [*OWN[: OWN.index("--num_held_out")], "--reward_funcs", "last_number", "--output_dir", "out"]
    with pytest.raises(ValueError, match="no column 'prompt'.* On the command line: --prompt_column question"):
        own_task(rest, 6).start()
    task = own_task([*rest, "--prompt_column", "question", "--answer_column", "answer"], 6)
    assert task.start().num_parameters() > 0
    assert task.facts["script"]["answer_column"] == "answer"


def test_a_missing_column_is_said_before_the_model_is_looked_for(workplace, capsys):
    from grpo_plus import cli

    flags = ["--prompt_column", "qestion", "--output_dir", "out", "--use_cpu", "--bf16", "False"]
    (workplace / "model" / "model.safetensors").unlink()
    assert cli.main(["train", *NAMES, *flags]) == 1
    assert "prompt_column='qestion' is no column of the dataset" in capsys.readouterr().err
