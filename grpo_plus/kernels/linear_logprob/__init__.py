"""From hidden states to log-probabilities of tokens and entropies: the LM head and what is read off its logits.

`reference` builds all logits. `single_pass` builds a tile of them at a time, once, and needs a head that does not
train; `why_not` says whether a model's head will do.
"""

from grpo_plus.kernels.linear_logprob.single_pass import linear_logprob, why_not

__all__ = ["linear_logprob", "why_not"]
