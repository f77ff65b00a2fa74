"""Worked examples of every reward function, on text and on conversations."""

import doctest
import importlib
import time

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import rewards as trl_rewards

from grpo_plus import rewards
from grpo_plus.config.data import check_data
from grpo_plus.rewards import boxed_answer, tagged_answer, think_answer_format

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 altogether.\n#### 72"
MATH = r"The sum is $\frac{1}{2} + \frac{1}{6}$, that is $\boxed{\frac{2}{3}}$."
FORMED = "<think>6 * 3</think>\n<answer>18</answer>"
ALL = [getattr(rewards, name) for name in rewards.__all__]


def chat(content):
    return [{"role": "assistant", "content": content}]


def one(function, completion, solution, **keywords):
    """The reward of one completion, which is the same as text and as a conversation."""
    plain, talk = (
        function(completions=[form], solution=[solution], **keywords)[0] for form in (completion, chat(completion))
    )
    assert plain == talk
    return plain


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        ("So she sold 72.", GSM8K, 1),
        ("She sold 72 clips in 2 months.", GSM8K, 0),  # the last number is 2
        ("#### 72", GSM8K, 1),
        (r"\boxed{72.00}", 72, 1),
        ("<answer>72</answer>", 72.0, 1),
        ("no idea", GSM8K, 0),
        ("", GSM8K, 0),
        ("-72", GSM8K, 0),
        ("2/3", MATH, 1),
        ("1,000", "#### 1000", 1),
        ("<think>24 + 48 = 72</think> It is 70.", GSM8K, 0),
        ("<think>24 + 48 = 72", GSM8K, 0),  # never came to an answer
        ("24 + 48</think> 72", GSM8K, 1),  # the template has opened the tag
        ("72", "many", None),
        ("72", None, None),
        ("72", "#### ", None),
    ],
)
def test_the_last_number(completion, solution, reward):
    assert one(rewards.last_number, completion, solution) == reward


def test_a_tolerance_is_a_share_of_the_solution():
    # 101 is 1 % away from 100, 102 is 2 %
    assert rewards.last_number(["101", "102", "-101"], ["100"] * 3, tolerance=0.01) == [1, 0, 0]
    assert rewards.last_number(["0", "0.001"], ["0", "0"], tolerance=0.5) == [1, 0]
    with pytest.raises(ValueError, match=r"tolerance=2 of last_number is no share"):
        rewards.last_number(["1"], ["1"], tolerance=2)


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        (r"It is \boxed{72}.", GSM8K, 1),
        (r"\boxed{24}, no, \boxed{72}", GSM8K, 1),
        (r"\boxed{72}, no, \boxed{24}", GSM8K, 0),
        ("It is 72.", GSM8K, 0),
        (r"\boxed{\$72 \text{ clips}}", GSM8K, 1),
        (r"\boxed{\dfrac{2}{3}}", MATH, 1),
        (r"\boxed{4/6}", MATH, 1),
        (r"\boxed{2\sqrt{2}}", r"2\sqrt{2}", 1),
        (r"\boxed{\sqrt{2}}", "2", 0),
        (r"\boxed{\text{(b)}}", "B", 1),
        (r"\boxed{\frac{2}{3}", MATH, 0),  # never closed
        (r"\boxed{}", GSM8K, 0),
        (r"<think>\boxed{72}</think> 72", GSM8K, 0),
        (r"\boxed{72}", "", None),
        (r"\boxed{72}", None, None),
    ],
)
def test_the_boxed_answer(completion, solution, reward):
    assert one(rewards.boxed_answer, completion, solution) == reward


@pytest.mark.parametrize(
    ("completion", "solution", "reward"),
    [
        ("<think>6 * 3</think><answer> 18. </answer>", "18", 1),
        ("<answer>17</answer> or <answer>New  York</answer>", "new york", 1),
        ("<answer><answer>18</answer>", "18", 1),
        ("<answer>18", "18", 0),
        ("18", "18", 0),
    ],
)
def test_the_tagged_answer(completion, solution, reward):
    assert one(rewards.tagged_answer, completion, solution) == reward


@pytest.mark.parametrize(
    ("completion", "form", "tags"),
    [
        (FORMED, 1, 1),
        ("\n" + FORMED + "\n", 1, 1),
        ("<think></think><answer>18</answer>", 1, 1),
        ("<think>6 * 3</think><answer> </answer>", 0, 1),
        (FORMED + " That is all.", 0, 1),
        ("<answer>18</answer><think>6 * 3</think>", 0, 1),
        ("<think>" + FORMED, 0, 0.75),
        ("<think>6 * 3</think> 18", 0, 0.5),
        ("18", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_form_and_its_tags(completion, form, tags):
    assert one(rewards.think_answer_format, completion, None) == form
    assert one(rewards.think_answer_tags, completion, None) == tags


def test_a_template_may_have_opened_the_reasoning():
    without = FORMED.removeprefix("<think>")
    assert one(rewards.think_answer_format, without, None) == 0
    assert one(rewards.think_answer_format, without, None, opened=True) == 1
    assert one(rewards.think_answer_tags, without, None, opened=True) == 1


def test_a_length_is_worth_less_the_farther_it_is_from_the_target():
    ids = [[7] * tokens for tokens in (0, 50, 100, 150, 200, 500)]
    # 1 - |tokens - 100| / 100
    assert rewards.target_length(ids, target=100, width=100) == [0, 0.5, 1, 0.5, 0, 0]
    with pytest.raises(ValueError, match="a width above 0"):
        rewards.target_length(ids, width=0)


@pytest.mark.parametrize(
    ("completion", "script", "share"),
    [
        ("x = 18", "latin", 1),
        ("Grüße, ñandú, 𝐀, Ａ", "latin", 1),
        ("так как x", "latin", 1 / 7),
        ("所以 is", ["latin"], 0.5),
        ("ひらがなと漢字、カタカナー", ["hiragana", "katakana", "cjk"], 1),
        ("हिन्दी", "devanagari", 1),  # the vowel signs are marks, no letters
        ("18 + 2", "cyrillic", 1),
        ("", "latin", 1),
    ],
)
def test_the_share_of_a_script(completion, script, share):
    assert one(rewards.script_share, completion, None, script=script) == pytest.approx(share)


def test_an_unknown_script_is_refused():
    with pytest.raises(ValueError, match=r"script='english' of script_share is no script. Known: arabic, .* latin, "):
        rewards.script_share(["18"], script="english")


@pytest.mark.parametrize("function", ALL, ids=rewards.__all__)
@settings(max_examples=25, deadline=None)
@given(
    content=st.text(alphabet=r"18 ./$\boxed{}<answerthink>#-Я中٣", max_size=60)
    | st.sampled_from([FORMED, r"\boxed{{", "<answer>", "####"])
)
def test_every_reward_is_none_or_a_share(function, content):
    forms = [content, chat(content), chat(None), chat([{"type": "text", "text": content}]), [], None]
    asked = [{"role": "tool", "content": content}]
    given = {"completion_ids": [[7] * 3] * 7, "solution": ["18", content, None, 18, "B", "", "x"]}
    values = function(completions=[*forms, asked], prompts=[""] * 7, trainer_state=None, **given)
    assert len(values) == 7
    assert all(value is None or 0 <= value <= 1 for value in values)
    assert values == function(completions=[*forms, asked], **given)


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>" + "x" * 40_000 + "</answer> x",
        "<answer>" + "." * 40_000 + "x</answer>",
        r"\boxed{" + " ." * 20_000 + "x}",
    ],
)
def test_a_model_that_repeats_a_sign_for_ever_is_judged_at_once(text):
    began = time.process_time()
    rewards = [think_answer_format([text]), tagged_answer([text], ["1"]), boxed_answer([text], ["1"])]
    assert rewards == [[0.0], [0.0], [0.0]]
    assert time.process_time() - began < 1  # it took the square of the length: 3 s and more


def test_a_number_that_a_tool_has_said_is_no_answer():
    call = {"role": "assistant", "content": None}
    said = {"role": "tool", "content": "18"}
    assert rewards.last_number([[call, said], [call, said, *chat("So 18.")]], ["18", "18"]) == [0, 1]


@pytest.mark.parametrize("function", ALL, ids=rewards.__all__)
def test_every_function_takes_what_trl_passes(function):
    columns = {"prompt": ["6 * 3 ="], "solution": ["18"]}
    dataset = Dataset.from_dict(columns)
    check_data({"train_dataset": dataset, "reward_funcs": [function], "args": None})


def test_none_is_a_twin_of_trls():
    assert set(rewards.__all__) & set(dir(trl_rewards)) == set()


@pytest.mark.parametrize("name", ["answers", "completions", "form", "numbers", "scripts"])
def test_the_examples_in_the_docstrings_are_right(name):
    failed, attempted = doctest.testmod(importlib.import_module(f"grpo_plus.rewards.{name}"))
    assert attempted > 0
    assert failed == 0
