"""One rank of trainings under `accelerate launch`: writes the rows it trained on and what it logged."""

import functools
import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import DistributedType, PartialState
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer, StepProfile, cli
from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer
from grpo_plus.report.completions import STEP_COLUMNS
from grpo_plus.trainer.update.spread import least
from tests import vllm_standin
from tests.refilling import MIXED, Judge
from tests.training import PROMPTS, brevity, make_trainer, stepwise, vowels, weights_of
from tests.vllm_standin.server import serving


class Recorder(GRPOPlusTrainer):
    """Keeps every row that reaches the loss: prompt, completion and advantage, or one advantage per token."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.rows = []
        self.drifts = []
        self.tokens = []

    def compute_loss(self, model, inputs, *arguments, **keywords):
        decode = self.processing_class.batch_decode
        prompts = decode(inputs["prompt_ids"], skip_special_tokens=True)
        completions = inputs["completion_ids"].tolist()
        self.rows.extend(zip(prompts, completions, inputs["advantages"].tolist(), strict=True))
        self.tokens.append((inputs["completion_mask"].sum().item(), inputs["num_items_in_batch"].item()))
        if "old_per_token_logps" in inputs:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                logps = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])[0]
            self.drifts.append((logps - inputs["old_per_token_logps"]).abs().max().item())
        return super().compute_loss(model, inputs, *arguments, **keywords)


def forgetful(completions: list[str], **_: Any) -> list[float]:
    """One reward too few on the second process, and a judge that is down there for the rest."""
    return [0.0] * (len(completions) - PartialState().process_index)


def short_of_steps(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
    """The steps of one completion too few on the second process."""
    for column in STEP_COLUMNS:
        log_extra(column, [[0]] * (len(completions) - PartialState().process_index))
    return [0.0] * len(completions)


def turnwise(completion_ids: list[list[int]], log_extra: Any, **_: Any) -> list[float]:
    """The steps of `stepwise`, which start from one of three states. The second process meets the last one first."""
    rewards = stepwise(completion_ids, log_extra)
    first = 2 * PartialState().process_index
    counts = [len(range(2, len(ids) - 1, 3)) + 1 for ids in completion_ids]
    log_extra("step_states", [[(first + step) % 3 for step in range(count)] for count in counts])
    return rewards


def even(prompts: list[str], **_: Any) -> list[float]:
    """Right where the prompt's sum begins with an even number."""
    return [float(int(prompt[0]) % 2 == 0) for prompt in prompts]


def refuse(_: Any, inputs: tuple, named: dict[str, Any]) -> None:
    """Fail where rows are packed, and where a self-check decodes its three rows."""
    ids, positions = named["input_ids"], named.get("position_ids")
    if positions is not None and len(positions) == 1 and bool((positions.diff() < 0).any()):
        raise ValueError("no packed rows here")
    if ids.shape == (3, 1):
        raise ValueError("no decoding here")


def of_one_prompt(completions: list[str], prompts: list[str], **_: Any) -> list[float]:
    """`brevity`, where the completions of a call belong to one prompt."""
    assert len(set(prompts)) == 1, prompts
    return brevity(completions)


SAVED = "base"


def save_model(folder: Path) -> None:
    """Save a model for a job with `saved`, which loads the policy and its reference from there."""
    tiny_model(tiny_tokenizer(), hidden_size=32, num_heads=2).save_pretrained(folder / SAVED)


FAULTS = {"rewards": forgetful, "steps": short_of_steps}


def down_after(calls: int) -> Any:
    """A judge that is down on the second process after so many calls."""
    seen: list[int] = []

    def judge(completions: list[str], **_: Any) -> list[float]:
        seen.append(len(completions))
        if len(seen) > calls and PartialState().process_index == 1:
            raise ConnectionError("down")
        return vowels(completions)

    return judge


class Spoiled(Recorder):
    """Breaks on one rank: the loss of some micro-batches by their number from 0, all rewards, or by a signal."""

    spoiled: ClassVar[dict[str, Any]] = {}
    infinite: ClassVar[dict[str, Any]] = {}
    signalled: ClassVar[dict[str, Any]] = {}

    def compute_loss(self, model, inputs, *arguments, **keywords):
        loss = super().compute_loss(model, inputs, *arguments, **keywords)
        rank, call = self.accelerator.process_index, len(self.tokens) - 1
        if self.signalled.get("rank") == rank and self.state.global_step + 1 == self.signalled["step"]:
            signal.raise_signal(signal.SIGTERM)
        return loss * (math.nan if self.spoiled.get("rank") == rank and call in self.spoiled["calls"] else 1.0)


def infinite(reward):
    """The reward function, with an infinity in the first place."""

    @functools.wraps(reward)
    def spoiled(completions, **keywords):
        return [math.inf, *reward(completions, **keywords)[1:]]

    return spoiled


class Sharded(GRPOPlusConfig):
    """FSDP2 on CPUs: accelerate would run DDP there without a word, and asks the kind of its processes alone."""

    def __post_init__(self):
        super().__post_init__()
        assert self.device.type == "cpu"  # reading it makes the processes meet
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def given() -> Callable[..., dict[str, Any]]:
    """Rollouts that depend on the number of the call and on the row alone, however many processes share the rows."""
    calls: list[int] = []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        calls.append(len(prompts))
        first = PartialState().process_index * len(prompts)
        draws = [random.Random(1000 * len(calls) + row) for row in range(first, first + len(prompts))]
        return {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [[draw.randrange(5, 20) for _ in range(draw.randrange(2, 12))] for draw in draws],
            "logprobs": None,
        }

    return rollout


def whole_weights(trainer: GRPOPlusTrainer) -> dict[str, torch.Tensor]:
    """As one process has them. All processes must ask."""
    weights = weights_of(trainer)
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in weights.items()}


@contextmanager
def served(output_dir: Path, config: dict[str, Any]) -> Iterator[None]:
    """The stand-in for vLLM, and a server above it where the configuration asks for one. The first process has it."""
    with ExitStack() as stack:
        stack.enter_context(vllm_standin.installed())
        if os.environ["RANK"] == "0" and config.get("vllm_mode") == "server":
            from vllm import LLM

            engine = LLM(str(output_dir / SAVED), logprobs_mode="processed_logprobs", enable_lora=True)
            config["vllm_server_base_url"] = stack.enter_context(serving(engine)).url
        yield


def run_command(folder: Path, command: list[str]) -> None:
    """Run a command of ours as a user's shell would in that folder, and keep what it prints."""
    printed = StringIO()
    with chdir(folder), redirect_stdout(printed):
        status = cli.main(command)
    (folder / f"printed_{PartialState().process_index}.txt").write_text(printed.getvalue())
    assert status == 0, printed.getvalue()


def train(output_dir: Path, config: dict[str, Any]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    resume_from = config.pop("resume_from", None)
    judge = Judge()
    of_steps = {"process": [stepwise], "turns": [turnwise]}
    task = {"reward_funcs": of_steps.get(config.get("advantage_estimator"), [vowels, brevity])}
    if config.pop("half_dead", False):
        task = {"reward_funcs": [judge], "train_dataset": MIXED}
    if config.get("overlap_rewards") == "groups":
        task = {"reward_funcs": [vowels, of_one_prompt]}
    if fails := config.pop("fails", None):
        task = {"reward_funcs": [FAULTS[fails]]}
    if fails_after := config.pop("fails_after", 0):
        task = {"reward_funcs": [down_after(fails_after)]}
    faults = {name: config.pop(name) for name in ("spoiled", "infinite", "signalled") if name in config}
    refuses = config.pop("refuses", None)
    saves_alone = config.pop("saves_alone", False)
    if faults.get("infinite", {}).get("rank") == PartialState().process_index:
        task = {"reward_funcs": [infinite(vowels), brevity]}
    held_out = {}
    if prompts := config.pop("held_out", 0):
        held_out = {"eval_dataset": PROMPTS.select(range(0, 4 * prompts, 4)), "eval_reward_funcs": even}
    adapter = LoraConfig(r=4, target_modules="all-linear") if config.pop("lora", False) else None
    if config.pop("given", False):
        held_out["rollout_func"] = given()
    trainer = make_trainer(
        output_dir,
        model=str(output_dir / SAVED) if config.pop("saved", False) else None,
        trainer_class=type("Faulty", (Spoiled,), faults),
        config_class=Sharded if "fsdp" in config else GRPOPlusConfig,
        trainer_arguments={"peft_config": adapter, **held_out},
        log_completions=True,
        **task,
        **config,
    )
    rank = PartialState().process_index
    trainer.add_callback(StepProfile(trainer))
    if rank == refuses:
        trainer.model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    start = torch.cat([weight.flatten() for weight in weights_of(trainer).values()])
    if fails:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            trainer.train()
        (output_dir / f"error_{rank}.json").write_text(json.dumps(str(raised.value)))
        return
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume_from and str(output_dir.parent / resume_from))
    except (RuntimeError, ValueError, SystemExit) as left:
        if not (faults or fails_after):
            raise
        error = f"{type(left).__name__}: {left}"
    if saves_alone and rank == 0:
        trainer.save_model(str(output_dir / "alone"))
    written = {
        "least": [least(found[rank]) for found in ((40, 24), (None, 7), (None, None))],
        "error": error,
        "rows": trainer.rows,
        "calls": judge.calls,
        "drifts": trainer.drifts,
        "tokens": trainer.tokens,
        "log": trainer.state.log_history,
        "state": trainer.estimator_state,
        "weights": {name: weight.tolist() for name, weight in whole_weights(trainer).items()},
        "start": start.tolist(),
        "spread": [name for name, weight in weights_of(trainer).items() if isinstance(weight, DTensor)],
        "packing": [choice and choice.description for choice in trainer.speed.packer._choices.values()]
        if trainer.speed.packer
        else [],
    }
    for name, values in written.items():
        (output_dir / f"{name}_{rank}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    before = os.environ.copy()
    for name, config in jobs.items():
        for variable in os.environ.keys() - before.keys():
            del os.environ[variable]  # accelerate leaves word of FSDP to all that follows
        if "command" in config:
            run_command(folder / name, config["command"])
            continue
        with served(folder / name, config) if config.get("use_vllm") else nullcontext():
            train(folder / name, config)
