"""Tokenizers and processors of vision families, built in memory: no hub, no torchvision.

Image processors are transformers' own for PIL. A processor whose class also wants a video processor does without:
transformers' video processors need torchvision.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.smolvlm import processing_smolvlm

from grpo_plus.demo.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Turns:
    """How a family's chat template writes a conversation.

    Attributes:
        opening: stands before the content of a message; "{}" is its role.
        picture: stands for an image, before the processor repeats it.
        closing: stands after the content of a message.
        answer: stands before a completion.
    """

    opening: str
    picture: str
    closing: str
    answer: str

    def template(self) -> str:
        before, after = self.opening.split("{}")
        return (
            "{% for message in messages %}"
            f"{{{{ {before!r} + message['role'] + {after!r} }}}}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for part in message['content'] %}"
            f"{{{{ {self.picture!r} if part['type'] == 'image' else part['text'] }}}}"
            "{% endfor %}{% endif %}"
            "{% for call in message['tool_calls'] or [] %}"
            "{{ '<call>' + call['function'] | tojson + '</call>' }}"
            "{% endfor %}"
            f"{{{{ {self.closing!r} }}}}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ {self.answer!r} }}}}{{% endif %}}"
        )

    def response_template(self, end: str) -> dict[str, Any]:
        """How a completion with tool calls is read."""
        call = {"type": "function", "function": "{content}"}
        calls = {"open": "<call>", "close": "</call>", "content": "json", "repeats": True, "transform": call}
        return {
            "defaults": {"role": "assistant"},
            "start_anchor": self.answer,
            "fields": {"tool_calls": calls, "content": {"close": end, "content": "text"}},
        }


class OfTextAndImages(ProcessorMixin):
    """Base of a processor that has an image processor and a tokenizer alone, whatever its class asks for."""

    video_processor = SimpleNamespace(num_frames=1, fps=1)  # SmolVLM's chat template reads both, without a video too

    def __init__(self, *parts: Any, **settings: Any) -> None:
        given = {name: value for name, value in settings.items() if value is not None}
        super().__init__(*(part for part in parts if part is not None), **given)

    def _process_images(self, images: Any, **settings: Any) -> Any:
        """Give tensors even where none are asked for, as image processors with torchvision do."""
        return super()._process_images(images, **(settings | {"return_tensors": "pt"}))

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def tokenizer_with(named: dict[str, str], tokens: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """The demo's tokenizer of characters with more special tokens.

    Args:
        named: tokens that the tokenizer gives out as attributes, such as `image_token`.
    """
    plain = tiny_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        **plain.special_tokens_map,
        extra_special_tokens=named,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    added = [AddedToken(token, normalized=False, special=True) for token in (*named.values(), *tokens)]
    tokenizer.add_special_tokens({"extra_special_tokens": added})
    return tokenizer


def processor_of(
    processor_class: type[ProcessorMixin],
    image_processor: Any,
    tokenizer: PreTrainedTokenizerFast,
    turns: Turns,
    **settings: Any,
) -> ProcessorMixin:
    tokenizer.response_template = turns.response_template(tokenizer.eos_token)
    made = type(processor_class.__name__, (processor_class, OfTextAndImages), {})
    absent = {"video_processor", "feature_extractor"} & set(processor_class.get_attributes())
    parts = {"image_processor": image_processor, "tokenizer": tokenizer} | dict.fromkeys(absent)
    # SmolVLM's class asks for a package that spells the number of a video's frames.
    with patch.object(processing_smolvlm, "num2words", str):
        return made(chat_template=turns.template(), **parts, **settings)
