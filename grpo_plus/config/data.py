"""Whether the dataset and the reward functions fit together: asked before a model is loaded.

TRL reads `prompt` of every row and passes all other columns to the reward functions by name. What a function takes and
the dataset lacks shows there after the first generation, as a TypeError.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from datasets import Dataset

PROMPT = "prompt"
ENVIRONMENT = "environment"  # the column that names a row's environment, where there are several
# What TRL passes to a reward function beside the dataset's columns.
ALWAYS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
PASSED = (*ALWAYS, "environments")
KEPT = (PROMPT, "image", "images")  # the columns that remove_unused_columns=True leaves
# Other names for what a column holds, the likeliest first.
ALIKE = {
    PROMPT: ("question", "problem", "query", "instruction", "input", "prompts", "text", "messages"),
    "solution": ("answer", "final_answer", "ground_truth", "gold", "target", "output", "label", "solutions"),
    "answer": ("solution", "final_answer", "ground_truth", "gold", "target", "output", "label", "answers"),
}
FLAGS = {PROMPT: "--prompt_column", "solution": "--answer_column"}
NEEDS_MATH_VERIFY = ("accuracy_reward", "reasoning_accuracy_reward", "cosine_scaled_reward")
READS_MESSAGES = (*NEEDS_MATH_VERIFY, "think_format_reward")


def check_data(given: Mapping[str, Any], eval_functions: Sequence[Any] = ()) -> None:
    """Refuse data that the run cannot use: a column that is missing, or text where a reward function reads messages.

    Args:
        given: the trainer's arguments by name.
        eval_functions: what judges the evaluations in place of the training's reward functions; none: those.

    Raises:
        ImportError: a reward function of TRL's needs a package that is not installed.
        ValueError: a column is missing; names the columns there are, and how to rename one.
    """
    if eval_functions:
        check_data({**given, "eval_dataset": None})
        check_data({**given, "train_dataset": None, "reward_funcs": list(eval_functions)})
        return
    functions = [function for function in _listed(given.get("reward_funcs")) if _is_function(function)]
    check_needs(functions)
    unused = bool(getattr(given.get("args"), "remove_unused_columns", False))
    for name in ("train_dataset", "eval_dataset"):
        datasets = given.get(name)
        for dataset in datasets.values() if isinstance(datasets, dict) else [datasets]:
            columns = _columns(dataset)
            if columns is None:
                continue
            if given.get("environment_factory") is None:  # an environment may bring the prompts along
                _check_column(name, columns, PROMPT, "which every row needs")
            _check_environments(name, dataset, columns, given.get("environment_factory"), unused=unused)
            _check_messages(name, dataset, functions)
            if given.get("rollout_func") is None:  # a rollout function may fill columns of its own
                _check_functions(name, columns, functions, unused=unused)
    for function in functions:
        _check_takes_all(function)


def check_needs(functions: Iterable[Any]) -> None:
    """Refuse a reward function of TRL's whose package is missing: TRL raises after the first generation."""
    for function in functions:
        if _trls_name(function) in NEEDS_MATH_VERIFY and find_spec("math_verify") is None:
            raise ImportError(
                f"The reward function {_name(function)!r} needs math-verify, which is not installed. Run: pip install "
                "math-verify"
            )


def _check_functions(dataset: str, columns: Sequence[str], functions: Sequence[Any], *, unused: bool) -> None:
    for function in functions:
        for needed in _needed(function):
            _check_column(dataset, columns, needed, f"which the reward function {_name(function)!r} takes")
            if unused and needed not in KEPT:
                raise ValueError(
                    f"remove_unused_columns=True drops the column {needed!r}, which the reward function "
                    f"{_name(function)!r} takes. Set remove_unused_columns=False, TRL's default."
                )


def _check_environments(name: str, dataset: Any, columns: Sequence[str], environments: Any, *, unused: bool) -> None:
    """Refuse rows that do not say in which of several environments they play: TRL raises in the first generation."""
    if not isinstance(environments, Mapping):
        return
    known = ", ".join(map(repr, environments))
    if ENVIRONMENT not in columns:
        raise ValueError(
            f"{name} has no column {ENVIRONMENT!r}, which names each row's environment out of environment_factory: "
            f"{known}. Its columns: {', '.join(columns) or 'none'}. Add it: {name}.add_column({ENVIRONMENT!r}, [...])."
        )
    if unused:
        raise ValueError(
            f"remove_unused_columns=True drops the column {ENVIRONMENT!r}, which names each row's environment. Set "
            "remove_unused_columns=False, TRL's default."
        )
    unknown = set(dataset.unique(ENVIRONMENT)) - set(environments) if isinstance(dataset, Dataset) else None
    if unknown:
        raise ValueError(
            f"{name} has rows with environment={sorted(map(repr, unknown))[0]}, which environment_factory does not "
            f"know. It knows {known}. Rename the rows' environment, or add it to environment_factory."
        )


def _check_takes_all(function: Callable[..., Any]) -> None:
    """Refuse a function without **kwargs: TRL passes everything by name, and adds names from version to version."""
    parameters = _parameters(function)
    if parameters is None or any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        return
    if refused := [name for name in ALWAYS if name not in [parameter.name for parameter in parameters]]:
        raise ValueError(
            f"The reward function {_name(function)!r} has no place for {', '.join(refused)}, which TRL passes beside "
            f"the dataset's columns. Add **kwargs to its parameters: def {_name(function)}(completions, **kwargs)."
        )


def _check_column(dataset: str, columns: Sequence[str], needed: str, why: str) -> None:
    if needed in columns:
        return
    likely = next((name for name in ALIKE.get(needed, ()) if name in columns), None)
    old = repr(likely) if likely else "OLD_NAME"
    rename = f"{dataset}.rename_column({old}, {needed!r})"
    raise ValueError(
        f"{dataset} has no column {needed!r}, {why}. Its columns: {', '.join(columns) or 'none'}. Rename the one that "
        f"holds it: {rename}. On the command line: {_flag(needed, likely or 'OLD_NAME')}."
    )


def _flag(needed: str, likely: str) -> str:
    """What the command line has for a column of another name."""
    if needed in FLAGS:
        return f"{FLAGS[needed]} {likely}"
    return "save the result, .to_parquet('data/train.parquet'), and give its folder: --dataset_name data"


def _check_messages(name: str, dataset: Any, functions: Sequence[Any]) -> None:
    """Refuse prompts of plain text where a function of TRL's reads the messages of a conversation."""
    readers = [function for function in functions if _trls_name(function) in READS_MESSAGES]
    row = first_row(dataset) if readers else None
    if row is not None and isinstance(row.get(PROMPT), str):
        raise ValueError(
            f"The reward function {_name(readers[0])!r} reads messages, but the prompts of {name} are plain text. Make "
            f"conversations: {name}.map(lambda row: {{'prompt': [{{'role': 'user', 'content': row['prompt']}}]}}). "
            "On the command line, --prompt_column prompt does so for a model with a chat template."
        )


def _columns(dataset: Any) -> list[str] | None:
    """The names of the columns; None where only reading the data would tell."""
    columns = list(getattr(dataset, "column_names", None) or ())
    row = first_row(dataset)  # a transform may make columns of its own
    if row is None and not columns:
        return None
    return list(dict.fromkeys([*columns, *(row or ())]))


def first_row(dataset: Any) -> dict[str, Any] | None:
    """The first row of a dataset that can be indexed; None of a stream, or an empty one."""
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")) or len(dataset) == 0:
        return None
    row = dataset[0]
    return dict(row) if isinstance(row, Mapping) else None


def _needed(function: Callable[..., Any]) -> list[str]:
    """The columns that a reward function cannot be called without."""
    return [
        parameter.name
        for parameter in _parameters(function) or ()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in PASSED
    ]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """None where the function does not say, as a builtin."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _listed(functions: Any) -> list[Any]:
    return list(functions) if isinstance(functions, (list, tuple)) else [functions]


def _is_function(function: Any) -> bool:
    """Whether TRL calls it with the columns: neither a model's name nor a model."""
    return callable(function) and not hasattr(function, "named_parameters")


def _trls_name(function: Any) -> str:
    """The function's name if it is one of TRL's; "" for others."""
    module = str(getattr(_unwrapped(function), "__module__", ""))
    return _name(function) if module.startswith("trl.rewards") else ""


def _unwrapped(function: Any) -> Any:
    """The function inside `functools.partial`, by whose name TRL logs it."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _name(function: Any) -> str:
    function = _unwrapped(function)
    return str(getattr(function, "__name__", type(function).__name__))
