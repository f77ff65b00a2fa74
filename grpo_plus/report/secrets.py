"""Values that no file or page may hold: tokens, keys and passwords, masked wherever settings are written.

A setting is secret by its name (`token`, `api_key`, `db_password`), or by its value where that has the form of a known
token. Names that only sound alike stay as they are: `pad_token`, `max_tokens`, `key_value_heads`.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

MASK = "***"
SHORTEST = 6  # characters; a shorter secret would be found inside ordinary words

ALWAYS = re.compile(
    "secrets?|passwords?|passwd|passphrase|pwd|credentials?|authorization|apikey|bearer|cookie"
)  # secret as any word of a name
LAST = re.compile("token|key|auth|pat")  # secret as the last word of a name
# What stands before "token" in the name of a special token, of a count, or of a unit.
PLAIN_TOKEN = re.compile(
    "pad|eos|bos|unk|cls|sep|mask|image|video|audio|vision|boi|eoi|eot|new|special|additional|decoder|start|end|per"
    "|max|min|num|first|last|next|prev|assistant|user|system|tool|think|stop"
)
PLAIN_KEY = re.compile("primary|foreign|sort|group|dict|cache|key|prompt|label|input|output|json|config")
FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)"
)
BEARER = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")
IN_ADDRESS = re.compile(r"(?<=://)[^\s/@]+(?=@)")  # https://user:password@host
IN_QUERY = re.compile(r"(?i)([?&;](?:[\w-]*(?:token|secret|password|passwd|signature|key|sig))=)[^&;\s]+")


def is_secret_name(name: str) -> bool:
    """Whether a setting of that name holds a secret."""
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    parts = [word for word in re.split(r"[^a-z0-9]+", words) if word]
    if not parts:
        return False
    if any(map(ALWAYS.fullmatch, parts)):
        return True
    before = parts[-2] if len(parts) > 1 else ""
    plain = PLAIN_KEY if parts[-1] == "key" else PLAIN_TOKEN
    return bool(LAST.fullmatch(parts[-1])) and not plain.fullmatch(before)


def masked(value: Any) -> Any:
    """The value, for a file or a page: a copy in which every secret is replaced by "***", at any depth.

    A text that holds a table as JSON, as a command line gives one, is masked inside.
    """
    if isinstance(value, Mapping):
        return {name: _hidden(inner) if is_secret_name(str(name)) else masked(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [masked(inner) for inner in value]
    return masked_text(value) if isinstance(value, str) else value


def secrets_of(value: Any) -> set[str]:
    """The secrets that settings hold, as texts, for `masked_text` to find in what a library wrote about them."""
    if isinstance(value, Mapping):
        hidden = {name: inner for name, inner in value.items() if is_secret_name(str(name))}
        others = [inner for name, inner in value.items() if name not in hidden]
        return {*_leaves(list(hidden.values())), *secrets_of(others)}
    if isinstance(value, (list, tuple, set, frozenset)):
        return {secret for inner in value for secret in secrets_of(inner)}
    return set()


def _leaves(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return _leaves(list(value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return {leaf for inner in value for leaf in _leaves(inner)}
    return {value} if isinstance(value, str) and len(value) >= SHORTEST else set()


def masked_text(text: str, known: Iterable[str] = ()) -> str:
    """The text without what has the form of a secret, and without the secrets that are known."""
    for secret in known:
        text = text.replace(secret, MASK)
    if text.lstrip()[:1] in ("{", "["):
        try:
            table = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            hidden = masked(table)
            return text if hidden == table else json.dumps(hidden)
    text = BEARER.sub(rf"\1 {MASK}", FORMS.sub(MASK, text))
    return IN_QUERY.sub(rf"\g<1>{MASK}", IN_ADDRESS.sub(MASK, text))


def _hidden(value: Any) -> Any:
    """A secret's place; whether one was given (None, a boolean, nothing) is no secret."""
    if isinstance(value, Mapping):
        return {name: _hidden(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_hidden(inner) for inner in value]
    return value if value is None or isinstance(value, bool) or value == "" else MASK
