"""The HTTP routes of a vLLM server that TRL's client and ours call, in a thread of this process, above the stand-in engine.

Status codes and messages are vLLM's: a refused adapter is an error of the server (500), files that it cannot find and names
that it does not know are 404.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

ROUTES = {
    "GET": ("/health", "/v1/models", "/server_info"),
    "POST": ("/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache"),
}


class Server:
    """What `vllm serve` would hold.

    Args:
        updates_lora: whether VLLM_ALLOW_RUNTIME_LORA_UPDATING is set.
        copies: of the engine, by --data-parallel-size.
    """

    def __init__(self, engine: Any, *, updates_lora: bool = True, copies: int = 1) -> None:
        self.engine, self.updates_lora, self.copies = engine, updates_lora, copies
        self.adapters: dict[str, Any] = {}
        self.answered: list[str] = []  # the models that completions came from
        self._count = 0
        self.url = ""

    def answer(self, route: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and body of the reply."""
        if route.endswith("_lora_adapter") and not self.updates_lora:
            return 404, {"detail": "Not Found"}
        replies = {
            "/health": dict,
            "/v1/models": lambda: {"data": [{"id": name} for name in (self.engine.base, *self.adapters)]},
            "/server_info": self._info,
            "/v1/completions": lambda: self._completions(body),
            "/v1/load_lora_adapter": lambda: self._load(**body),
            "/v1/unload_lora_adapter": lambda: self._unload(**body),
            "/reset_prefix_cache": lambda: {"success": self.engine.reset_prefix_cache()},
        }
        try:
            return 200, replies[route]()
        except KeyError as error:
            return 404, {"error": {"message": f"{error} cannot be found."}}
        except FileNotFoundError as error:
            return 404, {"error": {"message": str(error)}}
        except ValueError as error:
            return 500, {"error": {"message": str(error)}}

    def _info(self) -> dict[str, Any]:
        engine = self.engine
        lora = {"max_lora_rank": engine.max_lora_rank, "max_loras": engine.max_loras} if engine.enable_lora else None
        config = {
            "model_config": {"logprobs_mode": "processed_logprobs", "quantization": engine.quantization},
            "lora_config": lora,
            "parallel_config": {"data_parallel_size": self.copies},
            "weight_transfer_config": None,
        }
        return {"vllm_config": config, "vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": self.updates_lora}}

    def _load(self, lora_name: str, lora_path: str, load_inplace: bool = False, is_3d_lora_weight: bool = False) -> str:
        from vllm.lora.request import LoRARequest

        if lora_name in self.adapters and not load_inplace:
            raise ValueError(f"The lora adapter '{lora_name}' has already been loaded.")
        self._count += 1
        request = LoRARequest(lora_name, self._count, lora_path)
        self.engine.add_lora(request)
        self.adapters[lora_name] = request
        return f"Success: LoRA adapter '{lora_name}' added successfully."

    def _unload(self, lora_name: str, lora_int_id: int | None = None) -> str:
        del self.adapters[lora_name]
        return f"Success: LoRA adapter '{lora_name}' removed successfully."

    def _completions(self, body: dict[str, Any]) -> dict[str, Any]:
        from vllm import SamplingParams

        adapter = None if body["model"] == self.engine.base else self.adapters[body["model"]]
        self.answered.append(body["model"])
        assert body.pop("return_token_ids")
        assert body.pop("return_tokens_as_token_ids")
        prompts = [{"prompt_token_ids": ids} for ids in body["prompt"]]
        params = SamplingParams(**{name: value for name, value in body.items() if name not in ("model", "prompt")})
        return {
            "choices": [
                _choice(output.prompt_token_ids, completion)
                for output in self.engine.generate(prompts, params, lora_request=adapter)
                for completion in output.outputs
            ]
        }


def _choice(prompt: list[int], completion: Any) -> dict[str, Any]:
    tokens = [f"token_id:{token}" for token in completion.token_ids]
    logps = [next(iter(entry.values())).logprob for entry in completion.logprobs]
    return {
        "index": completion.index,
        "prompt_token_ids": prompt,
        "token_ids": completion.token_ids,
        "logprobs": {
            "tokens": tokens,
            "token_logprobs": logps,
            "top_logprobs": [{token: logp} for token, logp in zip(tokens, logps, strict=True)],
        },
    }


@contextmanager
def serving(engine: Any, **settings: Any) -> Iterator[Server]:
    """A server above the engine that answers on this machine, at a port of its own."""
    server = Server(engine, **settings)

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, reply = server.answer(self.path.partition("?")[0].rstrip("/"), json.loads(body or b"{}"))
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _reply  # noqa: N815

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
