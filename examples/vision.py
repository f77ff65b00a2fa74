"""GRPO on pictures: a tiny vision-language model learns to count shapes and to name their color.

python examples/vision.py                           on the CPU, offline, in a minute
python examples/vision.py --max_steps 400 --seed 1  a longer run, other pictures and weights

All is made here: the pictures, the processor, and a LLaVA with random weights. A warm-up shows the model 64 pictures
with their answers. It teaches the form of an answer and some of the skill. Then comes GRPO, with many more pictures and
no answers: the model hears only how good its own answers are.

To train a checkpoint of the hub, write `model="Qwen/Qwen2.5-VL-3B-Instruct"` and leave `processing_class` out. The
columns `prompt` and `image` and the reward functions stay as they are here.
"""

import argparse
import random
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl import GRPOConfig
from trl.data_utils import prepare_multimodal_messages

from grpo_plus import GRPOPlusTrainer

SIDE, PATCH = 24, 8  # pixels: a picture is 3 x 3 patches, so 9 tokens
COLORS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 205, 50)}
QUESTION = "how many shapes and which color"
SPECIAL_TOKENS = ["<pad>", "<eos>", "<unk>", "<image>"]
VOCABULARY = [*SPECIAL_TOKENS, *QUESTION.split(), *"1234", *COLORS]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"
    "{{ '<eos>' if message['role'] == 'assistant' }}{% endfor %}"
)
WARM_UP_PICTURES, WARM_UP_STEPS, TRAIN, HELD_OUT = 64, 60, 1000, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="vision")
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    draws = random.Random(args.seed)
    labeled, train, held_out = (pictures(size, draws) for size in (WARM_UP_PICTURES, TRAIN, HELD_OUT))
    processor = tiny_processor()
    model = tiny_model(processor, args.seed)
    warm_up(model, processor, labeled, args.seed)
    before = answers(model, processor, held_out)
    print(f"before: {share_right(before, held_out):.0%} of {HELD_OUT} held-out pictures right")

    trainer = GRPOPlusTrainer(
        model=model,
        processing_class=processor,
        reward_funcs=[number, color],
        train_dataset=train,
        args=GRPOConfig(
            args.output_dir,
            seed=args.seed,
            max_steps=args.max_steps,
            num_generations=8,
            per_device_train_batch_size=64,  # 8 pictures with 8 completions each
            max_completion_length=4,
            learning_rate=5e-4,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
    )
    trainer.train()

    after = answers(model, processor, held_out)
    changed = [told for told in zip(held_out, before, after, strict=True) if told[1] != told[2]]
    for row, old, new in changed[:3]:
        print(f"{as_text(row['image'])}\n{QUESTION}? before: {old}, after: {new}, right: {row['answer']}\n")
    print(f"after: {share_right(after, held_out):.0%} of {HELD_OUT} held-out pictures right")


def number(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """1 for the right number, 0.4 for a number beside it: who is nearly right hears so."""
    said = [(words(completion)[0], text.split()[0]) for completion, text in zip(completions, answer, strict=True)]
    return [{0: 1.0, 1: 0.4}.get(abs(int(own) - int(right)), 0.0) if own.isdigit() else 0.0 for own, right in said]


def color(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float]:
    """1 for the right color."""
    return [
        float(words(completion)[1] == text.split()[1]) for completion, text in zip(completions, answer, strict=True)
    ]


def words(completion: list[dict[str, str]]) -> list[str]:
    """The two words of an answer; empty ones where there are not two."""
    found = completion[-1]["content"].split()
    return found if len(found) == 2 else ["", ""]


def pictures(size: int, draws: random.Random) -> Dataset:
    """Rows as TRL takes them: `prompt`, `image`, and a column for the rewards."""
    rows = []
    for _ in range(size):
        image, answer = picture(draws)
        rows.append({"prompt": [{"role": "user", "content": QUESTION}], "image": image, "answer": answer})
    return Dataset.from_list(rows)


def picture(draws: random.Random) -> tuple[Image.Image, str]:
    """One to four disks and boxes of one color, in places and sizes of their own, and how many of what color."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    canvas = ImageDraw.Draw(image)
    count, name = draws.randint(1, 4), draws.choice(list(COLORS))
    for place in draws.sample(range((SIDE // PATCH) ** 2), count):
        side = draws.randint(5, PATCH)
        top, left = (PATCH * cell + draws.randint(0, PATCH - side) for cell in divmod(place, SIDE // PATCH))
        shape = draws.choice([canvas.ellipse, canvas.rectangle])
        shape((left, top, left + side - 1, top + side - 1), fill=COLORS[name])
    return image, f"{count} {name}"


def as_text(image: Image.Image) -> str:
    """The picture in letters, each the first of a color's name."""
    letters = {value: name[0] for name, value in COLORS.items()}
    rows = range(0, SIDE, 2)
    return "\n".join(" ".join(letters.get(image.getpixel((x, y)), ".") for x in rows) for y in rows)


def tiny_processor() -> LlavaProcessor:
    """A word is a token. The image processor is one of those that need PIL alone, not torchvision."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    return LlavaProcessor(
        CLIPImageProcessorPil(do_resize=False, do_center_crop=False),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",  # without the class token that CLIP puts first
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """A vision tower and a language model of two layers each. Weights this large make a tiny model learn faster."""
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {name: getattr(processor.tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    text = LlamaConfig(vocab_size=len(VOCABULARY), bos_token_id=None, initializer_range=0.1, **size, **tokens)
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, **size)
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=VOCABULARY.index("<image>"),
            vision_feature_layer=-1,
            **tokens,
        )
    )


def batch(processor: LlavaProcessor, rows: Dataset, answered: bool) -> Any:
    """What the model reads: pictures and questions, with the answers or without."""
    messages = []
    for row in rows:
        answer = [{"role": "assistant", "content": row["answer"]}] if answered else []
        messages.append(prepare_multimodal_messages(row["prompt"] + answer, images=[row["image"]]))
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, processor_kwargs={"padding": True, "return_tensors": "pt"}
    )


def warm_up(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Dataset, seed: int) -> None:
    """Supervised steps on half of the pictures at a time."""
    inputs = batch(processor, rows, answered=True)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100  # two words and the end are learned
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(WARM_UP_STEPS):
        drawn = torch.randperm(len(rows), generator=order)[: len(rows) // 2]
        model(**{name: values[drawn] for name, values in inputs.items()}, labels=labels[drawn]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def answers(model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Dataset) -> list[str]:
    """The model's most likely answers."""
    inputs = batch(processor, rows, answered=False)
    model.eval()
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share_right(texts: list[str], rows: Dataset) -> float:
    return sum(text == right for text, right in zip(texts, rows["answer"], strict=True)) / len(texts)


if __name__ == "__main__":
    main()
