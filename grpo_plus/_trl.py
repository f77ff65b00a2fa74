"""The seam to TRL: the only module that names TRL's private methods, dictionary keys and attributes.

`TRLSeam` turns TRL's private data into our values, calls a public hook, and puts the answer back. Nothing of TRL is
copied or patched. When TRL moves, this file and `trl_fingerprints.json` change, and nothing else should have to.
"""

import warnings
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import gather
from packaging.specifiers import SpecifierSet
from torch import Tensor
from trl import GRPOTrainer

from grpo_plus.advantages import Rewards, checked

TESTED_TRL = SpecifierSet(">=1.15,<1.17")

# Fingerprinted for each tested version. The first two are overridden. Of the others the seam assumes what they do with
# the advantages: `_prepare_inputs` carries them to the loss, `_compute_loss` uses them, `log` writes them out.
RELIED_ON = ("_calculate_rewards", "_generate_and_score_completions", "_prepare_inputs", "_compute_loss", "log")


def untested_version(installed: str) -> str | None:
    """A warning for a TRL outside the window that the suite runs on; None inside it."""
    if TESTED_TRL.contains(installed, prereleases=True):
        return None
    return (
        f"grpo_plus was tested with trl {TESTED_TRL}, found {installed}. `grpo-plus doctor` says whether anything "
        "that it relies on has changed."
    )


if message := untested_version(version("trl")):
    warnings.warn(message, stacklevel=2)


class TRLSeam(GRPOTrainer):
    """GRPOTrainer with its decision about advantages as a public hook, for subclasses to override."""

    _tag_names = [*GRPOTrainer._tag_names, "grpo_plus"]  # noqa: RUF012  (TRL declares it so)
    _rewards: Rewards

    def estimate_advantages(self, rewards: Rewards) -> Tensor | None:
        """Advantages of one generation batch.

        Args:
            rewards: of all processes, alike on each of them.

        Returns:
            (P, G) advantages, or None to keep the ones that TRL computed. They are checked: another shape or a value
            that is not finite is an error.
        """
        return None

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards_per_func.device)
        self._rewards = Rewards.from_table(
            rewards_per_func,
            num_generations=self.num_generations if self.model.training else self.num_generations_eval,
            weights=self.reward_weights,
            names=tuple(self.reward_func_names),
            lengths=gather(lengths),
        )
        return rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        advantages = self.estimate_advantages(self._rewards)
        if advantages is not None:
            advantages = checked("hook estimate_advantages", advantages, self._rewards)
            self._replace_advantages(output, advantages.flatten().to(output["advantages"]))
        return output

    def _replace_advantages(self, output: dict[str, Any], advantages: Tensor) -> None:
        """Put all processes' advantages (P*G,) in the place of TRL's: this rank's for the loss, all in the log."""
        local_rows = output["advantages"].shape[0]
        first = self.accelerator.process_index * local_rows
        output["advantages"] = advantages[first : first + local_rows]
        logged = self._logs["advantages"]
        for _ in range(min(advantages.shape[0], len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
