"""`grpo-plus ls NAME`: what a name computes (an estimator, a loss, a reward function, ...), and the line to copy."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo_plus.config.help import HELP
from grpo_plus.registry import suggestion

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# What the promises of an entry mean for whoever chooses it, by the promise and its value.
FACTS: dict[tuple[str, Any], str] = {
    ("scope", "batch"): "looks at the whole batch, not at one prompt's completions alone",
    ("domain", "binary"): "needs rewards of 0 or 1",
    ("domain", "unit"): "needs rewards from 0 to 1",
    ("multi_reward", True): "looks at each reward function by itself",
    ("needs_lengths", True): "reads the completions' lengths",
    ("needs_steps", True): "judges the steps of completions, with an advantage per token",
    ("needs_turns", True): "a step is a turn with tools or an environment, and starts from a state",
    ("needs_prompts", True): "recognizes a prompt that it has seen before",
    ("stateful", True): "remembers earlier batches; checkpoints hold what it remembers",
    ("trains_without_spread", True): "trains on groups of equal rewards, too",
    ("scale_invariant", True): "does not change with the unit of the rewards",
    ("zero_without_advantage", True): "completions with an advantage of 0 stay out of the update",
    ("reads_sampling_ratio", True): "contains the ratio to the sampler in its formula",
}

A_LENGTH = 512  # for the one keyword that has no default, `max_len` of a reward of TRL: as max_completion_length

# Values for the lines to copy, where a keyword of a modifier has no default.
EXAMPLES = {"by": "NAME", "keep": 4, "beta": 0.1, "max_length": A_LENGTH}

# Fields without which a modifier is refused.
BESIDE: dict[str, dict[str, Any]] = {"kl_in_reward": {"beta": 0.05}}

# Keywords that mean the same wherever they occur, and are explained where a docstring leaves them out.
SHARED = {
    "ddof": "1: the sample standard deviation; 0: the population's",
    "eps": "added to the divisor, so that a tiny spread does not give huge advantages",
    "decay": "share of the running mean and std that stays when a batch comes in",
}


@dataclass(frozen=True)
class Explained:
    """Everything that is said of one name.

    Attributes:
        name: of the entry.
        kind: what it is, in a word or two.
        documentation: its docstring.
        keywords: hyper-parameters and their defaults; ... is the default of none.
        facts: what else a user should know.
        lines: to copy, in Python and for the shell.
    """

    name: str
    kind: str
    documentation: str
    keywords: Mapping[str, Any]
    facts: tuple[str, ...]
    lines: tuple[str, ...]


def explained(name: str) -> list[Explained]:
    """What is known under a name: several things, where a loss and an estimator share it.

    Raises:
        ValueError: nothing is; names the nearest.
    """
    found = [make(name) for known, make in _kinds() if name in known]
    if not found:
        everything = dict.fromkeys(known for names, _ in _kinds() for known in names)
        if name in HELP:
            raise ValueError(f"{name!r} is a field of GRPOPlusConfig, and no name that a field takes. {HELP[name]}")
        near = suggestion(name, everything).partition(" Known:")[0]
        raise ValueError(f"There is nothing called {name!r}.{near} `grpo-plus ls` lists all names.")
    return found


def described(entry: Explained) -> "Group":
    """The entry for the terminal, without its lines to copy: a line that is wrapped cannot be copied."""
    from rich.console import Group
    from rich.text import Text

    text, meanings = split_arguments(entry.documentation)
    parts: list[Any] = [Text.assemble((entry.name, "bold"), f"  {entry.kind}"), Text()]
    parts += [Text(paragraph + "\n") for paragraph in paragraphs(text)]
    if entry.keywords:
        parts += [_table(entry.keywords, meanings), Text()]
    if entry.facts:
        parts += [Text("\n".join(f"- {fact}" for fact in entry.facts)), Text()]
    return Group(*parts)


def split_arguments(documentation: str) -> tuple[str, dict[str, str]]:
    """A docstring without its sections, and the meaning of each argument in the section Args."""
    text, *sections = re.split(r"\n\n(?=[A-Z]\w+:\n)", documentation)
    meanings: dict[str, str] = {}
    for section in sections:
        if section.startswith("Args:"):
            for argument in re.split(r"\n {4}(?=\w)", section)[1:]:
                name, _, meaning = argument.partition(": ")
                meanings[name] = " ".join(meaning.split())
    return text, meanings


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of a docstring: prose in lines as long as the terminal's, formulas and lists line by line.

    What stands beside a formula goes below it, and further in, so that a narrow terminal breaks neither.
    """
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        by_line = any(re.search(r" [=←≥≤] |\S {3,}\S|^\s*- |^>>> ", line) for line in lines)
        yield re.sub(r"(?<=\S) {3,}(?=\S)", "\n        ", paragraph) if by_line else " ".join(lines)


def _table(keywords: Mapping[str, Any], meanings: dict[str, str]) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    meanings = {name: text for name, text in (SHARED | meanings).items() if name in keywords}
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("keyword", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning" if meanings else "", overflow="fold")  # an address stays whole
    for name, default in keywords.items():
        shown = "needed" if default is ... else repr(default)
        table.add_row(escape(name), escape(shown), escape(meanings.get(name, "")))
    return table


def _kinds() -> list[tuple[list[str], Callable[[str], Explained]]]:
    """The names of each kind, and what explains one of them."""
    from grpo_plus.advantages import ESTIMATORS, MODIFIERS
    from grpo_plus.cli.reward_functions import REWARD_NAMES
    from grpo_plus.losses import LOSSES
    from grpo_plus.losses.demonstrations import DEMONSTRATION_LOSSES

    return [
        (list(ESTIMATORS), _estimator),
        (list(MODIFIERS), _modifier),
        (list(LOSSES), _loss),
        (list(DEMONSTRATION_LOSSES), _demonstration),
        (list(REWARD_NAMES), _reward),
    ]


def _facts(entry: Any) -> tuple[str, ...]:
    return tuple(fact for (promise, value), fact in FACTS.items() if getattr(entry, promise, None) == value)


def _estimator(name: str) -> Explained:
    from grpo_plus.advantages import ESTIMATORS

    entry = ESTIMATORS[name]
    both = f"grpo,{name}" if name != "grpo" else "grpo,dr_grpo"
    lines = (
        *_chosen("advantage_estimator", name, "advantage_kwargs", entry.keywords),
        f"grpo-plus replay RUN_DIR --estimators {both}",
        f"grpo-plus compare --estimators {both} --seeds 3",
    )
    return Explained(name, "advantage estimator", entry.documentation, entry.keywords, _facts(entry), lines)


def _loss(name: str) -> Explained:
    from grpo_plus.losses import LOSSES, TRL_LOSSES

    entry = LOSSES[name]
    trls = name in TRL_LOSSES
    lines = _chosen("loss_type", name, "loss_kwargs", {} if trls else entry.keywords)
    facts = (f"summed as {entry.reduction}", *(fact for fact in _facts(entry) if not fact.startswith("looks at")))
    if trls:
        facts = ("computed by TRL; its keywords are fields of the configuration", *facts)
    return Explained(name, "loss", entry.documentation, entry.keywords, facts, lines)


def _modifier(name: str) -> Explained:
    from grpo_plus.advantages import MODIFIERS

    function = MODIFIERS[name]
    keywords = keywords_of(function)
    example = {key: EXAMPLES.get(key, 1) for key, default in keywords.items() if default is ...}
    table = json.dumps({name: example})
    beside = BESIDE.get(name, {})
    fields = "".join(f", {field}={value}" for field, value in beside.items())
    flags = "".join(f" --{field} {value}" for field, value in beside.items())
    lines = (
        f'GRPOPlusConfig(advantage_estimator="dr_grpo", advantage_modifiers={table}{fields})',
        f"--advantage_estimator dr_grpo --advantage_modifiers '{table}'{flags}",
    )
    return Explained(name, "modifier of advantages", inspect.getdoc(function) or "", keywords, (), lines)


def _demonstration(name: str) -> Explained:
    from grpo_plus.losses.demonstrations import DEMONSTRATION_LOSSES

    function = DEMONSTRATION_LOSSES[name]
    keywords = keywords_of(function)
    table = json.dumps({name: dict(list(keywords.items())[:1])})
    lines = (
        f'GRPOPlusConfig(demonstration_column="solution", demonstration_loss={table})',
        f"--demonstration_column solution --demonstration_loss '{table}'",
    )
    return Explained(name, "way to train demonstrations", inspect.getdoc(function) or "", keywords, (), lines)


def keywords_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The function's hyper-parameters and their defaults; ... is the default of none."""
    parameters = inspect.signature(function).parameters.values()
    given = [one for one in parameters if one.kind is one.KEYWORD_ONLY]
    return {one.name: ... if one.default is one.empty else one.default for one in given}


def _reward(name: str) -> Explained:
    from grpo_plus import rewards
    from grpo_plus.cli.reward_functions import named_function, own_keywords

    function = named_function(name)
    ours = name in rewards.__all__
    place = "grpo_plus.rewards" if ours else "trl.rewards"
    keywords = own_keywords(name, function)
    documentation = inspect.getdoc(function) or ""
    lines = (f"from {place} import {name}", *_chosen("reward_funcs", name, "reward_kwargs", keywords)[1:])
    if not ours:
        documentation = documentation.strip().partition("\n\n")[0]  # TRL's own sections are written for a site
    return Explained(name, f"reward function of {place}", documentation, keywords, (), lines)


def _chosen(setting: str, name: str, keywords_of: str, keywords: Mapping[str, Any]) -> tuple[str, str]:
    """The setting in Python and as a flag, with the keywords that it needs, or the first one as an example."""
    needed: dict[str, Any] = {key: A_LENGTH for key, default in keywords.items() if default is ...}
    given = {key: value for key, value in keywords.items() if isinstance(value, int | float | str)}
    example = needed or dict(list(given.items())[:1])
    python = f", {keywords_of}={json.dumps(example)}" if example else ""
    table = {name: example} if setting == "reward_funcs" else example
    shell = f" --{keywords_of} '{json.dumps(table)}'" if example else ""
    return f'GRPOPlusConfig({setting}="{name}"{python})', f"--{setting} {name}{shell}"
