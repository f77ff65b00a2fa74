"""What transformers calls the cache of keys and values."""

import inspect

from transformers import GenerationMixin

# `past_key_values` until 5.23, `cache` from 5.24 on: in models, in their outputs and in the arguments of a generation.
_PREPARED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PREPARED else "past_key_values"
