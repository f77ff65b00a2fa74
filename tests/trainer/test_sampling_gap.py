"""A sampler that holds another policy is noticed, rounding is not."""

import math
import warnings

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.demo.tiny import tiny_model
from grpo_plus.losses.sampler import SamplerGap, suspicion
from tests.calling import asking, called, calling_tokenizer, count, grow
from tests.refilling import MIXED, Judge
from tests.training import make_trainer


def test_the_gap_is_the_root_mean_square_over_the_tokens_that_count():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0]])
    sampled = torch.tensor([[-1.6, -2.8, math.nan], [-1.0, -1.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    gap, nothing = SamplerGap(), SamplerGap()
    gap.add(logps, sampled, mask)
    # Four tokens with a value: 0.6, 0.8, 0, 0.
    assert gap.root_mean_square().item() == pytest.approx(0.5)
    assert "differ by 0.50 (root mean square" in suspicion(0.5, 3)
    assert suspicion(0.19, 3) is None
    assert nothing.root_mean_square() == 0
    # Of the ratios e^0.6, e^0.8, 1 and 1, the token without a value is left out.
    expected = [0.35, 0.8, 1.0, (math.exp(0.6) + math.exp(0.8) + 2) / 4, math.exp(0.8)]
    assert gap.figures(logps.device).tolist() == pytest.approx(expected)
    assert nothing.figures(logps.device).isnan().all()
    nothing.add(logps, sampled, torch.zeros_like(mask))  # a batch of demonstrations alone
    assert nothing.copy().figures(logps.device).isnan().all()


def rollout(stale):
    """Samples with the trainer's model, or reports the log-probabilities of the one that it was at the start."""

    def complete(prompts, trainer):
        tokenizer, model = trainer.processing_class, trainer.model
        prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        completion_ids = torch.randint(5, 40, (len(prompts), 6))
        if trainer.state.global_step == 0:
            start.update({name: value.clone() for name, value in model.state_dict().items()})
        weights = dict(model.state_dict()) if not stale else start
        rows = [[*ids, *completed] for ids, completed in zip(prompt_ids, completion_ids.tolist(), strict=True)]
        logprobs = []
        for row in rows:
            ids = torch.tensor([row])
            with torch.no_grad():
                logits = torch.func.functional_call(model, weights, (), {"input_ids": ids}).logits[0, -7:-1]
            logps = logits.float().log_softmax(-1).gather(-1, ids[0, -6:, None])
            logprobs.append((logps[:, 0] + 0.03 * torch.randn(6)).tolist())
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids.tolist(), "logprobs": logprobs}

    start: dict[str, torch.Tensor] = {}
    return complete


@pytest.mark.parametrize("stale", [False, True])
def test_a_sampler_that_stays_at_the_starting_policy_is_warned_of_once(tmp_path, stale):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(
            tmp_path,
            trainer_class=GRPOPlusTrainer,
            config_class=GRPOPlusConfig,
            num_iterations=2,
            max_steps=8,
            learning_rate=1e-1,
            trainer_arguments={"rollout_func": rollout(stale)},
        ).train()
    messages = [str(warning.message) for warning in caught if "not sampled from the policy" in str(warning.message)]
    assert len(messages) == stale
    assert not stale or "step 0" not in messages[0]


def gaps(tmp_path, **config):
    """The figures of transformers' own sampling, by step."""
    made = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        **({"temperature": 0.7, "learning_rate": 1e-1, "max_steps": 2} | config),
    )
    made.train()
    names = (
        "sampling_logp_difference/mean",
        "sampling_logp_difference/max",
        *(f"importance_sampling_ratio/{x}" for x in ("min", "mean", "max")),
    )
    log = made.state.log_history[:-1]
    return [
        [entry[f"sampling/{name}"] for name in names]
        for entry in log
        if "sampling/sampling_logp_difference/mean" in entry
    ]


CALLING = calling_tokenizer()
ROWS = {"gradient_accumulation_steps": 2, "generation_chunk_size": 3}
RUNS = {
    "compared in the update, over rows that moved": {
        **ROWS,
        "train_dataset": MIXED,
        "reward_funcs": [Judge()],
        "max_refills": 1,
        "skip_zero_advantage": True,
    },
    "compared turn by turn, around what a tool wrote": {
        "processing_class": CALLING,
        "model": tiny_model(CALLING, hidden_size=16, num_heads=2),
        "train_dataset": asking(*"0123"),
        "reward_funcs": [called],
        "trainer_arguments": {"tools": [count, grow]},
        "max_completion_length": 20,
        "generation_chunk_size": 3,
    },
    "compared with the old policy, padded": {**ROWS, "num_iterations": 2, "packing": "none"},
}


@pytest.mark.parametrize("config", RUNS.values(), ids=RUNS)
def test_what_transformers_samples_is_the_policy_in_every_row(tmp_path, config):
    """An entry of another row or place would be far away."""
    logged = gaps(tmp_path, **config)
    assert logged
    for mean, furthest, *ratios in logged:
        assert 0 < mean < furthest < 1e-4
        assert ratios == pytest.approx([1, 1, 1], abs=1e-4)


def test_truncated_sampling_is_a_gap_that_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="were not sampled from the policy"):
        (mean, _, _, ratio, most), *_ = gaps(tmp_path, top_k=3)
    # The sampler draws from three tokens of 40: what it gives each of them is more than the policy does.
    assert most < 1
    assert mean > 0.5
    assert ratio < 0.5


@pytest.mark.parametrize(
    "config",
    [
        {"generation_kwargs": {"do_sample": False}},
        {"generation_kwargs": {"num_beams": 2}},
    ],
)
def test_a_sampler_that_gives_no_probabilities_has_no_gap(tmp_path, config):
    assert gaps(tmp_path, max_steps=1, **config) == []


def test_a_quantized_cache_is_a_gap_that_is_small(tmp_path):
    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    (mean, furthest, *ratios), *_ = gaps(tmp_path, max_steps=1, generation_kwargs=quantized)
    assert 1e-5 < mean < furthest < 0.2
    assert ratios == pytest.approx([1, 1, 1], abs=0.2)
