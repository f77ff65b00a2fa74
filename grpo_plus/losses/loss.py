"""Policy losses: what one promises, and the registry of all of them."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from grpo_plus.losses.inputs import TokenLoss
from grpo_plus.losses.reduce import REDUCTIONS, Reduction
from grpo_plus.registry import Described, Registry, suggestion

Origin = Literal["trl", "grpo_plus"]
Scope = Literal["row", "batch"]


@dataclass(frozen=True)
class Loss(Described):
    """A policy loss and its promises. The property tests hold every loss to its promises.

    `register` takes the attributes after `function` as keywords. Their defaults promise nothing.

    Attributes:
        name: the name to write in `loss_type`.
        function: (LossInputs, *, hyper-parameters) -> TokenLoss.
        reduction: how the authors turn the tokens' losses into one number. A caller may choose another reduction.
        origin: who computes the loss in training. TRL computes its own eight losses; the functions here state them,
            and a test compares both.
        scope: "row" if a completion's loss depends on that completion alone, "batch" if on the other completions too.
        zero_without_advantage: a completion whose advantages are 0 has a gradient of 0.
        reinforce_on_policy: where old_logps = logps and a row has one advantage, the gradient is that of `reinforce`
            under the same reduction.
        reinforce_by_token: the same holds where the tokens of a row have different advantages.
        reads_sampling_ratio: the formula contains the ratio to the sampler. Any other loss is multiplied by
            `importance_sampling_ratio` afterwards.
        variant: what sets this name apart from other names of the same function. Opens the documentation.
    """

    name: str
    function: Callable[..., TokenLoss]
    _: KW_ONLY
    reduction: Reduction = "token-mean"
    origin: Origin = "grpo_plus"
    scope: Scope = "batch"
    zero_without_advantage: bool = False
    reinforce_on_policy: bool = False
    reinforce_by_token: bool = False
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


LOSSES = Registry("loss_type", "grpo_plus.losses", Loss)
"""Every loss by its name, `LOSSES["dual_clip"]`. A dotted path to a function is a name, too."""
register = LOSSES.register
"""Make a function a loss: `@register("mine", reduction="token-mean")`. `Loss` says what may be promised."""
