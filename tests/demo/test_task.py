import pytest
import torch
from datasets import Dataset

from grpo_plus.demo import task
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


class Scripted:
    """A model that generates given texts, whatever the prompt."""

    device = torch.device("cpu")

    def __init__(self, texts):
        self.texts = texts
        self.training = True

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode

    def generate(self, input_ids, **kwargs):
        assert not self.training
        assert kwargs["do_sample"] is False
        texts = TOKENIZER([text + "<eos>" for text in self.texts], padding=True, padding_side="right")["input_ids"]
        return torch.cat([input_ids, torch.tensor(texts)], dim=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_set_of_digits_is_both_trained_on_and_held_out(seed):
    held_out = set(task.dataset("held_out", 500, seed)["answer"])
    train = set(task.dataset("train", 5000, seed)["answer"])
    warm_up = {"".join(sorted(completion[1:-1])) for _, completion in task.format_examples(5000, seed)}
    assert len(held_out) > 40
    assert not held_out & train
    assert not held_out & warm_up


def test_rows_are_prompts_with_their_sorted_digits_and_never_repeat():
    rows = task.dataset("train", 5000, seed=0)
    assert len(set(rows["prompt"])) == 5000
    assert [row for row in rows if row["prompt"] != f"sort {row['prompt'][5:9]} = "] == []
    assert [row for row in rows if "".join(sorted(row["prompt"][5:9])) != row["answer"]] == []


def test_the_seed_decides_the_rows():
    first, again, other = (task.dataset("train", 50, seed)["prompt"] for seed in (3, 3, 4))
    assert list(first) == list(again)
    assert list(first) != list(other)


@pytest.mark.parametrize("size", [0, 10_001])
def test_a_size_that_the_split_cannot_give_is_refused(size):
    with pytest.raises(ValueError, match=f"size={size} .* 'held_out'"):
        task.dataset("held_out", size, seed=0)


def test_the_warm_up_shows_the_form_and_the_digits_but_not_their_order():
    examples = task.format_examples(2000, seed=0)
    completions = [completion for _, completion in examples]
    assert [example for example in examples if sorted(example[0][5:9]) != sorted(example[1][1:-1])] == []
    assert task.format_reward(completions) == [1.0] * 2000
    in_order = sum(list(completion[1:-1]) == sorted(completion[1:-1]) for completion in completions)
    # By chance 1 in 24 where the four digits differ, more often where some are equal: 6 % on average.
    assert 0.04 < in_order / 2000 < 0.09


@pytest.mark.parametrize(
    ("completion", "correctness", "form"),
    [
        ("[3669]", 1.0, 1.0),
        ("3669", 1.0, 0.0),  # the rewards disagree ...
        ("[6639]", 0.25, 1.0),  # ... both ways: the middle 6 and the 9 are in place, half of 2/4
        ("[9336]", 0.0, 1.0),
        ("[3669]]", 1.0, 0.0),
        ("3 6 6 9\n", 1.0, 0.0),
        ("[366]", 0.0, 0.0),
        ("[36699]", 0.0, 0.0),
        ("[36x9]", 0.0, 0.0),
        ("[٣٦٦٩]", 0.0, 0.0),
        ("[]", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_rewards_of_a_completion(completion, correctness, form):
    assert task.correctness_reward(completions=[completion], answer=["3669"], prompts=["sort 6639 = "]) == [correctness]
    assert task.format_reward(completions=[completion], answer=["3669"], prompts=["sort 6639 = "]) == [form]


def test_accuracy_wants_the_right_digits_in_the_right_form():
    rows = Dataset.from_dict({"prompt": ["sort 21 = "] * 4, "answer": ["1223", "3669", "0019", "4567"]})
    model = Scripted(["[1223]", "3669", "[0091]", "[4567]"])
    assert task.accuracy(model, TOKENIZER, rows) == 0.5
    assert model.training


def test_completions_are_greedy_whatever_the_padding():
    model = tiny_model(TOKENIZER, hidden_size=32, seed=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10)  # fresh weights barely attend; these make the completion depend on every token
    prompts = ["sort 6639 = ", "sort 1 = ", "7"]
    for prompt, completion in zip(prompts, task.complete(model, TOKENIZER, prompts), strict=True):
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        for _ in range(task.MAX_COMPLETION_LENGTH):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = TOKENIZER.decode(ids[0, len(prompt) :]).partition("<eos>")[0]
        assert completion == expected.replace("<unk>", "").replace("<bos>", "").replace("<pad>", "")


def test_completing_draws_no_random_numbers():
    torch.manual_seed(7)
    task.complete(tiny_model(TOKENIZER, hidden_size=32), TOKENIZER, ["sort 6639 = "])
    drawn = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(2))
