"""Addresses of files, and how they may be shown.

data/train                              a folder
https://host/data/train                 read by ranges; credentials come from ~/.netrc
s3://bucket/data/train                  by Arrow; AWS_* variables, AWS_ENDPOINT_URL for other servers
gs://bucket/data/train                  by HTTP; application default credentials, or a public bucket
pipe:ssh host cat /data/train/{name}    a shell command, {name} becomes a file's name
"""

import re
import shlex
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit


def join(folder: str, name: str) -> str:
    """The address of a file in a folder."""
    scheme = scheme_of(folder)
    if scheme == "pipe":
        return folder.replace("{name}", shlex.quote(name))
    if scheme in ("http", "https"):
        parts = urlsplit(folder)  # what signs the folder (a query) signs its files
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{folder.rstrip('/')}/{name}"


def local_path(url: str) -> Path | None:
    """Where a file of this machine lies; None for the address of something else."""
    if scheme_of(url) != "file":
        return None
    return Path(unquote(urlsplit(url).path) if url.startswith("file:") else url)


def shown(url: str) -> str:
    """An address as it may stand in messages: without user, password, query and arguments."""
    if scheme_of(url) == "pipe":
        return " ".join(["pipe:" + _program(url.partition(":")[2]), "..."])
    if scheme_of(url) == "file":
        return url
    parts = urlsplit(url)
    query = "..." if parts.query else ""
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


def _program(command: str) -> str:
    """The name of what a command runs, without the variables that it is given; empty where that is not so plain."""
    try:
        words = shlex.split(command)
    except ValueError:  # quotes that do not match
        return ""
    first = next((word for word in words if "=" not in word), "")
    return first if re.fullmatch(r"[\w./+-]+", first) else ""


def scheme_of(url: str) -> str:
    """`file` for whatever names none."""
    scheme, colon, _ = url.partition(":")
    if scheme == "pipe" and colon:
        return scheme
    return scheme.lower() if "://" in url else "file"


def without_secrets(text: str) -> str:
    """Libraries put whole addresses into their messages."""
    return re.sub(r"(?<=//)[^/\s@]+@", "", re.sub(r"\?[^\s'\")]+", "?...", text))
