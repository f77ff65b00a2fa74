"""Attention that reads a prompt once for all of its rows, against every row alone."""

import pytest
import torch

from grpo_plus.rollout.shared_attention import Places, PromptStates, shared_attention
from tests.close import assert_close

HEADS, QUERY_HEADS, PROMPT, OWN = 2, 6, 11, 5
CPU = torch.device("cpu")


def alone(query, key, value, *, padding=0, window=None, scale=0.7, softcap=None, sinks=None):
    """Attention of the last token of one row, written out: query (heads, D), key and value (heads of keys, n, D)."""
    key, value = (states.repeat_interleave(QUERY_HEADS // HEADS, 0) for states in (key, value))
    scores = (key @ query.unsqueeze(-1)).squeeze(-1) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores[:, : max(padding, key.shape[1] - (window or key.shape[1]))] = -torch.inf
    if sinks is not None:
        scores = torch.cat([scores, sinks.unsqueeze(1)], 1)
    weights = scores.softmax(-1)[:, : key.shape[1]]
    return (weights.unsqueeze(1) @ value).squeeze(1)


@pytest.mark.parametrize("window", [None, 4, 9, 40], ids=["no window", "own tokens only", "half a prompt", "all"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no cap", "cap"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_every_row_is_as_alone(window, softcap, sinks, padded):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    prompt_of_row = [1, 0, 0, 2, 0, 1, 1]  # in any order, groups of different sizes
    prompts, rows = 3, len(prompt_of_row)
    query, sink = random(rows, QUERY_HEADS, 1, 8), random(QUERY_HEADS) if sinks else None
    states = random(prompts, HEADS, PROMPT, 8), random(prompts, HEADS, PROMPT, 7)
    own = random(rows, HEADS, OWN, 8), random(rows, HEADS, OWN, 7)
    pads = [3, 0, 7] if padded else [0, 0, 0]
    hidden = torch.zeros(prompts, PROMPT).masked_fill_(torch.arange(PROMPT) < torch.tensor(pads)[:, None], -torch.inf)
    kept = min(PROMPT, (window or PROMPT + 1) - 1), min(OWN, window or OWN)
    found = shared_attention(
        query,
        *(state[:, :, -kept[1] :] for state in own),
        PromptStates(*(state[:, :, PROMPT - kept[0] :] for state in states), window),
        Places.of(prompt_of_row, hidden if padded else None, CPU),
        scaling=0.7,
        softcap=softcap,
        sinks=sink,
    )
    for row, prompt in enumerate(prompt_of_row):
        key, value = (torch.cat([s[prompt], o[row]], 1) for s, o in zip(states, own, strict=True))
        limits = {"padding": pads[prompt], "window": window, "softcap": softcap, "sinks": sink}
        assert_close(f"row {row}", found[row, 0], alone(query[row, :, 0], key, value, **limits), rtol=1e-6)
