import torch

from grpo_plus.demo.task import complete
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.demo.warmup import _tokenize, warm_up

TOKENIZER = tiny_tokenizer()


def test_only_the_completion_and_its_end_are_scored():
    input_ids, attention_mask, labels = _tokenize(TOKENIZER, [("ab", "c"), ("d", "efg")])
    a, b, c, d, e, f, g = TOKENIZER("abcdefg")["input_ids"]
    pad, eos = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
    assert input_ids.tolist() == [[pad, a, b, c, eos], [d, e, f, g, eos]]
    assert attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert labels.tolist() == [[-100, -100, -100, c, eos], [-100, e, f, g, eos]]


def test_the_model_learns_the_completion_and_to_stop_after_it():
    model = tiny_model(TOKENIZER, hidden_size=32)
    warm_up(model, TOKENIZER, [("1", "[ab]"), ("22", "[c]")], steps=80, batch_size=8, learning_rate=1e-2)
    assert complete(model, TOKENIZER, ["1", "22"]) == ["[ab]", "[c]"]


def test_the_seed_decides_the_draws_and_the_caller_keeps_their_random_state():
    examples = [(f"{number}", f"[{number}]") for number in range(50)]
    models = [tiny_model(TOKENIZER, hidden_size=32) for _ in range(3)]
    torch.manual_seed(7)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        warm_up(model, TOKENIZER, examples, steps=3, batch_size=4, seed=seed)
    drawn = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(2))
    first, again, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
