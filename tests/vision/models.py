"""The model of a family with its processor, built in memory."""

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from tests.vision.families import FAMILIES, TEXT, Family
from tests.vision.processors import processor_of, tokenizer_with

ENDS = "STUVWXYZ"  # letters that end a completion, beside the end of sequence


def family(name: str, *, seed: int = 0) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model in float32 and its processor; the caller's random state is left as it was."""
    made = FAMILIES[name]
    tokenizer = tokenizer_with(made.named, made.tokens)
    processor_class = getattr(transformers, made.processor)
    processor = processor_of(processor_class, made.images(), tokenizer, made.turns, **made.settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(_config(made, tokenizer), dtype=torch.float32)
        _widen(model)
    # Completions of an untrained model would all be cut at one length. With several ends, lengths differ.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(ENDS))]
    return model, processor


def _config(family: Family, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return AutoConfig.for_model(
        family.model_type,
        text_config=TEXT | ends | {"vocab_size": len(tokenizer)} | family.text,
        vision_config=family.vision,
        tie_word_embeddings=family.text.get("tie_word_embeddings", False),
        **{name: tokenizer.convert_tokens_to_ids(token) for name, token in family.token_ids.items()},
        **family.config,
    )


def _widen(model: PreTrainedModel) -> None:
    """Draw weights that are large enough for a picture to move the log-probs, as in a trained model."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
