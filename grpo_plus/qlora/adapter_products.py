"""What LoRA layers need not ask, copy and multiply again as long as nothing about them can change.

A *hold* is such a time: an update's forward and backward, the scoring of a batch, one generation. Within a hold a
layer is looked at once, the copies of the adapters in the dtype of their products are made once, and layers that share
an input are computed together. Every hold fills the copies anew, and outside of a hold every call asks and copies, so
that a weight which an optimizer, a callback, `load_state_dict` or `sync_ref_model` changes is never missed.

Layers that share an input are found by looking: they were called one after another with the same tensor. What one hold
has seen counts from the next hold on. A step of gradient checkpointing therefore computes its second forward as its
first.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grpo_plus.kernels.lora_linear import Adapted, Copies, Sharing, lora_linears
from grpo_plus.kernels.products import compute_dtype
from grpo_plus.qlora.plain_lora import Judged


class Siblings:
    """LoRA layers that read the same input, and their adapters with the copies of them.

    Attributes:
        active: what the layers call their active adapter.
    """

    def __init__(self, layers: tuple[Any, ...], parts: tuple[Adapted, ...]) -> None:
        self.layers, self.parts, self.sharing = layers, parts, Sharing.of(parts)
        self.active: Any = None
        self._kinds = _kinds(parts)
        self._copies: dict[torch.dtype, tuple[Copies, list[Tensor], list[Tensor]]] = {}

    def has(self, parts: tuple[Adapted, ...]) -> bool:
        """Whether the layers still have these adapters, in the same dtype and place."""
        return self._kinds == _kinds(parts) and all(
            ours.a is new.a and ours.b is new.b and ours.scaling == new.scaling
            for ours, new in zip(self.parts, parts, strict=True)
        )

    def copies(self, dtype: torch.dtype) -> tuple[Copies, list[Tensor], list[Tensor]]:
        """The copies in a dtype, what to fill of them, and from what. A weight that fits as it is has no copy."""
        if dtype not in self._copies:
            all_a, all_b = [part.a for part in self.parts], [part.b for part in self.parts]
            targets: list[Tensor] = []
            sources: list[Tensor] = []
            stacked = all_a[0]
            if len(all_a) > 1 or stacked.dtype != dtype:
                stacked = stacked.new_empty(sum(map(len, all_a)), stacked.shape[1], dtype=dtype)
                targets += stacked.split([len(a) for a in all_a])
                sources += all_a
            copied = []
            for b in all_b:
                copied.append(b if b.dtype == dtype else torch.empty_like(b, dtype=dtype))
                if copied[-1] is not b:
                    targets.append(copied[-1])
                    sources.append(b)
            self._copies[dtype] = Copies(stacked, tuple(copied)), targets, sources
        return self._copies[dtype]


def _kinds(parts: tuple[Adapted, ...]) -> list[tuple[torch.dtype, torch.device]]:
    return [(weight.dtype, weight.device) for part in parts for weight in (part.a, part.b)]


class Products:
    """The LoRA layers of one training: what they share, and what a hold keeps.

    Deep copies and pickles of a layer bring an empty `Products` along, under which a layer asks at every call.

    Attributes:
        on: whether the layers of an update are computed here. False leaves them to PEFT. A forward without a graph, as
            in generation, is computed here in any case.
    """

    def __init__(self) -> None:
        self.on = True
        self._judged: dict[Any, Judged] = {}
        self._is_held = self._in_step = False
        self._seen: dict[Any, tuple[Any, ...]] = {}  # by the first of them: the layers called with one input
        self._last: tuple[weakref.ref[Tensor], list[Any]] | None = None  # the latest input, and who was called with it
        self._kept: dict[tuple[Any, ...], Siblings] = {}
        self._plan: dict[Any, Siblings] | None = None
        self._last_plan: dict[Any, Siblings] = {}
        self._planned: dict[Any, tuple[Any, ...]] | None = None  # what had been seen when the last plan was made
        self._followers: set[Any] = set()  # of the plan: layers that others compute ahead
        self._filled: set[torch.dtype] = set()
        self._ahead: _Ahead | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Products":
        return Products()

    def __reduce__(self) -> tuple[Any, ...]:
        return Products, ()

    @contextmanager
    def of(self, layers: Sequence[Any]) -> Iterator[None]:
        """Serve these layers, inside. Afterwards nothing of them is left."""
        self._judged = {layer: Judged(layer) for layer in layers}
        try:
            yield
        finally:
            self._judged = {}
            self._seen.clear()
            self._kept.clear()
            self._last_plan, self._planned = {}, None
            self._release()

    @property
    def is_held(self) -> bool:
        """Whether nothing about the layers can change at the moment."""
        return self._is_held

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold, inside. Within another hold this does nothing."""
        if self._is_held:
            yield
            return
        self._is_held = True
        try:
            yield
        finally:
            self._release()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Let a `forward` that builds a graph hold until this context ends, with the backward inside."""
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            self._release()

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Hold for a forward. One that builds a graph outside of a `step` does not hold: nobody knows its backward."""
        if not torch.is_grad_enabled():
            with self.held():
                yield
            return
        self._is_held |= self._in_step
        yield

    def renew(self) -> None:
        """Ask and copy anew from here on, as in the next hold."""
        self._plan = self._last = self._ahead = None
        self._filled.clear()

    def _release(self) -> None:
        self._is_held = False
        self.renew()

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """Output of a layer within a hold. None: the layer is more than one plain adapter, or has changed it."""
        if self._ahead is not None and (output := self._ahead.take(layer, x)) is not None:
            return output
        if self._plan is None:
            self._make_plan()
            assert self._plan is not None
        siblings = self._plan.get(layer)
        if siblings is None or layer.active_adapter != siblings.active:
            return None
        self._look(siblings, x)
        outputs = lora_linears(x, siblings.sharing, self._copies(siblings))
        if self._ahead is not None and self._ahead.outputs:  # they have not been called with the same input this time
            self._seen = {first: others for first, others in self._seen.items() if first is not self._ahead.first}
        self._ahead = _Ahead.of(siblings.layers, x, outputs)
        return outputs[0]

    def _look(self, siblings: Siblings, x: Tensor) -> None:
        """Remember which layers are called with the same input, one after another."""
        if self._last is not None and self._last[0]() is x and siblings.layers[0] not in self._last[1]:
            self._last[1].extend(siblings.layers)
            self._seen[self._last[1][0]] = tuple(self._last[1])
        else:
            self._last = weakref.ref(x), list(siblings.layers)

    def _make_plan(self) -> None:
        """Find the siblings that a call of each fitting layer computes. A layer that others compute ahead is alone."""
        if self._last_plan_stands():
            self._plan = self._last_plan
            return
        self._planned = dict(self._seen)
        self._judged = {layer: judged if judged.holds() else Judged(layer) for layer, judged in self._judged.items()}
        fitting = {layer: judged.part for layer, judged in self._judged.items() if judged.part is not None}
        plan: dict[Any, Siblings] = {}
        for layer in fitting:
            layers = self._seen.get(layer, (layer,))
            if not _can_be_stacked([fitting.get(member) for member in layers]):
                layers = (layer,)
            parts = tuple(fitting[member] for member in layers)
            kept = self._kept.get(layers)
            if kept is None or not kept.has(parts):
                kept = Siblings(layers, parts)
            kept.active = self._judged[layer].active
            plan[layer] = kept
        self._followers = {member for siblings in plan.values() for member in siblings.layers[1:]}
        self._kept = {siblings.layers: siblings for layer, siblings in plan.items() if layer not in self._followers}
        self._plan = self._last_plan = plan

    def _last_plan_stands(self) -> bool:
        return (
            self._seen == self._planned
            and all(judged.holds() for judged in self._judged.values())
            and all(siblings.has(siblings.parts) for siblings in self._kept.values())
        )

    def _copies(self, siblings: Siblings) -> Copies | None:
        if siblings.layers[0] in self._followers:
            return None
        dtype = compute_dtype(siblings.parts[0].a)
        if dtype not in self._filled:
            self._fill(dtype)
        return siblings.copies(dtype)[0]

    @torch.inference_mode(False)  # a copy made in that mode could not be kept for backward later
    @torch.no_grad()
    def _fill(self, dtype: torch.dtype) -> None:
        """Bring the copies of all layers up to date, in one launch where torch has a kernel for it."""
        copies = [siblings.copies(dtype) for siblings in self._kept.values()]
        targets = [target for _, targets, _ in copies for target in targets]
        if targets:
            torch._foreach_copy_(targets, [source for _, _, sources in copies for source in sources])
        self._filled.add(dtype)


class _Ahead:
    """Outputs that the first of several siblings has computed for the others, which are yet to be called."""

    def __init__(self, first: Any, x: Tensor, outputs: dict[Any, Tensor]) -> None:
        self.first, self.outputs = first, outputs
        self._x, self._state = weakref.ref(x), _state(x)

    @classmethod
    def of(cls, layers: tuple[Any, ...], x: Tensor, outputs: tuple[Tensor, ...]) -> "_Ahead | None":
        """None for a layer without siblings."""
        return cls(layers[0], x, dict(zip(layers[1:], outputs[1:], strict=True))) if len(layers) > 1 else None

    def take(self, layer: Any, x: Tensor) -> Tensor | None:
        """The output, once. None for another input, for one that has been changed, and in another mode of autograd."""
        return self.outputs.pop(layer, None) if self._x() is x and self._state == _state(x) else None


def _state(x: Tensor) -> tuple[int, bool]:
    return 0 if x.is_inference() else x._version, torch.is_grad_enabled()


def _can_be_stacked(parts: list[Adapted | None]) -> bool:
    kinds = {
        None if part is None else (type(part.base.project), part.a.shape[1], part.a.dtype, part.a.device)
        for part in parts
    }
    return len(kinds) == 1 and None not in kinds
