"""What an estimator remembers under two processes (gloo): one state, by task, which a resumed run goes on with."""

from tests.processes.jobs import job
from tests.processes.test_advantages import SPLIT, read, tables_of

TASKS = job("tasks", advantage_estimator="ema_task", task_column="answer", max_steps=2, **SPLIT)
STATEFUL = {
    "advantage_estimator": "ema_task",
    "per_device_train_batch_size": 6,
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}
WHOLE = job("whole", **STATEFUL)
RESUMED = job("resumed", resume_from="whole/checkpoint-1", **STATEFUL)


def test_two_ranks_keep_one_state_by_task(runs):
    states, tables = read(runs / TASKS, "state"), tables_of(runs / TASKS)
    assert states[0] == states[1]
    prompts = {prompt for table in tables for prompt in table["prompt"]}
    # The answer is the task: "1+2=" belongs to "3".
    assert set(states[0]) == {str(sum(map(int, prompt.rstrip("=").split("+")))) for prompt in prompts}


def test_a_stateful_run_of_two_ranks_resumes_to_the_same_weights(runs):
    for name in ("state", "weights"):
        assert read(runs / RESUMED, name) == read(runs / WHOLE, name), name
