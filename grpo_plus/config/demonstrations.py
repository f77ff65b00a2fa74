"""Which settings can have completions of the dataset in a group."""

from typing import TYPE_CHECKING, Any

from grpo_plus.config.overlap import BATCH, GROUPS
from grpo_plus.losses import LOSSES
from grpo_plus.losses.demonstrations import BY_DEFAULT, UNJUDGED, check_demonstration_loss, differ_by_token

if TYPE_CHECKING:
    from grpo_plus.config.fields import GRPOPlusConfig


def check_demonstrations(config: "GRPOPlusConfig") -> None:
    """Refuse a loss in which demonstrations mean nothing, and settings that know no other sampler than the policy."""
    column, chosen = config.demonstration_column, config.demonstration_loss
    if column is None:
        if chosen is not None:
            raise ValueError(
                f"demonstration_loss={chosen!r} has no effect without demonstration_column. Set it to the column that "
                "holds the completions."
            )
        return
    if not isinstance(column, str) or not column:
        raise ValueError(
            f"demonstration_column={column!r} must be the name of a column of train_dataset, such as 'solution'."
        )
    assert not isinstance(chosen, str)  # the configuration has read it
    chosen = chosen or BY_DEFAULT
    check_demonstration_loss(chosen)
    _check_loss(config, chosen)
    if config.truncated_sampling is not None:
        raise ValueError(
            f"demonstration_column={column!r}: truncated_sampling={config.truncated_sampling!r} knows what the sampler "
            "could draw, and nobody knows that of given completions. Leave one of the two unset."
        )
    overlap = config.overlap_rewards
    if GROUPS in (overlap.values() if isinstance(overlap, dict) else [overlap]):
        raise ValueError(
            f"demonstration_column={column!r}: overlap_rewards={overlap!r} judges groups while they are drawn, and "
            f"knows no completion of the dataset. Take {BATCH!r}."
        )
    if config.refill_buffer:
        raise ValueError(
            f"demonstration_column={column!r}: refill_buffer={config.refill_buffer} is tested with drawn completions "
            "alone. Set refill_buffer=0."
        )
    if config.max_refills and set(chosen) & set(UNJUDGED):
        raise ValueError(
            f"demonstration_loss={chosen!r} with max_refills={config.max_refills} would replace groups that teach by "
            "their demonstration alone. Set max_refills=0."
        )
    if config.remove_unused_columns:
        raise ValueError(
            f"remove_unused_columns=True drops the column {column!r} of demonstration_column. Set "
            "remove_unused_columns=False, TRL's default."
        )


def _check_loss(config: "GRPOPlusConfig", chosen: dict[str, Any]) -> None:
    loss = LOSSES[config.loss_type]
    if not loss.reinforce_on_policy:
        raise ValueError(
            f"loss_type={loss.name!r} does not promise `reinforce_on_policy`: a completion without a ratio means "
            "nothing to it. Take a loss such as 'dapo', or leave demonstration_column unset."
        )
    if not differ_by_token(chosen):
        return
    by_sequence = config.importance_sampling_level == "sequence"
    if by_sequence or not loss.reinforce_by_token:
        given = "importance_sampling_level='sequence'" if by_sequence else f"loss_type={loss.name!r}"
        raise ValueError(
            f"demonstration_loss={chosen!r} weighs each token by itself, and {given} weighs completions as a whole. "
            "Take demonstration_loss='imitation', or a loss of token ratios such as 'dapo'."
        )
