"""Padded rows through the model without the padding, and each prompt once for all of its completions.

`layout` says where the tokens go, `attention` and `cached` are two ways to let completions see a shared prompt,
`forward` runs them inside the model's forward, `check` holds each to plain rows before it is used, `packer` decides.
"""

from grpo_plus.packing.forward import Head
from grpo_plus.packing.head import single_pass_head, why_not_single_pass
from grpo_plus.packing.packer import (
    PACKING,
    Packed,
    Packer,
    PaddedRows,
    base_model,
    forward_live,
    why_not_packed,
)
from grpo_plus.packing.regroup import regroup, reorder

__all__ = [
    "PACKING",
    "Head",
    "Packed",
    "Packer",
    "PaddedRows",
    "base_model",
    "forward_live",
    "regroup",
    "reorder",
    "single_pass_head",
    "why_not_packed",
    "why_not_single_pass",
]
