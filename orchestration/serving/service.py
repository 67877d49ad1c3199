"""`slotforge serve`: the HTTP service of app.py in this process, its replicas on Ray."""

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from orchestration.clusters.connection import ray_cluster
from orchestration.serving.app import Terms, application
from orchestration.serving.finder import ModelName

SHORTEST_TOKEN = 16
_STOP_SECONDS = 20  # that requests have to end when the service stops
_MOST_CONNECTIONS = 1024


class ServeError(Exception):
    """The service cannot be started as it is asked for; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What is served, where, and on which terms.

    Fields:
        host, port: where it listens; port 0 is any free one.
        replicas: copies of the model.
        batch: images that a copy sees at once.
    """

    model: ModelName
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    batch: int = 16
    terms: Terms = field(default_factory=Terms)


def run(settings: Settings, started: Callable[[str, str], None]) -> None:
    """Serves until it is stopped by SIGINT or SIGTERM.

    Args:
        started: told the address and the version of the model once requests are answered.

    Raises:
        ServeError: it cannot listen there, or not without a token.
        ValueError: the model is not one of the registry.
        MlflowException: there is no such model.
        NoRayError: Ray does not start.
    """
    if settings.terms.token is None and not is_loopback(settings.host):
        raise ServeError(
            f"--host {settings.host}: anybody who reaches this machine could ask; demand a token with --token-file, "
            "or stay on 127.0.0.1"
        )
    with bound(settings.host, settings.port) as listener:
        settings = replace(settings, model=settings.model.pinned())
        _stop_by_interrupt()
        try:
            with ray_cluster(settings.replicas):
                _stop_by_interrupt()  # Ray has put a handler of its own in its place
                _serve(settings, listener, started)
        except KeyboardInterrupt:
            return


def _serve(settings: Settings, listener: socket.socket, started: Callable[[str, str], None]) -> None:
    import ray

    from orchestration.serving.replicas import Replicas

    terms = settings.terms
    cpus = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    threads = max(1, cpus // settings.replicas)
    try:
        replicas = Replicas(
            settings.model,
            terms.limits,
            count=settings.replicas,
            batch=settings.batch,
            threads=threads,
        )
    except RuntimeError as error:
        raise ServeError(f"{settings.model.uri}: no replica could be started: {error}") from error
    try:
        server = http_server(application(replicas, terms, {"model": settings.model.uri}))
        host, port = listener.getsockname()[:2]
        listener.listen(_MOST_CONNECTIONS)  # whoever is told the address may ask at once, and waits for the loop
        started(f"http://{f'[{host}]' if ':' in host else host}:{port}", settings.model.uri)
        server.run(sockets=[listener])
    finally:
        replicas.stop()


def http_server(app: ASGIApp) -> uvicorn.Server:
    """What speaks HTTP for an application, within bounds of its own: of heads, connections, and the time to stop."""
    config = uvicorn.Config(
        app,
        http="h11",  # httptools, which is faster, takes a head of any length
        ws="none",
        lifespan="off",
        log_level=logging.WARNING,
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    return uvicorn.Server(config)


def _stop_by_interrupt() -> None:
    """Both signals clean up; uvicorn takes them while it runs, and hands them on when it has stopped."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)


def bound(host: str, port: int) -> socket.socket:
    """A socket with that address, taken before anything heavy is started; nobody is let in yet.

    Raises:
        ServeError: the address is taken, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ServeError(f"--host {host} --port {port}: cannot listen there ({error}); name another port") from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach an address; of a name, whether all that it stands for are such."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def read_token(path: Path) -> str:
    """The token in a file.

    Raises:
        ServeError: the file cannot be read, or is no token: too short to be secret, or not plain letters.
    """
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"--token-file {path}: cannot be read ({error})") from None
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ServeError(
            f"--token-file {path}: holds no token of {SHORTEST_TOKEN} letters or more; write one with: "
            f"openssl rand -hex 32 > {path}"
        )
    return token
