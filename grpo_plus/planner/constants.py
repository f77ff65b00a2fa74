"""Constants that arithmetic cannot know, each with its source, and how to replace them by your own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from grpo_plus.registry import suggestion

GIB = 2**30
Bytes = dict[str, float]  # by cause


@dataclass(frozen=True)
class Constants:
    """Constants of the planner. `python -m benchmarks.memory` writes a file of the constants that it measured.

    Attributes:
        context_bytes: CUDA context, cuBLAS workspaces and kernels. ASSUMED: 0.6 GiB, not measured here.
        unusable_bytes: bytes of the card that no program gets (driver, display, ECC). ASSUMED: cards sold as 8, 12, 16
            and 24 GB leave about 7.4, 11.3, 15.2 and 23.2 GiB.
        fragmentation: factor of the caching allocator on what comes and goes with the batch. ASSUMED: 1.08.
        activations: factor on the bytes that a layer keeps for its backward. 1.0, because `layer_activations` counts
            the tensors that autograd saves. The count agrees within 1 % with a Qwen3-4B layer on a CPU (161, 235 and
            296 kB per token: bfloat16, TRL's defaults, TRL's defaults with LoRA dropout 0.05).
        head_tokens: rows of a tile of logits of TRL's fused head, its TOKEN_CHUNK_SIZE (trl 1.16,
            trl/kernels/chunked_logprob.py).
        head_vocab: columns of that tile, TRL's chunk_size.
        sampling_copies: float32 copies of the (rows, vocabulary) logits in a step of generation. ASSUMED: 3.
    """

    context_bytes: float = 0.6 * GIB
    unusable_bytes: float = 0.7 * GIB
    fragmentation: float = 1.08
    activations: float = 1.0
    head_tokens: int = 4096
    head_vocab: int = 32768
    sampling_copies: int = 3

    def __post_init__(self) -> None:
        """Refuse a value that no measurement could give."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            least = 1 if entry.name in ("fragmentation", "head_tokens", "head_vocab") else 0
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise ValueError(f"The constant {entry.name}={value!r} is not a number of {least} or more.")


def load_constants(path: str | Path) -> Constants:
    """Load constants from a JSON object. Names that it lacks keep their defaults."""
    try:
        given: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"calibrate={str(path)!r} cannot be read: {error.strerror}. Name a JSON file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f'calibrate={str(path)!r} is not JSON: {error}. Write {{"fragmentation": 1.1}}.') from error
    if not isinstance(given, Mapping):
        raise ValueError(f'calibrate={str(path)!r} is no JSON object. Write for example {{"fragmentation": 1.1}}.')
    known = [entry.name for entry in fields(Constants)]
    for name in given:
        if name not in known:
            raise ValueError(f"calibrate={str(path)!r} has an unknown constant {name!r}.{suggestion(name, known)}")
    return replace(Constants(), **given)
