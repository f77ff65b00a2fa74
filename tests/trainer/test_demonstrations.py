"""Completions of the dataset in their groups: what they train is what their formula says, and nothing else changes."""

import math
from typing import Any

import pytest
import torch
from datasets import Dataset

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.losses.demonstrations import chord
from grpo_plus.trainer.batches.given import given_of, listed
from grpo_plus.trainer.saving.position import settings_of, why_another_batch
from tests.close import assert_close, differing
from tests.engine import install_engine
from tests.training import make_trainer, vowels, weights_of

WRITTEN = "aeio u"
LOGGED = {"completion_ids": [70, 74, 78, 84, 2], "logprobs": [-4.5, -4.6, -4.4, -9.0, -4.5]}
# The first group has no completion of the dataset.
DATA = Dataset.from_list([{"prompt": "2+2=", "given": None}, {"prompt": "abc=", "given": WRITTEN}])
OWN: dict[str, Any] = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}


def demonstrated(folder, data=DATA, **config):
    return make_trainer(
        folder, train_dataset=data, reward_funcs=[vowels], **OWN, **{"demonstration_column": "given"} | config
    )


def batch_of(trainer, data=DATA) -> dict[str, Any]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([row for row in data for _ in range(4)])


def gradient_of(model, loss) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def rows_of(trainer, batch) -> tuple[list[torch.Tensor], list[float]]:
    """Log-probabilities of each completion's tokens, of one row at a time without padding, and the rewards."""
    logps, rewards = [], []
    for prompt, prompt_mask, ids, mask in zip(
        *(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
    ):
        row, own = torch.cat([prompt[prompt_mask.bool()], ids[mask.bool()]]), ids[mask.bool()]
        logits = trainer.model(row.unsqueeze(0)).logits[0, -len(own) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, own.unsqueeze(1)).squeeze(1))
        rewards += vowels([trainer.processing_class.decode(own, skip_special_tokens=True)])
    return logps, rewards


def advantages(rewards: list[float]) -> list[float]:
    group = torch.tensor(rewards)
    return ((group - group.mean()) / (group.std() + 1e-4)).tolist()


def by_hand(case: str, logps: list[torch.Tensor], old: list[torch.Tensor], rewards: list[float]) -> torch.Tensor:
    """The loss of two groups of four, of which the last completion is given, over all tokens of the batch."""
    *drawn, given = logps
    drawn = [(new - before.detach()).exp() for new, before in zip(drawn, old, strict=False)]  # ratios within the clip
    tokens = sum(map(len, logps))
    if case in ("chord", "chord by row"):  # each part is a mean of its own; the demonstration is no part of its group
        own = [*advantages(rewards[:4]), *advantages(rewards[4:7])]
        if case == "chord":
            grpo = -sum(a * ratio.sum() for a, ratio in zip(own, drawn, strict=True)) / sum(map(len, drawn))
        else:
            grpo = -sum(a * ratio.mean() for a, ratio in zip(own, drawn, strict=True)) / 7
        p = given.detach().exp()
        return 0.7 * grpo + 0.3 * -(p * (1 - p) * given).mean()
    own = [*advantages(rewards[:4]), *advantages(rewards[4:])]
    others = -sum(a * ratio.sum() for a, ratio in zip(own[:-1], drawn, strict=True))
    last = {
        "imitation": lambda: -(own[-1] * given).sum(),
        "luffy": lambda: -(own[-1] * given.exp() / (given.exp() + 0.2)).sum(),
        "logged": lambda: -torch.min(*_surrogates(given, own[-1])).sum(),
    }[case.partition(",")[0]]()
    return (0.7 if case == "logged, chord" else 1.0) * (others + last) / tokens


def _surrogates(logps: torch.Tensor, advantage: float) -> tuple[torch.Tensor, torch.Tensor]:
    ratio = (logps - torch.tensor(LOGGED["logprobs"])).exp()
    return ratio * advantage, ratio.clamp(0.8, 1.2) * advantage


LOSSES = {
    "imitation": None,
    "luffy": {"luffy": {"gamma": 0.2}},
    "chord": {"chord": {"mu": 0.3}},
    "chord by row": {"chord": {"mu": 0.3}},
    "logged": None,
    "logged, chord": {"chord": {"mu": 0.3}},
}


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("imitation", {"num_iterations": 2}),
        ("luffy", {"packing": "none"}),
        ("luffy", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("luffy", {"loss_type": "dual_clip"}),
        ("chord", {}),
        ("chord by row", {"loss_type": "grpo"}),
        ("logged", {}),
        ("logged, chord", {}),
    ],
)
def test_the_gradient_is_the_formulas(tmp_path, case, config):
    data = DATA.map(lambda row: {"given": row["given"] and LOGGED}) if case.startswith("logged") else DATA
    trainer = demonstrated(tmp_path, data, demonstration_loss=LOSSES[case], **config)
    batch = batch_of(trainer, data)
    old, rewards = rows_of(trainer, batch)
    assert rewards[-1] > 0
    assert batch["advantages"][-1] != 0
    if "num_iterations" in config:  # an update has moved the policy
        with torch.no_grad():
            trainer.model.lm_head.weight *= 1.05
    logps, _ = rows_of(trainer, batch)
    expected = gradient_of(trainer.model, by_hand(case, logps, old, rewards))
    gradient = gradient_of(trainer.model, trainer._compute_loss(trainer.model, batch))
    assert_close("gradient", gradient, expected, rtol=1e-5)


def test_the_policy_draws_only_what_the_dataset_does_not_give(tmp_path):
    judged, drawn = [], []

    def judge(completions, given, **_):
        judged.append(completions)
        return vowels(completions)

    trainer = make_trainer(
        tmp_path,
        train_dataset=DATA,
        reward_funcs=[judge],
        trainer_arguments={"eval_dataset": DATA},
        **OWN,
        demonstration_column="given",
        demonstration_loss="chord",
        num_iterations=2,
        max_steps=2,
        per_device_eval_batch_size=8,
    )
    generate = trainer.model.generate
    trainer.model.generate = lambda *a, **k: drawn.append(len(k["input_ids"])) or generate(*a, **k)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    groups = [judged[0][:4], judged[0][4:]]
    (group,) = (group for group in groups if group[-1] == WRITTEN)
    assert WRITTEN not in group[:-1]
    assert drawn == [7]
    assert first["demonstrations/share"] == pytest.approx(1 / 8)
    assert first["demonstrations/reward"] == pytest.approx(0.7 * 5)
    assert first["reward"] == pytest.approx(first["demonstrations/drawn_reward"])  # TRL's mean leaves out the unjudged
    assert first["demonstrations/mu"] == 0.1
    assert second["demonstrations/nll"] < first["demonstrations/nll"]
    shown = trainer._logs["extra"]["demonstration"]
    assert [completion == WRITTEN for completion in trainer._logs["completion"]] == list(shown)
    trainer.evaluate()
    assert drawn == [7, 8]
    assert WRITTEN not in judged[-1]


def test_a_column_without_a_completion_changes_nothing(tmp_path):
    data = Dataset.from_list([{"prompt": f"{n}+{n}=", "given": None if n % 2 else []} for n in range(4)])
    weights = []
    for chosen in ({"demonstration_loss": "chord"}, {"demonstration_column": None}):
        trainer = demonstrated(tmp_path / str(len(weights)), data, **chosen)
        trainer.train()  # before the other trainer is made, which seeds the generator anew
        weights.append(weights_of(trainer))
    assert differing(*weights) == []


def test_a_skipped_completion_with_log_probabilities_makes_no_infinite_ratio(tmp_path):
    logged = LOGGED | {"logprobs": [-200.0] * 5}
    data = Dataset.from_list([{"prompt": "2+2=", "given": logged}, {"prompt": "abc=", "given": None}])

    def dead(completions, prompts, **_):
        return [
            0.0 if prompt == "2+2=" else reward for prompt, reward in zip(prompts, vowels(completions), strict=True)
        ]

    trainer = make_trainer(tmp_path, train_dataset=data, reward_funcs=[dead], **OWN, demonstration_column="given")
    loss = trainer._compute_loss(trainer.model, batch_of(trainer, data))
    assert loss.isfinite()
    assert gradient_of(trainer.model, loss).isfinite().all()


def test_the_log_counts_no_demonstration_that_was_skipped(tmp_path):
    data = Dataset.from_list([{"prompt": prompt, "given": WRITTEN} for prompt in ("2+2=", "abc=")])

    def dead(completions, prompts, **_):
        return [vowels([one])[0] * (prompt != "2+2=") for one, prompt in zip(completions, prompts, strict=True)]

    trainer = make_trainer(tmp_path, train_dataset=data, reward_funcs=[dead], **OWN, demonstration_column="given")
    batch = batch_of(trainer, data)
    logps, _ = rows_of(trainer, batch)
    trainer._compute_loss(trainer.model, batch)
    trainer._step_figures.log()
    assert trainer._metrics["train"]["demonstrations/nll"] == pytest.approx([-logps[-1].mean().item()], rel=1e-5)


def test_a_completion_that_vllm_did_not_draw_has_a_ratio_of_1(tmp_path, monkeypatch):
    install_engine(monkeypatch)
    trainer = demonstrated(tmp_path, use_vllm=True, skip_old_policy_pass=False)
    engine, asked = trainer.vllm_generation.llm, []
    monkeypatch.setattr(
        engine,
        "generate",
        lambda prompts, **k: asked.append(len(prompts)) or type(engine).generate(engine, prompts, **k),
    )
    batch = batch_of(trainer)
    assert asked == [8]  # TRL sends a server every fourth prompt
    ratio = batch["importance_sampling_ratio"]
    assert (ratio[-1] == 1).all()
    assert (ratio[:-1] != 1).any(1).all()
    assert trainer.processing_class.decode(batch["completion_ids"][-1], skip_special_tokens=True) == WRITTEN


def test_a_longer_completion_than_the_policy_can_write_is_left_out(tmp_path):
    data = Dataset.from_list([{"prompt": "a=", "given": "x" * 7}, {"prompt": "b=", "given": "x" * 8}])
    trainer = demonstrated(tmp_path, data)  # 8 tokens, of which one is the end
    with pytest.warns(UserWarning, match="holds a completion of 9 tokens.*'b='"):
        batch = batch_of(trainer, data)
    assert batch["demonstrated"].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    drawn = ~trainer._demonstrations.of_the_policy(trainer.rewards).values.isnan()  # for a sampler of prompts
    assert drawn.flatten().tolist() == [True, True, True, False, True, True, True, True]


def test_a_sampler_of_prompts_counts_no_demonstration(tmp_path):
    def right(completions, **_):
        return [float(completion == WRITTEN) for completion in completions]

    own = {"demonstration_column": "given", "prompt_sampler": {"pass_rate": {}}, "max_steps": 1}
    trainer = make_trainer(tmp_path, train_dataset=DATA, reward_funcs=[right], **OWN, **own)
    trainer.train()
    counts = trainer.prompt_sampler.state()
    assert dict(zip(counts["rows"], counts["judged"], strict=True)) == {0: 4, 1: 3}
    assert counts["passed"] == [0, 0]


def test_completions_become_the_tokens_that_the_policy_would_write(tmp_path):
    trainer = demonstrated(tmp_path)
    decode, end = trainer.processing_class.decode, trainer.processing_class.eos_token_id
    chat = [{"role": "user", "content": "2+2="}]
    reply = [{"role": "assistant", "content": "4"}]
    for prompt, value in (("2+2=", "4"), (chat, "4"), (chat, reply), ("2+2=", "4<eos>5")):
        assert decode(given_of(trainer, prompt, value).completion_ids) == "4<eos>"
    assert given_of(trainer, "2+2=", {"completion_ids": [9, end, 9], "logprobs": None}).completion_ids == [9, end, 9]
    for value, count in ((None, 0), ([], 0), ("4", 1), (["4", "5"], 2), (reply, 1), ([reply, reply], 2), (LOGGED, 1)):
        assert len(listed(value)) == count


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({"completion_ids": []}, "without a token"),
        ({"completion_ids": [5], "logprobs": [-1.0, -2.0]}, "1 tokens has 2 log-probabilities"),
        (
            {"completion_ids": [5, 500]},
            "demonstration_column='given', prompt 'b=': 500 in 'completion_ids' is no token",
        ),
        (7, "7 does not complete a prompt of text. A completion is None, text"),
    ],
)
def test_what_is_no_completion_is_refused_at_construction(tmp_path, value, error):
    data = Dataset.from_list([{"prompt": "a=", "given": None}, {"prompt": "b=", "given": value}])
    with pytest.raises(ValueError, match=error):
        demonstrated(tmp_path, data)


def test_a_template_that_does_not_continue_its_prompt_is_refused(tmp_path):
    trainer = demonstrated(tmp_path)
    trainer.processing_class.chat_template = "{{ 'start' if add_generation_prompt else 'other start' }}"
    with pytest.raises(ValueError, match="does not continue its own prompt.*'other start' after 'start'"):
        given_of(trainer, [{"role": "user", "content": "2+2="}], "4")


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"demonstration_column": None, "demonstration_loss": "luffy"}, "no effect without demonstration_column"),
        ({"demonstration_loss": "lufy"}, "Did you mean 'luffy'"),
        ({"demonstration_loss": '{"luffy": {"gama": 1}}'}, "'luffy' takes no keyword 'gama'. Did you mean 'gamma'"),
        ({"demonstration_loss": {"chord": {"mu": "0.1"}}}, "mu='0.1' must be a number"),
        ({"demonstration_loss": {"chord": {"phi": "no"}}}, "phi='no' must be True or False"),
        ({"demonstration_column": 3}, "demonstration_column=3 must be the name of a column"),
        ({"demonstration_loss": {"luffy": {"gamma": 0}}}, "gamma=0 must be above 0"),
        ({"demonstration_loss": {"luffy": {}, "chord": {}}}, "is not one name with its keywords"),
        ({"demonstration_loss": {"chord": {"mu": 1.5}}}, "must be shares from 0 to 1"),
        ({"demonstration_loss": {"chord": {"decay_steps": 9}}}, "belong together"),
        ({"demonstration_loss": {"chord": {"warmup_steps": -1}}}, "must be 0 or more"),
        ({"loss_type": "clip_cov"}, "does not promise `reinforce_on_policy`"),
        ({"demonstration_loss": "luffy", "loss_type": "gmpo"}, "loss_type='gmpo' weighs completions as a whole"),
        ({"demonstration_loss": "chord", "importance_sampling_level": "sequence"}, "'sequence' weighs completions"),
        ({"truncated_sampling": "correct"}, "knows what the sampler could draw"),
        ({"demonstration_loss": "chord", "max_refills": 1}, "teach by their demonstration alone"),
        ({"overlap_rewards": {"vowels": "groups"}}, "judges groups while they are drawn"),
        ({"refill_buffer": 1, "advantage_estimator": "rloo"}, "tested with drawn completions alone"),
        ({"remove_unused_columns": True}, "drops the column 'given'"),
    ],
)
def test_settings_in_which_demonstrations_mean_nothing_are_refused(tmp_path, config, error):
    with pytest.raises(ValueError, match=error):
        GRPOPlusConfig(str(tmp_path), use_cpu=True, bf16=False, **{"demonstration_column": "given"} | config)


def test_weights_of_whole_completions_go_with_losses_of_whole_completions(tmp_path):
    for loss in ("imitation", {"chord": {"phi": False}}):
        GRPOPlusConfig(
            str(tmp_path), use_cpu=True, loss_type="gmpo", demonstration_column="given", demonstration_loss=loss
        )


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"data": DATA.rename_column("given", "solution")}, "'given' is no column of train_dataset"),
        ({"trainer_arguments": {"rollout_func": print}}, "the run has rollout_func"),
    ],
)
def test_a_run_in_which_others_write_is_refused(tmp_path, changed, error):
    with pytest.raises(ValueError, match=error):
        demonstrated(tmp_path, **changed)


def test_completions_of_a_stream_join_their_groups(tmp_path):
    trainer = demonstrated(tmp_path, DATA.to_iterable_dataset())
    output = batch_of(trainer)
    assert trainer.processing_class.decode(output["completion_ids"][-1], skip_special_tokens=True) == WRITTEN


def test_mu_rises_in_a_line_and_falls_along_a_cosine():
    keywords = {"mu": 0.8, "mu_end": 0.2, "warmup_steps": 4, "decay_steps": 10}
    # Half of the way up; at the peak; half of the way down; at the end.
    expected = {2: 0.4, 4: 0.8, 9: 0.5, 14: 0.2, 99: 0.2}
    for step, mu in expected.items():
        tokens, demonstrated, drawn = chord(torch.tensor([[math.log(0.25)]]), step, **keywords)
        assert (demonstrated, drawn) == pytest.approx((mu, 1 - mu))
        assert tokens.item() == pytest.approx(0.25 * 0.75)
    assert chord(torch.zeros(1, 1), 50, mu=0.3, phi=False)[:2] == (torch.ones(1, 1), 0.3)


def test_a_run_takes_up_no_batch_of_other_demonstrations(tmp_path):
    before, after, none = (
        settings_of(demonstrated(tmp_path, **own))
        for own in ({"demonstration_loss": "chord"}, {"demonstration_loss": "luffy"}, {"demonstration_column": None})
    )
    assert "demonstration_loss was {'chord': {}} and is {'luffy': {}}" in why_another_batch({"settings": before}, after)
    assert "demonstration_column was 'given' and is None" in why_another_batch({"settings": before}, none)
    assert why_another_batch({"settings": before}, before) is None
