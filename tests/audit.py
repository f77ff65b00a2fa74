"""Known vulnerabilities of the pinned packages, and licenses of what the package needs to run: `make audit`.

    python -m tests.audit .venv/audit/bin/pip-audit
    python -m tests.audit .venv/audit/bin/pip-audit --service osv

Exit status 1 where something was found, and 2 where the vulnerabilities could not be looked up.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

from tests.base_only import ROOT, declared, distributions

CLASSIFIER = "License :: OSI Approved :: "

# SPDX names, and what packages write in their place. All allow use in a program under the Apache license.
PERMISSIVE = frozenset({
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "HPND", "ISC", "MIT", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib",
    "Apache 2.0 License", "Apache License 2.0", "Apache Software License", "BSD", "BSD License", "ISC License (ISCL)",
    "MIT License", "Python Software Foundation License",
})  # fmt: skip
# Obliges who changes a file of the package to publish that file. We change none.
BY_FILE = frozenset({"MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)"})
ALLOWED = PERMISSIVE | BY_FILE
# Read in the package's LICENSE file, because its metadata names none.
READ = {"zss": "BSD-3-Clause"}


@dataclass(frozen=True)
class Looked:
    """What a look-up of vulnerabilities found, in lines for the reader, and whether it covered every package."""

    found: tuple[str, ...]
    missing: tuple[str, ...]


def license_of(package: Distribution) -> str:
    """License of a package as an SPDX expression, or in its author's words. "" where its metadata has none."""
    metadata = package.metadata
    classified = [line.removeprefix(CLASSIFIER) for line in metadata.get_all("Classifier", []) if CLASSIFIER in line]
    written = str(metadata.get("License", "")).strip()
    # Some packages put the whole text there.
    return metadata.get("License-Expression") or " AND ".join(classified) or ("" if "\n" in written else written)


def allowed(expression: str) -> bool:
    """Whether some way to read the expression has allowed licenses alone: A AND (B OR C)."""
    inner = re.search(r"\(([^()]*)\)", expression)
    if inner and expression not in ALLOWED:
        chosen = "MIT" if allowed(inner[1]) else "refused"
        return allowed(expression[: inner.start()] + chosen + expression[inner.end() :])
    return any(all(name.strip() in ALLOWED for name in way.split(" AND ")) for way in expression.split(" OR "))


def refused_licenses(packages: Iterable[Distribution]) -> list[str]:
    """A line for every package whose license is not on the list."""
    licenses = {package.name: license_of(package) or READ.get(package.name, "") for package in packages}
    return [f"{name}: {found or 'no license'}" for name, found in licenses.items() if not allowed(found)]


def vulnerabilities(pip_audit: Path, service: str) -> Looked | None:
    """What pip-audit finds out about the versions of constraints.txt. None where the service does not answer."""
    command = [pip_audit, "--requirement", ROOT / "constraints.txt", "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return read(json.loads(done.stdout))
    except json.JSONDecodeError:
        print(done.stderr.strip().rpartition("\n")[2], file=sys.stderr)
        return None


def read(answer: dict) -> Looked:
    """Read pip-audit's answer. It skips packages that the service does not know, and ends as if all were well."""
    packages = answer["dependencies"]
    found = (
        f"{package['name']} {package['version']}: {each['id']}, mended in {', '.join(each['fix_versions']) or 'no version'}"
        for package in packages
        for each in package.get("vulns", ())
    )
    return Looked(tuple(found), tuple(package["name"] for package in packages if "skip_reason" in package))


def main() -> int:
    """Print what is wrong with licenses and versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pip_audit", type=Path, help="pip-audit's program")
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="whom pip-audit asks")
    args = parser.parse_args()
    packages = distributions(declared("peft", "qlora", "real")).values()
    refused = refused_licenses(packages)
    print(f"licenses: {len(packages)} packages, {len(refused)} refused")
    looked = vulnerabilities(args.pip_audit, args.service)
    wrong = [*refused, *(looked.found if looked else ())]
    print("\n".join(wrong), end="\n" if wrong else "")
    if looked is None or looked.missing:
        unknown = f"of {len(looked.missing)} packages, such as {looked.missing[0]}" if looked else "of any package"
        print(
            f"vulnerabilities: {args.service} knows nothing {unknown}. pypi stands for https://pypi.org/pypi/NAME/VERSION"
            "/json, osv for https://api.osv.dev. Look them up where one of them answers.",
            file=sys.stderr,
        )
        return 1 if wrong else 2
    print(f"vulnerabilities: {len(looked.found)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
