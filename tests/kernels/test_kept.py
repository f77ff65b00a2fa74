"""Log-probabilities over the tokens that a sampler could draw."""

import math
from itertools import chain, product

import pytest
import torch
from torch import Tensor

from grpo_plus.kernels.linear_logprob import listed, reference, single_pass, trained
from grpo_plus.kernels.linear_logprob.kept import Kept, KeptRows
from tests.close import assert_close

OPTIONS = {"softcap": 2.0, "logit_scale": 1.7, "temperature": 1.3}


def kept_of(sets: list[set[int]], vocab: int) -> Kept:
    """One row whose tokens have these kept sets, listed as the recorder does."""
    lists = [sorted(s) if 2 * len(s) <= vocab else sorted(set(range(vocab)) - s) for s in sets]
    counts = [len(s) if 2 * len(s) <= vocab else len(s) - vocab for s in sets]
    rows = KeptRows(torch.tensor([counts], dtype=torch.int32), torch.tensor([list(chain(*lists))], dtype=torch.int32))
    return rows.at(torch.zeros(len(sets), dtype=torch.long), torch.arange(len(sets)))


def random_sets(count: int, vocab: int, most: int | None = None) -> tuple[list[set[int]], Tensor]:
    """Kept sets of every size up to `most`, the largest and a single token among them, and a target out of each."""
    most = most or vocab
    sizes = [1, most, *torch.randint(1, most + 1, (count,)).tolist()][:count]
    orders = [torch.randperm(vocab)[:size].tolist() for size in sizes]
    return [set(order) for order in orders], torch.tensor([order[0] for order in orders])


def test_lists_name_what_is_kept_or_what_is_left_out():
    # Row 0: {1, 3} of five tokens, then all but 4, then everything. Row 1: {2}, then padding.
    rows = KeptRows(torch.tensor([[2, -1, 0], [1, 0, 0]]), torch.tensor([[1, 3, 4], [2, 0, 0]]))
    kept = rows.at(torch.tensor([1, 0, 0, 0]), torch.tensor([0, 2, 1, 0]))
    left_out = torch.tensor([[1, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1], [1, 0, 1, 0, 1]]).bool()
    assert torch.equal(kept.left_out(slice(0, 4), 5), left_out)
    assert torch.equal(kept.left_out(slice(1, 3), 5), left_out[1:3])
    assert torch.equal(kept.left_out(slice(3, 9), 5), left_out[3:])  # a last tile that is not full


def test_joined_and_widened_rows_keep_their_sets():
    first = KeptRows(torch.tensor([[2]]), torch.tensor([[1, 3]]))
    second = KeptRows(torch.tensor([[-1, 1]]), torch.tensor([[0, 4]]))
    kept = KeptRows.joined([first, second]).widened(4).at(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 3]))
    left_out = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(kept.left_out(slice(0, 4), 5), left_out)


def test_probabilities_are_those_of_the_kept_tokens_by_hand():
    # Probabilities 1/2, 1/4, 1/8, 1/8. Over {1, 2} they are 2/3 and 1/3, over all but token 0 1/2, 1/4 and 1/4.
    weight = torch.tensor([[0.5], [0.25], [0.125], [0.125]]).log()
    hidden, targets = torch.ones(2, 1), torch.tensor([1, 3])
    logps, entropies = reference.linear_logprob(hidden, weight, targets, kept=kept_of([{1, 2}, {1, 2, 3}], 4))
    assert_close("logps", logps, torch.tensor([2 / 3, 1 / 4]).log(), rtol=1e-6)
    expected = torch.tensor([-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3), 1.5 * math.log(2)])
    assert_close("entropies", entropies, expected, rtol=1e-6)


@pytest.mark.parametrize("implementation", [single_pass, trained, listed], ids=lambda module: module.__name__[-11:])
def test_tiles_give_what_all_logits_give(monkeypatch, implementation):
    monkeypatch.setattr(implementation, "TILE_BYTES", 1500)
    monkeypatch.setattr(single_pass, "BLOCK_BYTES", {"cpu": 700})
    trains_head = implementation is not single_pass
    count, width, vocab = 19, 6, 37
    sets, targets = random_sets(count, vocab, vocab // 2 if implementation is listed else None)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((count, width), (vocab, width), (vocab,))
    )
    cotangents = torch.randn(2, count, dtype=torch.float64)
    results = []
    for linear_logprob in (
        implementation.linear_logprob,
        _with_entropy_gradient if trains_head else reference.linear_logprob,
    ):
        tensors = [tensor.clone().requires_grad_(trains_head or tensor is hidden) for tensor in (hidden, weight, bias)]
        logps, entropies = linear_logprob(*tensors[:2], targets, kept=kept_of(sets, vocab), bias=tensors[2], **OPTIONS)
        assert entropies.requires_grad == trains_head
        (torch.stack([logps, entropies]) * cotangents).sum().backward()
        gradients = [tensor.grad for tensor in tensors if tensor.requires_grad]
        results.append([logps, entropies, *gradients])
    for number, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(f"result {number}", actual, expected, rtol=1e-12)


def _with_entropy_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, *, kept: Kept, bias: Tensor, **options):
    left_out = kept.left_out(slice(0, len(targets)), len(weight))
    ordered = (options["temperature"], options["softcap"], options["logit_scale"])
    logps = reference.log_softmax(hidden, weight, left_out, bias, *ordered)
    return logps.gather(1, targets[:, None])[:, 0], -reference.negative_entropy(logps)


@pytest.mark.parametrize("implementation", [single_pass, trained, listed], ids=lambda module: module.__name__[-11:])
def test_no_token_has_a_gradient_of_zero(implementation):
    trains_head = implementation is not single_pass
    hidden, weight = torch.empty(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=trains_head)
    rows = KeptRows(torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.int32))
    nowhere = torch.empty(0, dtype=torch.long)
    logps, _ = implementation.linear_logprob(hidden, weight, nowhere, kept=rows.at(nowhere, nowhere))
    logps.sum().backward()
    assert hidden.grad.shape == (0, 3)
    assert not trains_head or not weight.grad.any()


def test_the_mean_estimate_is_the_gradient_of_the_expected_reward():
    """All completions of two tokens out of five, under a policy whose first token is one of three."""
    vocab = 5
    table = torch.randn(1 + vocab, vocab, dtype=torch.float64, requires_grad=True)  # logits by the token before
    rewards = torch.randn(vocab, vocab, dtype=torch.float64)
    sets = [{0, 2, 4}, {1}, {0, 1, 2, 3}, {2, 3}, {0, 1, 2, 3, 4}, {0, 4}]
    masks = torch.tensor([[0.0 if token in s else -math.inf for token in range(vocab)] for s in sets]).double()
    policy = (table + masks).softmax(-1)
    value = sum(policy[0, a] * policy[1 + a, b] * rewards[a, b] for a, b in product(range(vocab), repeat=2))
    (expected,) = torch.autograd.grad(value, table)

    pairs = [(a, b) for a, b in product(range(vocab), repeat=2) if a in sets[0] and b in sets[1 + a]]
    before = torch.tensor([place for a, _ in pairs for place in (0, 1 + a)])
    targets = torch.tensor(pairs).flatten()
    one_hot = torch.eye(1 + vocab, dtype=torch.float64)
    logps, _ = trained.linear_logprob(
        one_hot[before], table.t(), targets, kept=kept_of([sets[place] for place in before.tolist()], vocab)
    )
    logps = logps.view(-1, 2).sum(1)
    assert logps.exp().sum().item() == pytest.approx(1.0)  # with all of the vocabulary, the kept mass
    rewards_of_pairs = torch.stack([rewards[a, b] for a, b in pairs])
    (actual,) = torch.autograd.grad((logps.detach().exp() * rewards_of_pairs * logps).sum(), table)
    assert_close("gradient", actual, expected, rtol=1e-10)


def test_kept_sets_wait_for_no_device():
    """A meta tensor has no values: whatever needs one on the host fails."""
    counts, ids, places = (torch.zeros(shape, dtype=torch.long, device="meta") for shape in ((3, 4), (3, 9), (5,)))
    left_out = KeptRows(counts, ids).at(places, places).left_out(slice(2, 9), 11)
    assert left_out.shape == (3, 11)


def test_lists_that_are_short_beside_the_vocabulary_are_read_alone():
    lists = KeptRows(torch.full((1, 4), 3), torch.zeros(1, 12, dtype=torch.long))
    kept = lists.at(torch.zeros(4, dtype=torch.long), torch.arange(4))
    assert listed.pays(kept, 64 * 3)
    assert not listed.pays(kept, 64 * 3 - 1)


def test_lists_that_lie_apart_belong_to_their_positions():
    """Entries of rows that are not scored, and padding, lie between those of the scored tokens."""
    rows = KeptRows(torch.tensor([[2, 1], [1, 2], [2, 0]]), torch.tensor([[0, 1, 2, 0], [3, 4, 1, 0], [2, 3, 0, 0]]))
    kept = rows.at(torch.tensor([2, 0]), torch.tensor([0, 1]))
    hidden, weight, targets = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([3, 2])
    logps, entropies = listed.linear_logprob(hidden, weight, targets, kept=kept)
    expected = reference.linear_logprob(hidden, weight, targets, kept=kept)
    assert_close("logps", logps, expected[0], rtol=1e-6)
    assert_close("entropies", entropies, expected[1], rtol=1e-6)
    assert logps[1] == 0.0
