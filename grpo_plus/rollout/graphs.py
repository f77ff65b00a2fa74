"""CUDA graphs of a decoding step: the host launches one graph in place of some sixty kernels a layer.

A graph runs the same kernels on the same memory again, so steps get fixed shapes (`fixed.py`). A bucket of shapes
begins with eager steps. Then its graph is recorded, and used only if it gives the same logits in less time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from grpo_plus.models.caches import CACHE
from grpo_plus.rollout.fixed import LEAST_STEPS, Bucket, FixedStep
from grpo_plus.rollout.keeper import Keeper
from grpo_plus.rollout.live import Moves
from grpo_plus.rollout.prefix import why_not_own_layers
from grpo_plus.rollout.prompts import Prompts

# No GPU has shown yet that graphs are right and faster. Where this is True, each run still measures its own.
ON = False
ATTENTION = ("sdpa", "eager")  # take a mask of any shape
EAGER_STEPS = 2  # before a recording: libraries allocate memory and choose kernels in them
TOLERANCE = 1e-3  # relative error of logits
FAILURES = (Exception,)  # whatever the libraries of the kernels raise where they cannot be recorded

Call = Callable[[], Tensor]


def cuda_graph(call: Call) -> Call:
    """Record a call. A replay writes its result where the recorded call has put its own."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class SelfMeasured:
    """Calls a function, and from some call on its recording if that gives the same in less time.

    Attributes:
        failure: reason why no recording is used. None while that is open, and where one is used.
    """

    def __init__(self, call: Call, record: Callable[[Call], Call], device: torch.device) -> None:
        self.failure: str | None = None
        self._call, self._record, self._device = call, record, device
        self._calls = 0

    def __call__(self) -> Tensor:
        """What the function gives."""
        self._calls += 1
        if self._calls != EAGER_STEPS + 1:
            return self._call()
        expected, seconds = self._timed(self._call)
        try:
            recorded = self._record(self._call)
            found, replay_seconds = self._timed(recorded)
        except FAILURES as failure:
            self.failure = f"a CUDA graph failed: {type(failure).__name__}: {failure}"
            return expected
        error = float((found - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            self.failure = f"a CUDA graph gives other logits, by {error:.1e}"
        elif replay_seconds >= seconds:
            self.failure = f"a CUDA graph takes {replay_seconds:.2g} s, the step that it replaces {seconds:.2g} s"
        else:
            self._call = recorded
        return expected

    def _timed(self, call: Call) -> tuple[Tensor, float]:
        """A copy of a call's result, and the seconds of the faster of two calls."""
        seconds = []
        for _ in range(2):
            self._wait()
            start = perf_counter()
            result = call()
            self._wait()
            seconds.append(perf_counter() - start)
        return result.clone(), min(seconds)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Graphed(Keeper):
    """A cache of fixed shapes, with a graph of the step on it."""

    words = "CUDA graphs"
    is_timed = True

    def __init__(
        self, model: PreTrainedModel, cache: DynamicCache, record: Callable[[Call], Call] = cuda_graph
    ) -> None:
        super().__init__(model, cache)
        self._record = record
        self._rows = self._tokens = 0
        self._step: FixedStep
        self._run: Call | SelfMeasured

    @classmethod
    def why_not(cls, model: PreTrainedModel, cache: DynamicCache) -> str | None:
        """Reason why a step of fixed shapes would be wrong on this model. With None it may be right."""
        name = model.config.get_text_config()._attn_implementation
        if name not in ATTENTION:
            return f"attention {name!r} is not one of {', '.join(ATTENTION)}"
        return why_not_own_layers(model, cache)

    @classmethod
    def pays(cls, model: PreTrainedModel, prompts: Prompts, length: int) -> bool:
        """Nowhere, until a GPU has shown it."""
        return ON and model.device.type == "cuda"

    def expand(self, index: Tensor, mask: Tensor | None) -> None:
        """Copy each prompt's entry for its rows into memory of fixed shapes."""
        self._tokens = self.cache.get_seq_length()
        shown = torch.ones(int(index.max()) + 1, self._tokens, device=index.device) if mask is None else mask
        self._fix(index, shown.bool())

    def keep(self, moves: Moves) -> None:
        """Move rows within their memory."""
        self._rows = moves.count
        self._step.keep(moves)

    def forward(self, **inputs: Any) -> CausalLMOutputWithPast:
        """A step of the model, by its graph where it has one."""
        rows, columns = self._step.shown.shape
        shrinks = Bucket.of(self._rows, self._tokens).rows < rows and columns - self._tokens >= LEAST_STEPS
        if shrinks or self._tokens == columns:
            self._fix(torch.arange(self._rows, device=self._step.shown.device), self._step.shown)
        self._step.write(inputs["input_ids"], inputs.get("position_ids"), self._tokens)
        self._tokens += 1
        logits = self._run()[: self._rows]
        if isinstance(self._run, SelfMeasured):
            self.failure = self._run.failure
        return CausalLMOutputWithPast(logits=logits[:, None], **{CACHE: self.cache})

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Afterwards no graph holds memory."""
        try:
            yield
        finally:
            self._run = self._step.run

    def _fix(self, index: Tensor, shown: Tensor) -> None:
        self._rows = len(index)
        self._step = FixedStep(self.model, self.cache, index, shown, self._tokens)
        run = self._step.run
        self._run = run if self.failure else SelfMeasured(run, self._record, shown.device)
