"""When transformers' own loop generates: what the grouped loop cannot do, or was not tested for."""

from functools import partial
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode, MaxLengthCriteria, StoppingCriteriaList

from grpo_plus.models.caches import CACHE
from grpo_plus.models.dropout import dropout_of
from grpo_plus.models.pictures import TOKEN_TYPES, Pictures, reads_images
from grpo_plus.models.positions import rescaled_from

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
CACHES = (None, "dynamic", "dynamic_full")
INPUTS = {"attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep", *TOKEN_TYPES}
# From this version on, models that read images take positions in every step, and images are encoded before a loop.
IMAGES_SINCE = Version("5.19")
# Arguments of `generate` that it does not hand on to a loop of ours.
LOST = {"assistant_model", "custom_generate", "streamer", "synced_gpus", "tokenizer"}


def why_not_model(model: PreTrainedModel) -> str | None:
    """Reason that lies in a base model, without wrappers. None where no reason is known."""
    if model.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if model.is_remote_code():
        return "the model's code is not transformers'"
    if isinstance(vars(model).get("generate"), partial) or type(model).generate is not GenerationMixin.generate:
        return "the model came with a generate of its own"
    if reads_images(model) and Version(transformers.__version__) < IMAGES_SINCE:
        return (
            "the model reads more than text, and may keep something about each row outside of the cache before "
            f"transformers {IMAGES_SINCE}, found {transformers.__version__}: pip install -U transformers"
        )
    return None


def why_not_config(config: GenerationConfig) -> str | None:
    """Reason that lies in the generation's settings. None where no reason is known."""
    mode = config.get_generation_mode()
    if mode not in MODES:
        return f"the decoding is {mode.value}"
    if config.cache_implementation not in CACHES:
        return f"cache_implementation={config.cache_implementation!r}"
    if config.use_cache is False:
        return "use_cache=False"
    if config.return_dict_in_generate:
        return "return_dict_in_generate=True asks for more than tokens"
    if config.prefill_chunk_size is not None:
        return f"prefill_chunk_size={config.prefill_chunk_size}"
    if config.guidance_scale not in (None, 1):
        return f"guidance_scale={config.guidance_scale} calls the model between the steps"
    return None


def why_not_batch(model: PreTrainedModel, config: GenerationConfig, arguments: dict[str, Any]) -> str | None:
    """Reason that shows in the arguments of one batch. None where no reason is known.

    Args:
        arguments: transformers' keyword arguments of the model.
    """
    unknown = sorted(name for name, value in arguments.items() if name not in INPUTS and value is not None)
    if unknown:
        return f"the model takes {', '.join(unknown)}"
    cache: Any = arguments.get(CACHE)
    if type(cache) is not DynamicCache:
        return f"the cache is {'missing' if cache is None else f'a {type(cache).__name__}'}"
    if cache.get_seq_length() or getattr(cache, "_is_user_defined", False):
        return "the cache is the caller's"
    if model.training and (dropout := dropout_of(model)):
        return f"{dropout}: every row draws its own, also within its prompt"
    if config.max_length > rescaled_from(model):
        return "the position frequencies (longrope or dynamic) depend on the longest row of the batch"
    return None


def why_not_images(pictures: Pictures | None, rows: int) -> str | None:
    """Reason why images cannot be given to the distinct prompts of a batch of some rows. None where they can."""
    if pictures is None:
        return None
    counts = {len(by_row) for by_row in pictures.images.values()}
    return None if counts == {rows} else f"images of {max(counts)} rows come with {rows} rows of tokens"


def why_not_worth(
    shared: bool, input_ids: Tensor, config: GenerationConfig, criteria: StoppingCriteriaList
) -> str | None:
    """Reason why a batch gains nothing. None where it may."""
    if shared:
        return None
    least = max(config.min_length or 0, input_ids.shape[1] + (config.min_new_tokens or 0))
    forced = least >= config.max_length or all(isinstance(criterion, MaxLengthCriteria) for criterion in criteria)
    return "no prompt is shared, and every row has the greatest length" if forced else None
