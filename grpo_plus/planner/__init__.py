"""Plan the GPU memory of a GRPO run from the model's config.json alone: no weights, no GPU.

    shape = load_shape("Qwen/Qwen3-4B")
    planned = plan(shape, Run(**QLORA, max_completion_length=1024))
    print(planned.table())
    if not planned.fits(parse_bytes("12GB")):
        print(advise(shape, parse_bytes("12GB"), planned.run).text())

The plan is for one GPU, and transformers generates. Start reading at `memory.py`, which holds the arithmetic.
`constants.py` holds what had to be measured or assumed. `families.py` says how to add an architecture.
It knows some without torch; `built.py` reads the others off the model that transformers builds on the meta device.
`saved_quantization.py` reads in which codes a model was saved, and `loaded.py` counts a model in memory.
"""

from grpo_plus.planner.advise import Advice, Suggestion, advise
from grpo_plus.planner.architecture import shape_of
from grpo_plus.planner.cards import Card, card
from grpo_plus.planner.config_file import load_shape, read_config
from grpo_plus.planner.constants import Constants, load_constants
from grpo_plus.planner.largest import largest, resized
from grpo_plus.planner.longest import Longest, longest, longest_table
from grpo_plus.planner.memory import MemoryPlan, plan
from grpo_plus.planner.run import QLORA, Run, parse_bytes
from grpo_plus.planner.shapes import ModelShape

__all__ = [
    "QLORA",
    "Advice",
    "Card",
    "Constants",
    "Longest",
    "MemoryPlan",
    "ModelShape",
    "Run",
    "Suggestion",
    "advise",
    "card",
    "largest",
    "load_constants",
    "load_shape",
    "longest",
    "longest_table",
    "parse_bytes",
    "plan",
    "read_config",
    "resized",
    "shape_of",
]
