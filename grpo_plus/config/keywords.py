"""Fields that hold keyword arguments: a dictionary, or JSON on the command line."""

import json
from typing import Any

# What an error message shows, where the keywords of an estimator or a loss would mislead.
EXAMPLES = {
    "advantage_modifiers": '{"clip": {"max": 5.0}}',
    "demonstration_loss": '{"luffy": {"gamma": 0.1}}',
    "overlap_rewards": '{"judge": "groups"}',
    "prompt_sampler": '{"pass_rate": {}}',
    "reward_kwargs": '{"get_soft_overlong_punishment": {"max_completion_len": 512}}',
    "reward_weight_schedule": '{"format": [1.0, 0.1]}',
}


def as_dictionary(name: str, given: dict[str, Any] | str | None) -> dict[str, Any]:
    """The dictionary that was given; {} for None.

    Raises:
        ValueError: the text is not a JSON object.
    """
    try:
        keywords = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError:
        keywords = None
    if not isinstance(keywords, dict):
        example = EXAMPLES.get(name, '{"ddof": 0}')
        raise ValueError(
            f"{name}={given!r} is not a JSON object. Write for example {example}, as a dictionary or as JSON."
        )
    return keywords


def as_choice(name: str, given: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """A name with its keywords, {"luffy": {"gamma": 0.1}}, of which the name alone may be given.

    Raises:
        ValueError: the text looks like JSON and is no JSON object.
    """
    if given is None or (isinstance(given, str) and not given.lstrip().startswith("{")):
        return None if given is None else {given: {}}
    return as_dictionary(name, given)
