"""Time the exact ways to compute an update where the run is, and take the fastest.

Which way is fastest depends on the card, on the host that launches its kernels and on the lengths of the rows. A few
seconds on the first micro-batch answer the question. TRL's own way is among the ways wherever the settings allow it, so
that the answer is never slower than TRL.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo_plus.models.memory import is_out_of_memory
from grpo_plus.packing.forward import Form, Head

logger = logging.getLogger("grpo_plus")

RUNS = 3  # the first run of a way compiles kernels and grows the allocator's pool: its time does not count
BUDGET = 30.0  # seconds


class Layers(Protocol):
    """LoRA layers that can change between ours and PEFT's.

    on: whether they are ours in an update.
    """

    on: bool

    def renew(self) -> None:
        """Forget what was kept of weights and inputs, as between two steps."""


@dataclass(frozen=True)
class Way:
    """One way to compute an update. The default is TRL's.

    form: how rows go through the model. None: padded, as TRL has them.
    head: what scores hidden states. None: TRL's fused head.
    own_layers: whether LoRA layers are ours and not PEFT's.
    """

    form: Form | None = None
    head: Head | None = None
    own_layers: bool = False

    def __str__(self) -> str:
        if self == Way():
            return "TRL"
        parts = [str(self.form) if self.form else "padded rows"]
        parts += ["single-pass head"] if self.head else []
        parts += ["one-step LoRA layers"] if self.own_layers else []
        return ", ".join(parts)

    @property
    def names(self) -> dict[str, Any]:
        """What tells the way apart in another process."""
        return {"form": str(self.form), "head": self.head is not None, "own_layers": self.own_layers}


def timed_ways(
    forms: Sequence[Form | None],
    heads: Sequence[Head | None],
    own_layers: Sequence[bool],
    seconds: Callable[[Way], float],
) -> dict[Way, float]:
    """Seconds of the ways worth a run: first every form, then the other head and the other layers of the fastest.

    After `BUDGET` seconds no further way is timed, but TRL's own in any case.

    Args:
        forms: the forms. A None among them lets TRL's own way take part.
        heads: the heads, the one to start with first. Padded rows are scored by TRL's head alone.
        own_layers: what the LoRA layers may be, the kind to start with first.
        seconds: time of one way. Infinite where the way cannot be taken.
    """
    times: dict[Way, float] = {}

    def time(ways: Iterable[Way]) -> Way:
        for way in ways:
            spent = RUNS * sum(found for found in times.values() if found < math.inf)
            if way not in times and (way == Way() or spent <= BUDGET):
                times[way] = seconds(way)
        return min(times, key=times.__getitem__)

    first = heads[0], own_layers[0]
    best = time(Way() if form is None else Way(form, *first) for form in forms)
    if best.form is not None:
        best = time(replace(best, head=head) for head in heads)
    time(replace(best, own_layers=own) for own in own_layers)
    return times


@dataclass(frozen=True)
class Stopwatch:
    """Times forwards together with their backwards. Leaves the gradients of the parameters as they are.

    parameters: what the gradient is taken of.
    clock: seconds, after the device has finished.
    prepare: called before each run.
    """

    parameters: Sequence[Tensor]
    clock: Callable[[], float]
    prepare: Callable[[], None]

    def seconds(self, forward: Callable[[], Tensor]) -> float:
        """The shortest of the warm runs. Infinite where memory is not enough.

        Args:
            forward: gives values whose sum has a gradient.
        """
        times = []
        for _ in range(RUNS):
            self.prepare()
            begin = self.clock()
            if not self._runs(forward):
                return math.inf
            times.append(self.clock() - begin)
        return min(times[1:])

    def _runs(self, forward: Callable[[], Tensor]) -> bool:
        try:
            # No `backward`: it would add to gradients that are there, and wake the hooks of DDP.
            torch.autograd.grad(forward().sum(), self.parameters, allow_unused=True)
        except RuntimeError as failure:
            if not is_out_of_memory(failure):
                raise
            return False
        return True


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock that waits for the device before it reads the time."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter()

    return clock


def card_of(device: torch.device) -> str:
    """What the times are true for: the name of the card."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Measure:
    """The fastest way of one training. Found once: in an update, or by the run that this run goes on from.

    Args:
        layers: LoRA layers that may be ours or PEFT's. None: there is no choice.
        clock_of: makes the clock of a device.
    """

    def __init__(
        self,
        layers: Layers | None = None,
        *,
        clock_of: Callable[[torch.device], Callable[[], float]] = device_clock,
    ) -> None:
        self.layers = layers
        self.clock_of = clock_of
        self._found: dict[str, Any] | None = None
        self.is_done = False

    def state(self) -> dict[str, Any] | None:
        """What was found, for a checkpoint. None where nothing has been measured."""
        return self._found

    def go_on_with(self, state: dict[str, Any] | None) -> None:
        """Take what an earlier run found, where it ran on such a card and the way is still exact."""
        self._found, self.is_done = state, False

    def knows(self, device: torch.device) -> bool:
        """Whether an earlier run has found the way for such a card."""
        return self._found is not None and self._found.get("card") == card_of(device)

    def fastest(
        self,
        device: torch.device,
        parameters: Sequence[Tensor],
        forms: Sequence[Form | None],
        heads: Sequence[Head | None],
        forward_of: Callable[[Way], Callable[[], Tensor] | None],
        *,
        can_time: bool = True,
    ) -> Way | None:
        """The way to take from now on, with the LoRA layers set to it.

        Args:
            device: where the update runs.
            parameters: what trains.
            forms, heads: as `timed_ways` takes them.
            forward_of: the forward of a way, whose values have a gradient. None where the way is not exact.
            can_time: whether the rows at hand are an update's. Where they are not, and what an earlier run found is
                none of these ways, the next update is timed.

        Returns:
            None where no way had enough memory, and where none is known and none can be timed.
        """
        own_layers = (False,) if self.layers is None else (True, False)
        way = self._known(device, [Way(*parts) for parts in _product(forms, heads, own_layers)], forward_of)
        self.is_done = way is not None or can_time
        if way is None:
            self._found = None
            way = self._timed(device, parameters, forms, heads, own_layers, forward_of) if can_time else None
        if self.layers is not None:
            self.layers.on = way is None or way.own_layers
        return way

    def _known(self, device: torch.device, ways: Sequence[Way], forward_of: Callable[[Way], Any]) -> Way | None:
        if self._found is None or not self.knows(device):
            return None
        names = {name: value for name, value in self._found.items() if name != "card"}
        return next((way for way in ways if way.names == names and forward_of(way) is not None), None)

    def _timed(
        self,
        device: torch.device,
        parameters: Sequence[Tensor],
        forms: Sequence[Form | None],
        heads: Sequence[Head | None],
        own_layers: Sequence[bool],
        forward_of: Callable[[Way], Callable[[], Tensor] | None],
    ) -> Way | None:
        stopwatch = Stopwatch(parameters, self.clock_of(device), self._prepare)

        def seconds(way: Way) -> float:
            forward = forward_of(way)
            if forward is None:
                return math.inf
            if self.layers is not None:
                self.layers.on = way.own_layers
            return stopwatch.seconds(forward)

        with _undisturbed(device):
            times = timed_ways(forms, heads, own_layers, seconds)
            self._prepare()
        logger.info("packing: measured %s.", in_words(times, card_of(device)))
        way = min(times, key=times.__getitem__)
        if times[way] == math.inf:
            return None
        self._found = {"card": card_of(device), **way.names}
        return way

    def _prepare(self) -> None:
        torch.clear_autocast_cache()  # it holds casts whose graph the last run has freed
        if self.layers is not None:
            self.layers.renew()


def _product(forms: Sequence[Any], heads: Sequence[Any], own_layers: Sequence[bool]) -> list[tuple[Any, Any, bool]]:
    return [
        (form, head, own) for form in forms for head in (heads if form is not None else (None,)) for own in own_layers
    ]


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the random numbers and the peak of memory as if nothing had run inside."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        yield
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def in_words(times: dict[Way, float], where: str) -> str:
    """What was found, for the log: "shared_prompt (cascade attention) 2.9x; padding_free 1.8x; TRL 1.0x on NVIDIA L4".

    The factors compare with TRL's way. Where TRL's way was not timed, or had too little memory, the slowest stands in.
    """
    finite = {way: seconds for way, seconds in times.items() if seconds < math.inf}
    reference = finite.get(Way(), max(finite.values(), default=math.inf))
    order = sorted(times, key=times.__getitem__)
    parts = [f"{way} {reference / times[way]:.1f}x" if way in finite else f"{way} cannot run" for way in order]
    return f"{'; '.join(parts)} on {where}"
