"""The memory of a card by its name: "4090", "rtx 3060", "T4", "A100 80GB"; or by a size: "12GB", "12"."""

import re
from dataclasses import dataclass

from grpo_plus.planner.run import parse_bytes
from grpo_plus.registry import did_you_mean

GIB = 2**30
MAKERS = re.compile(
    r"nvidia|geforce|quadro|tesla|radeon|instinct|amd|rtx|gtx|(?<![a-z])rx(?![a-z])|gpu|card|sxm\d?|pcie|[\s_-]+"
)
SIZE = re.compile(r"(?<=[a-z0-9\s_-])[\s_-]*\b(\d+)\s*gi?b?\s*$")

# Name -> memory in GiB: what is usually meant, then the other versions of the card. Makers' data sheets.
CARDS: dict[str, tuple[int, ...]] = {
    # GeForce
    "1060": (6, 3), "1070": (8,), "1080": (8,), "1080ti": (11,), "1650": (4,), "1660": (6,), "1660super": (6,),
    "1660ti": (6,), "2060": (6, 12), "2060super": (8,), "2070": (8,), "2070super": (8,), "2080": (8,),
    "2080super": (8,), "2080ti": (11,), "3050": (8, 6, 4), "3060": (12, 8), "3060ti": (8,), "3070": (8,),
    "3070ti": (8,), "3080": (10, 12), "3080ti": (12,), "3090": (24,), "3090ti": (24,), "4050": (6,), "4060": (8,),
    "4060ti": (8, 16), "4070": (12,), "4070super": (12,), "4070ti": (12,), "4070tisuper": (16,), "4080": (16,),
    "4080super": (16,), "4090": (24,), "4090d": (24,), "5050": (8,), "5060": (8,), "5060ti": (8, 16), "5070": (12,),
    "5070ti": (16,), "5080": (16,), "5090": (32,), "5090d": (32,), "titan": (24,), "titanv": (12,), "titanxp": (12,),
    "3060laptop": (6,), "3070laptop": (8,), "3080laptop": (8, 16), "3080tilaptop": (16,), "4050laptop": (6,),
    "4060laptop": (8,), "4070laptop": (8,), "4080laptop": (12,), "4090laptop": (16,), "5060laptop": (8,),
    "5070laptop": (8,), "5070tilaptop": (12,), "5080laptop": (16,), "5090laptop": (24,),
    # Workstations
    "a2000": (6, 12), "a4000": (16,), "a4500": (20,), "a5000": (24,), "a5500": (24,), "a6000": (48,),
    "2000ada": (16,), "4000ada": (20,), "4500ada": (32,), "5000ada": (32,), "6000ada": (48,), "6000": (24, 48),
    "8000": (48,), "pro4000": (24,), "pro4500": (32,), "pro5000": (48, 72), "pro6000": (96,),
    # Data centers
    "p4": (8,), "p40": (24,), "p100": (16, 12), "v100": (16, 32), "t4": (16,), "a2": (16,), "a10": (24,),
    "a10g": (24,), "a16": (16,), "a30": (24,), "a40": (48,), "a100": (40, 80), "a800": (80, 40), "l4": (24,),
    "l40": (48,), "l40s": (48,), "h100": (80, 94), "h100nvl": (94,), "h800": (80,), "h20": (96, 141), "h200": (141,),
    "gh200": (96, 144), "b100": (192,), "b200": (180, 192), "gb200": (186,), "b300": (270, 288),
    # AMD
    "6700xt": (12,), "6800": (16,), "6800xt": (16,), "6900xt": (16,), "7600xt": (16,), "7700xt": (12,),
    "7800xt": (16,), "7900gre": (16,), "7900xt": (20,), "7900xtx": (24,), "9060xt": (16, 8), "9070": (16,),
    "9070xt": (16,), "w7800": (32, 48), "w7900": (48,), "mi100": (32,), "mi210": (64,), "mi250": (128,),
    "mi250x": (128,), "mi300x": (192,), "mi325x": (256,), "mi350x": (288,), "mi355x": (288,),
}  # fmt: skip
LARGEST_BARE = 1024  # a bare number up to this is a size in GB


@dataclass(frozen=True)
class Card:
    """The memory that a plan is for.

    Attributes:
        size: bytes.
        note: what was taken for the card, for the reader; "" where the size itself was given.
    """

    size: int
    note: str = ""


def card(text: str) -> Card:
    """The card of that name or size. A number without a unit is a card's number or GB.

    Raises:
        ValueError: no known card, and no size above 0.
    """
    lowered = text.lower().strip()
    if (key := MAKERS.sub("", lowered)) in CARDS:
        first, *others = CARDS[key]
        sold = f"; also sold with {' and '.join(map(str, others))}: --gpu '{text} {others[0]}GB'" if others else ""
        return Card(first * GIB, f"{text}: {first} GB{sold}")
    if re.fullmatch(r"[-+]?\d+(\.\d+)?", lowered):
        if float(lowered) > LARGEST_BARE:
            raise ValueError(f"gpu={text!r} is no known card.{did_you_mean(key, CARDS)} A size has a unit: --gpu 24GB.")
        return Card(parse_bytes(f"{lowered}GB"))
    match = SIZE.search(lowered)
    if match and MAKERS.sub("", lowered[: match.start()]) in CARDS:
        return Card(int(match[1]) * GIB, f"{text}: {match[1]} GB")
    if re.match(r"[-+\d.]", lowered) and re.fullmatch(r"[-+]?[\d.]+\s*[a-z]{0,3}", lowered):
        return Card(parse_bytes(text))
    raise ValueError(f"gpu={text!r} is no known card.{did_you_mean(key, CARDS)} Write its memory, for example 24GB.")
