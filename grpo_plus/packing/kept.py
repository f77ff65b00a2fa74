"""Log-probabilities over the tokens that the sampler could draw, in every form of rows and for padded rows.

A form brings the hidden states of its scored tokens, and the head here takes its softmax over each token's kept set.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grpo_plus.kernels.linear_logprob import linear_logprob as single_pass
from grpo_plus.kernels.linear_logprob.kept import Kept, KeptRows
from grpo_plus.kernels.linear_logprob.listed import linear_logprob as listed
from grpo_plus.kernels.linear_logprob.listed import pays
from grpo_plus.kernels.linear_logprob.trained import linear_logprob as trained
from grpo_plus.models.dropout import without_dropout
from grpo_plus.packing.check import PaddedLogps, why_not_close
from grpo_plus.packing.forward import Form, Logps, PackedCall, Pass, Ready, install_packed_forward
from grpo_plus.packing.head import head_arguments, why_not_single_pass
from grpo_plus.packing.layout import unpack
from grpo_plus.packing.padded import Packed, PaddedRows, filled, imputed
from grpo_plus.packing.recomputed import one_by_one
from grpo_plus.packing.transfer import on_device


@dataclass(frozen=True)
class Truncated:
    """What the sampler could draw in padded completions, and how the head normalizes over that.

    lists: whether every list of a completion's token holds what is kept, so that the head may read the lists alone.
    temperature: of the policy.
    trains_entropy: whether entropies take part in the gradient.
    """

    kept: KeptRows
    lists: bool
    temperature: float
    trains_entropy: bool = False

    def head(self, model: PreTrainedModel, hidden: Tensor, targets: Tensor, kept: Kept) -> Logps:
        """Log-probabilities and entropies of the policy renormalized over the kept sets."""
        arguments = head_arguments(model, self.temperature)
        weight = model.get_output_embeddings().weight
        if self.lists and pays(kept, len(weight)):
            return listed(hidden, weight, targets, kept=kept, **arguments)
        frozen = not self.trains_entropy and why_not_single_pass(model) is None
        return (single_pass if frozen else trained)(hidden, weight, targets, kept=kept, **arguments)

    def passes(self, form: Form, part: Ready, model: PreTrainedModel, forward: Callable[..., Any]) -> Iterator[Pass]:
        """What runs in place of the form's passes with a head of its own."""
        hidden_states = form.passes(part.call, _hidden_states, model, forward)
        for one, places in zip(hidden_states, part.places, strict=True):
            yield partial(self._score, model, one, *places)

    def _score(self, model: PreTrainedModel, hidden_states: Pass, rows: Tensor, columns: Tensor) -> Logps:
        return self.head(model, *hidden_states(), self.kept.at(rows, columns))


def score_padded(model: nn.Module, base: PreTrainedModel, rows: PaddedRows, batch_size: int | None = None) -> Packed:
    """Log-probabilities and entropies of the rows' completions, padded as they are.

    Args:
        model: `base`, or the wrapper to call.
        batch_size: most rows of one pass, of which a backward holds one at a time. None takes all rows at once.
    """
    install_packed_forward(base)
    live = torch.tensor(range(len(rows.input_ids)) if rows.live is None else rows.live)
    calls, places, tokens = [], [], 0
    for index in on_device(list(live.split(batch_size or max(1, len(live)))), rows.input_ids.device):
        # Which tokens are scored is read from the device here.
        at, columns = rows.completion_mask.index_select(0, index).nonzero(as_tuple=True)
        calls.append(_padded_call(rows, index, at, columns))
        places.append((index[at], columns))
        tokens += len(index) * rows.input_ids.shape[1]

    def call(base: PreTrainedModel, forward: Callable[..., Any]) -> Logps:
        return one_by_one((partial(one, base, forward) for one in calls), len(calls), rows.input_ids.device)

    logps, entropies = model(packed=call)
    row, column = (torch.cat(parts) for parts in zip(*places, strict=True))
    mean = entropies.detach().sum() / max(1, entropies.numel())
    return Packed(
        unpack(logps, (row, column), filled(rows, logps)),
        unpack(entropies, (row, column), imputed(rows, mean)),
        tokens,
    )


def why_not_truncated(base: PreTrainedModel, rows: PaddedRows, padded_logps: PaddedLogps) -> str | None:
    """Reason why the head here is not the model's: with nothing left out, both must give the same. None where it is."""
    assert rows.truncated is not None
    ids, length = rows.input_ids[:2], rows.completion_length
    mask = torch.ones_like(ids)  # padding is a token like others here, so that there is something to compare
    everything = replace(rows.truncated, lists=False, kept=KeptRows(torch.zeros_like(ids[:, -length:]), ids[:, :0]))
    with torch.no_grad(), without_dropout(base):
        logps = score_padded(base, base, PaddedRows(ids, mask, length, truncated=everything)).logps
        return why_not_close(base, logps, padded_logps(ids, mask, length))


def _padded_call(rows: PaddedRows, index: Tensor, at: Tensor, columns: Tensor) -> PackedCall:
    truncated, length = rows.truncated, rows.completion_length
    assert truncated is not None

    def call(model: PreTrainedModel, _: Callable[..., Any]) -> Logps:
        ids, mask = rows.input_ids.index_select(0, index), rows.attention_mask.index_select(0, index)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        before = hidden[:, -length - 1 : -1][at, columns]
        return truncated.head(model, before, ids[:, -length:][at, columns], truncated.kept.at(index[at], columns))

    return call


def _hidden_states(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """A form's head that leaves the hidden states to a head after it."""
    return hidden, targets
