"""The supervised warm-up before GRPO: a model that never writes a well-formed answer gives GRPO nothing to reward."""

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[tuple[str, str]],
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Train `model` in place to continue each prompt with its completion and to stop there.

    Args:
        examples: (prompt, completion) pairs; each step draws `batch_size` of them with replacement.
        seed: decides the draws; the caller's random state is left as it was.
    """
    input_ids, attention_mask, labels = _tokenize(tokenizer, examples)
    draws = torch.randint(len(examples), (steps, batch_size), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for rows in tqdm(draws, desc="warm-up: the format", unit="step"):
        loss = model(input_ids=input_ids[rows], attention_mask=attention_mask[rows], labels=labels[rows]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _tokenize(tokenizer: PreTrainedTokenizerBase, examples: list[tuple[str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, L) padded on the left, their mask, and labels that score the completion and its end token only."""
    completions = [completion + tokenizer.eos_token for _, completion in examples]
    texts = [prompt + completion for (prompt, _), completion in zip(examples, completions, strict=True)]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    lengths = torch.tensor([len(ids) for ids in tokenizer(completions)["input_ids"]])
    from_the_end = torch.arange(batch["input_ids"].shape[1], 0, -1)
    labels = batch["input_ids"].masked_fill(from_the_end > lengths[:, None], -100)
    return batch["input_ids"], batch["attention_mask"], labels
