"""MLPs and norms in tiles of tokens: the same gradients, no further forward, and nothing (N, intermediate) kept."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from grpo_plus.models import dense, tiles
from grpo_plus.models.row_wise import is_mlp, is_norm, row_wise_modules
from grpo_plus.models.tiles import Tiles, why_not_tiled
from grpo_plus.packing.passes import CACHED
from grpo_plus.packing.rows import SEGMENTS
from grpo_plus.qlora.lora_layers import fused_lora
from tests.close import assert_close
from tests.models.test_offload import logps_of
from tests.packing.counting import kept_bytes
from tests.packing.models import CONFIGS, tiny
from tests.qlora.models import load_nf4, lora, save_base

TILE = 5  # of rows with 40 tokens
NO_MLP = ("gpt_oss", "phimoe", "qwen3_moe", "gpt2", "bloom", "mpt")  # experts, transposed weights, two inputs
IDS = torch.arange(40).view(2, 20) % 97


def gradients(model: Any, changed: Any, form: Any = None) -> Tensor:
    """Of all weights, one after another."""
    with changed:
        logps = logps_of(model, form)
        (logps * torch.arange(logps.numel()).view_as(logps).cos()).sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])
    model.zero_grad()
    return found


class Calls(Counter[str]):
    """Which modules were computed for how many tokens."""

    def __init__(self, model: nn.Module, monkeypatch: Any) -> None:
        super().__init__()
        kinds = {type(module) for module in model.modules() if is_mlp(module)}
        for kind in kinds:
            forward = kind.forward
            monkeypatch.setattr(kind, "forward", lambda module, x, forward=forward: self.note(x) or forward(module, x))

    def note(self, x: Tensor) -> None:
        self["graph" if torch.is_grad_enabled() else "no graph"] += x.shape[:-1].numel()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_is_exact(name):
    model = tiny(name, checkpointing=True)
    expected = gradients(model, nullcontext())
    made = Tiles(TILE)
    assert_close("gradients", gradients(model, made.of(model)), expected, rtol=2e-6)
    modules = made._modules[model]
    assert any(is_norm(module) for module in modules)
    assert any(is_mlp(module) for module in modules) == (name not in NO_MLP)
    assert not any("forward" in vars(module) for module in model.modules() if not hasattr(module, "lm_head"))


@pytest.mark.parametrize("form", [SEGMENTS, CACHED], ids=lambda form: form.detail)
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("fused", [False, True], ids=["peft", "fused"])
def test_adapters_in_both_packed_forms_are_exact(form, reentrant, fused):
    model = tiny("qwen3", checkpointing=True, reentrant=reentrant)
    model.enable_input_require_grads()
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with fused_lora(model) if fused else nullcontext():
        expected = gradients(model, nullcontext(), form)
        assert_close("gradients", gradients(model, Tiles(TILE).of(model), form), expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "reentrant", "further"), [("llama", False, 0), ("gemma2", False, 1), ("llama", True, 1)]
)
def test_under_a_checkpoint_that_stops_early_the_mlp_runs_no_third_time(monkeypatch, name, reentrant, further):
    model = tiny(name, checkpointing=True, reentrant=reentrant)
    model.enable_input_require_grads()
    made = Tiles(TILE)
    with made.of(model):  # the check is behind us
        pass
    calls = Calls(model, monkeypatch)
    with made.of(model):
        model(input_ids=IDS, use_cache=False).logits.sum().backward()
    tokens = 2 * IDS.numel()  # of two layers
    assert calls == {"no graph": tokens * (1 + further), "graph": tokens}


def test_a_short_row_goes_through_the_modules_own_forward(monkeypatch):
    model = tiny("llama", checkpointing=True)
    made = Tiles(IDS.numel())
    with made.of(model):
        expected = model(input_ids=IDS, use_cache=False).logits
        monkeypatch.setattr(tiles, "_Call", None)
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)


def test_scoring_without_a_graph_computes_in_tiles_too(monkeypatch):
    model, sizes = tiny("llama"), []
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with Tiles(TILE).of(model):
            monkeypatch.setattr(Calls, "note", lambda self, x: sizes.append(x.shape[1]))
            Calls(model, monkeypatch)
            assert_close("logits", model(input_ids=IDS).logits, expected, rtol=2e-6)
    assert sizes == [TILE] * (2 * IDS.numel() // TILE)


def test_without_checkpoints_only_inputs_are_kept():
    def kept(changed: Any) -> int:
        with changed, kept_bytes() as found:
            model.model.layers[0].mlp(torch.randn(1, 40, 32, requires_grad=True))
        return sum(found.values()) - sum(weight.nbytes for weight in model.model.layers[0].mlp.parameters())

    model = tiny("llama")
    width = model.config.intermediate_size
    assert kept(nullcontext()) == 4 * 40 * (32 + 4 * width)  # x; gate, its activation, up, and their product
    assert kept(Tiles(TILE).of(model)) + sum(w.nbytes for w in model.model.layers[0].mlp.parameters()) == 4 * 40 * 32


def test_the_gradient_of_bfloat16_weights_is_summed_in_float32():
    mlp = tiny("llama").model.layers[0].mlp
    exact = gradient_of(mlp, nullcontext())
    mlp.bfloat16()
    wide, parent = mlp.up_proj.weight.dtype, nn.ModuleList([mlp])
    whole, tiled = gradient_of(mlp, nullcontext()), gradient_of(mlp, Tiles(2).of(parent))
    assert wide == torch.bfloat16
    assert (tiled - exact).norm() < 1.2 * (whole - exact).norm()


def gradient_of(mlp: nn.Module, changed: Any) -> Tensor:
    weight = mlp.up_proj.weight
    x = (torch.arange(1000 * 32.0).view(1, 1000, 32) * 0.37).sin().to(weight.dtype)
    with changed:
        return torch.autograd.grad(mlp(x).sum(), weight)[0].float()


def test_autocast_trains_float32_weights():
    # A copy of a weight that autocast made without a graph would leave the weight without its gradient.
    model, found = tiny("llama", checkpointing=True), []
    for changed in (nullcontext(), Tiles(TILE).of(model)):
        with changed:
            with torch.autocast("cpu", torch.bfloat16):
                losses = [model(input_ids=IDS, use_cache=False).logits.float().square().mean() for _ in range(2)]
            sum(losses).backward()
        found.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        model.zero_grad()
    assert_close("gradients", found[1], found[0], rtol=3e-2)


def test_a_4_bit_weight_is_dequantized_once_per_pass_through_a_layer(tmp_path, monkeypatch):
    model: Any = load_nf4(save_base(tmp_path))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    get_peft_model(model, lora(init_lora_weights=False))
    model.train()
    made, counts = Tiles(TILE), []
    with fused_lora(model):
        expected = loss_and_gradient(model, nullcontext())
        with made.of(model):
            pass
        whole = dense.dequantized
        monkeypatch.setattr(dense, "dequantized", lambda layer: counts.append(layer) or whole(layer))
        tiled = loss_and_gradient(model, made.of(model))
    assert_close("gradients", tiled, expected, rtol=2e-2)  # products in bfloat16
    mlps = [layer.mlp for layer in model.model.layers]
    assert Counter(counts) == {
        child.base_layer: 2 for mlp in mlps for child in mlp.children() if child is not mlp.act_fn
    }


def test_an_evaluation_above_4_bits_goes_through_pefts_own_layers(tmp_path):
    """They are named as the layers in 4 bits that they hold."""
    model: Any = load_nf4(save_base(tmp_path))
    get_peft_model(model, lora(init_lora_weights=False))
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=IDS % 20, use_cache=False).logits
        with Tiles(TILE).of(model):
            tiled = model(input_ids=IDS % 20, use_cache=False).logits
    assert_close("logits", tiled.float(), expected.float(), rtol=2e-2)


def loss_and_gradient(model: Any, changed: Any) -> Tensor:
    model.zero_grad()
    with changed:
        model(input_ids=IDS % 20, use_cache=False).logits.float().log_softmax(-1)[..., 3].sum().backward()
    return torch.cat([weight.grad.flatten().float() for weight in model.parameters() if weight.requires_grad])


def test_a_module_that_mixes_tokens_or_draws_numbers_stays_whole(caplog):
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x.cumsum(1))))

    class Dropping(Mixing):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Dropout(0.1)

    assert is_mlp(Mixing())
    assert "Mixing is not the same in tiles" in str(why_not_tiled(Mixing()))
    assert not is_mlp(Dropping())
    experts = nn.ModuleDict({"experts": nn.ModuleList([tiny("llama").model.layers[0].mlp])})
    assert row_wise_modules(experts, why_not_tiled) == []
    with caplog.at_level("INFO", "grpo_plus"), Tiles(TILE).of(nn.ModuleList([Mixing()])):
        pass
    assert "Its input stays whole" in caplog.text
    assert "mlp_tile_tokens: norms only" in caplog.text
