"""Completions that begin alike go through the model once as far as they do, and train as rows of their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from grpo_plus.packing import tree
from grpo_plus.packing.choice import Choice
from grpo_plus.packing.head import single_pass_head
from grpo_plus.packing.layout import Group, group_rows, pack, unpack
from grpo_plus.packing.padded import Layout
from grpo_plus.packing.rows import CASCADE, SEGMENTS
from grpo_plus.packing.tree import Run, Tree, prefix_tree
from tests.close import assert_close
from tests.packing.models import tiny
from tests.packing.rows import COMPLETION, forked_batch, gradients, padded_output, rows_alone

CPU = torch.device("cpu")


def tree_of(*completions):
    return prefix_tree([torch.tensor(completion) for completion in completions])


def test_a_run_is_what_completions_have_in_common(everything_is_shared):
    # The first three begin with 5, 6, and the third ends there. The last two are equal.
    found = tree_of([5, 6, 7], [5, 6, 8, 9], [5, 6], [4], [4])
    assert found.runs == (Run(0, 0, 2), Run(0, 2, 3, before=0), Run(1, 2, 4, before=0), Run(3, 0, 1))
    assert found.last == (1, 2, 0, 3, 3)
    assert (found.tokens, found.leaves, found.path(2)) == (6, [1, 2, 3], [0, 2])


def test_a_beginning_that_saves_little_does_not_hide_a_longer_one():
    # Three completions share two tokens, which saves four: too few. Two of them share 18 tokens.
    long = [1, 2, *range(10, 26)]
    found = tree_of([*long, 3], [1, 2, 99], [*long, 4])
    assert found.runs == (Run(0, 0, 18), Run(0, 18, 19, before=0), Run(2, 18, 19, before=0), Run(1, 0, 3))


def test_rows_stay_as_they_are_where_sharing_would_save_little():
    # In the order of the rows, though the first and the third begin alike.
    found = tree_of(range(15), [7], range(15), [7, 8])
    assert found == Tree((Run(0, 0, 15), Run(1, 0, 1), Run(2, 0, 15), Run(3, 0, 2)), (0, 1, 2, 3))
    assert tree_of(range(16), [7], range(16)).tokens == 17  # one more token is worth it


TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=8)


@given(TEXTS, st.integers(1, 8))
def test_paths_spell_the_completions_and_every_shared_run_is_worth_it(texts, least):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "LEAST_SAVED", least)
        found = tree_of(*texts)
    for text, last in zip(texts, found.last, strict=True):
        path = [found.runs[run] for run in found.path(last)]
        assert [token for run in path for token in texts[run.row][run.start : run.end]] == text
    if least == 1:  # then it is a trie, with a token for each beginning of a completion
        assert found.tokens == len({tuple(text[: end + 1]) for text in texts for end in range(len(text))})
    saved = sum(map(len, texts)) - found.tokens
    assert saved == 0 or saved >= least


def test_every_run_is_seen_by_the_completions_that_share_it_alone(everything_is_shared):
    for group in group_rows(*forked_batch(), COMPLETION):
        packed = pack([group])
        (span,) = packed.spans
        tokens, positions = packed.input_ids[0], packed.position_ids[0]
        starts = (span.prefix, *span.ends[:-1])
        for index, (start, end) in enumerate(zip(starts, span.ends, strict=True)):
            run = group.tree.runs[index]
            seen = [*range(span.start, span.prefix), *(t for place in span.before[index] for t in range(*place))]
            seen += range(start, end)
            row = torch.cat([group.prompt, group.completions[run.row][: run.end]])
            assert tokens[seen].tolist() == row[:-1].tolist()
            assert positions[seen].tolist() == list(range(len(row) - 1))
        flat = span.padded.flatten().index_select(0, span.unpadded)
        assert flat.tolist() == list(range(span.prefix, span.end))


def in_form(model, form, *, bound=None, head=None):
    """Log-probabilities and entropies (B, T), and the tokens that went through the model."""
    ids, mask = forked_batch()
    parts = Layout.read(ids, mask, COMPLETION, None).ready(form, CPU, None, bound)
    places = torch.cat([part.rows for part in parts]), torch.cat([part.columns for part in parts])
    values = Choice(form, head).run(model, parts)
    logps, entropies = (unpack(value, places, torch.zeros(len(ids), COMPLETION)) for value in values)
    return logps, entropies, sum(part.tokens for part in parts)


def assert_exact(model, form, **arguments):
    ids, mask = forked_batch()
    expected = gradients(model, lambda: rows_alone(model, ids, mask))
    actual = gradients(model, lambda: in_form(model, form, **arguments)[0])
    for name, value, truth in zip(("log-probs", "gradients"), actual, expected, strict=True):
        assert_close(name, value, truth, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "form", "pairs", "checkpointing"),
    [
        ("llama", SEGMENTS, -1.0, False),
        ("llama", SEGMENTS, float("inf"), True),
        ("mistral", SEGMENTS, -1.0, True),
        ("mistral", SEGMENTS, float("inf"), False),
        ("gpt_oss", CASCADE, 0.0, True),
        ("llama", CASCADE, 0.0, False),
    ],
    ids=str,
)
def test_shared_runs_train_as_rows_alone(monkeypatch, everything_is_shared, name, form, pairs, checkpointing):
    monkeypatch.setattr("grpo_plus.packing.rows.pairs_per_call", lambda device: pairs)
    assert_exact(tiny(name, checkpointing=checkpointing), form)


@pytest.mark.parametrize("form", [SEGMENTS, CASCADE], ids=lambda form: form.detail)
def test_adapters_train_as_on_rows_alone_with_a_single_pass_head_and_bounded_passes(everything_is_shared, form):
    model = get_peft_model(tiny("qwen3", checkpointing=True), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.enable_input_require_grads()
    assert_exact(model, form, bound=50, head=single_pass_head("torch", temperature=1.3))


def test_each_beginning_goes_through_the_model_once(everything_is_shared):
    model, (ids, mask) = tiny("llama"), forked_batch()
    with torch.no_grad():
        _, entropies, tokens = in_form(model, SEGMENTS)
    # Prompts without their last tokens, then the runs: 17 + 8 + 4 + 8, then 5, then 6 + 5 + 5, then 5 + 6 + 8.
    assert tokens == 22 + 37 + 13 + 5 + 8 + 16 + 0 + 19
    groups = group_rows(ids, mask, COMPLETION)
    assert SEGMENTS.tokens(groups, CPU) == tokens
    assert (
        CASCADE.tokens(groups, CPU) == CASCADE.ready(groups, CPU).tokens == tokens + 5
    )  # a prompt of one token forks not
    assert_close("entropies", entropies, padded_output(model, ids, mask).entropy[:, -COMPLETION:], rtol=2e-6)


def test_passes_of_bounded_size_keep_rows_that_begin_alike_together(everything_is_shared):
    first, other = torch.arange(10), torch.arange(20, 30)
    group = Group(torch.tensor([7, 8]), (0, 1, 2, 3), (first, other, first, other))
    parts = SEGMENTS.ready_in_parts(group, CPU, 11)  # one token of the prompt and ten of a completion
    assert [part.rows.unique().tolist() for part in parts] == [[0, 2], [1, 3]]
    assert [part.tokens for part in parts] == [11, 11]
