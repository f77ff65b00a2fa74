from transformers import TrainerState

from grpo_plus.demo.progress import ACCURACY, HeldOutAccuracy
from grpo_plus.demo.task import dataset
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer


def test_accuracy_is_measured_at_every_tenth_of_the_run_and_at_its_end():
    tokenizer = tiny_tokenizer()
    callback = HeldOutAccuracy(tokenizer, dataset("held_out", 2, seed=0))
    model = tiny_model(tokenizer, hidden_size=32)
    state = TrainerState(max_steps=25, log_history=[])
    for state.global_step in range(1, 26):
        state.log_history.append({"step": state.global_step, "reward": 0.0})
        callback.on_log(None, state, None, model=model)
    state.log_history.append({"step": 25, "train_runtime": 1.0})
    callback.on_log(None, state, None, model=model)
    measured = [entry["step"] for entry in state.log_history if ACCURACY in entry]
    assert measured == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 25]
