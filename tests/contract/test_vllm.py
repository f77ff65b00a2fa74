"""The stand-in for vLLM, and what we ask of vLLM, fit vLLM's own package: the ends of the range that TRL supports."""

import inspect
import json
from dataclasses import fields

import pytest
from trl.generation import vllm_generation

from grpo_plus.trainer.vllm import servable
from tests.contract.vllm_interface import METHODS, RECORDED, interface
from tests.vllm_standin import server

pytestmark = [pytest.mark.newest_trl, pytest.mark.usefixtures("vllm")]
KNOWN = {version: dict(found) for version, found in json.loads(RECORDED.read_text()).items()}


@pytest.fixture(params=sorted(KNOWN))
def vllms(request):
    """Words of each entry."""
    return {name: value.split() if isinstance(value, str) else value for name, value in KNOWN[request.param].items()}


def test_the_stand_in_has_vllms_methods(vllms):
    from vllm import LLM

    for name in METHODS[1:]:
        parameters = inspect.signature(getattr(LLM, name)).parameters.values()
        named = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        assert named == vllms[f"LLM.{name}"][: len(named)]


def test_the_engine_takes_what_trl_and_we_hand_it(vllms):
    from vllm import LLM, SamplingParams
    from vllm.engine import OTHERS

    taken = {*vllms["LLM.__init__"], *vllms["EngineArgs"]}
    assert "**kwargs" in taken  # LLM hands them to EngineArgs
    named = [name for name in inspect.signature(LLM).parameters if name != "others"]
    assert {"enable_lora", "max_lora_rank", "max_loras", *named, *OTHERS} <= taken
    assert {field.name for field in fields(SamplingParams)} <= set(vllms["SamplingParams"])


def test_a_lora_request_is_vllms(vllms):
    from vllm.lora.request import LoRARequest

    assert [field.name for field in fields(LoRARequest)] == vllms["LoRARequest"]
    assert tuple(vllms["max_lora_rank"]) == servable.RANKS


def test_what_is_sent_is_what_vllm_reads_of_a_configuration(vllms):
    read = {name for name in vllms["PEFTHelper"] if not name.startswith("vllm_")}
    refused = {"bias", "modules_to_save", "use_dora"}  # vLLM reads these to refuse them
    assert read - refused == {"r", "lora_alpha", "target_modules", "use_rslora"}
    assert read & servable.SERVED == read - refused


def test_the_stub_of_the_server_has_vllms_routes(vllms):
    ours = {word for verb, routes in server.ROUTES.items() for route in routes for word in (verb, route)}
    assert ours <= set(vllms["routes"])
    assert {"lora_name", "lora_path"} <= set(vllms["LoadLoRAAdapterRequest"])
    assert "lora_name" in vllms["UnloadLoRAAdapterRequest"]
    assert {"model", "prompt", "n", "logprobs", "return_token_ids", "return_tokens_as_token_ids"} <= set(
        vllms["CompletionRequest"]
    )


def test_vllm_quantizes_as_it_loads_to_what_is_let_through():
    """From 0.28 a plug-in does, which vLLM's package does not hold."""
    assert KNOWN["0.22.0"]["quantizes_in_flight"] == ["compress_statistics=True", "quant_type='nf4'"]


def test_trl_calls_vllm_by_the_names_that_are_replaced():
    assert {"LLM", "VLLMClient"} <= set(vllm_generation.VLLMGeneration._init_vllm.__code__.co_names)


def test_an_interface_is_read_from_source():
    methods = "".join(f"    def {name}(self, *, level=1, **kwargs): pass\n" for name in METHODS)
    others = ("EngineArgs", "SamplingParams", "PEFTHelper", "CompletionRequest")
    others += ("LoadLoRAAdapterRequest", "UnloadLoRAAdapterRequest")
    classes = "".join(f"class {name}:\n    first: int\n    second: int = 1\n" for name in others)
    request = "class LoRARequest(Struct):\n    '''Doc.'''\n    lora_name: str\n    def name(self): pass\n"
    route = (
        '@router.post(\n    "/v1/completions",\n)\ndef create(): pass\n@router.post("/another")\ndef other(): pass\n'
    )
    found = interface([f"class LLM:\n{methods}", classes, request + route, "MaxLoRARanks = Literal[1, 8]\n"])
    assert found["LLM.sleep"] == "self level **kwargs"
    assert (found["EngineArgs"], found["LoRARequest"]) == ("first second", "lora_name")
    assert (found["routes"], found["max_lora_rank"]) == ("POST /v1/completions", [1, 8])
