"""Tables of README.md and of pages in docs, made from registries and results: `python -m tests.readme` writes them."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import scale
from grpo_plus.cli.ls import advantage_rows, demonstration_rows, loss_rows, modifier_rows, reward_rows
from grpo_plus.replay.rules import RULES
from tests import recipes

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGES = (README, *sorted(DOCS.glob("*.md")), recipes.RECIPES / "README.md")
RESULTS = README.parent / "benchmarks" / "results"


def step_rows() -> list[tuple[str, ...]]:
    """Seconds of a whole step on both sides, and how much of ours is generation."""
    cases = json.loads((RESULTS / "step.json").read_text())["cases"]
    header = ("prompt, longest completion, G", "TRL", "grpo_plus", "faster", "generation, TRL's and ours")
    rows = []
    for name, case in cases.items():
        step, generate = case["step_s"], {side: phases["generate_s"] for side, phases in case["seconds"].items()}
        seconds = [f"{step[side]:.2f} s" for side in ("trl", "plus")]
        parts = f"{generate['trl']:.2f} s, {generate['plus']:.2f} s"
        rows.append((STEP_CASES.get(name, name.replace(",", ", ")), *seconds, f"{case['speed_up']:.1f}x", parts))
    return [header, *rows]


STEP_CASES = {
    "256,64,8 dead": "256, 64, 8; two of five groups dead",
    "saved model": "SmolLM2-135M with LoRA; 8 prompts x 8 completions of at most 16 tokens",
}


def real_rows() -> list[tuple[str, ...]]:
    """What a real model learned on both sides, and what its steps cost: means of the seeds, accuracy of each seed."""
    runs = json.loads((RESULTS / "real_model.json").read_text())["runs"]
    sides = {side: [run for name, run in runs.items() if name.startswith(side)] for side in ("trl", "plus")}
    rows = [("mean (each seed)", "TRL", "grpo_plus")]
    for step in sides["plus"][0]["accuracy"]:
        shares = [[round(100 * run["accuracy"][step]) for run in of] for of in sides.values()]
        cells = [f"{fmean(found):.0f} % ({', '.join(map(str, found))})" for found in shares]
        rows.append((f"held-out sums right after {step} steps" if step != "0" else "before training", *cells))
    for phase, name in (("generate_s", "generation"), ("score_s", "rewards"), ("update_s", "update")):
        seconds = [fmean(entry[f"profile/{phase}"] for run in of for entry in run["log"]) for of in sides.values()]
        rows.append((f"{name}, seconds of a step", *(f"{found:.2f} s" for found in seconds)))
    minutes = [fmean(_step_minutes(run) for run in of) for of in sides.values()]
    rows.append((f"all {len(sides['plus'][0]['log'])} steps", *(f"{found:.1f} minutes" for found in minutes)))
    return rows


def _step_minutes(run: dict[str, Any]) -> float:
    phases = ("generate_s", "score_s", "update_s")
    return sum(entry[f"profile/{phase}"] for entry in run["log"] for phase in phases) / 60


def generation_rows() -> list[tuple[str, ...]]:
    """Seconds and memory of generation beside transformers' own loop."""
    files = [RESULTS / f"generation_{name}.json" for name in ("cpu", "images_cpu")]
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    table = [("prompt, longest completion, groups x G", "transformers", "grouped loop", "faster", "memory at the peak")]
    for row in rows:
        seconds = [f"{row['seconds'][side]:.2f} s" for side in ("trl", "grouped")]
        pace = f"{row['speed_up']:.2f}x ({row['slowest']:.2f} to {row['fastest']:.2f})"
        memory = f"{row['peak_mb']['trl']:.0f} MB, {row['peak_mb']['grouped']:.0f} MB"
        table.append((row["case"], *seconds, pace, memory))
    return table


def turns_rows() -> list[tuple[str, ...]]:
    """Seconds of two turns of a tool loop, by what goes through the model."""
    rows = json.loads((RESULTS / "turns_cpu.json").read_text())["rows"]
    words = {
        "trl": "transformers' own loop",
        "each row": "grouped loop, every distinct prompt as a whole",
        "beginnings once": "grouped loop, what prompts begin with once",
    }
    table = [("", "tokens of prompts", "both turns", "faster")]
    for row in rows:
        spread = f"{row['speed_up']:.2f}x ({row['slowest']:.2f} to {row['fastest']:.2f})"
        pace = "" if row["arm"] == "trl" else spread
        table.append((words[row["arm"]], f"{row['prefilled']:,}", f"{row['seconds']:.1f} s", pace))
    return table


def update_rows(results: str = "update_cpu.json") -> list[tuple[str, ...]]:
    """Speed-up and peak memory of an update by shape and variant, from the CPU's results."""
    rows = json.loads((RESULTS / results).read_text())["rows"]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(tuple(row["shape"]), row["variant"]): row for row in rows}
    table = [("prompt, longest completion, G", "tokens", *variants)]
    for shape in dict.fromkeys(shape for shape, _ in cells):
        measured = [cells.get((shape, variant)) for variant in variants]
        ratio = next(row["token_ratio"] for row in measured if row)
        figures = [f"{row['speed_up']:.1f}x, {row['memory_ratio']:.1f}x" if row else "" for row in measured]
        table.append((", ".join(map(str, shape)), f"{ratio:.1f}x fewer", *figures))
    return table


def tree_rows() -> list[tuple[str, ...]]:
    """Speed of an update where completions begin alike, beside stock TRL and beside shared prompts alone."""
    rows = json.loads((RESULTS / "tree.json").read_text())["rows"]
    cells = {(row["case"], row["variant"]): row for row in rows}
    variants = list(dict.fromkeys(variant for _, variant in cells))
    table = [("completions", "tokens: TRL, prompts, trees", *variants)]
    for case in dict.fromkeys(case for case, _ in cells):
        measured = [cells[case, variant] for variant in variants]
        ratios = [[f"{row['faster_than'][way]:.2f}x" for way in ("trl", "prompts")] for row in measured]
        tokens = ", ".join(f"{count:,}" for count in measured[0]["tokens"].values())
        table.append((case, tokens, *map(", ".join, ratios)))
    return table


def judge_rows() -> list[tuple[str, ...]]:
    """Seconds of a generation batch whose judges wait: TRL's, and those of each way to call them."""
    cases = json.loads((RESULTS / "judges.json").read_text())["seconds"]
    sides = {"trl": "TRL", "off": "`None`", "batch": '`"batch"`', "groups": '`"groups"`'}
    rows = [(name, *(f"{seconds[side]:.2f} s" for side in sides)) for name, seconds in cases.items()]
    return [("a judge takes", *sides.values()), *rows]


def gpu_rows() -> list[tuple[str, ...]]:
    """Updates of the first run on a GPU: seconds and peak memory of TRL's, and how the other ways compare."""
    rows = json.loads((RESULTS / "gpu_h200_first.json").read_text())["stages"]["update"]["rows"]
    found = {row["label"]: row for row in rows if "s" in row and "failure" not in row}
    cases = [row["label"] for row in rows if "seconds" in row]
    table = [("model, base; prompt, longest completion, G", "TRL", *GPU_WAYS.values())]
    for case in cases:
        trl = found.get(f"{case} trl")
        cells = [f"{trl['s']:.3f} s, {trl['peak_gb']:.1f} GiB" if trl else "not run"]
        for row in (found.get(f"{case} {way}") for way in GPU_WAYS):
            pace = f"{trl['s'] / row['s']:.2f}x" if trl and row else f"{row['s']:.2f} s" if row else ""
            cells.append(f"{pace}, {row['peak_gb']:.1f} GiB" if row else "")
        name, base, shape, *checkpointed = case.split()
        note = " checkpointed" if checkpointed else ""
        table.append((f"{name} {base}{note}; {shape.replace(',', ', ')}", *cells))
    return table


GPU_WAYS = {"segments": "segment attention", "cascade": "cascade prototype", "cascade+triton": "with the Triton head"}


def multitask_rows() -> list[tuple[str, ...]]:
    """Accuracy minus `grpo`'s by estimator and scenario, from the summary's tables."""
    text = (RESULTS / "multitask" / "summary.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    for scenario, section in re.findall(r"^## (\w+):(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE):
        for line in section.split("| minus `grpo` |")[1].split("\n\n")[0].splitlines()[2:]:
            name, accuracy = (cell.strip(" `") for cell in line.split("|")[1:3])
            found.setdefault(name, {})[scenario] = accuracy
    scenarios = list(dict.fromkeys(scenario for cells in found.values() for scenario in cells))
    rows = [(name, *(cells.get(scenario, "") for scenario in scenarios)) for name, cells in found.items()]
    return [("accuracy minus `grpo`", *scenarios), *rows]


def multitask_second_rows() -> list[tuple[str, ...]]:
    """Differences in accuracy of the benchmark's second round, by scenario."""
    text = (RESULTS / "multitask" / "second" / "summary.md").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = {}
    sections = re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)
    for scenario, section in sections:
        for line in section.split("| difference |")[1].splitlines():
            if line.startswith("| `"):
                label, accuracy = (cell.strip() for cell in line.split("|")[1:3])
                found.setdefault(label, {})[scenario] = accuracy
    scenarios = [scenario for scenario, _ in sections]
    return [
        ("accuracy", *scenarios),
        *((label, *(cells.get(scenario, "") for scenario in scenarios)) for label, cells in found.items()),
    ]


def longest_rows() -> list[tuple[str, ...]]:
    """Longest completion by model, settings and card, from the planner's arithmetic."""
    result = json.loads((RESULTS / "longest.json").read_text())
    header = ("model, settings", *(f"{card} GB" for card in result["cards_gb"]))
    shown = [row for row in result["rows"] if not row["settings"].endswith("these settings")]
    rows = [
        (
            f"{row['model']}: {row['settings']}",
            *(f"{tokens:,}" if tokens else "does not fit" for tokens in row["tokens"]),
        )
        for row in shown
    ]
    return [header, *rows]


def recipe_rows() -> list[tuple[str, ...]]:
    """Planned peaks of the recipes for long completions."""
    recipes = json.loads((RESULTS / "longest.json").read_text())["recipes"]
    header = ("card", "model", "completion", "planned peak", "fullest phase", "on the host")
    rows = [
        (
            f"{one['card_gb']} GB",
            one["model"],
            f"{one['tokens']:,} tokens",
            f"{one['peak_gib']} GiB",
            one["binds"],
            f"{one['host_gib']} GiB",
        )
        for one in recipes
    ]
    return [header, *rows]


def rule_rows() -> list[tuple[str, ...]]:
    """What a replay looks for in a log, and what each finding speaks for."""
    rows = [
        (
            rule.shows,
            *(", ".join(f"`{name}`" for name in names) for names in (rule.suits, rule.against)),
            rule.because,
            rule.source if rule.source.startswith("https://") else f"[{rule.source}]({rule.source})",
        )
        for rule in RULES
    ]
    return [("the log shows that", "for", "against", "because", "source"), *rows]


TABLES = {
    "advantages": advantage_rows,
    "losses": loss_rows,
    "demonstrations": demonstration_rows,
    "rewards": reward_rows,
    "gsm8k": recipes.rows,
    "modifiers": modifier_rows,
    "step": step_rows,
    "real": real_rows,
    "generation": generation_rows,
    "turns": turns_rows,
    "update": update_rows,
    "update_vision": lambda: update_rows("update_vision_cpu.json"),
    "tree": tree_rows,
    "judges": judge_rows,
    "gpu": gpu_rows,
    "multitask": multitask_rows,
    "multitask_second": multitask_second_rows,
    "longest": longest_rows,
    "recipes": recipe_rows,
    "scale_memory": scale.memory_rows,
    "scale_wire": scale.wire_rows,
    "scale_compute": scale.compute_rows,
    "rules": rule_rows,
}


def markdown(rows: list[tuple[str, ...]]) -> str:
    header, *body = rows
    lines = [header, ("---",) * len(header), *[(_name(name), *map(_cell, rest)) for name, *rest in body]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(text: str) -> str:
    return f"`{text}`" if text.isidentifier() else text


def _cell(text: str) -> str:
    if text.startswith("https://"):
        label = text.rpartition("/")[2]
        return f"[{label if '.' in label else f'TRL #{label}'}]({text})"
    return f"`{text}`" if re.fullmatch(r"\w+=\S+(, \w+=\S+)*", text) else text


def block(kind: str) -> str:
    return f"<!-- {kind} -->\n{markdown(TABLES[kind]())}\n<!-- /{kind} -->"


def rendered(text: str) -> str:
    """`text` with its generated tables up to date."""
    for kind in TABLES:
        text = re.sub(rf"<!-- {kind} -->.*<!-- /{kind} -->", lambda _, kind=kind: block(kind), text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
