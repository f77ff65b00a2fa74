"""Forward padded rows without their padding, and each prompt once for all of its completions.

Start reading at `packer.py`, which chooses the form of a model's rows. `check.py` compares a form with plain rows
before its use. Several processes choose together (`joint.py`). A completion sees a shared prompt by cascade attention
(`cascade.py`, on a GPU), by segment attention (`attention.py`), or through the model's own cache (`cached.py`).
`kept.py` normalizes over what a sampler could draw.

To add a form, write a `Form` (`forward.py`) at the end of `rows.py` or of a file of its own, and offer the form in
`candidates.py`. Rows with images have the cached form alone (`seen.py`).
"""

from grpo_plus.packing.candidates import base_model, why_not_packed
from grpo_plus.packing.forward import Head, Logps
from grpo_plus.packing.head import single_pass_head, why_not_single_pass
from grpo_plus.packing.joint import JointPacker
from grpo_plus.packing.kept import Truncated, score_padded, why_not_truncated
from grpo_plus.packing.layout import group_rows
from grpo_plus.packing.packer import PACKING, Packer
from grpo_plus.packing.padded import Layout, Packed, PaddedRows, forward_live, forward_padded
from grpo_plus.packing.regroup import regroup, reorder
from grpo_plus.packing.spread import SpreadPacker

__all__ = [
    "PACKING",
    "Head",
    "JointPacker",
    "Layout",
    "Logps",
    "Packed",
    "Packer",
    "PaddedRows",
    "SpreadPacker",
    "Truncated",
    "base_model",
    "forward_live",
    "forward_padded",
    "group_rows",
    "regroup",
    "reorder",
    "score_padded",
    "single_pass_head",
    "why_not_packed",
    "why_not_single_pass",
    "why_not_truncated",
]
