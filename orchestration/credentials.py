"""Whether an address or a command holds a secret: both are logged with the recipe, so both may only name one."""

import re
from urllib.parse import parse_qs, urlsplit

_WORDS = r"passw(?:or)?d|token|secret|signature|credentials?|api[-_]?key|access[-_]?key(?:[-_]?id)?"
_VALUE = r"[\"']?(?![\"'$`\s])\S"  # not $NAME nor $(command): those are read where the command runs
_COMMANDS = [
    rf"(?:{_WORDS}|\bsig)\s*[=:]\s*{_VALUE}",  # NAME=value, --name=value, ?name=value, Header: value
    rf"-(?:{_WORDS})\s+{_VALUE}",  # --name value
    rf"(?:bearer|basic)\s+{_VALUE}",  # Authorization: Bearer value
    r"//[^/\s@:]*:(?!\$)[^/\s@]+@",  # https://user:value@host
    r"(?<!\S)(?:-u|--user)[\s=]*[\"']?[^\s\"':]+:(?!\$)\S",  # curl -u user:value
]


def in_url(url: str) -> bool:
    """Whether a URL has a password, or a query with a password, a token or a signature."""
    parts = urlsplit(url)
    names = parse_qs(parts.query, keep_blank_values=True)
    return bool(parts.password) or any(re.search(rf"{_WORDS}|^sig$", name, re.IGNORECASE) for name in names)


def in_command(command: str) -> bool:
    """Whether a shell command spells out what looks like a secret; one that it takes from a variable is none."""
    return any(re.search(pattern, command, re.IGNORECASE) for pattern in _COMMANDS)
