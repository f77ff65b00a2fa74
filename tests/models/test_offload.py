"""Layer inputs on the host: the same gradients, each input copied once, back one layer ahead, and nothing left over."""

import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_plus.models import offload
from grpo_plus.models.offload import Offload
from grpo_plus.packing.layout import group_rows
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.recomputed import one_by_one
from grpo_plus.packing.rows import SEGMENTS
from tests.packing.models import tiny
from tests.packing.rows import COMPLETION, padded_batch

LAYERS, ROWS = 3, {14: (2, 5), 9: (4,)}
FORMS = {"padded": None, "segments": SEGMENTS, "cached": CACHED}


def logps_of(model: Any, form: Any) -> Tensor:
    ids, mask = padded_batch(ROWS)
    if form is None:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    groups = group_rows(ids, mask, COMPLETION)
    ready = form.ready(form.arrange(groups), model.device)
    return model(packed=lambda base, forward: form.run(ready.call, None, base, forward))[0]


def gradients(model: Any, form: Any, off: Offload | None) -> dict[str, Tensor]:
    with nullcontext() if off is None else off.of(model):
        logps = logps_of(model, form)
        (logps * torch.arange(logps.numel()).view_as(logps).cos()).sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    model.zero_grad()
    return found


def checkpointed(*, reentrant: bool = False, adapters: bool = False) -> Any:
    model: Any = tiny("llama", checkpointing=True, reentrant=reentrant, num_hidden_layers=LAYERS)
    model.enable_input_require_grads()
    if adapters:
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return model


@pytest.fixture(scope="module")
def model():
    return checkpointed()


@pytest.fixture
def events(monkeypatch):
    """What happens to the inputs, in order: ("out", 0) for the first that is copied to the host."""
    happened: list[tuple[str, int]] = []
    order: list[weakref.ref[Any]] = []
    make, fetch, take = offload._Input.__init__, offload._Input.fetch, offload._Input.take

    def place(self: Any) -> int:
        return next(place for place, other in enumerate(order) if other() is self)

    def made(self: Any, *args: Any) -> None:
        make(self, *args)
        order.append(weakref.ref(self))
        happened.append(("out", place(self)))

    def fetched(self: Any) -> None:
        if self._on_device is None:
            happened.append(("back", place(self)))
        fetch(self)

    def taken(self: Any) -> Tensor:
        happened.append(("used", place(self)))
        return take(self)

    monkeypatch.setattr(offload._Input, "__init__", made)
    monkeypatch.setattr(offload._Input, "fetch", fetched)
    monkeypatch.setattr(offload._Input, "take", taken)
    yield happened
    assert [other() for other in order] == [None] * len(order), "inputs outlive the backward"


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_same_to_the_last_bit(monkeypatch, form, reentrant):
    monkeypatch.setattr(offload, "PIECE_BYTES", 100)  # so that an input is several pieces
    model, off = checkpointed(reentrant=reentrant, adapters=form == "segments"), Offload(least_bytes=1)
    expected = gradients(model, FORMS[form], None)
    for name, gradient in gradients(model, FORMS[form], off).items():
        assert torch.equal(gradient, expected[name]), name
    assert max(gradient.abs().max() for gradient in expected.values()) > 0
    assert off._newest is not None


def test_an_input_leaves_once_and_is_back_before_the_layer_above_it_is_done(model, events):
    gradients(model, None, Offload(least_bytes=1))
    # The last layer's input is still on the device when the backward begins.
    assert events == [
        ("out", 0),
        ("out", 1),
        ("out", 2),
        ("used", 2),
        ("back", 1),
        ("used", 1),
        ("back", 0),
        ("used", 0),
    ]


def test_both_passes_of_the_cached_form_leave(model, events):
    gradients(model, CACHED, Offload(least_bytes=1))
    packed, used = ([place for kind, place in events if kind == name] for name in ("out", "used"))
    assert packed == sorted(used) == list(range(2 * LAYERS))  # the prompts', then the completions'
    assert [place for kind, place in events if kind == "back"] == used[1:]  # every guess was right


def test_small_inputs_and_what_layers_share_stay(model, events):
    gradients(model, None, Offload(least_bytes=2**20))
    assert events == []
    gradients(model, None, Offload(least_bytes=1))
    assert len([kind for kind, _ in events if kind == "out"]) == LAYERS  # no mask, no positions, no weights


def test_an_input_that_is_no_whole_tensor_stays():
    off, held = Offload(least_bytes=1), []
    column = torch.randn(4, 6, requires_grad=True)[:, ::2]
    off._checkpoint(lambda layer, states: held.append(layer(states)), torch.exp, column)
    held[0].sum().backward()
    assert off._newest is None


def test_a_graph_can_be_walked_twice_and_a_wrong_guess_is_dropped(model):
    off = Offload(least_bytes=1)
    weight = model.model.layers[0].mlp.up_proj.weight
    with off.of(model):
        loss, other = (logps_of(model, None).square().mean() for _ in range(2))
        first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
        assert torch.equal(torch.autograd.grad(loss, weight)[0], first)
        torch.autograd.grad(other, model.model.layers[2].mlp.up_proj.weight)
        assert off._ahead is not None  # the second layer's input, which nobody has asked for
    assert off._ahead is None
    assert "partial" not in str(model.model.layers[0]._gradient_checkpointing_func.func)


def test_the_layers_have_their_own_checkpoint_back_after_an_error(model):
    before = model.model.layers[0]._gradient_checkpointing_func
    with pytest.raises(ZeroDivisionError), Offload().of(model):
        raise ZeroDivisionError
    assert model.model.layers[0]._gradient_checkpointing_func is before


def test_no_copy_makes_the_host_wait(model):
    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator is torch.ops.aten.copy_.default and args[0].numel() == size:
                non_blocking.append(len(args) > 2 and args[2])
            return operator(*args, **(kwargs or {}))

    non_blocking: list[bool] = []
    size = padded_batch(ROWS)[0].numel() * model.config.hidden_size
    with Copies():
        gradients(model, None, Offload(least_bytes=1))
    assert non_blocking == [True] * (2 * LAYERS - 1)  # the last layer's input does not come back


def test_a_copy_waits_for_the_computation_and_the_computation_for_the_copy(monkeypatch):
    """A stand-in for torch.cuda, which notes in which order streams wait."""

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            order.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            order.append(f"event on {self.name}")
            return "event"

        def wait_event(self, event: str) -> None:
            order.append(f"{self.name} waits for {event}")

    order: list[str] = []
    module = SimpleNamespace(
        Stream=lambda device: Stream("side"),
        current_stream=lambda device: Stream("main"),
        stream=lambda side: nullcontext(),
    )
    monkeypatch.setattr(offload, "COPIES_ASIDE", ("cpu",))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    side = offload._Side(torch.device("cpu"))
    side.wait(side.copy([torch.zeros(3)], [torch.ones(3)]))
    assert order == ["side waits for main", "event on side", "main waits for event"]


def test_the_inputs_of_all_passes_wait_on_the_host(model, monkeypatch):
    made: weakref.WeakSet[Any] = weakref.WeakSet()
    make = offload._Input.__init__
    monkeypatch.setattr(offload._Input, "__init__", lambda self, *args: (make(self, *args), made.add(self))[0])
    ids = torch.arange(2 * 20).view(2, 20)

    def scored(row: Tensor) -> tuple[Tensor, Tensor]:
        logps = model(input_ids=row.unsqueeze(0), use_cache=False).logits.log_softmax(-1).flatten()
        return logps, logps.detach()

    with Offload(least_bytes=1).of(model):
        logps, _ = one_by_one((partial(scored, row) for row in ids), len(ids), model.device)
        waiting = sum(piece.nbytes for packed in made for piece in packed._on_host)
        assert waiting == LAYERS * ids.numel() * model.config.hidden_size * 4
        logps.sum().backward()
    model.zero_grad()
    assert not made
