"""A vLLM server is sent the adapters alone, over HTTP: TRL's client asks, and a stub of the server answers."""

import pytest

from tests.qlora.models import save_base
from tests.trainer.adapters_to_vllm import gaps, load, make
from tests.training import logs_of
from tests.vllm_standin.server import serving

adapters = pytest.importorskip("requests.adapters", reason="TRL asks servers by requests")
pytestmark = [pytest.mark.newest_trl, pytest.mark.usefixtures("vllm")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), num_layers=1)


def engine(base, **settings):
    from vllm import LLM

    return LLM(str(base), logprobs_mode="processed_logprobs", **({"enable_lora": True} | settings))


def make_client(folder, base, server, *, bits=32, **config):
    config = {"vllm_mode": "server", "vllm_server_base_url": server.url} | config
    trainer = make(folder, load(base, bits=bits), **config)
    # TRL asks a server that is gone five times more, for a minute.
    trainer.vllm_generation.vllm_client.session.mount("http://", adapters.HTTPAdapter(max_retries=0))
    return trainer


@pytest.mark.parametrize("bits", [32, 4])
def test_rollouts_come_from_the_adapter_that_the_server_was_sent(tmp_path, base, bits):
    with serving(engine(base, quantization="bitsandbytes" if bits == 4 else None)) as server:
        trainer = make_client(tmp_path, base, server, bits=bits)
        assert trainer.speed.drops_old_policy_pass
        trainer.train()
    assert len(gaps(trainer)) == 3
    assert max(gaps(trainer)) < 1e-3
    assert [log["sampling/importance_sampling_ratio/mean"] for log in logs_of(trainer)[:3]] == pytest.approx([1.0] * 3)
    assert [name.rpartition("-")[2] for name in server.answered] == ["v1", "v2", "v3"]
    assert list(server.adapters) == server.answered[-1:]  # the ones before are unloaded
    assert server.engine.resets == 3


@pytest.mark.parametrize(
    ("of_engine", "of_server", "message"),
    [
        ({"enable_lora": False}, {}, "serves no adapters.*vllm serve MODEL --enable-lora --max-lora-rank 8"),
        ({}, {"updates_lora": False}, "takes no adapters while it runs.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"max_lora_rank": 1}, {}, "serves adapters up to --max-lora-rank 1, and needs 8"),
        ({}, {"copies": 2}, "--data-parallel-size 2, where an adapter reaches one"),
    ],
)
def test_a_server_that_cannot_serve_the_adapter_is_refused(tmp_path, base, of_engine, of_server, message):
    with (
        serving(engine(base, **of_engine), **of_server) as server,
        pytest.raises(ValueError, match=f"vllm_lora_sync=True: the vLLM server at http://127.0.0.1:[0-9]+ .*{message}"),
    ):
        make_client(tmp_path, base, server)


def test_an_adapter_that_the_server_refuses_ends_the_run_with_its_reason(tmp_path, base, monkeypatch):
    with serving(engine(base)) as server:
        trainer = make_client(tmp_path, base, server)
        server.engine.max_lora_rank = 1
        with pytest.raises(RuntimeError, match="did not load the adapter in .*-v1: LoRA rank 4 is greater than max_l"):
            trainer.train()


def test_files_that_the_server_cannot_read_are_named(tmp_path, base, monkeypatch):
    with serving(engine(base)) as server:
        trainer = make_client(tmp_path, base, server)
        load_lora = server.engine.add_lora
        elsewhere = tmp_path / "elsewhere"
        monkeypatch.setattr(
            server.engine, "add_lora", lambda request: load_lora(type(request)(request.lora_name, 1, str(elsewhere)))
        )
        with pytest.raises(RuntimeError, match="No adapter found for .*must be able to read output_dir under the same"):
            trainer.train()


def test_a_server_that_dies_ends_the_run_with_what_to_do(tmp_path, base):
    with serving(engine(base)) as server:
        trainer = make_client(tmp_path, base, server)
    with pytest.raises(RuntimeError, match="does not answer load_lora_adapter: .*Start the server again, and resume"):
        trainer.train()


def test_a_server_with_another_base_is_warned_of(tmp_path, base):
    with (
        serving(engine(base)) as server,
        pytest.warns(UserWarning, match="quantization=None, and the trainer holds it in 4 bits: .*--quantization bits"),
    ):
        make_client(tmp_path, base, server, bits=4)
