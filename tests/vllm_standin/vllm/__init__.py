"""A stand-in for vLLM, importable as `vllm`: its names and signatures, and a small engine that is right.

The engine holds a base of its own, which it loads from the disk as vLLM does, in nf4 where vLLM would quantize. It applies
the adapter of a request from the adapter's files, by PEFT. `tests/contract/test_vllm.py` compares what stands here with
vLLM's own package.
"""

from vllm.engine import LLM
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

__all__ = ["LLM", "RequestOutput", "SamplingParams"]
__version__ = "0.31.0"
