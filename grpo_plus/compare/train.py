"""Every variant trained over several seeds from the same start: which advantages for these rewards, by experiment.

    from grpo_plus.compare.train import Variant, compare

    comparison = compare(task, ["grpo", "gdpo", Variant("dr_grpo", "dr_grpo")], seeds=range(5), folder="comparison")

`task.py` says what a task is. All variants see the same prompts in the same order under the same seed, so they are
compared seed by seed. What is finished stays finished: called again on its folder, a comparison goes on where it was,
with more seeds or variants if there are more, and two processes on one folder share the arms. `sweep.py` says how a
sweep chooses the setting that a variant is judged at.
"""

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from grpo_plus.compare.arm import (
    configuration,
    held_out_samples,
    held_out_scores,
    identity,
    quiet_trainer,
    release,
    train_arm,
)
from grpo_plus.compare.choices import Choices, choose, with_edges
from grpo_plus.compare.comparison import ArmResult, Comparison, StartSignal, arm_folder, at_choices, read_arm
from grpo_plus.compare.gradients import measure_start
from grpo_plus.compare.plan import SEED, Arm, Variant, as_variants, planned_arms
from grpo_plus.compare.start import Start
from grpo_plus.compare.store import ERROR, RESULT, SAMPLES, agree, as_json, check, claim, read_json, write_json
from grpo_plus.compare.sweep import SWEEP_SEEDS, Candidate, Setting, Sweep, candidates, check_items, choosing_half
from grpo_plus.compare.task import Scores, Task
from grpo_plus.config import GRPOPlusConfig
from grpo_plus.report.secrets import masked_text, secrets_of
from grpo_plus.report.text import count

COMPARISON, ARM = "comparison.json", "arm.json"
# Fields of a configuration that do not change what is learned.
INCIDENTAL = ("output_dir", "logging_dir", "run_name", "disable_tqdm", "report_to", SEED)
WAIT = 1.0  # seconds between looks at arms that another process trains


def compare(
    task: Task,
    variants: Sequence[Variant | str],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    sweep: Mapping[str, Sequence[float]] | None = None,
    sweep_seeds: Sequence[int] = SWEEP_SEEDS,
    progress: bool = False,
) -> Comparison:
    """Train every variant on every seed, but for what `folder` holds already.

    An arm that fails is recorded with its traceback, the others go on, and the next call tries it again.

    Args:
        variants: estimators by name, or `Variant`s.
        sweep: values to try by field, such as {"learning_rate": [1e-5, 3e-5]}; several fields make a grid. Each variant
            is judged at its own best setting. None: all variants have the task's own.
        sweep_seeds: the seeds on which the settings are chosen; other seeds than `seeds`.
        progress: whether to print the number of trainings and a line per arm, and to show a bar while an arm trains.

    Raises:
        ValueError: a name is unknown, a configuration is refused, or the folder holds another comparison; raised
            before any work is done.
    """
    chosen = as_variants(variants)
    trainings = _Trainings(task, planned_arms(chosen, seeds), Path(folder), progress)
    if sweep is not None:
        return _swept(trainings, chosen, seeds, Sweep(sweep, sweep_seeds))
    trainings.check(trainings.arms)
    trainings.announce(f"{count(len(chosen), 'variant')} x {count(len(seeds), 'seed')}", len(trainings.arms))
    trainings.train(trainings.arms)
    return trainings.comparison(trainings.arms)


def _swept(trainings: "_Trainings", variants: list[Variant], seeds: Sequence[int], sweep: Sweep) -> Comparison:
    """Train every setting on the choosing seeds, then the chosen ones on the comparison's seeds."""
    sweep.check_seeds(seeds)
    found = candidates(variants, sweep, trainings.own_configuration)
    swept = [candidate.variant for candidate in found]
    choosing = planned_arms(swept, sweep.seeds)
    trainings.check([*choosing, *planned_arms(swept, seeds)])
    many = count(len(variants), "variant")
    to_choose = f"{many} x {count(len(sweep.settings), 'setting')} x {count(len(sweep.seeds), 'seed')} to choose"
    to_judge = f"{many} x {count(len(seeds), 'seed')} to judge"
    trainings.announce(f"{to_choose} + {to_judge}", len(choosing) + len(trainings.arms))
    trainings.measure_start()
    check_items(trainings.start_scores)
    trainings.train(choosing)
    choices = trainings.choices(sweep, found, choosing)
    judging = choices.arms(trainings.arms)
    trainings.train(judging)
    return at_choices(trainings.comparison(judging), trainings.arms, choices)


@dataclass(eq=False)
class _Trainings:
    """The arms of one comparison; trains those that its folder does not hold yet.

    arms: every variant on every seed, as asked for. A sweep trains other arms, too.
    """

    task: Task
    arms: list[Arm]
    folder: Path
    progress: bool
    failures: dict[Arm, str] = field(default_factory=dict)
    done: int = 0
    total: int = 0

    def check(self, arms: Sequence[Arm]) -> None:
        """Refuse what cannot be compared, then record what is."""
        for arm in arms:
            config = configuration(self.task, arm, arm_folder(self.folder, arm))
            if config.world_size > 1:
                raise ValueError(
                    f"A comparison trains in one process, but there are {config.world_size}. Start it without "
                    "`accelerate launch`; two commands on the same folder share the arms."
                )
            if config.use_vllm:
                raise ValueError(
                    "use_vllm=True: every arm would start an engine of its own, and none is let go of. Set "
                    "use_vllm=False, or train the arms one by one with `grpo-plus train`."
                )
        check(self.folder / COMPARISON, self.shared, "a comparison")
        for arm in arms:
            check(arm_folder(self.folder, arm) / ARM, identity(arm), f"the arm {arm.name!r}")
        self.folder.mkdir(parents=True, exist_ok=True)
        agree(self.folder / COMPARISON, self.shared, "a comparison")

    @cached_property
    def shared(self) -> dict[str, Any]:
        """What all arms have in common."""
        config = self.task.config(output_dir=str(self.folder)).to_dict()
        fields = {name: value for name, value in config.items() if name not in INCIDENTAL}
        return as_json({"task": self.task.name, "facts": dict(self.task.facts), "config": fields})

    @cached_property
    def start(self) -> Start:
        """The model that every arm starts from, loaded on first use. A finished comparison loads none."""
        start = Start(self.task.start())
        path = self.folder / "start"
        agree(path / "weights.json", {"sha256": start.digest(), "trainable": start.size}, "a start")
        return start

    def announce(self, how: str, total: int) -> None:
        """Say how many trainings there will be, those that are finished included."""
        self.total = total
        if self.progress:
            print(f"{how} = {count(total, 'training')}", flush=True)

    def train(self, arms: Sequence[Arm]) -> None:
        """Train the arms that nobody has trained; wait for those that another process is training."""
        self.measure_start()
        if any(self._result(arm) is None for arm in arms):
            _ = self.start  # what goes wrong there is the failure of no arm
        waiting = list(arms)
        while waiting:
            left = [arm for arm in waiting if not self._settle(arm)]
            if len(left) == len(waiting):
                time.sleep(WAIT)
            waiting = left

    def comparison(self, arms: Sequence[Arm]) -> Comparison:
        """The results of the arms, and all failures so far."""
        start = read_json(self.folder / "start" / RESULT)
        failures = {arm: text for arm, text in self.failures.items() if self._result(arm) is None}
        signal = StartSignal(**start["signal"])
        return Comparison(self.folder, self.shared, arms, start["scores"], signal, self._results(arms), failures)

    def choices(self, sweep: Sweep, found: Sequence[Candidate], choosing: Sequence[Arm]) -> Choices:
        """What the choosing arms say of the settings."""
        score = next(iter(self.start_scores))
        scores = {arm: choosing_half(result.scores)[score] for arm, result in self._results(choosing).items()}
        return with_edges(choose(sweep, found, scores, score), self._accepts)

    def own_configuration(self, variant: Variant) -> GRPOPlusConfig:
        """The configuration of a variant on the comparison's first seed."""
        return configuration(self.task, Arm(variant, self.arms[0].seed), self.folder)

    def _accepts(self, candidate: Candidate, setting: Setting) -> bool:
        try:
            self.own_configuration(replace(candidate.variant, setting=setting))
        except (ValueError, TypeError):
            return False
        return True

    def _result(self, arm: Arm) -> ArmResult | None:
        return read_arm(arm_folder(self.folder, arm))

    def _results(self, arms: Sequence[Arm]) -> dict[Arm, ArmResult]:
        return {arm: result for arm in arms if (result := self._result(arm)) is not None}

    def _settle(self, arm: Arm) -> bool:
        """Train the arm, unless it is finished. False, without training, while another process holds the arm."""
        folder = arm_folder(self.folder, arm)
        with claim(folder) as mine:
            if not mine:
                return False
            if (result := read_arm(folder)) is not None:
                self._say(arm, f"{_brief(result)} (finished before)")
                return True
            self._try(arm, folder)
            return True

    def _try(self, arm: Arm, folder: Path) -> None:
        try:
            result = train_arm(self.task, self.start, arm, folder, self.start_scores, progress=self.progress)
        # Any error of the user's model, rewards or estimator is this arm's, and the others must not pay for it.
        except Exception as error:
            secrets = secrets_of([self.task.facts, vars(configuration(self.task, arm, folder))])
            self.failures[arm] = masked_text(traceback.format_exc(), secrets)
            (folder / ERROR).write_text(self.failures[arm], encoding="utf-8")
            self._say(arm, masked_text(f"failed: {type(error).__name__}: {error}", secrets))
        else:
            self._say(arm, f"{_brief(result)}, {result.seconds:.0f} s")

    def measure_start(self) -> None:
        """Judge the start, and see what each variant's estimator makes of it, unless the folder says so already."""
        folder = self.folder / "start"
        for _ in _until_claimed(folder):
            if self._knows_start(folder):
                return
            configs = {arm.variant.label: configuration(self.task, arm, folder) for arm in self.arms}
            seed = self.arms[0].seed
            # The start is no run of a logger's, and TRL fails where it generates for trackio without one.
            config = self.task.config(seed=seed, output_dir=str(folder), report_to="none")
            trainer = quiet_trainer(self.task, self.start, config)
            signal = measure_start(trainer, configs)
            scores, samples = held_out_scores(self.task, trainer, seed), held_out_samples(self.task, trainer)
            release(trainer)
            write_json(folder, {SAMPLES: samples, RESULT: {"scores": scores, "signal": asdict(signal)}})

    def _knows_start(self, folder: Path) -> bool:
        if not (folder / RESULT).exists():
            return False
        signal = read_json(folder / RESULT)["signal"]
        return {arm.variant.label for arm in self.arms} <= {*signal["advantages"], *signal["refused"]}

    @property
    def start_scores(self) -> Scores:
        """The held-out scores of the start, once it is measured."""
        scores: Scores = read_json(self.folder / "start" / RESULT)["scores"]
        return scores

    def _say(self, arm: Arm, text: str) -> None:
        self.done += 1
        if self.progress:
            print(f"[{self.done}/{self.total}] {arm.name}: {text}", flush=True)


def _brief(result: ArmResult) -> str:
    name, scores = next(iter(result.scores.items()))
    return f"{name} {sum(scores) / len(scores):.3f}"


def _until_claimed(folder: Path) -> Iterator[None]:
    """Wait while another process holds the folder. Then hold it for one round of the caller's loop."""
    while True:
        with claim(folder) as mine:
            if mine:
                yield
                return
        time.sleep(WAIT)
