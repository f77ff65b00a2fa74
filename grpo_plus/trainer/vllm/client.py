"""TRL's client of a vLLM server, which tells the server where the newest adapter is."""

import warnings
from typing import TYPE_CHECKING, Any

from trl.generation.vllm_client import VLLMClient

from grpo_plus.trainer.vllm.files import Adapter

if TYPE_CHECKING:
    from requests import Response

RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
BITSANDBYTES = "bitsandbytes"
LOAD_SECONDS = 600  # in which a server reads the files of an adapter


class LoRAClient(VLLMClient):
    """TRL's client of a server that holds the base that it loaded itself."""

    _loaded: str | None = None

    def init_communicator(self, device: Any = 0) -> None:
        """Do nothing: no weight moves between the trainer's device and the server's."""

    def check(self, *, rank: int, quantized: bool) -> None:
        """Refuse a server that cannot serve the adapter, and warn of one with another base.

        Args:
            rank: the least `--max-lora-rank` that the server may have.
            quantized: whether the trainer's base is in 4 bits.

        Raises:
            ValueError: with the command that starts such a server.
        """
        info = self._info()
        if (reason := _why_not(info, rank)) is not None:
            raise ValueError(f"vllm_lora_sync=True: the vLLM server at {self.base_url} {reason}. {_start(rank)}")
        if ((bits := info["vllm_config"]["model_config"]["quantization"]) == BITSANDBYTES) != quantized:
            warnings.warn(
                f"The vLLM server at {self.base_url} holds its base with quantization={bits!r}, and the trainer holds "
                f"it {'in 4 bits' if quantized else 'unquantized'}: completions come from another policy, by what "
                f"quantization costs. `vllm serve --quantization {BITSANDBYTES}` quantizes to nf4.",
                stacklevel=2,
            )

    def _info(self) -> Any:
        """How the server was started. None where it does not say so."""
        response = self.session.get(f"{self.base_url}/server_info", params={"config_format": "json"})
        return response.json() if response.status_code == 200 else None

    def use(self, adapter: Adapter) -> None:
        """Let the server load this adapter, ask for it from here on, and let the server forget the one before.

        Raises:
            RuntimeError: the server cannot be reached, or refuses the adapter.
        """
        response = self._tell("load_lora_adapter", lora_name=adapter.name, lora_path=adapter.path)
        if response.status_code != 200:
            raise RuntimeError(
                f"The vLLM server at {self.base_url} did not load the adapter in {adapter.path}: "
                f"{_message(response)}{_fix(response)}"
            )
        before, self._loaded = self._loaded, adapter.name
        self.model = adapter.name  # TRL's requests name it
        if before is not None:
            self._tell("unload_lora_adapter", lora_name=before)  # a server that has forgotten it answers with an error
        self.reset_prefix_cache()

    def _tell(self, route: str, **fields: str) -> "Response":
        import requests  # TRL says how to install it

        # Not TRL's session: it would ask a server that refuses an adapter three times more, and lose the reason.
        try:
            return requests.post(f"{self.base_url}/v1/{route}", json=fields, timeout=LOAD_SECONDS)
        except requests.RequestException as error:
            raise RuntimeError(
                f"The vLLM server at {self.base_url} does not answer {route}: {error}. The run cannot go on without "
                "it. Start the server again, and resume from the last checkpoint."
            ) from error


def _start(rank: int) -> str:
    return (
        f"Start it with VLLM_SERVER_DEV_MODE=1 {RUNTIME_LORA}=1 in its environment: `vllm serve MODEL --enable-lora "
        f"--max-lora-rank {rank} --logprobs-mode processed_logprobs`."
    )


def _why_not(info: Any, rank: int) -> str | None:
    if info is None:
        return "does not say how it was started (/server_info)"
    config = info["vllm_config"]
    if config["lora_config"] is None:
        return "serves no adapters"
    if not info["vllm_env"].get(RUNTIME_LORA):
        return "takes no adapters while it runs"
    if (largest := config["lora_config"]["max_lora_rank"]) < rank:
        return f"serves adapters up to --max-lora-rank {largest}, and needs {rank}"
    if (copies := config["parallel_config"]["data_parallel_size"]) > 1:
        return f"runs with --data-parallel-size {copies}, where an adapter reaches one of the copies alone"
    return None


def _message(response: "Response") -> str:
    """What the server says, and the status where it says nothing."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"


def _fix(response: "Response") -> str:
    if response.status_code != 404:
        return ""
    return ". The server must be able to read output_dir under the same path, as on a shared file system."
