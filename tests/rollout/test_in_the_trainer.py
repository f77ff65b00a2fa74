"""A training whose completions come from the grouped loop is, to the last bit, the training with transformers' loop."""

import pytest
import torch
from peft import LoraConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.speed import speed_of
from tests.close import differing
from tests.qlora.models import load_nf4, lora, save_base
from tests.spreading import under_fsdp, under_zero
from tests.training import OF_THE_SAMPLER, PROMPTS, logs_of, make_trainer, weights_of

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def trainer(folder, loop="auto", **config):
    classes = {"trainer_class": GRPOPlusTrainer, "config_class": GRPOPlusConfig}
    return make_trainer(folder, **classes, generation_loop=loop, **{"max_steps": 1} | config)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "trainer_arguments": {"eval_dataset": PROMPTS.select(range(2))}}
TRAININGS = {
    "lora-refills": {"trainer_arguments": {"peft_config": LORA}, "max_refills": 1, "advantage_estimator": "grpo"},
    "evaluation": EVALUATED | {"num_generations_eval": 2, "per_device_eval_batch_size": 4},
    "chunks": {
        "generation_chunk_size": 3,
        "repetition_penalty": 1.2,
        "generation_kwargs": {"eos_token_id": [*range(2, 40)]},
    },
    "bfloat16": {"bf16": True, "max_completion_length": 6},
}


def without_sampler(logs):
    """Without what the grouped loop says of itself, which a run that is TRL's in everything does not log."""
    return [{name: value for name, value in entry.items() if not name.startswith(OF_THE_SAMPLER)} for entry in logs]


@pytest.mark.parametrize("case", TRAININGS)
def test_a_training_is_the_same_to_the_last_bit(tmp_path, case):
    config = {"max_steps": 2, **TRAININGS[case]}
    theirs = trainer(tmp_path / "trl", "trl", **config)
    theirs.train()
    ours = trainer(tmp_path / "ours", "grouped", **config)
    start = weights_of(ours)
    ours.train()
    assert ours.speed.rollouts.statistics
    assert theirs.speed.rollouts is None
    assert without_sampler(logs_of(ours)) == logs_of(theirs)
    trained = weights_of(ours)
    assert differing(trained, start)
    assert differing(trained, weights_of(theirs)) == []


def test_a_quantized_policy_samples_the_same(tmp_path):
    base = save_base(tmp_path / "base", hidden_size=32)
    arguments = {"trainer_arguments": {"peft_config": lora(init_lora_weights=False)}, "bf16": True}
    completions = []
    for loop in ("grouped", "trl"):
        made = trainer(tmp_path / loop, loop, model=load_nf4(base), **arguments)
        torch.manual_seed(0)
        completions.append(made._generate_single_turn([[5, 6, 7]] * 3 + [[8, 9]] * 3, None, {}, 3)[0])
    assert completions[0] == completions[1]


def test_unequal_and_empty_prompts_are_as_on_trls_path(tmp_path):
    """A tool's answers make the prompts of a second turn unequal."""
    given = [[5, 6, 7, 8], [5, 6, 7], [5, 6, 7, 8], [9] * 11]
    completions = []
    for loop in ("grouped", "trl"):
        made = trainer(tmp_path / loop, loop)
        torch.manual_seed(0)
        completions.append([made._generate_single_turn(rows, None, {}, 4)[0] for rows in (given, [*given, []])])
    assert completions[0] == completions[1]


def test_prompts_without_a_token_are_as_on_trls_path(tmp_path):
    def outcome(loop):
        made = trainer(tmp_path / loop, loop)
        torch.manual_seed(0)
        try:
            return made._generate_single_turn([[], []], None, {}, 2)[0]
        except Exception as failure:
            return type(failure), str(failure)

    assert outcome("auto") == outcome("trl")


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed ZeRO-3"])
def test_spread_weights_are_generated_with_by_transformers_own_loop(tmp_path, monkeypatch, name):
    made = trainer(tmp_path)
    assert made.speed.rollouts is not None
    if name == "FSDP":
        under_fsdp(made, monkeypatch)
    else:
        under_zero(made, monkeypatch, stage=3)
    reason = f"{name} spreads the weights over the processes"
    with pytest.warns(UserWarning, match=f"generation_loop: transformers' own loop. {reason}"):
        assert speed_of(made, made.args).rollouts is None
    made.args.generation_loop = "grouped"
    with pytest.raises(ValueError, match=f"generation_loop='grouped' is not possible: {reason}"):
        speed_of(made, made.args)


REFUSED = {
    "compiled": ({"torch_compile": True}, "torch_compile would compile every number of live rows anew"),
    "beams": ({"generation_kwargs": {"num_beams": 2}}, "the decoding is beam_sample"),
    "static": ({"cache_implementation": "static"}, "cache_implementation='static'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_cannot_be_grouped_is_refused_at_construction(tmp_path, case):
    config, reason = REFUSED[case]
    with pytest.warns(UserWarning, match=f"generation_loop: transformers' own loop. {reason}"):
        assert trainer(tmp_path, **config).speed.rollouts is None
    with pytest.raises(ValueError, match=f"generation_loop='grouped' is not possible: {reason}.*leave generation_loop"):
        trainer(tmp_path, "grouped", **config)


def test_where_transformers_does_not_generate_in_batches_nothing_is_installed(tmp_path):
    config = {"use_transformers_continuous_batching": True}
    assert trainer(tmp_path, **config).speed.rollouts is None
    with pytest.raises(ValueError, match="generation_loop='grouped' is for transformers' plain generation"):
        trainer(tmp_path, "grouped", **config)
    with pytest.raises(ValueError, match="Unknown generation_loop 'group'. Did you mean 'grouped'"):
        trainer(tmp_path, "group")
    rollouts = {"trainer_arguments": {"rollout_func": lambda prompts, trainer: {}}}
    assert trainer(tmp_path, **rollouts).speed.rollouts is None
