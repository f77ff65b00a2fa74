"""Hand a training command over to `accelerate launch`, as `trl grpo` does with launcher flags that it meets."""

from importlib.resources import files
from pathlib import Path

from grpo_plus.registry import suggestion


def launch(arguments: list[str], launcher_flags: list[str]) -> int:
    """Run `grpo-plus train` under accelerate.

    Args:
        arguments: the whole command line after `train`.
        launcher_flags: what TRL's parser did not know, in order; from the command line or a config file.

    Raises:
        ValueError: a flag is unknown to accelerate too.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    parser = launch_command_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    flags = _resolve_config(launcher_flags)
    for flag in flags:
        name = flag.partition("=")[0]
        if flag.startswith("-") and name not in known:
            raise ValueError(f"Neither TRL, grpo_plus nor accelerate knows {name}.{_near(name)}")
    launch_command(parser.parse_args([*flags, "-m", "grpo_plus", "train", *_without(arguments, launcher_flags)]))
    return 0


def _resolve_config(flags: list[str]) -> list[str]:
    """`--accelerate_config NAME_OR_FILE` becomes `--config_file FILE`; names are those of TRL's own files."""
    if "--accelerate_config" not in flags:
        return flags
    index = flags.index("--accelerate_config")
    name = flags[index + 1]
    shipped = files("trl") / "accelerate_configs" / f"{name}.yaml"
    path = Path(name) if Path(name).is_file() else Path(str(shipped))
    if not path.is_file():
        raise ValueError(f"--accelerate_config {name} is neither a file nor one of TRL's configurations.")
    return ["--config_file", str(path), *flags[:index], *flags[index + 2 :]]


def _without(arguments: list[str], removed: list[str]) -> list[str]:
    """`arguments` less the ordered subsequence of them that is in `removed`."""
    left = list(removed)
    return [argument for argument in arguments if not (left and argument == left[0] and left.pop(0))]


def _near(flag: str) -> str:
    from dataclasses import fields

    from grpo_plus.config import GRPOPlusConfig

    near = suggestion(flag, [f"--{field.name}" for field in fields(GRPOPlusConfig)])
    return near.partition(" Known:")[0]
