"""An untrained model that calls tools: of its few tokens, one opens a call and one closes it.

Nothing stands in for the model or for TRL. What is called, and whether the arguments make sense, is up to chance.
"""

from typing import Any

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
WORDS = ("<user>", "<assistant>", "<tool>", "<count>", "<grow>", "</call>")
DIGITS = "0123"

# The names and arguments of the calls are rendered as JSON, which the vocabulary does not know: no call is read again.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + (message.content if message.content is string else "
    "message.content | map(attribute='text') | join) }}{{ message.tool_calls | tojson if message.tool_calls }}"
    "{{ eos_token if message.role == 'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
)
CALL = {"type": "function", "function": {"name": "{name}", "arguments": {"digits": "{content}"}}}
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "tool_calls": {
            "open_pattern": "<(?P<name>count|grow)>",
            "close": "</call>",
            "repeats": True,
            "content": "text",
            "transform": CALL,
        },
        "content": {"close": "<eos>", "content": "text"},
    },
}


def calling_tokenizer() -> PreTrainedTokenizerFast:
    """Few tokens, so that each of them is likely."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS, *DIGITS))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(token, normalized=False) for token in WORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template, tokenizer.response_template = CHAT_TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


def asking(*contents: str, **columns: list[Any]) -> Dataset:
    """A prompt of one message for each of the contents."""
    prompts = [[{"role": "user", "content": content}] for content in contents]
    return Dataset.from_dict({"prompt": prompts} | columns)


def count(digits: str) -> int:
    """Count digits.

    Args:
        digits: Digits, and whatever else is between them.
    """
    return sum(map(str.isdigit, digits))


def grow(digits: str) -> str:
    """Give an answer of any length. Fails where the digits are no number.

    Args:
        digits: The length.
    """
    return "0" * int(digits)


def called(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    """Messages of each completion, and a little for every digit that the model wrote."""
    return [
        len(messages) + 0.1 * sum(count(message["content"]) for message in messages if message["role"] == "assistant")
        for messages in completions
    ]


class Counting:
    """An environment that judges its rollout by what its one tool has counted. Each instance observes its own number."""

    made = 0

    def __init__(self) -> None:
        self._number = type(self).made
        type(self).made += 1

    def reset(self, **row: Any) -> str:
        self.calls: list[str] = []
        self.row = row
        return str(self._number % 4)

    def count(self, digits: str) -> int:
        """Count digits.

        Args:
            digits: Digits, and whatever else is between them.
        """
        self.calls.append(digits)
        return count(digits)

    def get_reward(self) -> float:
        return float(sum(map(count, self.calls)))


class Growing:
    """An environment with a tool that is awaited, and without an observation. It leaves the reward to others."""

    def reset(self, **row: Any) -> None:
        self.calls: list[str] = []
        self.row = row

    async def grow(self, digits: str) -> str:
        """Give an answer of any length. Fails where the digits are no number.

        Args:
            digits: The length.
        """
        self.calls.append(digits)
        return grow(digits)
