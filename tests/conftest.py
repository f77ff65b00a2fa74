import gc
import os

# Two cores are shared by the workers of the suite; tiny models only lose by more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# TRL reports every trainer that is built to the hub, from a thread.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch
from hypothesis import settings

from tests.interpreter import INTERPRETED

settings.register_profile("suite", deadline=None, max_examples=30)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    if not INTERPRETED:
        skipped = pytest.mark.skip(reason="needs Triton's interpreter; runs in `make test-kernels`")
        for item in items:
            if item.get_closest_marker("triton"):
                item.add_marker(skipped)


@pytest.fixture(autouse=True, scope="module")
def _frozen():
    """Keeps what is there before a module from the garbage collector.

    Every training ends with two collections, and each would walk all of torch and transformers: 0.25 s. Nothing may
    call `gc.unfreeze()`, which undoes this for the rest of the process.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def vllm():
    """vLLM's stand-in, importable as `vllm`."""
    from tests import vllm_standin  # with TRL, which the kernels' tests do without

    with vllm_standin.installed():
        yield


@pytest.fixture
def nan_from_torch_empty(monkeypatch):
    """Fresh memory holds NaN, so that a kernel which reads what it has not written shows; the sizes that were asked for."""
    sizes = []

    def poisoned(make):
        def call(*args, **kwargs):
            tensor = make(*args, **kwargs)
            sizes.append(tensor.numel())
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    return sizes
