"""What the sampler could draw, recorded behind the last processor."""

import pytest
import torch

from grpo_plus.demo.tiny import tiny_tokenizer
from grpo_plus.rollout import kept
from grpo_plus.rollout.kept import KeptRecorder
from grpo_plus.rollout.recorder import recording
from tests.packing.models import VOCABULARY, tiny

PROMPTS = torch.tensor([[5, 6, 7], [8, 9, 10]]).repeat_interleave(2, 0)
SAMPLED = {"do_sample": True, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": 2}


@pytest.fixture(scope="module")
def model():
    return tiny("llama").eval()


def generate(model, **settings):
    torch.manual_seed(3)
    return model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), **(SAMPLED | settings))


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.7, "top_k": 0}, {"top_k": 3}, {"top_k": 0, "min_p": 0.2, "suppress_tokens": [4, 11]}, {"top_k": 0}],
    ids=str,
)
def test_kept_sets_are_what_the_scores_leave(monkeypatch, model, settings):
    monkeypatch.setattr(kept, "WAITING_BYTES", 2 * len(PROMPTS) * VOCABULARY)  # a list for every two steps
    with recording(model, KeptRecorder) as recorders:
        output = generate(model, return_dict_in_generate=True, output_scores=True, **settings)
    assert torch.equal(output.sequences, generate(model, **settings))
    could = torch.stack(output.scores, dim=1) > -torch.inf
    lengths = [5, 2, 1, 4]
    (rows,) = (recorder.table(lengths) for recorder in recorders)
    places = [(row, step) for row, length in enumerate(lengths) for step in range(length)]
    at = torch.tensor(places).unbind(1)
    assert torch.equal(~rows.at(*at).left_out(slice(0, len(places)), VOCABULARY), could[at])
    sizes = could.sum(-1)
    listed = torch.minimum(sizes, VOCABULARY - sizes)
    assert rows.ids.shape[1] == max(int(listed[row, :length].sum()) for row, length in enumerate(lengths))
    assert not rows.counts[2, 1:].any()


def test_the_model_is_left_as_it_was(model):
    class Interrupted(KeptRecorder):
        def __call__(self, input_ids, scores):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recording(model, Interrupted) as recorders:
        generate(model)
    assert recorders == []
    assert "generate" not in vars(model)


def test_a_loop_of_another_hand_stays_and_is_recorded(model):
    """As with a decoding loop of ours, which is installed the same way inside."""
    calls = []

    def decode(model, *args, **kwargs):
        calls.append(1)
        return type(model)._sample(model, *args, **kwargs)

    with recording(model, KeptRecorder) as recorders:
        expected = model.generate(
            PROMPTS, attention_mask=torch.ones_like(PROMPTS), custom_generate=decode, **SAMPLED, top_k=2
        )
    assert calls
    assert expected.shape[0] == len(PROMPTS)
    assert (recorders[0].table([1] * 4).counts == 2).all()


def test_a_processor_that_moves_odds_is_refused_by_name(model):
    with (
        pytest.raises(ValueError, match="RepetitionPenaltyLogitsProcessor changes the odds"),
        recording(model, KeptRecorder),
    ):
        generate(model, repetition_penalty=1.1)


@pytest.mark.parametrize(
    "settings", [{"num_beams": 2}, {"stop_strings": ["b"], "tokenizer": tiny_tokenizer()}], ids=["beams", "stop"]
)
def test_what_is_no_loop_of_draws_or_needs_transformers_own_is_left_alone(model, settings):
    with recording(model, KeptRecorder) as recorders:
        found = generate(model, **settings)
    assert torch.equal(found, generate(model, **settings))
    assert recorders == []
