"""A tokenizer and a causal LM small enough to train on a laptop's CPU, built in memory: no hub, no download.

The demo, the tests and the benchmarks all take their models from here. The tokenizer reads one character as one token,
so what a reward function sees is what the model wrote, and a hand-written example tokenizes to its own length.
"""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(chr(code) for code in range(ord(" "), ord("~") + 1))

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline, `<unk>` for others; pads on the left, for generation."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    # BPE without merges: every character stays a token, and none needs a pre-tokenizer that could drop spaces.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    architecture: str = "qwen3",
    hidden_size: int = 128,
    intermediate_size: int | None = None,
    num_layers: int = 2,
    num_heads: int = 4,
    num_key_value_heads: int | None = None,
    max_position_embeddings: int = 1024,
    seed: int = 0,
) -> PreTrainedModel:
    """A randomly initialized float32 causal LM that knows `tokenizer`'s vocabulary and special tokens.

    Args:
        architecture: a model type whose config has Llama's field names: "qwen3", "llama", "mistral", "gemma3_text" ...
            Beside a saved "qwen2" model, AutoTokenizer loads Qwen2's tokenizer class whatever was saved.
        intermediate_size: of the MLP; None means four times `hidden_size`.
        num_key_value_heads: fewer than `num_heads` gives grouped-query attention; None gives every head its own.
        seed: decides the weights; the caller's random state is left as it was.
    """
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads or num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
