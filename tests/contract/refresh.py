"""Record the installed TRL's fingerprints, after reading its diff: `python -m tests.contract.refresh`."""

import json
from importlib.metadata import version
from pathlib import Path

from grpo_plus.trainer import contract

path = Path(contract.__file__).with_name("trl_fingerprints.json")


def main() -> None:
    known = contract.known_fingerprints() if path.exists() else {}
    known[version("trl")] = contract.fingerprints()
    path.write_text(json.dumps(dict(sorted(known.items())), indent=2) + "\n")
    print(f"recorded trl {version('trl')} in {path.name}")


if __name__ == "__main__":
    main()
