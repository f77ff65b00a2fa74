"""Which rows of the dataset a generation batch has, where `prompt_sampler` decides.

The data loader fetches rows before the rewards of the last batch are known, and a run that resumes makes it skip
batches. So the rows that it brings only count: they are replaced where the batch is about to be generated, by rows that
every process draws alike.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from grpo_plus.advantages import Rewards
from grpo_plus.config.evaluation import chosen_reward
from grpo_plus.config.prompts import PassRate, check_drawable, prompt_sampler_of
from grpo_plus.trainer.batches.pass_rates import PassRates
from grpo_plus.trainer.names import log_value

if TYPE_CHECKING:
    from grpo_plus.trainer.seam import TRLSeam


def rows_at(trainer: "TRLSeam", indices: list[int], local_rows: int, columns: tuple[str, ...]) -> list[dict[str, Any]]:
    """This process's rows of the prompts at `indices`, each as often as it is completed.

    Args:
        indices: of all processes.
        columns: what the dataloader left: other columns would not reach the reward functions every time.
    """
    first = trainer.accelerator.process_index * local_rows
    rows = [trainer.train_dataset[indices[i // trainer.num_generations]] for i in range(first, first + local_rows)]
    return [{name: value for name, value in row.items() if name in columns} for row in rows]


@dataclass
class DrawsOfStep:
    """Numbers the draws of an optimizer step. Counted from its start, a resumed run counts alike."""

    last: tuple[int, int] = (-1, 0)  # the step, and how many draws it has taken before

    def next(self, step: int) -> tuple[int, int]:
        """The step, and the number of its next draw."""
        before, number = self.last
        self.last = step, number + 1 if before == step else 0
        return self.last


class PromptSampler:
    """Draws the prompts of one run by how often they were solved."""

    def __init__(self, trainer: "TRLSeam", rule: PassRate) -> None:
        self._trainer = trainer
        self._rule = rule
        self._reward = chosen_reward(
            rule.reward,
            trainer.reward_func_names,
            asking=f"prompt_sampler={trainer.plus.prompt_sampler}",
            setting="its keyword reward",
        )
        # Rewards come as float32: one of 0.9 is below the float64 of that name.
        self._threshold = torch.tensor(rule.threshold, dtype=torch.float32).item()
        self._rates = PassRates(len(trainer.train_dataset), rule.decay)
        self.reset()

    def reset(self) -> None:
        """Begin a training. What is known of the prompts stays."""
        self._draws = DrawsOfStep()
        self._of_batch: set[int] = set()
        self._drawn: list[int] = []

    def replaced(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """This process's rows of a generation batch, in the place of those that the data loader brought."""
        trainer = self._trainer
        self._of_batch = set()
        indices = self.draw(len(inputs) * trainer.accelerator.num_processes // trainer.num_generations)
        return rows_at(trainer, indices, len(inputs), tuple(inputs[0]))

    def draw(self, prompts: int) -> list[int]:
        """Rows of the dataset for all processes, without those that the generation batch has had already."""
        trainer = self._trainer
        seed = (trainer.args.seed, *self._draws.next(trainer.state.global_step))
        self._drawn = self._rates.draw(prompts, self._rule.floor, seed, self._of_batch)
        self._of_batch.update(self._drawn)
        return self._drawn

    def take(self, rewards: Rewards) -> None:
        """Count what the completions of the last draw have earned, those of dead groups too."""
        values = rewards.values[..., rewards.index(self._reward)].cpu()
        passed, judged = (values >= self._threshold).sum(-1), (~values.isnan()).sum(-1)
        self._rates.add(self._drawn, passed, judged)
        rates = passed / judged
        log_value(self._trainer, "sampling/visited_prompts", self._rates.visited, latest=True)
        if judged.any():
            log_value(self._trainer, "sampling/pass_variance", (rates * (1 - rates)).nanmean().item())

    @property
    def _counted(self) -> dict[str, Any]:
        """What the counts are of."""
        return {"size": len(self._trainer.train_dataset), "reward": self._reward, "threshold": self._rule.threshold}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, for JSON."""
        return self._counted | self._rates.state()

    def load(self, state: dict[str, Any] | None) -> None:
        """Take up what `state` returned. None, or counts of other prompts or passes: begin anew.

        Raises:
            ValueError: the state is damaged.
        """
        if state is not None and not isinstance(state, dict):
            raise ValueError(f"prompts is {state!r}, where a dictionary belongs.")
        counted = self._counted
        found = None if state is None else {name: state.get(name) for name in counted}
        if state is not None and found == counted:
            self._rates.load(state)
            return
        warnings.warn(
            f"The checkpoint holds {_passes(found)}, and this run counts {_passes(counted)}: prompt_sampler starts "
            "without memory, as in a new run.",
            stacklevel=2,
        )
        self._rates.clear()


def _passes(counted: dict[str, Any] | None) -> str:
    """In words, what counts are of."""
    if counted is None:
        return "no passes of prompts"
    return f"passes of {counted['size']} prompts by {counted['reward']!r} of at least {counted['threshold']}"


def sampler_of_prompts(trainer: "TRLSeam") -> PromptSampler | None:
    """What the configuration asks for; None for TRL's own order."""
    check_drawable(trainer.plus, trainer.train_dataset)
    rule = prompt_sampler_of(trainer.plus)
    return None if rule is None else PromptSampler(trainer, rule)
