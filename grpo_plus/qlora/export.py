"""Export the trained model to a folder that loads without bitsandbytes, and check the folder against the model.

Adapters learn on top of the weights that the 4-bit codes stand for. "dequantize" writes out these weights with the
adapters merged in, which gives the trained model to rounding. "base" merges into the original weights, which the
adapters never saw, so that the result is off by what quantization changed. "adapter" leaves the adapters apart. A merge
into the 4-bit codes themselves would round away most of what was learned, and is refused.
"""

import copy
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grpo_plus.models.adapters import changed_by_init, has_adapters
from grpo_plus.qlora.checks import ADAPTER_WEIGHTS
from grpo_plus.qlora.originals import original_base
from grpo_plus.qlora.precision import keep_gradients_on_the_cpu
from grpo_plus.qlora.reloaded import adapter_folder, described_base, load_trained, write_record
from grpo_plus.qlora.unwrapped import dequantized, dtype_of, unwrapped

logger = logging.getLogger("grpo_plus")

METHODS = ("dequantize", "base", "adapter")
MAX_KL = 1e-3
ROUNDING = 1e-5  # a KL below this is rounding, in half precision


@dataclass(frozen=True)
class Export:
    """An exported model, and its distance from the trained model.

    kl:                 mean KL(trained || exported) of the probed tokens, with the folder read back from the disk.
    kl_without_adapter: mean KL of the base without adapters, which a merge that loses everything would have.
    compared_with:      the model in memory that the folder was compared with, in words.
    """

    path: Path
    method: str
    kl: float
    kl_without_adapter: float
    compared_with: str = "the model in memory"

    def __str__(self) -> str:
        return (
            f"{self.path}: method={self.method!r}, KL to the trained model {self.kl:.2g} per token "
            f"(without any adapter: {self.kl_without_adapter:.2g}), compared with {self.compared_with}"
        )


def save_merged(
    model: Any,
    path: str | Path,
    *,
    method: str = "dequantize",
    tokenizer: PreTrainedTokenizerBase | None = None,
    input_ids: Tensor | None = None,
    base: str | None = None,
    max_kl: float = MAX_KL,
    device: str = "cpu",
) -> Export:
    """Save a trained model with adapters to `path`, check its KL to the trained model, and print the KL.

    Args:
        model: a model with adapters, such as `trainer.model`, or what `load_trained` reads from a folder of adapters.
            It stays as it is. The export is compared with this model, so load it above the base of its training.
        path: a folder that does not exist or is empty. A failure leaves nothing there.
        method: "dequantize", "base" or "adapter"; see the module.
        tokenizer: saved beside the model.
        input_ids: (B, L) tokens to compare on, best of your own prompts and completions. None takes random tokens.
        base: name or folder of the unquantized base, for method="base". None takes the name of the quantized base.
        max_kl: limit for method="dequantize" and method="adapter". Above it nothing is saved.
        device: where the exported model is built and checked, in the dtype of the trained model.

    Raises:
        ValueError: an unknown or lossy method, a model without adapters, or adapters that the method cannot export.
        FileExistsError: the folder holds something.
        RuntimeError: the exported model is further than `max_kl` from the trained model, or further than the model
            without its adapter.
    """
    _check_method(method)
    if not has_adapters(model):
        raise ValueError(f"{type(model).__name__} has no adapters to merge. Save it with save_pretrained.")
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"path={str(path)!r} exists and is not an empty folder. Choose another one.")
    _check_adapters(model, method)
    keep_gradients_on_the_cpu(model)
    ids = _random_ids(model) if input_ids is None else input_ids
    trained = token_logps(model, ids)
    with model.disable_adapter():
        without = kl_divergence(trained, token_logps(model, ids))
    target = path.resolve()  # an empty folder may be a link
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own beside the target, so that the last step is a rename and no other folder is touched.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as own:
        unfinished = Path(own) / target.name
        _write(model, unfinished, method, base, device)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        kl = _kl_of_folder(unfinished, method, model, trained, ids, device)
        export = Export(path, method, kl, without, f"the adapter above {described_base(model)}")
        if method == "adapter" and changed_by_init(model.peft_config[model.active_adapters[0]]):
            # Its start is computed again, or drawn: all is right then, or most of the training is lost.
            max_kl = min(max_kl, max(without / 100, ROUNDING))
        _check_export(export, max_kl)
        unfinished.replace(target)
    print(export)
    return export


def token_logps(model: Any, input_ids: Tensor) -> Tensor:
    """Log-probabilities (B, L, V) in float32 on the CPU, without dropout, row by row. The modes of the modules stay."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            rows = [
                model(input_ids=row.to(model.device)).logits.float().log_softmax(-1).cpu() for row in input_ids.split(1)
            ]
    finally:
        for module in training:
            module.training = True
    return torch.cat(rows)


def kl_divergence(trained: Tensor, exported: Tensor) -> float:
    """Mean over the tokens of Σ_v p(v) (log p(v) − log q(v)), with p of the trained and q of the exported model."""
    rows = ((p.double(), q.double()) for p, q in zip(trained, exported, strict=True))
    # A token of probability 0 adds nothing, also where both models rule it out and the difference is not a number.
    means = [(p.exp() * (p - q)).where(p > -torch.inf, 0.0).sum(-1).mean() for p, q in rows]
    mean = torch.stack(means).mean().item()
    return 0.0 if -ROUNDING < mean < 0 else mean  # log-probabilities are rounded, a KL is never negative


def _check_method(method: str) -> None:
    if method in ("4bit", "merge_and_unload", "merged_4bit", "merge"):
        raise ValueError(
            f"method={method!r} would merge into the 4-bit codes, whose steps are larger than most updates: measured, "
            "the result is about as far from the trained model as the base without any adapter. Use "
            "method='dequantize' and quantize the saved model anew where it must be small, or method='adapter'."
        )
    if method not in METHODS:
        raise ValueError(f"Unknown method {method!r}. Known: {', '.join(METHODS)}.")


def _check_adapters(model: Any, method: str) -> None:
    """Refuse adapters that the method would export as another model."""
    from peft.tuners.tuners_utils import BaseTuner

    names = model.active_adapters
    if len(names) != 1:
        raise ValueError(
            f"{len(names)} adapters are active ({', '.join(names)}), and an export takes one. Call set_adapter(...) "
            "first."
        )
    config = model.peft_config[names[0]]
    if method != "adapter" and not isinstance(model.base_model, BaseTuner):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{kind} adapters are no weights that could be merged. Use method='adapter'.")
    if method != "adapter" and getattr(config, "lora_bias", False) and _lacks_biases(model):
        raise ValueError(
            "lora_bias=True has trained biases for layers that have none in the base, so a merged model has no place "
            "for them. Use method='adapter'."
        )
    if method == "base" and (init := changed_by_init(config)):
        raise ValueError(
            f"init_lora_weights={init!r} has changed the base, so the adapter does not fit the original weights. Use "
            "method='dequantize', which exports the base as it was trained above."
        )
    if method == "base" and getattr(config, "layer_replication", None):
        raise ValueError(
            "layer_replication trains several layers above one weight, which a merge into the original base would "
            "change for all of them. Use method='dequantize'."
        )


def _lacks_biases(model: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return any(getattr(unwrapped(layer), "bias", None) is None for layer in layers)


def _check_export(export: Export, max_kl: float) -> None:
    """Refuse an export that is too far. `not <=` refuses NaN too."""
    if export.method != "base" and not export.kl <= max_kl:
        hint = (
            " The adapter needs the base that it was trained above, which a reload does not give. "
            "method='dequantize' exports that base with the adapter merged in."
            if export.method == "adapter"
            else ""
        )
        raise RuntimeError(f"{export} is more than max_kl={max_kl:.2g}, so nothing was saved.{hint}")
    if not export.kl <= max(export.kl_without_adapter, ROUNDING):
        hint = (
            "Quantizing the base has changed it by more than the training did: the original weights are not those "
            "that the adapters were trained above. method='dequantize' keeps what was trained."
            if export.method == "base"
            else "The merge loses more than the training changed. method='adapter' keeps what was trained; to see "
            "whether your own prompts differ, pass them as input_ids."
        )
        raise RuntimeError(f"{export} is further than the model without its adapter, so nothing was saved. {hint}")


def _write(model: Any, folder: Path, method: str, base: str | None, device: str) -> None:
    adapter = model.active_adapters[0]
    if method == "adapter":
        model.save_pretrained(folder, selected_adapters=[adapter])
        write_record(model, folder)
        return
    dense = dequantized(model, device) if method == "dequantize" else original_base(model, base).to(device)
    _merged(dense, model, adapter, keeps_layers=method == "dequantize").save_pretrained(folder)


def _merged(dense: PreTrainedModel, model: Any, adapter: str, *, keeps_layers: bool) -> PreTrainedModel:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[adapter])
    config.init_lora_weights = True  # any other choice computes a start from the base, or changes the base
    if keeps_layers:
        config.layer_replication = None  # the base in memory has its replicas already
    wrapped = get_peft_model(dense, config, adapter_name=adapter)
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    set_peft_model_state_dict(wrapped, weights, adapter_name=adapter)
    return wrapped.merge_and_unload()


def _kl_of_folder(folder: Path, method: str, model: Any, trained: Tensor, ids: Tensor, device: str) -> float:
    """Read the folder back and compare what it computes with what the trained model computes."""
    if method != "adapter":
        base = model.get_base_model()
        again: Any = type(base).from_pretrained(folder, dtype=dtype_of(base)).to(device)
        return kl_divergence(trained, token_logps(again, ids))
    try:
        again = load_trained(folder, device=device)
    except (OSError, ValueError) as error:
        if init := changed_by_init(model.peft_config[model.active_adapters[0]]):
            raise ValueError(
                f"init_lora_weights={init!r} has changed the base, which cannot be loaded again: the adapter alone "
                "would be another model. Use method='dequantize'."
            ) from error
        logger.warning(f"The adapters are compared weight by weight, because the base cannot be loaded again: {error}")
        return _kl_of_weights(folder, model)
    return kl_divergence(trained, token_logps(again, ids))


def _kl_of_weights(folder: Path, model: Any) -> float:
    """0 where the folder holds the adapter's weights to the bit. NaN otherwise."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    adapter = model.active_adapters[0]
    written = load_file(adapter_folder(folder) / ADAPTER_WEIGHTS)
    weights = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    same = all(name in written and torch.equal(written[name], weight.cpu()) for name, weight in weights.items())
    return 0.0 if same else float("nan")


def _random_ids(model: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
