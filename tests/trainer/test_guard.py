"""The guard of a long run: steps that are not finite are skipped, counted and end the run; nothing broken is saved."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.safety.guard import Guard
from tests.close import differing
from tests.training import logs_of, make_trainer, weights_of

OFF = {"packing": "none", "skip_zero_advantage": False, "lora_backend": "peft"}
NAN, INF = math.nan, math.inf


class Broken(GRPOPlusTrainer):
    """Spoils the loss of some micro-batches, by their number from 0: NaN reaches the gradient, and infinity does not."""

    def __init__(self, *arguments, factors=None, **keywords):
        super().__init__(*arguments, **keywords)
        self.factors, self.calls = factors or {}, 0

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        if self.model.training:
            self.calls += 1
            value = self.factors.get(self.calls - 1, 1.0)
            loss = loss + value if math.isinf(value) else loss * value
        return loss


class Blind(GRPOPlusTrainer):
    """Sees NaN for log-probabilities in the update of step 2, and so in the KL and the entropy too."""

    def _get_per_token_logps_and_entropies(self, model, *arguments, **keywords):
        logps, entropies, aux = super()._get_per_token_logps_and_entropies(model, *arguments, **keywords)
        if torch.is_grad_enabled() and self.state.global_step == 1:
            logps, entropies = logps * NAN, entropies * NAN
        return logps, entropies, aux


class Gradient(TrainerCallback):
    """Spoils the gradient of the steps it is told, after the backward."""

    def __init__(self, *steps, value=NAN):
        self.steps, self.value = steps, value

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps:
            next(model.parameters()).grad.view(-1)[0] = self.value


class Watch(TrainerCallback):
    """The weights and the optimizer's state after each step."""

    def __init__(self):
        self.weights, self.moments = [], []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.weights.append([weight.detach().clone() for weight in model.parameters()])
        states = optimizer.state_dict()["state"].values()
        self.moments.append([torch.as_tensor(value).clone() for state in states for value in state.values()])


def broken(output_dir, factors=None, config_class=GRPOPlusConfig, callbacks=(), peft_config=None, **config):
    arguments = {"factors": factors, "callbacks": list(callbacks), "peft_config": peft_config}
    return make_trainer(
        output_dir, trainer_class=Broken, config_class=config_class, trainer_arguments=arguments, **config
    )


def same(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("factors", "callbacks", "loss", "config_class"),
    [
        pytest.param({2: NAN}, (), NAN, GRPOConfig, id="loss"),  # micro-batch 2 of 2 each: the first of step 2
        pytest.param({3: INF}, (), INF, GRPOPlusConfig, id="infinite loss in the last micro-batch"),
        pytest.param({}, (Gradient(2),), None, GRPOPlusConfig, id="gradient"),
        pytest.param({}, (Gradient(2, value=INF),), None, GRPOConfig, id="infinite gradient"),
    ],
)
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged_as_it_was(
    tmp_path, factors, callbacks, loss, config_class, caplog
):
    watch = Watch()
    trainer = broken(
        tmp_path,
        factors,
        config_class,
        (watch, *callbacks),
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    trainer.train()
    first, second, third = watch.weights
    assert same(first, second)
    assert same(watch.moments[0], watch.moments[1])
    assert not same(second, third)
    assert all(weight.isfinite().all() for weight in third)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry.get("guard/skipped_steps") for entry in logged] == [None, 1, 1]
    assert [entry["learning_rate"] for entry in logged] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert math.isfinite(logged[0]["loss"])
    assert math.isfinite(logged[2]["loss"])
    if loss is None:  # the loss was finite, and is logged as it is
        sound = broken(tmp_path, {}, config_class, gradient_accumulation_steps=2, per_device_train_batch_size=4)
        sound.train()
        assert logged[1]["loss"] == sound.state.log_history[1]["loss"]
    else:
        assert str(abs(logged[1]["loss"])) == str(loss)
    warned = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith(f"Step 2 is skipped: its {'gradient' if loss is None else 'loss'} is not finite.")


@pytest.mark.parametrize("nan_filter", [True, False])
def test_one_nan_spoils_the_loss_of_its_own_log_only(tmp_path, nan_filter):
    trainer = broken(tmp_path, {1: NAN}, max_steps=6, logging_steps=2, logging_nan_inf_filter=nan_filter)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [math.isfinite(loss) for loss in losses] == [False, True, True]
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_a_skipped_step_is_as_if_it_had_not_been_but_for_the_schedule(tmp_path):
    class Skip(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                for weight in model.parameters():
                    weight.grad = None

    skipped = broken(tmp_path, {1: NAN}, **OFF)
    skipped.train()
    left_out = broken(tmp_path, callbacks=[Skip()], **OFF)
    left_out.train()
    assert not differing(weights_of(skipped), weights_of(left_out))


def test_too_many_in_a_row_end_the_run_with_the_batch_in_a_file(tmp_path):
    trainer = broken(
        tmp_path,
        dict.fromkeys(range(4, 100), NAN),
        max_steps=50,
        max_nonfinite_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
    )
    watch = Watch()
    trainer.add_callback(watch)
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    message = str(error.value)
    assert "Steps 3 to 5 were skipped, as many in a row as max_nonfinite_steps=3 allows" in message
    assert "The weights are those after step 2." in message
    assert "The losses of step 5 on this process were nan, nan." in message
    path = tmp_path / "nonfinite_step_5_rank_0.pt"
    assert str(path) in message
    written = torch.load(path, weights_only=True)
    assert written["step"] == 5
    assert len(written["micro_batches"]) == 2
    assert written["micro_batches"][0]["completion_ids"].shape[0] == 4
    prompts = trainer.processing_class.batch_decode(written["micro_batches"][0]["prompt_ids"], skip_special_tokens=True)
    assert all(repr(prompt) in message for prompt in set(prompts))
    # The last state that was sound can be gone on from.
    assert same(watch.weights[1], [w.detach() for w in trainer.model.parameters()])
    resumed = broken(tmp_path, max_steps=7, max_nonfinite_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7


def test_the_reason_of_the_stop_is_seen_where_the_checkpoint_fails(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError("No space left on device")

    trainer = broken(tmp_path, {0: NAN}, max_nonfinite_steps=1)
    monkeypatch.setattr(trainer, "_save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert "Step 1 was skipped" in caplog.text


def test_a_plain_configuration_stops_after_five(tmp_path):
    trainer = broken(tmp_path, dict.fromkeys(range(100), NAN), GRPOConfig, max_steps=50)
    with pytest.raises(RuntimeError, match="Steps 1 to 5 were skipped.*max_nonfinite_steps=5.*after step 0"):
        trainer.train()


def test_a_finite_step_ends_the_row(tmp_path):
    trainer = broken(tmp_path, {0: NAN, 1: NAN, 3: NAN, 4: NAN}, max_steps=6, max_nonfinite_steps=3)
    trainer.train()
    assert trainer.state.log_history[-2]["guard/skipped_steps"] == 4


def test_the_counts_and_the_loss_to_be_logged_go_on_after_a_checkpoint(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 4, "max_nonfinite_steps": 3}
    trainer = broken(tmp_path, {0: INF, 1: INF}, max_steps=2, **settings)
    trainer.train()
    with pytest.raises(RuntimeError, match="Steps 1 to 3 were skipped"):
        broken(tmp_path / "again", {0: NAN}, max_steps=4, **settings).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )
    resumed = broken(tmp_path, max_steps=4, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (logged,) = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert logged["guard/skipped_steps"] == 2
    assert logged["loss"] == INF


def test_a_checkpoint_of_nan_weights_is_refused_and_older_ones_stay(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.lm_head.weight.data[0, 0] = NAN

    trainer = broken(tmp_path, callbacks=[Spoil()], save_strategy="steps", save_steps=1, save_total_limit=1)
    with pytest.raises(RuntimeError, match=r"trained weight '[\w.]+' .*is not finite after step 2\. Nothing is saved"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    with pytest.raises(RuntimeError, match="is not finite after step 2"):
        trainer.save_model(tmp_path / "final")
    assert not (tmp_path / "final").exists()
    resumed = broken(tmp_path, max_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert all(weight.isfinite().all() for weight in weights_of(resumed).values())


def test_a_run_that_stops_with_nan_weights_saves_none(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.lm_head.weight.data[0, 0] = NAN

    # The rows of one generation batch: later ones could not be sampled.
    trainer = broken(tmp_path, callbacks=[Spoil()], num_iterations=3, max_nonfinite_steps=2, max_steps=3)
    with pytest.raises(RuntimeError, match="Steps 2 to 3 were skipped.* is not finite after step 3"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("loss_type", ["dapo", "gmpo"])
def test_what_is_steered_by_a_step_stays_where_the_step_is_skipped(tmp_path, loss_type):
    seen = []

    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append((trainer.beta, trainer.entropy_coef))

    adaptive = {"use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_target": 0.0}
    trainer = make_trainer(
        tmp_path,
        trainer_class=Blind,
        config_class=GRPOPlusConfig,
        loss_type=loss_type,
        max_steps=4,
        beta=0.1,
        kl_target=1.0,
        trainer_arguments={"callbacks": [Seen()], "peft_config": LoraConfig(r=4, target_modules="all-linear")},
        **(adaptive if loss_type == "dapo" else {}),
    )
    trainer.train()
    assert trainer.state.log_history[1]["guard/skipped_steps"] == 1
    assert seen[0] != seen[1]
    assert seen[1] == seen[2]
    assert seen[2][0] < seen[1][0] or seen[3][0] < seen[2][0]


class Scaled(TrainerCallback):
    """Trains under fp16's scaler, which accelerate sets up on a GPU only."""

    def __init__(self, scale):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def install(self, trainer):
        trainer.accelerator.scaler = self.scaler
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
        trainer.add_callback(self)
        return self


@pytest.fixture
def scaled():
    yield lambda trainer, scale: Scaled(scale).install(trainer)
    AcceleratorState()._mixed_precision = "no"


def test_overflows_of_fp16_are_the_scalers_business(tmp_path, scaled):
    logs, weights = [], []
    for trainer_class in (GRPOTrainer, GRPOPlusTrainer):
        trainer = make_trainer(tmp_path, trainer_class=trainer_class, max_steps=6, max_grad_norm=0.0)
        scaler = scaled(trainer, 2.0**9).scaler
        too_large = lambda loss, scaler=scaler: NAN if scaler.get_scale() > 2.0**6 else 1.0  # noqa: E731
        spoil(trainer, too_large)
        trainer.train()
        assert scaler.get_scale() == 2.0**6
        logs.append([{k: v for k, v in entry.items() if not k.startswith("advantages/")} for entry in logs_of(trainer)])
        weights.append(weights_of(trainer))
    assert repr(logs[0]) == repr(logs[1])  # the norms are NaN
    assert not differing(*weights)


def spoil(trainer, factor):
    """Multiplies what the backward starts from, and not the loss that is logged."""
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **keywords: backward(loss * factor(loss), **keywords)


def test_gradients_that_no_scale_makes_finite_end_the_run(tmp_path, scaled):
    trainer = broken(tmp_path, {}, max_steps=50, max_nonfinite_steps=2)
    scaled(trainer, 8.0)
    spoil(trainer, lambda loss: NAN)
    with pytest.raises(RuntimeError, match="Steps 4 to 5 were skipped"):  # at scales 8, 4, 2: the scaler's business
        trainer.train()


def test_a_loss_that_is_infinite_alone_is_skipped_under_the_scaler_too(tmp_path, scaled):
    watch = Watch()
    trainer = broken(tmp_path, {1: INF}, callbacks=[watch], max_steps=3)
    scaler = scaled(trainer, 1.0).scaler
    trainer.train()
    first, second, third = watch.weights
    assert same(first, second)
    assert not same(second, third)
    assert scaler.get_scale() == 1.0


def test_where_a_step_cannot_be_skipped_the_first_broken_weight_ends_the_run(tmp_path):
    class WithinBackward(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            args.optim = "galore_adamw_layerwise"  # steps in hooks of the backward, as here the optimizer does

    trainer = broken(tmp_path, {1: NAN}, callbacks=[WithinBackward()], max_steps=9, num_iterations=9)
    with pytest.raises(RuntimeError, match=r"Step 2 was taken within the backward.*is not finite after step 2"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_without_a_nan_nothing_is_different_from_trl(tmp_path):
    stock = make_trainer(tmp_path, gradient_accumulation_steps=2, logging_nan_inf_filter=False, max_grad_norm=0.0)
    stock.train()
    ours = make_trainer(
        tmp_path,
        trainer_class=GRPOPlusTrainer,
        gradient_accumulation_steps=2,
        logging_nan_inf_filter=False,
        max_grad_norm=0.0,
    )
    ours.train()
    without_ours = [{k: v for k, v in entry.items() if not k.startswith("advantages/")} for entry in logs_of(ours)]
    assert without_ours == logs_of(stock)
    assert not differing(weights_of(ours), weights_of(stock))
    assert not [callback for callback in ours.callback_handler.callbacks if isinstance(callback, Guard)]
