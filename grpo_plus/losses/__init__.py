"""Losses that `loss_type` accepts: (log-probabilities, advantages) to one number.

The eight are TRL's own; grpo_plus feeds them other advantages and leaves their formulas alone.
"""

TRL_LOSSES = {
    "bnpo": ("PPO clip; mean over the tokens of the micro-batch.", "https://github.com/huggingface/trl/pull/3256"),
    "cispo": ("Clipped, detached ratio times log-probability.", "https://huggingface.co/papers/2506.13585"),
    "dapo": ("PPO clip; mean over the tokens of the accumulated batch.", "https://huggingface.co/papers/2503.14476"),
    "dr_grpo": ("PPO clip; sum over tokens by max_completion_length.", "https://huggingface.co/papers/2503.20783"),
    "grpo": ("PPO clip; mean over tokens, then over sequences.", "https://huggingface.co/papers/2402.03300"),
    "luspo": ("PPO clip; sum over tokens, mean over sequences.", "https://huggingface.co/papers/2602.05261"),
    "sapo": ("Soft, sigmoid gate on the ratio instead of a clip.", "https://huggingface.co/papers/2511.20347"),
    "vespo": ("Detached gamma weight of the sequence ratio.", "https://huggingface.co/papers/2602.10693"),
}
