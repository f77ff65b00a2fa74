"""Whether a run's weights are spread over its processes, and what can be packed there."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import gather_object
from torch.distributed.fsdp import CPUOffloadPolicy
from trl import GRPOTrainer

from grpo_plus.models.pictures import reads_images
from grpo_plus.models.positions import rescaled_from
from grpo_plus.packing import base_model

SPREADS_FROM = 3  # the stage of ZeRO that spreads weights. Earlier ones spread gradients and the optimizer's state.


def spreads_weights(trainer: GRPOTrainer) -> bool:
    """Whether no process has whole weights between two forwards."""
    if trainer.is_deepspeed_enabled:
        return bool(trainer.accelerator.state.deepspeed_plugin.zero_stage >= SPREADS_FROM)
    return bool(trainer.is_fsdp_enabled)


def why_not_whole_weights(trainer: GRPOTrainer) -> str | None:
    """Reason against what needs whole weights. None where every process has them."""
    if not spreads_weights(trainer):
        return None
    name = "DeepSpeed ZeRO-3" if trainer.is_deepspeed_enabled else "FSDP"
    return f"{name} spreads the weights over the processes"


def why_not_packed_when_spread(trainer: GRPOTrainer) -> str | None:
    """Reason why the rows of a model with spread weights stay padded. None where they may be packed."""
    if reason := _why_not_with_zero(trainer) if trainer.is_deepspeed_enabled else _why_not_with_fsdp(trainer):
        return reason
    base = base_model(trainer.accelerator.unwrap_model(trainer.model))
    if reads_images(base):
        return "the model reads images, whose packed rows call parts of it, which spread weights cannot serve"
    if rescaled_from(base) != float("inf"):
        return "position frequencies depend on a row's length, which differs between the processes"
    return None


def _why_not_with_zero(trainer: GRPOTrainer) -> str | None:
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if config.get("offload_param", {}).get("device", "none") != "none":
        return "DeepSpeed keeps the weights on the host (offload_param), where packing is not tested"
    return None


def _why_not_with_fsdp(trainer: GRPOTrainer) -> str | None:
    accelerator = trainer.accelerator
    if not accelerator.is_fsdp2:
        return f"{why_not_whole_weights(trainer)}, where packing is tested with FSDP2 alone"
    plugin: Any = accelerator.state.fsdp_plugin
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return "FSDP keeps the weights on the host (cpu_offload), where packing is not tested"
    if plugin.activation_checkpointing:
        return "FSDP's own activation_checkpointing is not tested with packing: set gradient_checkpointing instead"
    return None


def gathered(value: Any) -> list[Any]:
    """What each process has given, in the order of the processes. All processes must call it."""
    found: list[Any] = gather_object([value])
    return found


def least(found: int | None) -> int | None:
    """The least that a process has found. None where none has found anything. All processes must call it."""
    return min((one for one in gathered(found) if one is not None), default=None)


def check_alike(decisions: Mapping[str, Any]) -> None:
    """Refuse processes that have decided differently: they would wait for each other in different places.

    Args:
        decisions: of this process, by name. All processes must call it with the same names.

    Raises:
        ValueError: on every process.
    """
    found = gathered(dict(decisions))
    for name in decisions:
        values = [process[name] for process in found]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"The processes differ in {name}: {', '.join(map(str, values))}. Give all of them the same settings, "
                "and install the same packages on all machines."
            )
