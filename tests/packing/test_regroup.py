import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo_plus.packing.regroup import regroup, reorder


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.randoms(use_true_random=False))
def test_prompts_stay_together_where_they_fit(groups_per_batch, micro_batches, num_generations, random):
    prompts = [group for group in range(groups_per_batch * micro_batches) for _ in range(num_generations)]
    random.shuffle(prompts)
    tokens = [random.randint(0, 9) for _ in prompts]
    order = regroup(prompts, tokens, micro_batches)
    assert sorted(order) == list(range(len(prompts)))
    size = len(prompts) // micro_batches
    batches = [[prompts[row] for row in order[start : start + size]] for start in range(0, len(order), size)]
    assert sum(len(set(batch)) for batch in batches) == groups_per_batch * micro_batches  # no prompt in two of them


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_any_groups_fill_micro_batches_of_equal_size(prompts, data):
    micro_batches = data.draw(st.sampled_from([n for n in range(1, len(prompts) + 1) if len(prompts) % n == 0]))
    assert sorted(regroup(prompts, [1] * len(prompts), micro_batches)) == list(range(len(prompts)))


def test_tokens_are_balanced():
    # Groups of 2, 10, 1 and 9 tokens: 10 + 1 and 9 + 2.
    order = regroup(["a", "a", "b", "b", "c", "c", "d", "d"], [1, 1, 5, 5, 1, 0, 5, 4], 2)
    assert [set(order[:4]), set(order[4:])] == [{2, 3, 4, 5}, {0, 1, 6, 7}]


def test_reorder_moves_every_tensor_of_a_row_and_leaves_the_rest():
    total = torch.tensor(7.0)
    batches = [
        {"ids": torch.tensor([[0, 0], [1, 1]]), "advantages": torch.tensor([0.0, 1.0]), "names": ["0", "1"]},
        {"ids": torch.tensor([[2, 2], [3, 3]]), "advantages": torch.tensor([2.0, 3.0]), "names": ["2", "3"]},
    ]
    batches = [batch | {"total": total, "images": None} for batch in batches]
    first, second = reorder(batches, [3, 0, 2, 1])
    assert first["ids"][:, 0].tolist() == first["advantages"].tolist() == [3, 0]
    assert second["ids"][:, 0].tolist() == second["advantages"].tolist() == [2, 1]
    assert (first["names"], second["names"]) == (["3", "0"], ["2", "1"])
    assert first["total"] is total
    assert second["images"] is None
    assert batches[0]["advantages"].tolist() == [0.0, 1.0]
