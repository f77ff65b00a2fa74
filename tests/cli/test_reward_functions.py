"""Reward functions by name, with keywords."""

import pytest
from trl.rewards import accuracy_reward

from grpo_plus import rewards
from grpo_plus.cli.reward_functions import MAKERS, REWARD_NAMES, check_keywords, named_rewards
from grpo_plus.config.data import check_needs
from grpo_plus.registry import UnknownNameError


def rewards_in_use(names, given):
    check_keywords(given, names)
    return named_rewards(names, given)


GIVEN = {"get_cosine_scaled_reward": {"max_len": 100}}


@pytest.mark.parametrize("name", REWARD_NAMES)
def test_every_name_is_a_function(name):
    (function,) = named_rewards([name], {name: GIVEN[name]} if name in GIVEN else {})
    assert callable(function)
    check_needs([function])


def test_trls_and_ours_and_the_users_are_found_in_order():
    functions = named_rewards(["last_number", "accuracy_reward", "grpo_plus.rewards.form.target_length"], {})
    assert functions == [rewards.last_number, accuracy_reward, rewards.target_length]


def test_keywords_reach_the_function():
    names = ["last_number", "get_soft_overlong_punishment", "grpo_plus.rewards.form.target_length"]
    given = {names[0]: {"tolerance": 0.5}, names[1]: {"max_completion_len": 100}, names[2]: {"target": 2, "width": 4}}
    given[names[1]]["soft_punish_cache"] = 20
    close, short, target = named_rewards(names, given)
    columns = {"prompts": ["?"], "completion_ids": [[7] * 90], "trainer_state": None, "log_extra": None}
    assert close(completions=["12"], solution=["10"], **columns) == [1]
    assert short(completions=["12"], **columns) == [-0.5]  # (100 - 20 - 90) / 20
    assert target(completions=["12"], **columns | {"completion_ids": [[7] * 3]}) == [0.75]


def test_unset_keywords_of_a_maker_are_those_of_trls_own_script():
    (soft,) = named_rewards(["get_soft_overlong_punishment"], {})
    # 1,280 - 256 = 1,024 tokens are free; 1,152 are half way to the limit
    assert soft(completion_ids=[[7] * 1024, [7] * 1152, [7] * 1281]) == [0, -0.5, -1]
    assert set(MAKERS) < set(REWARD_NAMES)


@pytest.mark.parametrize(
    ("names", "given", "error", "message"),
    [
        (["last_numbr"], {}, UnknownNameError, "Unknown reward function 'last_numbr'. Did you mean 'last_number'"),
        (["last_number"], {"boxed_answer": {}}, ValueError, "is about 'boxed_answer', which is not in use. In use: last_number"),
        (["last_number"], {"last_number": 3}, ValueError, """takes a table by function: '{"last_number": {"keyword": 1}}'"""),
        (["last_number"], {"last_number": {"tolerence": 1}}, ValueError, "'last_number' has no keyword 'tolerence'. Did you mean 'tolerance'"),
        (["boxed_answer"], {"boxed_answer": {"completions": 1}}, ValueError, "'boxed_answer' has no keyword 'completions'"),
        (["get_cosine_scaled_reward"], {}, ValueError, """needs max_len. Write --reward_kwargs '{"get_cosine_scaled_reward": {"max_len": 512}}'"""),
    ],
)  # fmt: skip
def test_a_wrong_name_or_keyword_says_what_to_write(names, given, error, message):
    with pytest.raises(error) as raised:
        rewards_in_use(names, given)
    assert message in str(raised.value)
