"""What an estimator remembers under two processes (gloo): one state, by task, which a resumed run goes on with."""

from tests.processes.jobs import job
from tests.processes.test_advantages import SPLIT, read, tables_of

TASKS = job("tasks", advantage_estimator="ema_task", task_column="answer", max_steps=2, **SPLIT)


def test_two_ranks_keep_one_state_by_task(runs):
    states, tables = read(runs / TASKS, "state"), tables_of(runs / TASKS)
    assert states[0] == states[1]
    prompts = {prompt for table in tables for prompt in table["prompt"]}
    # The answer is the task: "1+2=" belongs to "3".
    assert set(states[0]) == {str(sum(map(int, prompt.rstrip("=").split("+")))) for prompt in prompts}
