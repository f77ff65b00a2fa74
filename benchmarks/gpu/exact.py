"""Whether every form, head and layer gives what plain rows give, on the card: values and gradients."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.gauges import relative
from benchmarks.gpu.record import Setting, Stage
from benchmarks.lora_layer import layer_case
from grpo_plus.packing import single_pass_head
from grpo_plus.packing.attention import uninstall_segments
from grpo_plus.packing.candidates import candidates
from grpo_plus.packing.forward import Form, Head
from grpo_plus.packing.layout import group_rows, unpack
from grpo_plus.packing.packer import Packer, PaddedRows
from grpo_plus.packing.rows import CASCADE
from grpo_plus.qlora.lora_layers import fused_lora
from tests.packing.models import CONFIGS, VOCABULARY, tiny

ARCHITECTURES = ("qwen3", "llama", "gemma3", "gpt_oss", "qwen3_5")
REHEARSED = (("qwen3", "sdpa", "float32"), ("gpt_oss", "eager", "float32"), ("qwen3_5", "sdpa", "float32"))
# Prompt length: lengths of its completions. No completion, one of a token, a prompt of one token, one on its own.
GROUPS = {150: (70, 0, 33, 1), 97: (2, 40), 1: (3, 20), 149: (66,)}
TINY_GROUPS = {22: (10, 0, 5, 1), 13: (2, 6), 1: (3,)}

Rows = tuple[Tensor, Tensor, int, int]  # ids and mask (B, L), longest prompt, longest completion
Outcome = tuple[Tensor, Tensor]  # log-probabilities, and all gradients in one vector


def exact(stage: Stage, setting: Setting) -> None:
    """Compare with rows alone in float32."""
    for dtype in ("float32", "bfloat16"):
        for name in ARCHITECTURES:
            for attention in ("sdpa", "eager"):
                wanted = (
                    (name, attention, dtype) in REHEARSED if setting.tiny else (name, attention) != ("gpt_oss", "sdpa")
                )
                if wanted:
                    stage.item(f"{name} {attention} {dtype}", _architecture, setting, name, attention, dtype)
    for dtype in ("float32",) if setting.tiny else ("float32", "bfloat16"):
        for backend in ("peft", "torch"):
            for head in ("trl", "torch") if setting.tiny else ("trl", "torch", "triton"):
                label = f"LoRA qwen3 {dtype} lora_backend={backend} head={head}"
                stage.item(label, _lora, setting, dtype, backend, head)
    for autocast in (False,) if setting.tiny else (True, False):
        stage.item(f"nf4 layer, autocast {autocast}", _nf4_layer, setting, autocast)
    stage.item("greedy generation in chunks", _greedy, setting)


def _rows(setting: Setting) -> Rows:
    generator = torch.Generator().manual_seed(1)
    groups = TINY_GROUPS if setting.tiny else GROUPS
    longest, completion = max(groups), max(map(max, groups.values()))
    rows = []
    for length, counts in groups.items():
        prompt = torch.randint(3, VOCABULARY, (length,), generator=generator)
        rows += [(prompt, torch.randint(3, VOCABULARY, (count,), generator=generator)) for count in counts]
    ids = torch.zeros(len(rows), longest + completion, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(rows):
        used = slice(longest - len(prompt), longest + len(answer))
        ids[row, used], mask[row, used] = torch.cat([prompt, answer]), 1
    order = torch.randperm(len(rows), generator=generator)
    return ids[order].to(setting.device), mask[order].to(setting.device), longest, completion


def _model(setting: Setting, name: str, attention: str, dtype: torch.dtype) -> Any:
    changes: dict[str, Any] = {}
    if not setting.tiny:
        changes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
        changes |= {"sliding_window": 40} if "sliding_window" in CONFIGS[name][1] else {}
        changes |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32} if name == "qwen3_5" else {}
    return tiny(name, attn_implementation=attention, **changes).to(setting.device, dtype)


def _alone(model: Any, rows: Rows) -> Tensor:
    """(B, T) log-probabilities of rows that go through the model one by one, without padding."""
    ids, mask, prompt, completion = rows
    values = []
    for row, seen in zip(ids, mask.bool(), strict=True):
        count = int(seen[prompt:].sum())
        if count == 0:
            values.append(torch.zeros(completion, device=ids.device))
            continue
        tokens = row[seen].unsqueeze(0)
        labels = tokens.clone()
        labels[:, :-count] = -100
        logps = model(input_ids=tokens, labels=labels, fused_lm_head=True).log_probs[0, -count:]
        values.append(torch.nn.functional.pad(logps.float(), (0, completion - count)))
    return torch.stack(values)


def padded(model: Any, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    """(B, T) as TRL computes them."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-length] = -100
    return model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -length:]  # type: ignore[no-any-return]


def _in_form(model: Any, form: Form, head: Head | None, rows: Rows) -> Tensor:
    ids, mask, _, completion = rows
    ready = form.ready(form.arrange(group_rows(ids, mask, completion)), ids.device)
    logps, _ = model(packed=partial(form.run, ready.call, head))
    return unpack(logps, (ready.rows, ready.columns), torch.zeros(len(ids), completion, device=ids.device))


def _outcome(model: Any, call: Callable[[], Tensor]) -> Outcome:
    model.zero_grad()
    values = call().float()
    (
        values * torch.randn(values.shape[1], generator=torch.Generator().manual_seed(2)).to(values.device)
    ).sum().backward()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    flat = [(torch.zeros_like(w) if w.grad is None else w.grad).flatten().float() for w in trained]
    return values.detach(), torch.cat(flat)


def _errors(found: Outcome, truth: Outcome, mask: Tensor) -> list[float]:
    return [relative(found[0] * mask, truth[0]), relative(found[1], truth[1])]


def _architecture(setting: Setting, name: str, attention: str, dtype: str) -> dict[str, Any]:
    """Errors of log-probabilities and gradients: TRL's padded forward, and each form."""
    rows = _rows(setting)
    ids, mask, _, completion = rows
    model, wide = (_model(setting, name, attention, kind) for kind in (getattr(torch, dtype), torch.float32))
    wide.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    truth = _outcome(wide, lambda: _alone(wide, rows))
    scored = mask[:, -completion:]
    noise = _errors(_outcome(model, lambda: padded(model, ids, mask, completion)), truth, scored)
    row: dict[str, Any] = {"padded": noise}
    floor, bad = 2e-5 if dtype == "float32" else 2e-3, []
    forms, _ = candidates("auto", model, None)
    for form in [CASCADE, *forms] if setting.tiny and name == "qwen3" else forms:
        errors = _errors(_outcome(model, lambda form=form: _in_form(model, form, None, rows)), truth, scored)  # type: ignore[misc]
        row[str(form)] = errors
        if not all(error <= max(floor, 2 * least) for error, least in zip(errors, noise, strict=True)):
            bad.append(str(form))
        uninstall_segments(model)
    packer = Packer("auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packer.logps(model, model, PaddedRows(ids, mask, completion), partial(padded, model))
    packer.release()
    return row | {"auto": packer.describe(), "bad": bad}


def _adapted(setting: Setting, dtype: torch.dtype) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        _model(setting, "qwen3", "sdpa", dtype), LoraConfig(r=8, target_modules="all-linear")
    ).train()
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator).to(setting.device) * 0.05
    return model


@contextmanager
def _layers(model: Any, backend: str) -> Iterator[None]:
    if backend == "peft":
        yield
        return
    with fused_lora(model) as products:
        for _ in range(2):  # the second time, layers that share an input are one step
            with products.held(), torch.no_grad():
                model(input_ids=torch.ones(1, 4, dtype=torch.long, device=model.device), use_cache=False)
        with products.held():
            yield


def _lora(setting: Setting, dtype: str, backend: str, head_name: str) -> dict[str, Any]:
    rows = _rows(setting)
    ids, mask, _, completion = rows
    model, wide = _adapted(setting, getattr(torch, dtype)), _adapted(setting, torch.float32)
    wide.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    truth = _outcome(wide, lambda: _alone(wide, rows))
    scored = mask[:, -completion:]
    autocast = torch.autocast(setting.device, torch.bfloat16) if dtype == "bfloat16" else nullcontext()
    head = None if head_name == "trl" else single_pass_head(head_name, temperature=1.3)
    form = candidates("auto", model.get_base_model(), None)[0][0]

    def under(call: Callable[[], Tensor]) -> Tensor:
        with autocast:
            return call()

    noise = _outcome(model, lambda: under(lambda: padded(model, ids, mask, completion)))
    with _layers(model, backend):
        found = _outcome(model, lambda: under(lambda: _in_form(model, form, head, rows)))
    return {"form": str(form), "padded": _errors(noise, truth, scored), "ours": _errors(found, truth, scored)}


def _nf4_layer(setting: Setting, autocast: bool) -> dict[str, Any]:
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    with layer_case(256, 256, 512, device=setting.device, dtype=dtype, autocast=autocast) as (_, error):
        return {"largest_difference_from_peft": float(f"{error:.1e}")}


def _greedy(setting: Setting) -> dict[str, Any]:
    """Greedy completions of a tiny model: all rows at once, and in chunks of three."""
    from datasets import Dataset

    from grpo_plus import GRPOPlusConfig, GRPOPlusTrainer
    from grpo_plus.demo.tiny import tiny_model, tiny_tokenizer

    tokenizer, found = tiny_tokenizer(), []
    for size in (None, 3):
        config = GRPOPlusConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=16,
            bf16=False,
            use_cpu=setting.tiny,
            report_to="none",
            generation_chunk_size=size,
            generation_kwargs={"do_sample": False},
        )
        trainer = GRPOPlusTrainer(
            model=tiny_model(tokenizer, hidden_size=64, num_heads=2),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": "1"}]),
            processing_class=tokenizer,
        )
        texts = ("1+1=", "12+3=", "2", "hello world", "0 1 2", "abc", "x", "9")
        found.append(trainer._generate_single_turn([tokenizer(text)["input_ids"] for text in texts], None, {}, 1)[0])
    return {"equal": f"{sum(a == b for a, b in zip(*found, strict=True))} of 8"}
