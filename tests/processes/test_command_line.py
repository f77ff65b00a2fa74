"""`grpo-plus train` under two processes (gloo): one of them speaks, and one model is saved."""

from tests.cli.test_train import CPU, NAMES, SHORT
from tests.processes.jobs import job

LENGTHS = ["--max_completion_length", "8", "--output_dir", "out"]
TRAINED = job("command", command=["train", *NAMES, *SHORT, *CPU, *LENGTHS, "--advantage_estimator", "rloo"])


def test_the_command_trains_and_only_one_process_says_so(runs):
    printed = [(runs / TRAINED / f"printed_{rank}.txt").read_text() for rank in range(2)]
    assert [text.count("advantages rloo(); loss dapo") for text in printed] == [1, 0]
    assert (runs / TRAINED / "out" / "model.safetensors").exists()
