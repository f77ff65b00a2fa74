"""What a config.json says about the quantization that the model was saved with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_plus.planner.shapes import Saved

# Methods whose weights transformers turns back into numbers for training.
DEQUANTIZED = {
    "mxfp4": "quantization_config=Mxfp4Config(dequantize=True)",
    "fp8": "quantization_config=FineGrainedFP8Config(dequantize=True)",
}
BITSANDBYTES = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
LORA_R = 16  # rank where a run above saved codes names none


class Quantization(NamedTuple):
    """A saved quantization: what bitsandbytes holds, the modules that it leaves out, and what to say."""

    saved: Saved | None = None
    skipped: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def quantization_of(config: Mapping[str, Any], name: str) -> Quantization:
    """Read the quantization of a config. An empty one where the model was saved in plain numbers.

    Raises:
        ValueError: a method whose memory the planner does not count, by its name.
    """
    given = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not given:
        return Quantization()
    four = bool(given.get("load_in_4bit", given.get("_load_in_4bit", False)))
    eight = bool(given.get("load_in_8bit", given.get("_load_in_8bit", False)))
    method = str(given.get("quant_method") or ("bitsandbytes" if four or eight else None))
    if method in BITSANDBYTES and (four or eight):
        nested = four and bool(given.get("bnb_4bit_use_double_quant"))
        kind = given.get("bnb_4bit_quant_type", "fp4") if four else "int8"
        skipped = given.get("llm_int8_skip_modules")
        how = f"{kind}, double quantization" if nested else kind
        return Quantization(
            Saved(load_in_4bit=four, load_in_8bit=eight, use_bnb_nested_quant=nested),
            None if not skipped else tuple(skipped),
            (
                f"Saved in {4 if four else 8} bits by bitsandbytes ({how}), where only adapters train. A plan without "
                f"lora_r takes lora_r={LORA_R}.",
            ),
        )
    if method in DEQUANTIZED:
        return Quantization(
            notes=(f"Saved in {method}. Planned in the dtype of the run: training needs {DEQUANTIZED[method]}.",)
        )
    raise ValueError(
        f"{name!r} was saved quantized by quant_method={method!r}, whose memory the planner does not count. Plan the "
        "model that it was quantized from, with --qlora for 4 bits."
    )
