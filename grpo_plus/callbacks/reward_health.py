"""Read the log of any GRPO run, TRL's or ours, for a run that cannot learn and for rewards that stop teaching."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grpo_plus.advantages import ESTIMATORS

LENGTH, ENTROPY = "completions/mean_length", "entropy"
DEAD_GROUPS = "advantages/dead_groups"
ZERO_SPREAD, REWARD_SHARE = "advantages/zero_spread/", "advantages/reward_share/"
CUT_OFF, GRADIENT = "completions/clipped_ratio", "grad_norm"
# Why nothing is learned, the most special cause first: a log counts for the first that holds.
IDLE = ("weights", "cut_off", "greedy", "constant", "dead_groups", "gradient")
# Groups that must be dead in a row, once others have not been: where tasks are hard, five small batches often are.
MANY_GROUPS = 64
# Sampling below these chooses the likeliest token, and the completions of a prompt are copies.
COLD, NARROW = 0.05, 0.01
# Share of completions cut off and masked from which on hardly anything is trained on.
MOST = 0.95
# Share of groups from which on a reward that differs in them counts beside another.
COUNTS = 0.1
# TRL writes float32 statistics: equal rewards can show a std of about 1e-7 of their value.
ROUNDING = 1e-6

MORE = "docs/troubleshooting.md"

Logs = dict[str, Any]
Finding = tuple[str, str | None]


class RewardHealthCallback(TrainerCallback):
    """Warns, once per cause and with what to try, when the log says that the run cannot learn, or not what it should.

    A run cannot learn where the rewards of every group are equal, every completion is cut off and masked, the sampling
    is greedy, or every reward weight is 0. A run may learn something else where one reward counts alone, lengths
    drift, or the entropy collapses. A cause must show in `patience` training logs in a row. Dead groups must be 64 in a
    row where earlier ones were alive. The callback reads the `advantages/` figures of GRPOPlusTrainer, or else what TRL
    logs. Evaluation logs are ignored. A resumed run continues from the log of its checkpoint.

    GRPOPlusTrainer adds one by itself; `health_warnings=False` leaves it out.

    Args:
        weights: reward name -> weight. A reward of weight 0 is only watched, and may do what it likes. None: all count,
            unless `reward_weights` of the arguments are all 0.
        patience: number of logs in a row. Length and entropy are compared with their mean over as many first logs.
        dead_groups: share of groups with advantages of 0 only, from which on most of the batch is idle.
        reward_share: share of the centered reward above which one function drives the update alone.
        length_ratio: factor by which the mean length may grow or shrink.
        length_correlation: largest harmless |correlation| of advantage and length.
        entropy_ratio: share of its mean over the first `patience` logs below which the entropy counts as collapsed.
    """

    def __init__(
        self,
        *,
        weights: Mapping[str, float] | None = None,
        patience: int = 5,
        dead_groups: float = 0.95,
        reward_share: float = 0.95,
        length_ratio: float = 2.0,
        length_correlation: float = 0.8,
        entropy_ratio: float = 0.1,
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience={patience} is a number of logs in a row. Use 1 to warn at the first sign.")
        if length_ratio <= 1:
            raise ValueError(f"length_ratio={length_ratio} is a factor of growth or shrinkage. Use more than 1.")
        shares = {
            "dead_groups": dead_groups,
            "reward_share": reward_share,
            "length_correlation": length_correlation,
            "entropy_ratio": entropy_ratio,
        }
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"{name}={share} is a share. Use a value above 0 and at most 1.")
        self.weights = weights
        self.patience = patience
        self.dead_groups = dead_groups
        self.reward_share = reward_share
        self.length_ratio = length_ratio
        self.length_correlation = length_correlation
        self.entropy_ratio = entropy_ratio
        self._warned: set[str] = set()
        self._forget()

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Start anew, or from the log of the checkpoint that the run resumes."""
        self._forget()
        for entry in state.log_history:
            self._read(entry, args)

    def on_log(self, args: Arguments, state: State, control: Control, logs: Logs | None = None, **kwargs: Any) -> None:
        """Warn of causes that have shown for `patience` logs."""
        for cause, message in self._read(logs or {}, args):
            needed = self._needed(args, state) if cause == "dead_groups" else self.patience
            if message and self._streak[cause] >= needed and cause not in self._warned:
                self._warned.add(cause)
                if state.is_world_process_zero:
                    row = f"Step {state.global_step}, {needed} logs in a row"
                    warnings.warn(f"{row}: {message} More: {MORE}.", stacklevel=2)

    def _forget(self) -> None:
        self._streak: defaultdict[str, int] = defaultdict(int)
        self._first: defaultdict[str, list[float]] = defaultdict(list)
        self._lived = False  # whether any log had groups that teach

    def _needed(self, args: Arguments, state: State) -> int:
        """Logs in a row that make out `MANY_GROUPS` groups, where some groups have taught before."""
        names = "generation_batch_size", "num_generations", "gradient_accumulation_steps", "steps_per_generation"
        sizes: list[Any] = [getattr(args, name, None) for name in (*names, "num_iterations")]
        if not self._lived or not all(isinstance(size, int) and size > 0 for size in sizes):
            return self.patience
        batch, generations, accumulation, per_batch, uses = sizes
        batches = max(1, state.logging_steps * accumulation // (per_batch * uses)) if state.logging_steps else 1
        return max(self.patience, math.ceil(MANY_GROUPS * generations / (batch * batches)))

    def _counts(self, name: str) -> bool:
        return self.weights is None or self.weights.get(name, 1.0) != 0

    def _read(self, logs: Logs, args: Arguments) -> list[Finding]:
        """Count one log. A cause about which the log says nothing keeps its streak."""
        # TRL logs None where no completion of the window had a value; some integrations turn that into NaN.
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float) and math.isfinite(value)}
        for key in (LENGTH, ENTROPY):
            if key in numbers and len(self._first[key]) < self.patience:
                self._first[key].append(numbers[key])
        findings = [*self._idle(numbers, args), *self._dominant(numbers, args)]
        findings += [*self._drifted(numbers), *self._collapsed(numbers)]
        for cause, message in findings:
            self._streak[cause] = self._streak[cause] + 1 if message else 0
        return findings

    def _idle(self, logs: Logs, args: Arguments) -> Iterator[Finding]:
        """Why nothing is learned: one cause at most. A log of no training says nothing about any."""
        share = logs.get(DEAD_GROUPS, logs.get("frac_reward_zero_std"))
        constant = self._constant(logs)
        if share is None and constant is None and GRADIENT not in logs:
            return
        # Under scale_rewards="batch" TRL's figure is a flag of the whole batch; ours stays a share of groups.
        dead = share is not None and share >= self.dead_groups
        self._lived |= not dead
        found = {
            "weights": self._weightless(args),
            "cut_off": _cut_off(logs, args),
            "greedy": _greedy(args) if dead else None,
            "constant": constant,
            "dead_groups": None
            if not dead
            else (
                f"in {share:.0%} of the groups no completion is better or worse than another, and these teach nothing. "
                "Try prompts of another difficulty, a larger num_generations, a higher temperature, or a reward with "
                "partial credit."
            ),
            "gradient": None
            if logs.get(GRADIENT, 1.0) != 0
            else (
                "the gradient is 0, and the weights stay as they are. Check the advantages (advantages/frac_zero in "
                "the log), and that a part of the model trains."
            ),
        }
        first = next((cause for cause in IDLE if found[cause]), None)
        for cause in IDLE:
            yield cause, found[cause] if cause == first else None

    def _weightless(self, args: Arguments) -> str | None:
        weights = list((self.weights or {}).values()) or getattr(args, "reward_weights", None)
        if not weights or any(weights):
            return None
        return (
            "every reward weight is 0, so no completion is better than another. Set reward_weights to other numbers "
            "for the rewards that should teach."
        )

    def _constant(self, logs: Logs) -> str | None:
        """Whether no reward that counts tells the completions of any group apart."""
        same: dict[str, str] = {}
        for key, std in logs.items():
            name = key.removeprefix("rewards/").removesuffix("/std")
            if not (key.startswith("rewards/") and key.endswith("/std") and self._counts(name)):
                continue
            mean = logs.get(f"rewards/{name}/mean", 0.0)
            # Where rewards of steps decide, what the function returned may be constant; our figure knows.
            if logs.get(ZERO_SPREAD + name, float(std <= ROUNDING * abs(mean))) < 1:
                return None
            same[name] = f"reward {name!r} (mean {mean:.4g})"
        if not same:
            return None
        return (
            f"{' and '.join(same.values())} {'does' if len(same) == 1 else 'do'} not tell the completions of any group "
            "apart, and nothing is learned. If it is at its best, drop it or make it harder; if at its worst, check "
            "its parsing on the logged completions (log_completions=True), or try a higher temperature."
        )

    def _dominant(self, logs: Logs, args: Arguments) -> Iterator[Finding]:
        normalize = ', or an estimator that normalizes each reward by itself: advantage_estimator="gdpo"'
        advice = "a smaller weight for it in reward_weights" + ("" if _normalizes_each(args) else normalize)
        for key, share in logs.items():
            if key.startswith(REWARD_SHARE):
                name = key.removeprefix(REWARD_SHARE)
                # Beside rewards that are the same everywhere, one makes all the difference, and nothing is wrong.
                others = [k.removeprefix(REWARD_SHARE) for k in logs if k.startswith(REWARD_SHARE) and k != key]
                overshadows = any(logs.get(ZERO_SPREAD + other, 0.0) <= 1 - COUNTS for other in others)
                message = (
                    f"reward {name!r} makes up {share:.0%} of the differences between completions; the other rewards "
                    f"hardly count. Try {advice}."
                )
                yield f"dominant/{name}", message if share > self.reward_share and overshadows else None

    def _drifted(self, logs: Logs) -> Iterator[Finding]:
        if LENGTH in logs:
            length, first = logs[LENGTH], _mean(self._first[LENGTH])
            cut = logs.get("completions/clipped_ratio")
            message = (
                f"completions have {length:.0f} tokens on average and had {first:.0f} at first"
                f"{'' if cut is None else f', {cut:.0%} of them cut off at max_completion_length'}. Check that no "
                'reward pays for length as such; try loss_type="dr_grpo" or "dapo", or a penalty for overlong ones.'
            )
            drifted = length > first * self.length_ratio or length * self.length_ratio < first
            yield "length", message if drifted else None
        if "advantages/length_correlation" in logs:
            correlation = logs["advantages/length_correlation"]
            message = (
                f"the advantages follow the length of the completions (correlation {correlation:+.2f}): the policy is "
                f"taught to write {'longer' if correlation > 0 else 'shorter'}. Check whether a reward measures length "
                "instead of quality."
            )
            yield "length_correlation", message if abs(correlation) > self.length_correlation else None

    def _collapsed(self, logs: Logs) -> Iterator[Finding]:
        if ENTROPY in logs:
            entropy, first = logs[ENTROPY], _mean(self._first[ENTROPY])
            message = (
                f"the entropy fell to {entropy:.3g} from {first:.3g}: completions of one prompt become copies of each "
                "other. Try a lower learning_rate, a larger epsilon_high (0.28), a KL term (beta > 0), or a higher "
                "temperature."
            )
            yield "entropy", message if entropy < self.entropy_ratio * first else None


def _cut_off(logs: Logs, args: Arguments) -> str | None:
    share = logs.get(CUT_OFF, 0.0)
    if not getattr(args, "mask_truncated_completions", False) or share < MOST:
        return None
    return (
        f"{share:.0%} of the completions reach max_completion_length={args.max_completion_length} without an end, and "
        "mask_truncated_completions=True leaves none of these to train on. Raise max_completion_length, check that the "
        "model can write its end-of-sequence token, or set mask_truncated_completions=False."
    )


def _greedy(args: Arguments) -> str | None:
    limits = {"temperature": COLD, "top_k": 1, "top_p": NARROW}
    values = {name: getattr(args, name, None) for name in limits}
    cold = [
        f"{name}={value}"
        for name, value in values.items()
        if isinstance(value, int | float) and 0 < value <= limits[name]
    ]
    if not cold:
        return None
    return (
        f"with {', '.join(cold)} the likeliest token is chosen each time, the completions of a prompt are copies, and "
        "no one is better than another. Sample with temperature=1.0, top_k=0 and top_p=1.0."
    )


def _normalizes_each(args: Arguments) -> bool:
    """Whether the run divides each reward function by its own spread already."""
    name = getattr(args, "advantage_estimator", None)
    if name is None:
        return getattr(args, "multi_objective_aggregation", None) == "normalize_then_sum"
    return ESTIMATORS[name].normalizes_each


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
