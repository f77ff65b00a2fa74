"""Completions of the dataset under two processes (gloo): they end their groups, also the group across both ranks."""

import json

import pandas as pd
import pytest

from tests.processes.jobs import job

CHORD = job(
    "chord",
    num_generations=4,
    per_device_train_batch_size=6,
    max_steps=1,
    demonstration_column="answer",
    demonstration_loss="chord",
)


def test_two_ranks_weigh_the_demonstrations_of_both(runs):
    folder = runs / CHORD
    (path,) = (folder / "completions").glob("*.parquet")
    table = pd.read_parquet(path)
    prompts = [prompt.removesuffix("=").split("+") for prompt in table["prompt"]]
    answers = [str(int(first) + int(second)) for first, second in prompts]
    assert table["demonstration"].tolist() == [False, False, False, True] * 3
    assert table["completion"][3::4].tolist() == answers[3::4]
    ranks = [json.loads((folder / f"rows_{rank}.json").read_text()) for rank in range(2)]
    total = json.loads((folder / "tokens_0.json").read_text())[0][1]
    of_demonstrations = total / sum(len(answer) + 1 for answer in answers[3::4])  # with the token that ends it
    shown = [[advantage for *_, advantage in rows if advantage == pytest.approx(of_demonstrations)] for rows in ranks]
    assert [len(found) for found in shown] == [1, 2]
