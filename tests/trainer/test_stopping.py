"""SIGTERM and Ctrl-C: the step is finished, a checkpoint is written, and the run ends; a second signal ends it at once."""

import os
import signal
import threading
import time

import pytest
from transformers import TrainerCallback
from trl import GRPOConfig

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
from grpo_plus.trainer.safety import stopping
from grpo_plus.trainer.safety.stopping import StopSignals
from tests.close import differing
from tests.forked import FORK, exit_code, started
from tests.training import PROMPTS, logs_of, make_trainer, vowels, weights_of


class Send(TrainerCallback):
    """Sends a signal to this process, within a step."""

    def __init__(self, number, step=2, event="on_pre_optimizer_step"):
        self.number, self.step, self.ended = number, step, False
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            signal.raise_signal(self.number)

    def on_train_end(self, args, state, control, **kwargs):
        self.ended = True


def made(output_dir, *callbacks, config_class=GRPOPlusConfig, reward_funcs=(vowels,), trainer_arguments=None, **config):
    return make_trainer(
        output_dir,
        trainer_class=GRPOPlusTrainer,
        config_class=config_class,
        reward_funcs=reward_funcs,
        trainer_arguments={"callbacks": list(callbacks)} | (trainer_arguments or {}),
        **config,
    )


def saved(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture(autouse=True)
def handlers():
    """What pytest has set is what every test leaves."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(
    ("save_strategy", "config_class"), [("no", GRPOConfig), ("steps", GRPOPlusConfig), ("epoch", GRPOPlusConfig)]
)
def test_sigterm_finishes_the_step_and_saves_once(tmp_path, save_strategy, config_class, monkeypatch):
    calls = []
    save = GRPOPlusTrainer._save_checkpoint
    monkeypatch.setattr(GRPOPlusTrainer, "_save_checkpoint", lambda self, *a: calls.append(1) or save(self, *a))
    send = Send(signal.SIGTERM)
    trainer = made(tmp_path, send, config_class=config_class, save_strategy=save_strategy, save_steps=2)
    with pytest.raises(SystemExit) as left:
        trainer.train()
    assert left.value.code == 0
    assert trainer.state.global_step == 2
    assert saved(tmp_path) == ["checkpoint-2"]
    assert len(calls) == 1
    assert not send.ended  # what a whole training ends with, such as loading the best model, is not for this one


def test_ctrl_c_does_the_same_and_is_a_keyboard_interrupt(tmp_path, capfd):
    trainer = made(tmp_path, Send(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "SIGINT received: the optimizer step is finished" in capfd.readouterr().err
    assert saved(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("event", "settings"),
    [
        ("on_pre_optimizer_step", {"save_strategy": "no"}),  # inside a generation batch, which serves two steps
        ("on_log", {"save_strategy": "no"}),  # between two steps
        ("on_save", {"save_strategy": "steps", "save_steps": 1}),
    ],
)
def test_the_stopped_run_goes_on_to_where_it_would_have_come(tmp_path, event, settings):
    settings = settings | {"max_steps": 4, "num_iterations": 2}
    whole = made(tmp_path / "whole", **settings)
    whole.train()
    step = 1 if event == "on_pre_optimizer_step" else 2  # `Send` counts the steps that are over
    first = made(tmp_path / "stopped", Send(signal.SIGTERM, step, event), **settings)
    with pytest.raises(SystemExit):
        first.train()
    assert saved(tmp_path / "stopped") == ["checkpoint-1"]
    second = made(tmp_path / "stopped", **settings)
    second.train(resume_from_checkpoint=True)
    assert not differing(weights_of(second), weights_of(whole))
    assert logs_of(second)[:-1] == logs_of(whole)[:-1]


def test_the_evaluation_that_is_due_is_left_out(tmp_path):
    trainer = made(
        tmp_path,
        Send(signal.SIGTERM),
        evaluated := Counts(),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        trainer_arguments={"eval_dataset": PROMPTS.select(range(2))},
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert evaluated.batches == 0


class Counts(TrainerCallback):
    batches = 0

    def on_prediction_step(self, args, state, control, **kwargs):
        self.batches += 1


def test_an_evaluation_that_runs_is_left_and_the_step_before_it_saved(tmp_path):
    class During(TrainerCallback):
        evaluated = 0

        def on_prediction_step(self, args, state, control, **kwargs):
            self.evaluated += 1
            signal.raise_signal(signal.SIGTERM)

    during = During()
    trainer = made(
        tmp_path,
        during,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=4,
        trainer_arguments={"eval_dataset": PROMPTS.select(range(3))},
    )
    with pytest.raises(SystemExit):
        trainer.train()
    assert during.evaluated == 1
    assert saved(tmp_path) == ["checkpoint-2"]


def test_a_signal_into_a_save_needs_no_further_step(tmp_path):
    class Saving(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    trainer = made(tmp_path, Saving(), save_strategy="steps", save_steps=1)
    with pytest.raises(SystemExit):
        trainer.train()
    assert saved(tmp_path) == ["checkpoint-1"]


def test_a_signal_after_the_last_step_leaves_a_checkpoint_too(tmp_path):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            signal.raise_signal(signal.SIGTERM)

    trainer = made(tmp_path, Late(), max_steps=2)
    with pytest.raises(SystemExit):
        trainer.train()
    assert saved(tmp_path) == ["checkpoint-2"]


def test_a_handler_of_the_users_stays_in_charge(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        made(tmp_path, Send(signal.SIGTERM)).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert saved(tmp_path) == []


def test_transformers_own_checkpoint_on_sigterm_stays_in_charge(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    trainer = made(tmp_path, Send(signal.SIGTERM), enable_jit_checkpoint=True)
    (jit,) = [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "JITCheckpointCallback"]
    monkeypatch.setattr(jit.jit_manager, "kill_wait", 0)
    try:
        trainer.add_callback(Pause())  # the wait is a thread's
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved(tmp_path) == ["checkpoint-2"]


class Pause(TrainerCallback):
    def on_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(0.05)


def test_a_training_in_another_thread_listens_to_nothing(tmp_path):
    seen = []

    class See(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(signal.getsignal(signal.SIGTERM))

    trainer = made(tmp_path, See(), max_steps=1)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


def test_handlers_are_given_back_after_an_error(tmp_path):
    def fails(completions, **_):
        raise KeyError("judge")

    with pytest.raises(RuntimeError, match="judge"):
        made(tmp_path, reward_funcs=[fails]).train()  # the fixture looks at the handlers


def test_a_forked_child_dies_of_the_sigterm_that_its_parent_sends():
    signals = StopSignals()
    with signals.listening():
        child = FORK.Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.1)
        child.terminate()
        child.join(timeout=10)
        alive = child.is_alive()
        child.kill()
    assert not alive
    assert child.exitcode == -signal.SIGTERM
    assert signals.received is None


@pytest.mark.parametrize("thread", [False, True])
def test_a_child_is_not_deaf_while_it_is_born(thread):
    """A pool ends its workers by SIGTERM, maybe before they have run at all; `reward_timeout` forks in a thread."""
    deaf = []

    def fork_and_terminate():
        for _ in range(20):
            child = os.fork()
            if child == 0:
                time.sleep(20)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            deadline = time.monotonic() + 5
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    deaf.append(child)
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return
                time.sleep(0.001)

    signals = StopSignals()
    with signals.listening():
        if thread:
            forking = threading.Thread(target=fork_and_terminate)
            forking.start()
            forking.join()
        else:
            fork_and_terminate()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        assert signal.getsignal(signal.SIGTERM) == signals._receive
    assert not deaf
    assert signals.received is None


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch):
    monkeypatch.setattr(stopping, "ECHO", 0.0)
    signals = StopSignals()
    with signals.listening():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signals.received == signal.SIGINT


@pytest.mark.parametrize(("launched", "after", "counts"), [(False, 0.4, False), (True, 4.0, False), (True, 6.0, True)])
def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch, launched, after, counts):
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(stopping, "_launched", lambda: launched)
    signals = StopSignals()
    with signals.listening():
        signal.raise_signal(signal.SIGTERM)
        clock[0] += after
        if counts:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        else:
            signal.raise_signal(signal.SIGINT)
    assert signals.received == signal.SIGTERM


def script(folder, judging, went_on):
    def slow(completions, **_):
        judging.set()
        time.sleep(0.5)
        return vowels(completions)

    made(folder, reward_funcs=[slow], max_steps=50).train()
    went_on.set()


def test_the_process_exits_with_status_0(tmp_path):
    judging, went_on = FORK.Event(), FORK.Event()
    process = started(script, tmp_path, judging, went_on)
    assert judging.wait(60)
    process.terminate()
    assert exit_code(process) == 0
    assert not went_on.is_set()
    assert saved(tmp_path) == ["checkpoint-1"]


def listen(ready):
    with StopSignals().listening():
        ready.set()
        while True:
            time.sleep(60)


def test_a_second_sigterm_ends_the_process_at_once(monkeypatch):
    monkeypatch.setattr(stopping, "ECHO", 0.2)
    ready = FORK.Event()
    child = started(listen, ready)
    ready.wait(10)
    child.terminate()
    child.join(timeout=0.3)
    assert child.is_alive()
    child.terminate()
    child.join(timeout=10)
    assert child.exitcode == -signal.SIGTERM
