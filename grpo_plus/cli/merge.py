"""`grpo-plus merge`: a folder of trained adapters becomes an ordinary model, measured against the trained one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HELP = "Merge trained adapters into an ordinary model, and measure the result."
EXAMPLE = "grpo-plus merge out merged"

EPILOG = """Example: grpo-plus merge out/checkpoint-500 merged --text prompts.txt

The adapters are loaded above the base of their training, which a file beside them names (grpo_plus_base.json, in every
checkpoint of GRPOPlusTrainer). The merged model is read back from the disk, and its KL to the trained model is printed.
Nothing is left in OUT where the two are too far apart."""

ROW = 128  # tokens of a row to compare on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the folders, the method, and what a folder without a record needs."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="a checkpoint, or a folder with adapter_config.json")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist or is empty")
    parser.add_argument(
        "--method",
        default="dequantize",
        choices=("dequantize", "base"),
        help="merge into the weights that the adapters were trained above (dequantize), or into the original ones",
    )
    parser.add_argument("--base", metavar="NAME", help="the base, where it has moved")
    parser.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="the adapters were trained above nf4, and no file beside them says so",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="of the products, with --load_in_4bit"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="text like that of your task to compare on; default: random tokens"
    )
    parser.add_argument(
        "--max_kl", type=float, metavar="N", help="most KL per token of method dequantize; default: 0.001"
    )
    parser.add_argument("--device", help="for example cpu or cuda:0; default: the first GPU, or the CPU")


def run(args: argparse.Namespace, rest: list[str]) -> int:
    """Load, merge, measure and print."""
    from grpo_plus.qlora.export import MAX_KL, save_merged
    from grpo_plus.qlora.recipe import qlora
    from grpo_plus.qlora.reloaded import load_trained

    quantization = qlora(dtype=args.dtype).quantization_config if args.load_in_4bit else None
    model = load_trained(args.adapter, base=args.base, quantization_config=quantization, device=args.device)
    tokenizer = _tokenizer(args.adapter, model)
    save_merged(
        model,
        args.out,
        method=args.method,
        tokenizer=tokenizer,
        input_ids=None if args.text is None else _rows(args.text, tokenizer),
        base=args.base if args.method == "base" else None,
        max_kl=MAX_KL if args.max_kl is None else args.max_kl,
        device=args.device or "cpu",
    )
    return 0


def _tokenizer(adapter: str, model: Any) -> Any:
    """The tokenizer beside the adapters, else that of the base, else None."""
    from transformers import AutoTokenizer

    folders = [path for path in (Path(adapter), Path(adapter).parent) if (path / "tokenizer_config.json").exists()]
    try:
        return AutoTokenizer.from_pretrained(folders[0] if folders else model.config.name_or_path)
    except (OSError, ValueError):  # a base without one, which is then saved without one
        return None


def _rows(text: str, tokenizer: Any) -> "Tensor":
    """(B, L) tokens of a file."""
    import torch

    if tokenizer is None:
        raise ValueError(
            "--text needs a tokenizer, and neither the adapter's folder nor the base has one. Drop --text."
        )
    ids = tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]
    length = min(ROW, len(ids))
    if length < 2:
        raise ValueError(f"--text {text} has {len(ids)} tokens, too few to compare on. Give more text.")
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
