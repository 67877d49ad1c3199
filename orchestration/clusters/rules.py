"""What every kind of cluster file has to say, whoever starts it: the image, the commands, the token, MLflow, no secret.

Each function takes the place in the file and its value, and gives a sentence for each problem.
"""

import difflib
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from orchestration.submission.job import LEAST_STOP_SECONDS

Config = dict[str, Any]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BUCKETS = ("s3://", "gs://", "abfss://")
LONGEST_IDLE = 60  # minutes

_TAG = re.compile(r"^(?P<ray>\d+\.\d+\.\d+)(?:-py(?P<python>3\d+))?(?:-(?P<accelerator>gpu|cpu|cu\d+[^-]*))?")
_SECRETS = (
    re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),  # AWS
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    re.compile(r"\b(?:ghp|gho|ghs|hf|xox[abp])[_-][A-Za-z0-9_-]{16,}"),  # GitHub, Hugging Face, Slack
    re.compile(r"://[^/\s:@$]+:[^/\s@$]+@"),  # a password in an address
    # An assignment of a literal: what the shell fills in ($NAME, "$(cat FILE)") is none.
    re.compile(r"\b[A-Z_]*(?:PASSWORD|SECRET|SECRET_KEY|TOKEN|API_KEY|ACCESS_KEY)=[\"']?(?![\"'$]|\s|$)"),
)
_SECRET_FIELD = re.compile(r"(?:password|passwd|secret|secret_?key|token|api_?key|access_?key|credentials)$", re.I)


@dataclass(frozen=True)
class Start:
    """A program that a command starts: where the command stands, the variables set for it, and its arguments."""

    path: str
    env: dict[str, str]
    arguments: list[str]

    def option(self, name: str) -> str | None:
        """The value of ``--name VALUE`` or ``--name=VALUE``."""
        for i, argument in enumerate(self.arguments):
            if argument.startswith(f"{name}="):
                return argument.partition("=")[2]
            if argument == name:
                return self.arguments[i + 1] if i + 1 < len(self.arguments) else ""
        return None


@cache
def pinned_ray() -> str:
    """The version of Ray that the project pins; the installed one where its metadata is not to be had."""
    try:
        requirements = metadata.requires("slotforge") or []
    except metadata.PackageNotFoundError:
        requirements = []
    for requirement in map(Requirement, requirements):
        if requirement.name == "ray" and requirement.marker is None:
            for clause in requirement.specifier:
                if clause.operator == "==":
                    return clause.version
    return metadata.version("ray")


@cache
def oldest_python() -> tuple[int, int]:
    """The oldest Python that the project runs on."""
    try:
        text = metadata.metadata("slotforge")["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        text = ""
    found = re.search(r">=\s*(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (3, 11)


def starts(path: str, command: str, program: Sequence[str]) -> Iterator[Start]:
    """Each time that a shell command starts a program, with the variables that the command has set by then."""
    exported: dict[str, str] = {}
    for words in _simple_commands(command):
        env, rest = dict(exported), list(words)
        while rest and (rest[0] in ("nohup", "setsid", "exec", "export") or re.match(r"[A-Za-z_]\w*=", rest[0])):
            word = rest.pop(0)
            if word == "export":
                exported.update(_assignment(each) for each in rest if "=" in each)
            elif "=" in word:
                name, value = _assignment(word)
                env[name] = value
        if rest[: len(program)] == list(program):
            yield Start(path, env, rest[len(program) :])


def in_background(command: str, program: str) -> bool:
    """Whether a shell command starts a program and does not wait for its end."""
    return re.search(rf"\b{re.escape(program)}\b.*(?<![&>])&(?![&>])", command, re.DOTALL) is not None


def all_starts(section: str, commands: Sequence[str], program: str) -> list[Start]:
    """Each start of a program in a list of commands."""
    return [
        start for i, command in enumerate(commands) for start in starts(f"{section}[{i}]", command, program.split())
    ]


def part(holder: Any, field: str) -> dict[str, Any]:
    """A field that should be a mapping; an empty one where it is missing, or something else."""
    value = holder.get(field) if isinstance(holder, dict) else None
    return value if isinstance(value, dict) else {}


def parts(holder: Any, field: str) -> list[dict[str, Any]]:
    """A field that should be a list of mappings; those of its entries that are."""
    value = holder.get(field) if isinstance(holder, dict) else None
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def texts(holder: Any, field: str) -> list[str]:
    """A field that should be a list of texts; those of its entries that are."""
    value = holder.get(field) if isinstance(holder, dict) else None
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def within(path: str, folders: Collection[str]) -> bool:
    """Whether a path lies in one of the folders."""
    return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def unknown(path: str, given: Collection[str], known: Collection[str], whose: str) -> Iterator[str]:
    """Fields that nobody reads."""
    for field in given:
        if field not in known:
            close = difflib.get_close_matches(str(field), known, n=1)
            cure = f"did you mean {close[0]!r}?" if close else "leave it out"
            yield f"{path}.{field}: {whose} has no such field; {cure}"


def image_problems(path: str, image: object, gpu: bool) -> Iterator[str]:
    """An image must hold the pinned Ray, a Python that the project runs on, and CUDA where there are GPUs."""
    wanted, (major, minor) = pinned_ray(), oldest_python()
    example = f"rayproject/ray:{wanted}-py{major}{minor}{'-gpu' if gpu else '-cpu'}"
    if not isinstance(image, str) or not image:
        yield f"{path}: {image!r} names no image; write one such as {example}"
        return
    repository, _, tag = image.partition("@")[0].rpartition(":")
    if not repository or "/" in tag:
        yield f"{path}: {image!r} has no tag, so nodes of one cluster may differ; write one such as {example}"
        return
    own = not f"/{repository}".rpartition("/")[0].endswith("/rayproject")
    # The user's own image says in its tag, somewhere, what it is built from: 1.4-ray2.60.0-py311.
    found = re.search(r"ray-?" + _TAG.pattern.lstrip("^"), tag) if own else _TAG.match(tag)
    if found is None or found["ray"] != wanted:
        said = f"Ray {found['ray']}" if found else "no version of Ray"
        yield f"{path}: {image!r} says {said}, and the project pins {wanted}; write one such as {example}"
        return
    if own and found["python"] is None:
        return
    if found["python"] is None:
        yield f"{path}: {image!r} does not say which Python it has; the project needs {major}.{minor}: write {example}"
    elif (int(found["python"][0]), int(found["python"][1:])) < (major, minor):
        version = f"{found['python'][0]}.{found['python'][1:]}"
        yield f"{path}: {image!r} has Python {version}, and the project needs {major}.{minor}; write {example}"
    if gpu and found["accelerator"] in ("cpu", *([] if own else [None])):
        yield f"{path}: {image!r} is without CUDA, and its nodes have GPUs; write {example}"


def mlflow_problems(server: Start, lasting: Collection[str]) -> Iterator[str]:
    """An MLflow server keeps artifacts in a bucket and curves where they last, and asks who is there beyond loopback.

    Args:
        lasting: folders that outlive the server's container.
    """
    artifacts = server.option("--artifacts-destination") or server.option("--default-artifact-root") or ""
    if not artifacts.startswith(BUCKETS):
        yield (
            f"{server.path}: mlflow server keeps artifacts in {artifacts or 'a local folder'!r}, lost with the head; "
            "add --artifacts-destination s3://... or gs://..."
        )
    store = server.option("--backend-store-uri") or ""
    if not store or (store.startswith("sqlite:") and not within(store.removeprefix("sqlite:///"), lasting)):
        yield (
            f"{server.path}: mlflow server keeps curves in {store or 'the folder that it starts in'!r}, lost with its "
            "container; add --backend-store-uri sqlite:////FOLDER/mlflow.db, on storage that is mounted there"
        )
    host = server.option("--host") or server.option("-h") or LOOPBACK[0]
    if host in LOOPBACK:
        return
    if host in ("0.0.0.0", "::"):  # noqa: S104 it is what is refused
        yield (
            f"{server.path}: mlflow server --host {host} listens on every interface, the public one included; bind it "
            "to 127.0.0.1 or to the head's address inside the cluster"
        )
    if server.option("--app-name") != "basic-auth":
        yield f"{server.path}: mlflow server --host {host} asks nobody for a password; add --app-name basic-auth"
    hosts = server.option("--allowed-hosts")
    if not hosts or "*" in hosts.split(","):
        yield f"{server.path}: mlflow server --allowed-hosts {hosts} lets any name in; list the head's address alone"


def stop_problems(path: str, environment: Mapping[str, Any]) -> Iterator[str]:
    """A job that is stopped needs time to save; Ray gives it three seconds."""
    seconds = str(environment.get("RAY_JOB_STOP_WAIT_TIME_S"))
    if not seconds.isdigit() or int(seconds) < LEAST_STOP_SECONDS:
        yield (
            f"{path}: RAY_JOB_STOP_WAIT_TIME_S={seconds} is too little for a stopped job to save; set "
            f"{LEAST_STOP_SECONDS} or more"
        )


def secret_problems(value: Any, path: str = "") -> Iterator[str]:
    """Secrets that stand in the file, which is shared and versioned."""
    if isinstance(value, dict):
        for key, inner in value.items():
            place = f"{path}.{key}" if path else str(key)
            if isinstance(inner, str) and _SECRET_FIELD.search(str(key)) and inner and not _is_reference(inner):
                yield f"{place}: a secret stands in the file (not shown); keep it in a file or a secret store"
            else:
                yield from secret_problems(inner, place)
        name, literal = value.get("name"), value.get("value")  # a variable of a container
        if isinstance(name, str) and isinstance(literal, str) and _SECRET_FIELD.search(name) and literal:
            yield f"{path}: {name} stands in the file (not shown); take it from a Secret: valueFrom.secretKeyRef"
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from secret_problems(inner, f"{path}[{i}]")
    elif isinstance(value, str) and any(pattern.search(value) for pattern in _SECRETS):
        yield f"{path}: a secret stands in the file (not shown); let the shell read it from a file: $(cat FILE)"


def placeholders(value: Any, path: str = "") -> Iterator[str]:
    """Places that are left for the user to fill in: words such as YOUR-BUCKET."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from placeholders(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from placeholders(inner, f"{path}[{i}]")
    elif isinstance(value, str):
        for word in dict.fromkeys(re.findall(r"\bYOUR-[A-Z-]*[A-Z]", value)):
            yield f"{path}: {word}"


def requirement(word: str) -> Requirement | None:
    """What a word of `pip install` asks for, if it is a requirement."""
    try:
        return Requirement(word)
    except InvalidRequirement:
        return None


def _simple_commands(command: str) -> list[list[str]]:
    filled = re.sub(r"\$\([^()]*\)", "$SHELL_FILLS_IN", command)  # what is in $(...) starts nothing of the cluster
    lexer = shlex.shlex(filled, posix=True, punctuation_chars=";&|()")
    lexer.whitespace_split = True
    lexer.commenters = ""
    found: list[list[str]] = [[]]
    try:
        for word in lexer:
            if set(word) <= set(";&|()"):
                found.append([])
            else:
                found[-1].append(word)
    except ValueError:  # quotes that do not close: the shell will say so
        return []
    return found


def _assignment(word: str) -> tuple[str, str]:
    name, _, value = word.partition("=")
    return name, value


def _is_reference(text: str) -> bool:
    """A path, a variable or a name of something, rather than the secret itself."""
    return text.startswith(("~", "/", "$")) or "/" in text
