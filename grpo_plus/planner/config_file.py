"""Read a model's config.json from a folder, a file or the hub."""

import json
from pathlib import Path
from typing import Any

from grpo_plus.planner.architecture import shape_of
from grpo_plus.planner.shapes import ModelShape


def load_shape(model: str | Path, *, revision: str | None = None) -> ModelShape:
    """Load the shape of a model: a local folder, a config.json, or a name on the hub."""
    return shape_of(read_config(model, revision=revision), name=str(model))


def read_config(model: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """Read config.json of a local folder or file, else of the model with this name on the hub.

    Raises:
        ValueError: the file cannot be read. The message says what to write instead.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise ValueError(f"The folder {str(model)!r} has no config.json. Name a folder that a model was saved to.")
    elif not path.is_file():
        path = _from_hub(str(model), revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}. Fetch the model's config.json again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds {type(config).__name__}, not a JSON object. Fetch it again.")
    return config


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # The cache first: a config hardly ever changes, and without a network the hub's client retries for long.
        return Path(hf_hub_download(model, "config.json", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ValueError(f"{model!r} is neither a local folder nor a name on the hub: {error}") from error
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{model!r} is no local folder, and its config.json could not be fetched from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name (and `hf auth login` for a gated "
            "model), or name a folder with its config.json."
        ) from error
