"""Bytes that a forward and backward allocate, counted tensor by tensor, without computing anything."""

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_plus.packing.attention import Segments, install_segments
from grpo_plus.packing.layout import Span
from grpo_plus.planner import Run
from grpo_plus.planner.run import DTYPES


class Allocations(TorchDispatchMode):
    """Bytes of live storages that were made inside, and the most there were."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                self.live += self.sizes[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor.untyped_storage(), self._freed, key)
        return output

    def _freed(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


class Counted(NamedTuple):
    """Bytes that the forward keeps, and the most in forward and backward, the parameters' gradients aside."""

    kept: int
    peak: int


def count(
    config: dict[str, Any],
    run: Run,
    *,
    layers: int,
    around: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext,
) -> Counted:
    """One pass of `run` through the layers of a model; the loss is the sum of the hidden states.

    Padded rows have a mask. Otherwise the pass is one completion alone with its prompt. What a run keeps on the host
    counts, too, because a CPU's memory is the host's.

    The tensors are fake, so sizes are those of a real model. An nf4 layer is stood in for by a frozen one, which saves
    no activation either.

    Args:
        around: what changes the model for the update.
    """
    size = {width: getattr(torch, name) for name, width in DTYPES.items() if name != "float16"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config | {"num_hidden_layers": layers, "vocab_size": 128}),
            dtype=size[run.weight_size],
        )
        if run.lora_r:
            adapters = LoraConfig(r=run.lora_r, target_modules="all-linear", lora_dropout=run.lora_dropout)
            get_peft_model(model, adapters)
    rows, total = run.rows_per_pass, run.prompt_length + run.max_completion_length
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    trains = run.lora_r is None or "lora" in str(type(module)) or parameter.requires_grad
                    dtype = size[run.adapter_size] if run.lora_r and trains else parameter.dtype
                    fake = torch.empty(parameter.shape, dtype=dtype)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=trains)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        model.train()
        if run.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        ids = torch.zeros(rows, total, dtype=torch.long)
        # As TRL's rows have it: one token of padding, so that there is a mask.
        mask = torch.ones(rows, 1, total, total, dtype=torch.bool)
        kinds = set(model.config.layer_types or ()) if hasattr(model.config, "layer_types") else set()
        masks = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
        inputs: Any = {"attention_mask": masks}
        if run.packing != "none":
            install_segments(model)
            alone = Span(0, run.prompt_length, (total,), ((),), torch.empty(0), torch.empty(0))
            inputs = {"attention_mask": torch.zeros(1, 1, 1, 1), "segments": Segments((alone,), pairs_per_call=0)}
        # As from the second micro-batch of a step on: the gradients exist.
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        allocations = Allocations([*model.parameters(), *model.buffers(), *gradients])
        with allocations, around(model):
            with torch.autocast("cpu", torch.bfloat16, enabled=run.bf16):
                hidden = model.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
            kept = allocations.live
            hidden.sum().backward()
        return Counted(kept, allocations.peak)
