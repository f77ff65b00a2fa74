"""The KL to the reference in the reward: TRL's RLOOTrainer's, by hand, and through everything that touches rewards."""

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from trl import RLOOConfig, RLOOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, Rewards
from grpo_plus.advantages import estimate
from grpo_plus.trainer.saving.position import settings_of, why_another_batch
from tests.close import assert_close
from tests.refilling import MIXED, Judge
from tests.training import PROMPTS, logs_of, make_trainer, newest, weights_of

# Adapters that begin away from the reference, so that there is a KL.
LORA = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
BETA = 0.3
OURS = {"advantage_estimator": "rloo", "advantage_modifiers": {"kl_in_reward": {}}, "beta": BETA}


def trainer(folder, *, adapter=LORA, trainer_class=GRPOPlusTrainer, config_class=GRPOPlusConfig, **config):
    torch.manual_seed(0)  # the adapters begin at random
    return make_trainer(
        folder,
        trainer_class=trainer_class,
        config_class=config_class,
        trainer_arguments={"peft_config": adapter},
        **config,
    )


def first_batch(made) -> dict:
    made.model.train()
    torch.manual_seed(1)
    return made._generate_and_score_completions([PROMPTS[row // 4] for row in range(8)])


def test_rewards_are_those_of_trls_rloo_trainer(tmp_path):
    ours = trainer(tmp_path / "ours", **OURS)
    theirs = trainer(tmp_path / "theirs", trainer_class=RLOOTrainer, config_class=RLOOConfig, beta=BETA)
    mine, batch = first_batch(ours), first_batch(theirs)
    assert torch.equal(mine["completion_ids"], batch["completion_ids"])
    without = estimate("rloo", ours.rewards).flatten()
    assert (batch["advantages"].double() - without).abs().max() > 0.1
    assert_close("advantages", mine["advantages"], batch["advantages"], rtol=1e-5)


class ByHand(GRPOPlusTrainer):
    """Leave-one-out advantages of the rewards less the KL, from plain forwards of one row at a time; no KL elsewhere."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.kl, tokens = [], 0
        for prompt, completion in zip(prompts, completion_ids_list, strict=True):
            ids = torch.tensor([[*self.processing_class(prompt)["input_ids"], *completion]])
            with torch.no_grad():
                policy = self.token_logps(ids, len(completion))
                with self.model.disable_adapter():
                    self.kl.append((policy - self.token_logps(ids, len(completion))).sum().item())
            tokens += len(completion)
        self.mean_kl = sum(self.kl) / tokens
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def token_logps(self, ids: Tensor, length: int) -> Tensor:
        logits = self.model(ids).logits[0, -length - 1 : -1].float()
        return logits.log_softmax(-1).gather(-1, ids[0, -length:, None]).squeeze(-1)

    def estimate_advantages(self, rewards: Rewards) -> Tensor:
        total = rewards.total() - BETA * torch.tensor(self.kl, dtype=torch.float64).view_as(rewards.judged)
        size = total.shape[1]
        return (total - total.mean(-1, keepdim=True)) * size / (size - 1)


STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5}
CASES = [
    {},  # TRL scores no old policy, so we do
    newest({"loss_type": "dual_clip", "num_iterations": 2, "packing": "none"}),
]


@pytest.mark.parametrize("config", CASES)
def test_a_step_is_that_of_advantages_by_hand_without_a_kl_in_the_loss(tmp_path, config):
    changes = []
    runs = {"ours": ({**OURS, **config}, GRPOPlusTrainer), "hand": (config, ByHand)}
    made = {name: trainer(tmp_path / name, trainer_class=kind, **STEP, **own) for name, (own, kind) in runs.items()}
    for each in made.values():
        start = weights_of(each)
        torch.manual_seed(2)
        each.train()
        changes.append(torch.cat([(weight - start[name]).flatten() for name, weight in weights_of(each).items()]))
    assert changes[1].norm() > 1e-3
    assert_close("changes of the weights", *changes, rtol=2e-5)
    assert logs_of(made["ours"])[0]["kl"] == pytest.approx(made["hand"].mean_kl, rel=1e-4)
    assert made["ours"].speed.skips, "a completion without an advantage has no gradient"
    assert made["ours"].beta == BETA


@pytest.mark.newest_trl
def test_a_tools_tokens_have_no_kl_and_evaluation_has_a_price_too(tmp_path):
    made = trainer(tmp_path, **OURS, top_p=0.8, truncated_sampling="correct")
    batch = first_batch(made)
    before, penalty = batch.pop("kl_to_reference"), made.rewards.kl_penalty
    # Of the policy that sampled: renormalized over what top_p left.
    old_logps = (before + batch["ref_per_token_logps"]) * batch["completion_mask"]
    assert_close("old", old_logps, batch["sampled_logps"].nan_to_num() * batch["completion_mask"], rtol=1e-4)
    assert_close("penalty", penalty.flatten(), BETA * before.sum(1), rtol=1e-6)
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][:, 1] = 0
    batch["old_per_token_logps"] = before + batch["ref_per_token_logps"]
    after = made._kl.added_to(batch)["kl_to_reference"]
    assert_close("kl", after, before * batch["tool_mask"], rtol=1e-6)
    made.model.eval()
    made._generate_and_score_completions([PROMPTS[0]] * 4)
    assert made.rewards.kl_penalty.abs().max() > 0


@pytest.mark.newest_trl
def test_groups_that_refills_bring_have_their_own_price(tmp_path):
    made = trainer(
        tmp_path,
        **OURS | {"advantage_modifiers": {"kl_in_reward": {}, "filter_zero_std": {"by": "judge"}}},
        reward_funcs=[Judge()],
        train_dataset=MIXED,
        max_refills=2,
        max_steps=1,
    )
    torch.manual_seed(0)
    batch = made._prepare_inputs([MIXED[row // 4] for row in range(8)])
    assert made._metrics["train"]["sampling/refills"][0] > 0
    rows = torch.cat([part["kl_to_reference"].sum(1) for part in made._buffered_inputs])
    # TRL has shuffled the rows.
    assert_close("penalty", made.rewards.kl_penalty.flatten().sort()[0], BETA * rows.sort()[0], rtol=1e-5)
    assert batch["kl_to_reference"].shape == batch["completion_ids"].shape


@pytest.mark.newest_trl
def test_kl_target_moves_the_price(tmp_path):
    made = trainer(tmp_path, **OURS, kl_target=1e-4, kl_horizon=8, max_steps=2)
    made.train()
    kl = [entry["kl"] for entry in logs_of(made) if "kl" in entry]
    expected = BETA
    for measured in kl:
        expected *= 1 + min(max(measured / 1e-4 - 1, -0.2), 0.2)
    assert made.beta == pytest.approx(expected)
    assert made.beta != BETA


def test_a_run_without_the_modifier_takes_up_no_batch_of_a_run_with_it(tmp_path):
    priced, plain = (
        settings_of(trainer(tmp_path, **OURS | {"advantage_modifiers": own})) for own in ({"kl_in_reward": {}}, {})
    )
    assert why_another_batch({"settings": priced}, plain) == "kl_in_reward was True and is None"
    assert why_another_batch({"settings": priced}, priced) is None
