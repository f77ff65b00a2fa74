import math

import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, Rewards
from grpo_plus.advantages import ESTIMATORS, State, register
from grpo_plus.demo.tiny import tiny_tokenizer
from grpo_plus.losses import policy_loss
from tests.close import differing
from tests.training import PROMPTS, brevity, logs_of, make_trainer, newest, vowels, weights_of


def plus(output_dir, **arguments):
    return make_trainer(output_dir, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, **arguments)


@pytest.fixture
def registered():
    """Register estimators for one test."""
    with ESTIMATORS.temporarily():
        yield register


def completions_table(output_dir) -> pd.DataFrame:
    return pd.concat(map(pd.read_parquet, sorted((output_dir / "completions").glob("*.parquet"))))


@pytest.mark.parametrize("estimator", ["grpo_pop", *map(newest, ("rloo", "dr_grpo"))])
def test_the_completions_table_shows_the_estimators_values(tmp_path, estimator, capsys):
    trainer = plus(tmp_path, advantage_estimator=estimator, log_completions=True, reward_weights=[1.0, 0.5])
    trainer.train()
    table = completions_table(tmp_path)
    assert len(table) == 3 * 8
    rewards = torch.tensor((table["vowels"] + 0.5 * table["brevity"]).to_numpy()).view(-1, 4)
    centered = rewards - rewards.mean(-1, keepdim=True)
    spread = rewards.std(-1, keepdim=True, correction=0)
    expected = {
        "grpo_pop": torch.where(spread > 1e-6, centered / spread, 0.0),
        "rloo": centered * 4 / 3,
        "dr_grpo": centered,
    }[estimator]
    torch.testing.assert_close(torch.tensor(table["advantage"].to_numpy()).view(-1, 4), expected, rtol=0, atol=1e-6)


@pytest.mark.newest_trl
def test_the_loss_uses_the_estimators_values(tmp_path, registered):
    registered("five_times_centered")(lambda rewards: 5 * (rewards.total() - rewards.total().mean(-1, keepdim=True)))
    gradients = []
    for estimator in ("dr_grpo", "five_times_centered"):
        trainer = plus(tmp_path, advantage_estimator=estimator, max_steps=1, max_grad_norm=1e9)
        trainer.train()
        gradients.append(trainer.state.log_history[0]["grad_norm"])
    assert gradients[1] == pytest.approx(5 * gradients[0], rel=1e-4)


@pytest.mark.newest_trl
def test_an_estimator_sees_names_weights_and_lengths(tmp_path, registered):
    seen: list[Rewards] = []

    @registered("spy")
    def spy(rewards: Rewards) -> torch.Tensor:
        seen.append(rewards)
        return rewards.total() * 0

    trainer = plus(
        tmp_path,
        advantage_estimator="spy",
        max_steps=1,
        reward_weights=[1.0, 0.5],
        log_completions=True,
        reward_funcs=[counting, brevity],
        max_completion_length=64,
    )
    trainer.train()
    (rewards,) = seen
    assert rewards.names == ("counting", "brevity")
    assert rewards.weights.tolist() == [1.0, 0.5]
    assert rewards.values[..., 1].flatten().tolist() == pytest.approx(completions_table(tmp_path)["brevity"].tolist())
    # `counting` returns the number of tokens of each completion.
    assert rewards.lengths.tolist() == rewards.values[..., 0].tolist()
    assert len(set(rewards.lengths.flatten().tolist())) > 1


def counting(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


@pytest.mark.newest_trl
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_advantage_stops_before_any_weight_moves(tmp_path, registered, value):
    registered("broken")(lambda rewards: rewards.total() * 0 + value)
    trainer = plus(tmp_path, advantage_estimator="broken")
    start = weights_of(trainer)
    with pytest.raises(ValueError, match=f"'broken' returned {value} for completion 0 of group 0.*vowels: "):
        trainer.train()
    assert differing(weights_of(trainer), start) == []


@pytest.mark.newest_trl
def test_an_infinite_reward_stops_before_any_weight_moves(tmp_path):
    def endless(completions, **_):
        return [float("inf")] * len(completions)

    trainer = plus(tmp_path, advantage_estimator="rloo", reward_funcs=[vowels, endless])
    start = weights_of(trainer)
    with pytest.raises(ValueError, match="reward function 'endless' returned inf"):
        trainer.train()
    assert differing(weights_of(trainer), start) == []


@pytest.mark.newest_trl
def test_a_completion_that_nobody_judged_gets_zero_and_leaves_the_others_alone(tmp_path):
    def first_abstains(completions, **_):
        return [None if index % 4 == 0 else float(index) for index in range(len(completions))]

    trainer = plus(
        tmp_path, advantage_estimator="dr_grpo", reward_funcs=[first_abstains], log_completions=True, max_steps=1
    )
    trainer.train()
    assert completions_table(tmp_path)["advantage"].tolist() == [0, -1, 0, 1, 0, -1, 0, 1]


@pytest.mark.newest_trl
def test_an_incomplete_group_is_named(tmp_path):
    # Four prompts, four completions each, in evaluation batches of six: the group of the second prompt is cut.
    evaluated = {"eval_dataset": PROMPTS.select(range(4))}
    trainer = plus(tmp_path, advantage_estimator="rloo", trainer_arguments=evaluated)
    trainer.args.per_device_eval_batch_size = 6
    with pytest.raises(
        ValueError, match="reward table of vowels, brevity has 6 rows, which is not a multiple of the group size 4"
    ):
        trainer.evaluate()


@pytest.mark.newest_trl
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(4, 4), r"hook estimate_advantages returned \(4, 4\) for rewards of 2 groups of 4"),
        (torch.full((2, 4), torch.nan), "hook estimate_advantages returned nan for completion 0 of group 0"),
        (torch.full((2, 4), 1e39, dtype=torch.float64), r"hook estimate_advantages returned 1e\+39"),
        (torch.zeros(4, 2, 8), r"returned \(4, 2, 8\) for rewards of 2 groups of 4"),
        (torch.zeros(2, 4, 7), r"returned \(2, 4, 7\) .* \(2, 4, T\) with T of at least 8, the tokens of the longest"),
        (torch.full((2, 4, 8), torch.nan), "returned nan for token 0 of completion 0 of group 0"),
    ],
)
def test_the_answer_of_an_overridden_hook_is_checked(tmp_path, answer, message):
    class Overriding(GRPOPlusTrainer):
        def estimate_advantages(self, rewards):
            return answer

    trainer = make_trainer(tmp_path, trainer_class=Overriding)
    start = weights_of(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert differing(weights_of(trainer), start) == []


def tiny_reward_model():
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        "qwen3", vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=tokenizer.pad_token_id
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config), tokenizer


@pytest.mark.newest_trl
def test_a_reward_model_is_a_judge_too(tmp_path):
    model, tokenizer = tiny_reward_model()
    arguments = {"reward_processing_classes": [tokenizer, None]}
    trainer = plus(
        tmp_path,
        advantage_estimator="dr_grpo",
        reward_funcs=[model, vowels],
        trainer_arguments=arguments,
        log_completions=True,
        max_steps=1,
    )
    trainer.train()
    table = completions_table(tmp_path)
    total = torch.tensor((table.iloc[:, 3] + table["vowels"]).to_numpy()).view(-1, 4)
    expected = (total - total.mean(-1, keepdim=True)).flatten()
    torch.testing.assert_close(torch.tensor(table["advantage"].to_numpy()), expected, rtol=0, atol=1e-5)


def test_a_callback_and_a_streamed_dataset(tmp_path):
    steps = []

    class Counter(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            steps.append(state.global_step)

    trainer = plus(
        tmp_path,
        advantage_estimator="rloo",
        train_dataset=PROMPTS.to_iterable_dataset(),
        trainer_arguments={"callbacks": [Counter()]},
    )
    trainer.train()
    assert steps == [1, 2, 3]
    assert [entry for entry in trainer.state.log_history[:3] if "grad_norm" not in entry] == []


async def async_reward(completions, **_):
    return [float(len(text)) for text in completions]


def chat_reward(completions, **_):
    return vowels([completion[0]["content"] for completion in completions])


CHAT = Dataset.from_list([{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS])


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"reward_funcs": [async_reward, vowels]}, id="async"),
        pytest.param({"reward_funcs": [chat_reward], "train_dataset": CHAT}, id="conversational"),
        pytest.param({"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.05, "peft": True}, id="lora-cispo-kl"),
        newest({"advantage_kwargs": '{"ddof": 0}'}, id="keywords"),
    ],
)
def test_what_trl_accepts_still_trains(tmp_path, arguments):
    arguments = dict(arguments)
    if arguments.pop("peft", False):
        arguments["trainer_arguments"] = {"peft_config": LoraConfig(r=4, target_modules="all-linear")}
    trainer = plus(tmp_path, advantage_estimator="grpo", max_steps=2, **arguments)
    start = weights_of(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss for loss in losses if not math.isfinite(loss)] == []
    assert differing(weights_of(trainer), start)


@pytest.mark.newest_trl
@pytest.mark.parametrize("num_generations_eval", [1, 2])
def test_evaluation_groups_by_its_own_number_of_generations(tmp_path, num_generations_eval, registered):
    shapes = []

    @registered("spy")
    def spy(rewards: Rewards) -> torch.Tensor:
        shapes.append(tuple(rewards.values.shape))
        return rewards.total() * 0

    trainer = plus(
        tmp_path,
        advantage_estimator="spy",
        num_generations_eval=num_generations_eval,
        per_device_eval_batch_size=8,
        trainer_arguments={"eval_dataset": PROMPTS.select(range(8))},
    )
    trainer.evaluate()
    assert shapes == [(8 // num_generations_eval, num_generations_eval, 2)] * num_generations_eval


@pytest.mark.newest_trl
def test_the_completions_table_of_several_evaluation_batches_is_in_order(tmp_path):
    trainer = plus(
        tmp_path,
        advantage_estimator="dr_grpo",
        num_generations_eval=2,
        per_device_eval_batch_size=4,
        log_completions=True,
        reward_funcs=[vowels],
        trainer_arguments={"eval_dataset": PROMPTS.select(range(4))},
    )
    trainer.evaluate()
    table = completions_table(tmp_path)
    rewards = torch.tensor(table["vowels"].to_numpy()).view(4, 2)
    centered = rewards - rewards.mean(-1, keepdim=True)
    assert centered.any()
    torch.testing.assert_close(torch.tensor(table["advantage"].to_numpy()).view(4, 2), centered, rtol=0, atol=1e-6)


@pytest.mark.newest_trl
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    settings = {"advantage_estimator": "rloo", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = plus(tmp_path / "whole", **settings)
    whole.train()
    resumed = plus(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logs_of(resumed)[:4] == logs_of(whole)[:4]
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


TASKS = Dataset.from_list([{**row, "task": "even" if i % 2 else "odd"} for i, row in enumerate(PROMPTS)])


@pytest.mark.newest_trl
@pytest.mark.parametrize("estimator", ["ema_task", "popart", "spo"])
def test_a_stateful_estimator_resumes_to_the_same_numbers(tmp_path, estimator):
    settings = {
        "advantage_estimator": estimator,
        "task_column": "task",
        "train_dataset": TASKS,
        "reward_funcs": [has_vowel],
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = plus(tmp_path / "whole", **settings)
    whole.train()
    assert whole.estimator_state
    resumed = plus(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.estimator_state == whole.estimator_state
    assert logs_of(resumed)[:4] == logs_of(whole)[:4]
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


def has_vowel(completions, **_):
    return [float(any(letter in "aeiou" for letter in text)) for text in completions]


@pytest.mark.newest_trl
@pytest.mark.parametrize(
    ("saved", "found"), [("rloo", "nothing that an estimator remembers"), ("popart", "what 'popart' remembers")]
)
def test_a_checkpoint_without_the_estimators_state_is_warned_about(tmp_path, saved, found):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "reward_funcs": [has_vowel]}
    plus(tmp_path / "saved", advantage_estimator=saved, **settings).train()
    resumed = plus(tmp_path / "resumed", advantage_estimator="ema_task", **settings)
    with pytest.warns(UserWarning, match=f"holds {found}: advantage_estimator='ema_task' starts without memory"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-2"))
    fresh = plus(tmp_path / "fresh", advantage_estimator="ema_task", **settings)
    fresh.load_running_state({"estimator": "ema_task", "estimator_state": {"": [0.5, 0.5]}})
    assert fresh.estimator_state == {"": [0.5, 0.5]}


@pytest.mark.newest_trl
@pytest.mark.parametrize("config_class", [GRPOConfig, GRPOPlusConfig])
def test_what_an_overridden_hook_remembers_survives_a_checkpoint(tmp_path, config_class):
    class Remembering(GRPOPlusTrainer):
        def estimate_advantages(self, rewards):
            self.estimator_state["batches"] = self.estimator_state.get("batches", 0) + 1

    settings = {"trainer_class": Remembering, "config_class": config_class, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path / "saved", **settings).train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "saved" / "checkpoint-2"))
    assert resumed.estimator_state == {"batches": 3}


@pytest.mark.newest_trl
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (3, 1.0, r"'counting' has the key 3, which a checkpoint would turn into a string. Write str\(3\)"),
        ("mean", torch.zeros(2), r"'counting'\['mean'\] is a Tensor, which a checkpoint cannot hold"),
        ("per_task", {"a": [0.5, {1: 2}]}, r"'counting'\['per_task'\]\['a'\]\[1\] has the key 1"),
    ],
)
def test_a_state_that_no_checkpoint_can_hold_is_refused_in_the_first_step(tmp_path, registered, key, value, message):
    @registered("counting", stateful=True)
    def counting_state(rewards: Rewards, state: State) -> torch.Tensor:
        state[key] = value
        return rewards.total() * 0

    trainer = plus(tmp_path, advantage_estimator="counting")
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.newest_trl
def test_images_in_a_prompt_are_told_apart_by_their_content(tmp_path):
    image = pytest.importorskip("PIL.Image")
    trainer = plus(tmp_path, advantage_estimator="spo", reward_funcs=[has_vowel])

    def key(colour: int, size: tuple[int, int] = (2, 3)) -> str:
        part = {"type": "image", "image": image.new("L", size, colour)}
        return trainer.prompt_key([{"role": "user", "content": [part]}])

    assert key(1) == key(1)
    assert len({key(1), key(2), key(1, (3, 2))}) == 3
    with pytest.raises(ValueError, match="A prompt holds a object, which cannot be recognized"):
        trainer.prompt_key([{"role": "user", "content": object()}])


@pytest.mark.newest_trl
def test_evaluation_leaves_no_trace_in_the_state(tmp_path):
    evaluated = {"eval_dataset": TASKS.select(range(4))}
    trainer = plus(
        tmp_path, advantage_estimator="ema_task", task_column="task", train_dataset=TASKS, trainer_arguments=evaluated
    )
    trainer.train()
    before = dict(trainer.estimator_state)
    assert set(before) == {"even", "odd"}
    trainer.evaluate()
    assert trainer.estimator_state == before


@pytest.mark.newest_trl
def test_a_task_column_that_is_not_there_is_named(tmp_path):
    settings = {"advantage_estimator": "ema_task", "task_column": "tusk"}
    message = "task_column='tusk' is no column of the dataset. Did you mean 'task'.*Known: prompt, answer, task"
    with pytest.raises(ValueError, match=message):
        plus(tmp_path, train_dataset=TASKS, **settings)
    tusks = TASKS.rename_column("task", "tusk")
    with pytest.raises(ValueError, match=message):
        plus(tmp_path, train_dataset=tusks, trainer_arguments={"eval_dataset": {"all": TASKS}}, **settings)
    # A stream that does not know its columns shows them in the first batch.
    stream = IterableDataset.from_generator(lambda: iter(TASKS))
    with pytest.raises(ValueError, match="task_column='tusk' is no column of the dataset. Known: prompt, answer, task"):
        plus(tmp_path, train_dataset=stream, **settings).train()


@pytest.mark.newest_trl
def test_a_task_that_is_absent_from_a_batch_has_a_share_of_zero_there(tmp_path):
    # Two prompts per batch: the third task occurs in one of the logs only, and in half of its batches at most.
    rare = Dataset.from_list([{**row, "task": "rare" if i == 0 else "common"} for i, row in enumerate(PROMPTS)])
    settings = {"task_column": "task", "train_dataset": rare, "advantage_estimator": "dr_grpo", "max_steps": 10}
    trainer = plus(tmp_path, logging_steps=5, log_completions=True, **settings)
    trainer.train()
    shares = [
        entry["advantages/task_share/rare"]
        for entry in trainer.state.log_history
        if "advantages/task_share/rare" in entry
    ]
    for entry in trainer.state.log_history[:2]:
        logged = [value for name, value in entry.items() if name.startswith("advantages/task_share/")]
        assert sum(logged) == pytest.approx(1.0)
    assert len(shares) == 1
    assert 0 < shares[0] <= 1 / 5


@pytest.mark.newest_trl
def test_the_completions_table_shows_the_tasks(tmp_path):
    trainer = plus(tmp_path, task_column="task", train_dataset=TASKS, log_completions=True)
    trainer.train()
    table = completions_table(tmp_path)
    task_of = {row["prompt"]: row["task"] for row in TASKS}
    assert table["task"].tolist() == [task_of[prompt] for prompt in table["prompt"]]
    assert set(table["task"]) == {"even", "odd"}


def twice(name: str):
    def reward(completions, **_):
        return vowels(completions)

    reward.__name__ = name
    return reward


@pytest.mark.newest_trl
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"advantage_modifiers": {"filter_zero_std": {"by": "vowel"}}},
            "advantage_modifiers=.*no reward 'vowel'. Did you mean 'vowels'",
        ),
        (
            {"advantage_estimator": "sa_mrpo", "advantage_kwargs": {"bounds": {"brevety": [0, 1]}}},
            "advantage_kwargs=.*no reward 'brevety'. Did you mean 'brevity'",
        ),
        ({"advantage_estimator": "process"}, "'vowels', 'brevity' would not all have an effect"),
        ({"reward_funcs": [twice("same"), twice("same")]}, "Two reward functions are called 'same'"),
    ],
)
def test_what_does_not_fit_the_reward_functions_is_refused_at_construction(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        plus(tmp_path, **({"advantage_estimator": "dr_grpo"} | settings))


@pytest.mark.newest_trl
def test_functions_that_are_only_watched_fit_process_rewards(tmp_path):
    plus(tmp_path, advantage_estimator="process", reward_weights=[1.0, 0.0])


@pytest.mark.newest_trl
def test_two_functions_of_one_name_are_left_to_trl_where_trl_estimates(tmp_path):
    plus(tmp_path, reward_funcs=[twice("same"), twice("same")], max_steps=1).train()


@pytest.mark.newest_trl
@pytest.mark.parametrize(
    ("loss_type", "message"),
    [
        ("gmpo", "loss_type='gmpo' is none of TRL's.*Write args=GRPOPlusConfig"),
        ("dappo", "Unknown loss_type 'dappo'. Did you mean 'dapo'"),
    ],
)
def test_a_loss_that_a_plain_config_cannot_describe_is_refused_at_construction(tmp_path, loss_type, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, loss_type=loss_type)


@pytest.mark.newest_trl
def test_an_overridden_loss_needs_no_config_of_ours(tmp_path):
    class Own(GRPOPlusTrainer):
        def policy_loss(self, inputs, *, num_items, accumulation_steps):
            return policy_loss("reinforce", inputs, num_items=num_items)

    trainer = make_trainer(tmp_path, trainer_class=Own, loss_type="mine", max_steps=1)
    trainer.train()
    assert "grad_norm" in trainer.state.log_history[0]


@pytest.mark.newest_trl
def test_what_the_advantages_are_like_is_logged(tmp_path):
    trainer = plus(tmp_path, task_column="task", train_dataset=TASKS, reward_funcs=[vowels, has_vowel])
    trainer.train()
    entry = trainer.state.log_history[0]
    ours = {name for name in entry if name.startswith("advantages/")}
    assert ours >= {f"advantages/{name}" for name in ("frac_zero", "conflict", "effective_samples", "max_abs")}
    assert entry["advantages/reward_share/vowels"] + entry["advantages/reward_share/has_vowel"] == pytest.approx(1.0)
    tasks = [entry[name] for name in ours if name.startswith("advantages/task_share/")]
    assert sum(tasks) == pytest.approx(1.0)


def with_kl(tmp_path, **settings):
    lora = LoraConfig(r=4, target_modules="all-linear")
    return plus(tmp_path, num_iterations=2, beta=0.5, trainer_arguments={"peft_config": lora}, **settings)


@pytest.mark.newest_trl
@pytest.mark.parametrize(("loss_type", "accumulation"), [("grpo", 1), ("gmpo", 1), ("dapo", 2)])
def test_beta_moves_once_a_step_towards_the_kl_that_is_wanted(tmp_path, loss_type, accumulation):
    settings = {"loss_type": loss_type, "gradient_accumulation_steps": accumulation}
    trainer = with_kl(tmp_path, kl_target=1e-9, kl_horizon=100, **settings)
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-9)
    assert kls[1] > 1e-8
    # The first step measures no KL and lowers beta by its completions' worth, the others raise it.
    change = 0.2 * 8 * accumulation / 100
    factors = [1 - change if kl < 1e-9 else 1 + change for kl in kls]
    assert trainer.beta == pytest.approx(0.5 * torch.tensor(factors, dtype=torch.float64).prod().item())


@pytest.mark.newest_trl
def test_an_adapted_beta_survives_a_checkpoint(tmp_path):
    settings = {"kl_target": 1e-9, "kl_horizon": 100, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = with_kl(tmp_path / "whole", **settings)
    whole.train()
    assert whole.beta != 0.5
    resumed = with_kl(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.beta == whole.beta


@pytest.mark.newest_trl
def test_without_a_target_a_checkpoint_does_not_set_beta(tmp_path):
    trainer = with_kl(tmp_path)
    trainer.load_running_state({"beta": 0.123})
    assert trainer.beta == 0.5


@pytest.mark.newest_trl
def test_without_a_target_beta_stays(tmp_path):
    trainer = with_kl(tmp_path)
    trainer.train()
    assert trainer.beta == 0.5


def test_the_model_card_names_the_package(tmp_path):
    trainer = plus(tmp_path)
    trainer.create_model_card(model_name="tiny")
    assert "- grpo_plus" in (tmp_path / "README.md").read_text()


@pytest.mark.newest_trl
def test_a_plain_config_keeps_trls_advantages(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=GRPOPlusTrainer, config_class=GRPOConfig, reward_funcs=[brevity])
    assert trainer.estimate_advantages(None) is None


@pytest.mark.newest_trl
def test_modifiers_apply_to_the_estimators_values(tmp_path):
    trainer = plus(
        tmp_path,
        advantage_estimator="dr_grpo",
        advantage_modifiers='{"clip": {"max": 0.25}}',
        log_completions=True,
        reward_funcs=[vowels],
    )
    trainer.train()
    table = completions_table(tmp_path)
    rewards = torch.tensor(table["vowels"].to_numpy()).view(-1, 4)
    centered = (rewards - rewards.mean(-1, keepdim=True)).flatten()
    assert centered.abs().max() > 0.25
    clipped = [entry["advantages/frac_clipped"] for entry in trainer.state.log_history[:3]]
    assert sum(clipped) / 3 == pytest.approx((centered.abs() >= 0.25).double().mean().item())
    torch.testing.assert_close(
        torch.tensor(table["advantage"].to_numpy()), centered.clamp(-0.25, 0.25), rtol=0, atol=1e-6
    )
