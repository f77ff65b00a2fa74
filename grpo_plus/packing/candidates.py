"""Which forms a model's rows may take, before a self-check has judged any of them."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from grpo_plus.models.adapters import has_adapters
from grpo_plus.models.dropout import dropout_of
from grpo_plus.packing.attention import why_not_segments
from grpo_plus.packing.cascade import why_not_cascade
from grpo_plus.packing.forward import Form
from grpo_plus.packing.passes import CACHED, why_not_cached
from grpo_plus.packing.rows import CASCADE, PADDING_FREE, PADDING_FREE_FLASH, SEGMENTS

READS_ROWS = ("XLORA", "POLY")  # PEFT types whose adapters depend on the whole input


def base_model(model: Any) -> PreTrainedModel:
    """Model inside a PEFT model. Any other model as it is."""
    inner: PreTrainedModel = model.get_base_model() if has_adapters(model) else model
    return inner


def why_not_packed(model: Any) -> str | None:
    """Reason why the rows of a model, PEFT included, must stay padded. None where no reason is known."""
    for config in model.peft_config.values() if has_adapters(model) else ():
        if config.is_prompt_learning:
            return "prompt-learning PEFT puts tokens of its own before every row"
        if getattr(config, "alora_invocation_tokens", None) is not None or config.peft_type in READS_ROWS:
            return f"{config.peft_type.value} adapters of this kind look for tokens in the padded rows"
    return None


def candidates(packing: str, base: PreTrainedModel, no_segments: str | None) -> tuple[list[Form], list[str]]:
    """Forms to try, best first, and reasons why other forms are not among them."""
    unshared = _why_not_shared(base)
    cascade = no_segments or unshared or why_not_cascade(base)
    segments, cached = no_segments or why_not_segments(base), why_not_cached(base)
    forms, reasons = [], []
    if packing != "padding_free":
        if unshared:
            reasons.append(unshared)
        else:
            forms += _where([(CASCADE, cascade), (SEGMENTS, segments), (CACHED, cached)])
    if packing != "shared_prompt":
        forms += _where([(PADDING_FREE_FLASH, cascade), (PADDING_FREE, segments)])
    if segments is not None and cascade is not None:
        reasons.append(f"segment attention: {segments}")
    if packing != "padding_free" and cached is not None:
        reasons.append(f"the model's cache: {cached}")
    return forms, reasons


def candidates_with_images(packing: str, base: PreTrainedModel) -> tuple[list[Form], list[str]]:
    """Forms of rows with images to try, and reasons why there are none. Only a cache shares what a model sees."""
    if packing == "padding_free":
        return [], ["packing='padding_free' shares no prompt, and rows with images gain nothing else"]
    reason = _why_not_shared(base) or why_not_cached(base)
    return ([CACHED], []) if reason is None else ([], [reason])


def candidates_of_spread_weights(
    packing: str, base: PreTrainedModel, no_segments: str | None
) -> tuple[list[Form], list[str]]:
    """Forms of text that run every layer once, whatever the rows, and reasons why others are not among them."""
    unshared, segments = _why_not_shared(base), no_segments or why_not_segments(base)
    forms = []
    if packing != "padding_free":
        forms += _where([(SEGMENTS, unshared or segments)])
    if packing != "shared_prompt":
        forms += _where([(PADDING_FREE, segments)])
    return forms, [reason for reason in (unshared, segments) if reason is not None]


def _why_not_shared(base: PreTrainedModel) -> str | None:
    dropout = dropout_of(base)
    return dropout and f"{dropout}: a shared prompt would draw one dropout mask for all of its completions"


def _where(reasons: Sequence[tuple[Form, str | None]]) -> list[Form]:
    return [form for form, reason in reasons if reason is None]
