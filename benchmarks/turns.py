"""Two turns of a tool loop: the whole transcript of each row anew, or what the transcripts begin with once.

python -m benchmarks.turns [--device cuda|cpu] [--pairs 5]

Prompts of 256 tokens, 4 groups of 8 rows. A row writes up to 32 tokens, gets a reply of 128 tokens that no other row
gets, and writes up to 32 more. Rows end with the same probability at every token, 45 % of the longest on average before
the cut. The model is Qwen3-shaped with random weights, float32 on a CPU and bfloat16 on a GPU. The tokens of all arms
are compared first, in float32: other tokens end the run. Then the arms take turns; a ratio is the median over rounds,
of seconds of both turns. On a CPU: seconds of the process, one thread. Writes benchmarks/results/turns_<device>.json.
"""

import argparse
import json
import math
import os
import statistics
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from benchmarks.generation import EOS, PAD, VOCABULARY, small_model
from benchmarks.lengths import FixedLengths, geometric
from benchmarks.machine import RESULTS, describe, device_name, seconds
from grpo_plus.rollout import Rollouts, Statistics
from grpo_plus.rollout.passes import LEAST_SAVED

PROMPT, FIRST, REPLY, SECOND, GROUPS, GENERATIONS = 256, 32, 128, 32, 4, 8
ARMS = ("trl", "each row", "beginnings once")


def main() -> None:
    """Compare the tokens, then time every arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = small_model("m").to(args.device)
    arms = {name: Turns(model, name) for name in ARMS}
    drawn = [arm.generate(seed=0) for arm in arms.values()]  # in float32, also on a GPU
    if not all(found == drawn[0] for found in drawn):
        raise SystemExit("other tokens than transformers' own loop")
    if args.device == "cuda":
        model.to(torch.bfloat16)
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for pair in range(args.pairs):
        for name, arm in arms.items():
            times[name].append(seconds(lambda arm=arm, pair=pair: arm.generate(seed=pair), args.device))
    command = f"python -m benchmarks.turns --device {args.device} --pairs {args.pairs}"
    machine = describe() | {"device": device_name(args.device), "threads": 1, "load": round(os.getloadavg()[0], 1)}
    rows = [_row(name, times, arms[name]) for name in ARMS]
    for row in rows:
        print(f"{row['arm']:<16} {row['seconds']:6.2f} s  {row['speed_up']:.2f}x  {row['prefilled']} tokens of prompts")
    path = RESULTS / f"turns_{args.device}.json"
    path.write_text(json.dumps({"command": command, "machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"written to {path.name}")


def _row(name: str, times: dict[str, list[float]], arm: "Turns") -> dict[str, Any]:
    ratios = [trl / ours for trl, ours in zip(times["trl"], times[name], strict=True)]
    return {
        "arm": name,
        "seconds": statistics.median(times[name]),
        "speed_up": statistics.median(ratios),
        "slowest": min(ratios),
        "fastest": max(ratios),
        "prefilled": arm.prefilled,
    }


class Turns:
    """Both turns of one batch by one of the arms.

    Attributes:
        prefilled: tokens of prompts that went through the model in both turns, padding included, the last time.
    """

    def __init__(self, model: PreTrainedModel, arm: str) -> None:
        self.model, self.arm = model, arm
        self.rollouts = None if arm == "trl" else Rollouts(insists=True)
        self.prefilled = 0

    def generate(self, *, seed: int) -> list[list[int]]:
        """Ids of each row's transcript. The same seed gives the same lengths and replies."""
        generator = torch.Generator().manual_seed(seed)
        prompts = torch.randint(5, VOCABULARY, (GROUPS, PROMPT), generator=generator)
        replies = torch.randint(5, VOCABULARY, (GROUPS * GENERATIONS, REPLY), generator=generator).tolist()
        rows = prompts.repeat_interleave(GENERATIONS, 0).tolist()
        self.prefilled = 0
        rows = self._turn(rows, FIRST, seed, generator)
        return self._turn([row + reply for row, reply in zip(rows, replies, strict=True)], SECOND, seed, generator)

    def _turn(self, rows: list[list[int]], longest: int, seed: int, generator: torch.Generator) -> list[list[int]]:
        """Each row with what it has written."""
        lengths = geometric(len(rows), longest, generator)
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True, padding_side="left").long()
        config = GenerationConfig(
            max_new_tokens=longest, do_sample=True, top_k=0, pad_token_id=PAD, eos_token_id=EOS, disable_compile=True
        )
        # Without sharing, a further pass never saves enough.
        least = {} if self.arm == "beginnings once" else {self.model.device.type: math.inf}
        torch.manual_seed(seed)
        with torch.no_grad(), patch.dict(LEAST_SAVED, least), self._decoding():
            found: Tensor = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([FixedLengths([lengths], EOS)]),
            )
        self.prefilled += Statistics.joined(self.rollouts.statistics).prefilled if self.rollouts else ids.numel()
        written = found[:, ids.shape[1] :].tolist()
        return [row + new[:length] for row, new, length in zip(rows, written, lengths.tolist(), strict=True)]

    def _decoding(self) -> Any:
        return self.rollouts.decoding(self.model) if self.rollouts else nullcontext()


if __name__ == "__main__":
    main()
