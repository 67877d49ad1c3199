"""The HTTP service: who may ask, what is taken in, how much at a time. What answers stands behind `Backend`."""

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Any, Protocol, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestration.serving.answers import TAKEN, Answer, Form, Masks, Work, problem
from orchestration.serving.images import Limits

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1
_LOCAL_NAMES = {"127.0.0.1", "localhost", "[::1]"}
_OPEN = "/healthz"  # to whoever watches over the service; it says nothing but whether there is one


class Backend(Protocol):
    """What answers requests."""

    async def answer(self, work: Work) -> Answer: ...

    async def replicas(self) -> int:
        """How many can answer now."""


class UnavailableError(Exception):
    """Nobody can answer now."""


@dataclass(frozen=True)
class Terms:
    """On which terms requests are answered.

    Fields:
        limits: of one request.
        waiting: requests that are read or answered at the same time; more are sent away with 503. They bound the
            memory: at most so many bodies are held.
        seconds: that a request may take, from its first byte to its answer.
        token: that has to come with a request, as `Authorization: Bearer TOKEN`; None lets everybody ask.
    """

    limits: Limits = field(default_factory=Limits)
    waiting: int = 64
    seconds: float = 60.0
    token: str | None = field(default=None, repr=False)


class _Metrics:
    """Counters of one service, in the text of Prometheus."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        known = self.registry
        self.requests = Counter("slotforge_requests", "answered requests", ["path", "status"], registry=known)
        self.images = Counter("slotforge_images", "images answered for", registry=known)
        self.seconds = Histogram(
            "slotforge_request_seconds",
            "from a request's head to its answer",
            buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
            registry=known,
        )
        self.waiting = Gauge("slotforge_requests_waiting", "requests read or answered now", registry=known)
        self.replicas = Gauge("slotforge_replicas", "replicas that can answer", registry=known)
        ProcessCollector(registry=self.registry)


class _Refusal(Exception):
    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.answer = problem(status, sentence)


def application(backend: Backend, terms: Terms, about: Mapping[str, Any]) -> ASGIApp:
    """The service as an ASGI application.

    Args:
        about: what GET / tells about the model.
    """
    service = _Service(backend, terms, about)
    routes = [
        Route("/", service.describe),
        Route("/healthz", service.health),
        Route("/metrics", service.measure),
        Route("/predict", service.predict("facts"), methods=["POST"]),
        Route("/predict/labels.png", service.predict("labels"), methods=["POST"]),
        Route("/predict/overlay.png", service.predict("overlay"), methods=["POST"]),
    ]
    return _Gate(Starlette(routes=routes), terms.token)


class _Service:
    def __init__(self, backend: Backend, terms: Terms, about: Mapping[str, Any]) -> None:
        self._backend, self._terms = backend, terms
        self._about = {**about, "takes": list(TAKEN), "limits": asdict(terms.limits)}
        self._metrics = _Metrics()
        self._waiting = 0

    async def describe(self, request: Request) -> Response:
        return JSONResponse(self._about)

    async def health(self, request: Request) -> Response:
        ready = await self._backend.replicas() > 0
        return JSONResponse({"ready": ready}, HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)

    async def measure(self, request: Request) -> Response:
        self._metrics.replicas.set(await self._backend.replicas())
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def predict(self, form: Form) -> Any:
        async def endpoint(request: Request) -> Response:
            start = time.perf_counter()
            answer = await self._answer(request, form)
            self._metrics.requests.labels(request.url.path, answer.status).inc()
            self._metrics.images.inc(answer.images)
            self._metrics.seconds.observe(time.perf_counter() - start)
            retry = {"Retry-After": str(RETRY_SECONDS)} if answer.status == HTTPStatus.SERVICE_UNAVAILABLE else None
            return Response(answer.body, answer.status, retry, answer.media)

        return endpoint

    async def _answer(self, request: Request, form: Form) -> Answer:
        if self._waiting >= self._terms.waiting:
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._waiting} requests are waiting; try again later")
        self._waiting += 1
        self._metrics.waiting.set(self._waiting)
        try:
            async with asyncio.timeout(self._terms.seconds):
                return await self._backend.answer(await self._work(request, form))
        except _Refusal as refusal:
            return refusal.answer
        except ClientDisconnect:
            return problem(HTTPStatus.BAD_REQUEST, "the request broke off")  # for the counters: nobody reads it
        except UnavailableError as error:
            return problem(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
        except TimeoutError:
            return problem(HTTPStatus.GATEWAY_TIMEOUT, f"not read and answered within {self._terms.seconds:g} s")
        except Exception:  # nothing of what went wrong inside is told outside
            logger.exception("a request failed")
            return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "the service failed; its log says how")
        finally:
            self._waiting -= 1
            self._metrics.waiting.set(self._waiting)

    async def _work(self, request: Request, form: Form) -> Work:
        """Reads a request, up to the limit.

        Raises:
            _Refusal: it is of another type, or too long.
        """
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media not in TAKEN:
            raise _Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"Content-Type: {media or 'none'} is not taken; send {', '.join(TAKEN)}",
            )
        masks = request.query_params.get("masks", "rle")
        if masks not in get_args(Masks):
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"masks: {masks} is not one of {', '.join(get_args(Masks))}")
        limit = self._terms.limits.bytes
        too_long = _Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is over the limit of {limit} bytes; send less at a time"
        )
        length = request.headers.get("content-length", "")
        if length.isdecimal() and int(length[:19]) > limit:  # else the count below decides
            raise too_long
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_long
        return Work(media, bytes(body), form, masks)  # type: ignore[arg-type]


class _Gate:
    """Lets in who has the token; where none is demanded, who asks for this machine by a name of its own.

    A web page can make its visitor's browser ask a server on loopback, under a name that the page's owner controls.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._bearer = None if token is None else f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != _OPEN and (refusal := self._refusal(dict(scope["headers"]))):
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Mapping[bytes, bytes]) -> Response | None:
        if self._bearer is not None:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if hmac.compare_digest(scheme.lower() + b" " + token, self._bearer):
                return None
            told = json.dumps({"error": "this service demands its token: Authorization: Bearer TOKEN"})
            challenge = {"WWW-Authenticate": "Bearer"}
            return Response(told, HTTPStatus.UNAUTHORIZED, challenge, "application/json")
        name = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if name in _LOCAL_NAMES:
            return None
        told = json.dumps(
            {"error": f"Host: {name[:100]} is not a name of this machine; demand a token to serve others"}
        )
        return Response(told, HTTPStatus.FORBIDDEN, media_type="application/json")
