"""What a trainer would sample and how it would score it, for tools that train nothing."""

import itertools
from collections.abc import Iterator

from torch import Tensor

from grpo_plus.advantages import Rewards
from grpo_plus.trainer.names import ROWS, multimodal, trained_tokens, whole_rows
from grpo_plus.trainer.seam import TRLSeam


def sampled_batches(trainer: TRLSeam, count: int) -> Iterator[tuple[Rewards, dict[str, Tensor]]]:
    """Generation batches as the training would sample them from the model as it is: rewards, and rows for `logps_of`.

    Rows are in the order of the groups; {} in place of rows with images. Nothing is trained; the random state moves on.
    """
    trainer.model.train()
    # TRL repeats a batch for every step that trains on it.
    repeats = trainer.num_iterations * trainer.args.steps_per_generation
    for inputs in itertools.islice(trainer.get_train_dataloader(), 0, count * repeats, repeats):
        output = trainer._generate_and_score_completions(inputs)
        is_text = not multimodal(output)
        yield trainer.rewards, {name: output[name] for name in ROWS if name in output and is_text}


def logps_of(trainer: TRLSeam, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T) of the completions, as the training differentiates them, and their mask (B, T)."""
    logps, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, *whole_rows(rows))
    return logps, trained_tokens(rows)
