"""Completions that stand in the dataset, as the tokens that the policy would have written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trl import GRPOTrainer, is_conversational

from grpo_plus.trainer.names import tokenizer_of, until_end

FORMS = (
    "None, text, messages of the assistant, {'completion_ids': [...], 'logprobs': [...]} of another policy, or a list "
    "of these"
)


@dataclass(frozen=True)
class Given:
    """A completion of the dataset.

    Attributes:
        completion_ids: its tokens, with the one that ends it.
        logps: what the policy that wrote it gave each token. None where nobody knows.
    """

    completion_ids: list[int]
    logps: list[float] | None = None

    def __post_init__(self) -> None:
        if not self.completion_ids:
            raise ValueError("A completion without a token cannot be trained on. Leave it out of the column.")
        if self.logps is not None and len(self.logps) != len(self.completion_ids):
            raise ValueError(
                f"A completion of {len(self.completion_ids)} tokens has {len(self.logps)} log-probabilities. Give one "
                "for each token, or no 'logprobs'."
            )


def listed(value: Any) -> list[Any]:
    """The completions that one row's value holds: each text, messages, or a dictionary of token ids."""
    parts = value if isinstance(value, list) else [] if value is None else [value]
    return [parts] if parts and _is_message(parts[0]) else parts


def given_of(trainer: GRPOTrainer, prompt: Any, value: Any) -> Given:
    """One of `listed`, tokenized as the policy would have written it after the prompt.

    Raises:
        ValueError: the value holds no completion, or the chat template cannot continue the prompt with it.
    """
    if isinstance(value, Mapping) and "completion_ids" in value:
        vocabulary = trainer.model.config.get_text_config().vocab_size
        if odd := [token for token in value["completion_ids"] if token not in range(vocabulary)]:
            raise ValueError(f"{odd[0]!r} in 'completion_ids' is no token of the model, which has {vocabulary}.")
        return Given(list(value["completion_ids"]), value.get("logprobs"))
    tokenizer = tokenizer_of(trainer)
    ids: list[int] = tokenizer(_text(trainer, prompt, value), add_special_tokens=False)["input_ids"]
    return Given(until_end(trainer, [*ids, tokenizer.eos_token_id]))


def _text(trainer: GRPOTrainer, prompt: Any, value: Any) -> str:
    """What follows the prompt."""
    if not is_conversational({"prompt": prompt}):
        if isinstance(value, str):
            return value
        raise ValueError(f"{value!r} does not complete a prompt of text. A completion is {FORMS}.")
    messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else value
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise ValueError(f"{value!r} does not complete a conversation. A completion is {FORMS}.")
    start, whole = _rendered(trainer, prompt, replies=True), _rendered(trainer, [*prompt, *messages])
    if not whole.startswith(start):
        raise ValueError(
            "The chat template does not continue its own prompt with the completion: it writes "
            f"{whole[-len(whole) + len(start) - 40 :]!r} after {start[-40:]!r}. Give the tokens themselves: "
            "{'completion_ids': [...]}."
        )
    return whole[len(start) :]


def _rendered(trainer: GRPOTrainer, messages: list[Any], *, replies: bool = False) -> str:
    """The conversation as TRL renders prompts; `replies`: with the start of a reply."""
    text: str = trainer.processing_class.apply_chat_template(
        messages,
        chat_template=trainer.chat_template,
        add_generation_prompt=replies,
        tokenize=False,
        **trainer.chat_template_kwargs,
    )
    return text


def _is_message(part: Any) -> bool:
    return isinstance(part, Mapping) and "role" in part
