"""A sampler that holds another policy is noticed, rounding is not."""

import math
import warnings

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.losses.sampler import sampler_differences, suspicion
from tests.training import make_trainer


def test_the_gap_is_the_root_mean_square_over_the_tokens_that_count():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -9.0]])
    sampled = torch.tensor([[-1.6, -2.8, math.nan], [-1.0, -1.0, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    differences = sampler_differences(logps, sampled, mask)
    # Four tokens with a value: 0.6, 0.8, 0, 0.
    assert differences.tolist() == pytest.approx([0.6, 0.8, 0.0, 0.0])
    assert "differ by 0.50 (root mean square" in suspicion(differences, 3)
    assert suspicion(differences / 2.6, 3) is None  # 0.19
    assert suspicion(torch.zeros(0), 3) is None


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
