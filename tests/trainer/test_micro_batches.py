"""What the host knows of micro-batches: read once, in one copy, and only as long as it is true."""

import pytest
import torch

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.update import micro_batches
from grpo_plus.trainer.update.micro_batches import Known, MicroBatches, read
from grpo_plus.trainer.update.regrouping import regrouped
from tests.close import assert_close
from tests.exactness.test_gradients import micro_batch, step, trainer
from tests.packing.counting import OnDevice
from tests.training import make_trainer


def alive(inputs):
    return inputs["advantages"] != 0


def on_device(inputs):
    return {name: value.as_subclass(OnDevice) for name, value in inputs.items()}


@pytest.fixture
def waits():
    OnDevice.waits.clear()
    yield OnDevice.waits
    OnDevice.waits.clear()


def test_a_generation_batch_is_read_and_regrouped_in_one_wait(waits):
    batches = [on_device(micro_batch()) for _ in range(4)]
    rows = read(batches, alive)
    assert len(waits) == 1
    moved, rows = regrouped(batches, rows, accumulation_steps=4, loss_type="grpo")
    kept = MicroBatches()
    kept.keep(moved, rows)
    for batch in moved:
        assert kept.of(batch, alive).layout.groups
    assert len(waits) == 1
    for batch, known in zip(moved, kept._known, strict=True):  # what moved with the rows is what is in the batch
        fresh = Known(batch, read([batch], alive))
        assert known.live == fresh.live
        assert [g.rows for g in known.layout.groups] == [g.rows for g in fresh.layout.groups]
        for group, other in zip(known.layout.groups, fresh.layout.groups, strict=True):
            assert torch.equal(group.prompt, other.prompt)
            assert all(map(torch.equal, group.completions, other.completions))


@pytest.mark.parametrize("packing", ["auto", "none"])
def test_a_known_micro_batch_is_not_waited_for(tmp_path, waits, packing):
    made = trainer(tmp_path, "grpo", {}, None, packing=packing)
    step(made, micro_batch())  # the self-check reads its own probes
    inputs = on_device(micro_batch())
    waits.clear()
    step(made, inputs)
    figures = [wait for wait in waits if "step_figures" in wait]  # once an optimizer step, which this micro-batch ends
    assert len(figures) == 1
    assert len(waits) == 2  # from a checkpoint, say: nothing is known of it
    made._known.keep([inputs], read([inputs], made._alive))
    waits.clear()
    step(made, inputs)
    assert waits == figures


def test_a_changed_micro_batch_is_read_anew():
    inputs = micro_batch()
    kept = MicroBatches()
    kept.keep([inputs], read([inputs], alive))
    assert kept.of(dict(inputs), alive) is kept._known[0]
    other = inputs | {"completion_ids": inputs["completion_ids"].flip(1)}
    assert kept.of(other, alive) is not kept._known[0]
    inputs["advantages"][1] = 1.0  # in place: row 1 has a gradient now
    fresh = kept.of(inputs, alive)
    assert 1 in fresh.live
    assert 1 not in kept._known[0].live


def changed_ids(ids):
    return torch.where(ids > 0, 3 + (ids - 2) % 17, ids)


class ChangesTokens(GRPOPlusTrainer):
    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs | {"completion_ids": changed_ids(inputs["completion_ids"])})


class ChangesTheForward(GRPOPlusTrainer):
    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        ids = torch.cat([input_ids[:, :5], changed_ids(input_ids[:, 5:])], dim=1)
        return super()._get_per_token_logps_and_entropies(model, ids, *args, **kwargs)


@pytest.mark.parametrize("subclass", [ChangesTokens, ChangesTheForward])
def test_tokens_that_a_subclass_changes_are_those_that_are_forwarded(tmp_path, subclass):
    inputs = micro_batch(on_policy=True)
    expected = step(
        trainer(tmp_path / "plain", "grpo", {}, None, packing="auto"),
        inputs | {"completion_ids": changed_ids(inputs["completion_ids"])},
    )
    made = make_trainer(tmp_path, trainer_class=subclass, config_class=GRPOPlusConfig, loss_type="grpo")
    made.model.train()
    made.current_gradient_accumulation_steps = 2
    made._known.keep([inputs], read([inputs], made._alive))
    for name, gradient in step(made, inputs)[1].items():
        assert_close(name, gradient, expected[1][name], rtol=2e-6)


def test_a_training_reads_each_generation_batch_once(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(
        micro_batches, "read", lambda batches, alive: reads.append(len(batches)) or read(batches, alive)
    )
    monkeypatch.setattr("grpo_plus.trainer.seam.read", micro_batches.read)
    made = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        config_class=GRPOPlusConfig,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_iterations=2,
        max_steps=4,
        num_generations=4,
    )
    made.train()
    assert reads == [2, 2]  # two generation batches of two micro-batches, each trained on twice
    assert all(isinstance(value, torch.Tensor) for value in made._buffered_inputs[0].values())
