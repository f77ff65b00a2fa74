"""Screen at the start of a run with adapters: what is quantized, which dtype trains, its memory, what will hurt."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grpo_plus.models.adapters import adapter_parameters, bits_of, changed_by_init
from grpo_plus.planner import Constants, advise, plan
from grpo_plus.planner.constants import GIB
from grpo_plus.planner.loaded import shape_and_run
from grpo_plus.planner.memory import NF4, NF4_NESTED
from grpo_plus.planner.run import flags
from grpo_plus.qlora.frozen import WARNS, sample

logger = logging.getLogger("grpo_plus")


def setting_check(model: Any, args: Any) -> tuple[list[str], list[str]]:
    """Describe a model with adapters: lines for the screen, and hints, each with the setting that mends it.

    Args:
        args: the trainer's configuration, TRL's or ours.
    """
    return list(_overview(model, args)), [hint for find in HINTS if (hint := find(model, args)) is not None]


def log_setting_check(model: Any, args: Any) -> None:
    """Log the screen at INFO and the hints at WARNING, by the logger "grpo_plus"."""
    overview, hints = setting_check(model, args)
    logger.info("\n".join(overview))
    for hint in hints:
        logger.warning(hint)


def _overview(model: Any, args: Any) -> Iterator[str]:
    quantization = getattr(model.config, "quantization_config", None)
    yield f"Settings of {model.config.name_or_path or type(model.get_base_model()).__name__}"
    if bits_of(model) == 4 and quantization is not None:
        nested = "double quantization" if quantization.bnb_4bit_use_double_quant else "no double quantization"
        compute = _short(quantization.bnb_4bit_compute_dtype)
        yield f"  quantized      4 bits, {quantization.bnb_4bit_quant_type}, {nested}, computed in {compute}"
    else:
        yield f"  quantized      {f'{bits_of(model)} bits' if bits_of(model) else 'no'}"
    for kind, weights in _groups(model).items():
        dtypes = ", ".join(sorted({_short(weight.dtype) for weight in weights}))
        size = sum(_elements(weight) for weight in weights)
        yield f"  {kind:14} {dtypes}, {size:,} weights"
    trained = sum(weight.numel() for _, weight in adapter_parameters(model))
    total = sum(_elements(weight) for weight in model.parameters())
    yield f"  trained        {trained:,} of {total:,} weights ({trained / total:.2%})"
    yield f"  optimizer      {_name(args.optim)}, learning_rate={args.learning_rate}"
    yield from _expected_peak(model, args)


def _expected_peak(model: Any, args: Any) -> Iterator[str]:
    try:
        planned = plan(*shape_and_run(model, args))
    except ValueError as error:
        yield f"  expected peak  unknown: {error}"
        return
    yield from (f"  planner        {note}" for note in planned.shape.notes)
    yield (
        f"  expected peak  {planned.peak / GIB:.2f} GiB of GPU memory, in {planned.binding}, for prompts of "
        f"{planned.run.prompt_length} tokens and completions of full length"
    )


def _groups(model: Any) -> dict[str, list[nn.Parameter]]:
    """Weights by kind: embeddings and head, linear layers, norms and others, adapters."""
    embeddings = {id(weight) for weight in _embeddings(model)}
    groups: dict[str, list[nn.Parameter]] = {"embeddings": [], "linear layers": [], "norms, others": [], "adapters": []}
    for weight in model.parameters():
        if weight.requires_grad:
            groups["adapters"].append(weight)
        elif id(weight) in embeddings:
            groups["embeddings"].append(weight)
        else:
            matrix = weight.dim() > 1 or not weight.is_floating_point()
            groups["linear layers" if matrix else "norms, others"].append(weight)
    return {kind: weights for kind, weights in groups.items() if weights}


def _embeddings(model: Any) -> list[nn.Parameter]:
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [weight for layer in layers if layer is not None for weight in layer.parameters()]


def _elements(weight: Tensor) -> int:
    """Number of weights. Two 4-bit codes share a byte, so `numel` would be half of it."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def _too_small_a_step(model: Any, args: Any) -> str | None:
    weights = [weight for name, weight in adapter_parameters(model) if "lora_A" in name and weight.is_floating_point()]
    sampled = [sample(weight.detach()) for weight in weights if weight.numel() > 0]
    if not sampled or args.learning_rate <= 0:
        return None
    values = torch.cat([values.cpu() for values in sampled])
    share = (values - args.learning_rate).ne(values).float().mean().item()
    if share >= WARNS:
        return None
    dtype = _short(values.dtype)
    fix = "Set adapter_dtype='float32'" if values.dtype != torch.float32 else "Set a larger learning_rate"
    return (
        f"learning_rate={args.learning_rate} is too small for adapters in {dtype}: a step of Adam changes {share:.1%} "
        f"of lora_A, and rounds to nothing on the rest. {fix}."
    )


def _dropout(model: Any, args: Any) -> str | None:
    rate = model.peft_config[model.active_adapters[0]]
    rate = getattr(rate, "lora_dropout", 0.0)
    if not rate:
        return None
    return (
        f"lora_dropout={rate}: the update computes log-probabilities under random masks that the completions were not "
        "sampled with, so the ratio of the policies is noise. Set lora_dropout=0.0."
    )


def _wide_embeddings(model: Any, args: Any) -> str | None:
    wide = [weight for weight in _embeddings(model) if weight.dtype == torch.float32 and not weight.requires_grad]
    if not bits_of(model) or not wide:
        return None
    spare = sum(weight.numel() * 2 for weight in {id(weight): weight for weight in wide}.values()) / GIB
    half = _half_precision(args)
    return (
        f"The embeddings are float32, and with them the residual stream and the cache of the generation; in {half} "
        f"the embeddings alone take {spare:.2f} GiB less. Load the model with dtype='{half}' (--dtype {half})."
    )


def _wide_compute(model: Any, args: Any) -> str | None:
    if bits_of(model) != 4 or _compute_dtype(model) != torch.float32:
        return None
    half = _half_precision(args)
    fix = f"Set bnb_4bit_compute_dtype=torch.{half} (on the command line: --dtype {half})."
    return f"4-bit weights are computed in float32, without the fast kernels. {_for_saved(model, half) or fix}"


def _single_quantization(model: Any, args: Any) -> str | None:
    quantization = getattr(model.config, "quantization_config", None)
    if bits_of(model) != 4 or getattr(quantization, "bnb_4bit_use_double_quant", True):
        return None
    size = sum(_elements(weight) for weight in model.parameters() if getattr(weight, "quant_state", None) is not None)
    fix = "Set bnb_4bit_use_double_quant=True (--use_bnb_nested_quant)."
    return (
        f"No double quantization: the scales take {size * (NF4 - NF4_NESTED) / GIB:.2f} GiB more than they need. "
        f"{_for_saved(model, _half_precision(args)) or fix}"
    )


def _bfloat16_under_float16(model: Any, args: Any) -> str | None:
    if not getattr(args, "fp16", False):
        return None
    emulated = "which cards before Ampere (T4, RTX 20) only emulate"
    if _compute_dtype(model) == torch.bfloat16 and (fix := _for_saved(model, "float16")):
        return f"fp16=True, but 4-bit weights are computed in bfloat16, {emulated}. {fix}"
    if model.get_input_embeddings().weight.dtype != torch.bfloat16:
        return None
    return (
        f"fp16=True, but the weights that are not quantized are bfloat16, {emulated}. Load the model with "
        "dtype='float16' (--dtype float16, or qlora(dtype='float16'))."
    )


def _compute_dtype(model: Any) -> Any:
    return getattr(getattr(model.config, "quantization_config", None), "bnb_4bit_compute_dtype", None)


def _for_saved(model: Any, half: str) -> str | None:
    """What helps where the model was saved quantized. transformers keeps the settings that it was saved with."""
    if not getattr(getattr(model.get_base_model(), "hf_quantizer", None), "pre_quantized", False):
        return None
    dtype = "" if half == "bfloat16" else f"dtype={half!r}"
    flag = "" if half == "bfloat16" else f" --dtype {half} --fp16"
    return (
        f"{model.config.name_or_path!r} was saved with these settings, and transformers keeps them. Name the model "
        f"that it was quantized from, with qlora({dtype}) (--qlora{flag})."
    )


def _moved_reference(model: Any, args: Any) -> str | None:
    """PiSSA and the like subtract the adapter's start from the base, and the reference is the base without adapters."""
    init = changed_by_init(model.peft_config[model.active_adapters[0]])
    if init is None or not getattr(args, "beta", 0.0):
        return None
    return (
        f"beta={args.beta} with init_lora_weights={init!r}: the reference is the base without the adapter, which this "
        "start has changed, so the KL pulls to another model than the one that the training starts from. Set beta=0.0, "
        "or init_lora_weights=True."
    )


def _too_large(model: Any, args: Any) -> str | None:
    if model.device.type != "cuda":
        return None
    constants = Constants(unusable_bytes=0)  # the driver's part is not in what CUDA calls total
    total = torch.cuda.mem_get_info(model.device)[1]
    try:
        shape, run = shape_and_run(model, args)
    except ValueError:
        return None
    planned = plan(shape, run, constants=constants)
    if planned.fits(total):
        return None
    changes = "; ".join(flags(made.settings) for made in advise(shape, total, run, constants=constants).suggestions)
    return (
        f"The planner expects {planned.peak / GIB:.2f} GiB, in {planned.binding}, and the GPU has {total / GIB:.2f}. "
        f"{f'Cheapest changes: {changes}' if changes else 'It knows of no change that helps'}."
    )


HINTS: tuple[Callable[[Any, Any], str | None], ...] = (
    _too_small_a_step,
    _dropout,
    _wide_embeddings,
    _wide_compute,
    _single_quantization,
    _bfloat16_under_float16,
    _moved_reference,
    _too_large,
)


def _half_precision(args: Any) -> str:
    return "float16" if getattr(args, "fp16", False) else "bfloat16"


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _name(optim: Any) -> str:
    return str(getattr(optim, "value", optim))
