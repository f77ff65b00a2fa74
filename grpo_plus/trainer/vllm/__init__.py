"""vLLM that is sent the adapters alone: what `vllm_lora_sync` makes of TRL's engine and of its client.

TRL merges the adapters into the base and sends vLLM every weight. Here vLLM holds the base that it loaded itself, and
is sent the LoRA weights, as files that a LoRA request names. Above a 4-bit base only this is right.

`construction` lets TRL build these classes in place of its own, `servable` refuses what vLLM cannot serve, `files`
writes the adapter, `generation` sends it, to the `engine` beside the trainer or by the `client` to a server. `engine`
imports vLLM, so only `generation` imports it, and only where TRL has found vLLM.

None of this ran against vLLM itself. `tests/vllm_standin` stands in for it, and `tests/contract` holds the names and
signatures of vLLM's that the stand-in and this room rely on.
"""

from grpo_plus.trainer.vllm.construction import adapters_alone

__all__ = ["adapters_alone"]
