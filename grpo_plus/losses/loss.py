"""What a registered loss is, and the registry of all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from grpo_plus.losses.inputs import TokenLoss
from grpo_plus.losses.reduce import REDUCTIONS, Reduction
from grpo_plus.registry import Described, Registry, suggestion

Origin = Literal["trl", "grpo_plus"]
Scope = Literal["row", "batch"]
Function = TypeVar("Function", bound=Callable[..., TokenLoss])


@dataclass(frozen=True)
class Loss(Described):
    """A policy loss and what it promises; the property tests hold it to these promises.

    Attributes:
        name: as written in `loss_type`.
        function: (LossInputs, *, hyper-parameters) -> TokenLoss.
        reduction: how its authors sum it; a caller may choose another.
        origin: who computes it in training. TRL's eight stay TRL's; the functions here state them and a test pins
            them to TRL's numbers.
        scope: "row" if a completion's loss depends on that completion alone, "batch" if on the others too.
        zero_without_advantage: a completion whose advantages are 0 has a gradient of 0.
        reinforce_on_policy: where old_logps = logps and a row has one advantage, the gradient is that of `reinforce`
            under the same reduction.
        reads_sampling_ratio: takes `importance_sampling_ratio` into its own formula; the others are multiplied by it.
        variant: what sets this name apart where several share a function; the first lines of its documentation.
    """

    name: str
    function: Callable[..., TokenLoss]
    reduction: Reduction = "token-mean"
    origin: Origin = "grpo_plus"
    scope: Scope = "batch"
    zero_without_advantage: bool = False
    reinforce_on_policy: bool = False
    reads_sampling_ratio: bool = False
    variant: str = ""

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"The loss {self.name!r} has an unknown reduction {self.reduction!r}."
                f"{suggestion(str(self.reduction), REDUCTIONS)}"
            )

    @property
    def documentation(self) -> str:
        """The variant's lines, then the function's docstring."""
        return "\n\n".join(filter(None, (self.variant, super().documentation)))


LOSSES: Registry[Loss] = Registry("loss_type", Loss)


def register(
    name: str,
    *,
    reduction: Reduction = "token-mean",
    origin: Origin = "grpo_plus",
    scope: Scope = "batch",
    zero_without_advantage: bool = False,
    reinforce_on_policy: bool = False,
    reads_sampling_ratio: bool = False,
    variant: str = "",
) -> Callable[[Function], Function]:
    """Make a function available as `loss_type=name`.

    The function takes a `LossInputs`, then keyword-only hyper-parameters, and returns a `TokenLoss`. The promises
    default to the weakest; see `Loss`.

    Raises:
        ValueError: the name is taken or is not an identifier, or the reduction is unknown.
    """

    def add(function: Function) -> Function:
        entry = Loss(
            name,
            function,
            reduction=reduction,
            origin=origin,
            scope=scope,
            zero_without_advantage=zero_without_advantage,
            reinforce_on_policy=reinforce_on_policy,
            reads_sampling_ratio=reads_sampling_ratio,
            variant=variant,
        )
        LOSSES.add(name, entry)
        return function

    return add
