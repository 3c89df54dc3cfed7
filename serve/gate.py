"""The first thing a request meets: key, size and queue, all decided before its body is read."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.auth import KeyRing
from serve.metrics import Metrics
from serve.problems import ProblemError, overloaded

PUBLIC_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json"})
ADMIN_PREFIX = "/v1/admin/"
SIGNED_PREFIXES = ("/media/", "/thumb/")
SEARCH_PATHS = frozenset({"/v1/search", "/v1/search/by-example"})
UPLOAD_PATH = "/v1/search/by-example"
MAX_JSON_BYTES = 1_000_000
_SHORT_BYTES = 16_000
_CALM_SECONDS = 1.0
_STANDING = 4.5  # times what a search takes alone
_FEW = 4  # searches in flight that are never too many, and from which on their times tell what one takes among others
_SEARCHED = (200, 504)  # a request that makes no sense, or was taken back, says nothing of what a search takes
_CLIENT_LEFT = 499  # in the metrics, as proxies write it: never sent

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}


class Admission:
    """Counts searches in flight, refuses what would wait too long, and says when to come back.

    A search that finds n others waits for about n times what one takes when they are answered together (Little's law:
    time in the server over searches in it). So the queue is as long as the server is fast.

    A burst may wait ``max_wait_seconds``. Where more comes than can be answered, everyone would always wait that long:
    a long queue then makes all late and nobody faster (the standing queue of Nichols and Jacobson, "Controlling queue
    delay", 2012). So after a refusal, until nothing was refused for a second, a search may only wait a few times as
    long as one takes alone, which is less than twice what it takes in the company that it usually has: what is accepted
    in an overload is answered nearly as fast as ever, in batches that are large enough.
    """

    def __init__(self, limit: int, *, always: int, max_wait_seconds: float) -> None:
        """Set the limits.

        Args:
            limit: searches in flight, at most.
            always: so many may come at once however slow the last ones were.
            max_wait_seconds: a search that would wait longer is refused.
        """
        self.limit = limit
        self.always = always
        self.max_wait_seconds = max_wait_seconds
        self.in_flight = 0
        self._seconds_alone: float | None = None
        self._seconds_each: float | None = None
        self._refused_at = -math.inf

    def enter(self, now: float) -> int | None:
        """Take a place at ``now`` (monotonic seconds): how many are in flight with it, or None where there is none."""
        always, most = self.always, self.max_wait_seconds
        if now - self._refused_at < _CALM_SECONDS:
            always = min(always, _FEW)
            if self._seconds_alone is not None:
                most = min(most, _STANDING * self._seconds_alone)
        wait = math.inf if self._seconds_each is None else self.in_flight * self._seconds_each
        if self.in_flight >= self.limit or (self.in_flight >= always and wait > most):
            self._refused_at = now
            return None
        self.in_flight += 1
        return self.in_flight

    def leave(self, entered: int, seconds: float | None) -> None:
        """Give back a place that :meth:`enter` gave as the ``entered``-th, after a search of ``seconds``; None where
        nothing was searched."""
        self.in_flight -= 1
        if seconds is None:
            return
        if entered == 1:
            self.took_alone(seconds)
        elif entered >= _FEW:
            # By those that it found, not by those who came later, or a growing queue would look fast.
            each = seconds / entered
            self._seconds_each = each if self._seconds_each is None else 0.9 * self._seconds_each + 0.1 * each

    def took_alone(self, seconds: float) -> None:
        """Hear what a search took that met no other, a probe's for one. The first searches are admitted by that, as if
        none could share a batch: a burst that meets a fresh server must not wait without end."""
        # Falls fast and rises slowly: a search by example also waits for its upload.
        alone = seconds if self._seconds_alone is None else self._seconds_alone
        self._seconds_alone = alone + (0.5 if seconds < alone else 0.05) * (seconds - alone)
        if self._seconds_each is None:
            self._seconds_each = seconds

    def retry_after(self) -> int:
        """Seconds until about half of the searches in flight are gone, 1 to 30."""
        return max(1, min(30, math.ceil(self.in_flight * (self._seconds_each or 0.0) / 2)))


class Gate:
    """ASGI middleware: metrics and headers for every answer; keys, body limits and admission for every request."""

    def __init__(
        self, app: ASGIApp, *, keys: KeyRing, admission: Admission, metrics: Metrics, max_body_bytes: int
    ) -> None:
        self._app = app
        self._keys = keys
        self._admission = admission
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._admit(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            status = _CLIENT_LEFT
            raise
        finally:
            route = scope.get("route")
            self._metrics.request(getattr(route, "path", "other"), status, time.perf_counter() - started)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), _routed(scope)
        limit = self._max_body_bytes if path == UPLOAD_PATH else MAX_JSON_BYTES
        try:
            self._check_key(scope, path, headers)
            if _length(headers) > limit:
                raise _too_large(limit)
            searching = path in SEARCH_PATHS and scope["method"] == "POST"
            place = self._admission.enter(time.monotonic()) if searching else None
            if searching and place is None:
                self._metrics.rejected("queue")
                raise overloaded(self._admission.retry_after())
        except ProblemError as e:
            # The body was not read. A short one goes by; a long one is not waited for: the connection ends here.
            response = e.response()
            if "transfer-encoding" in headers or _length(headers) > _SHORT_BYTES:
                response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        if place is None:
            await self._app(scope, _limited(receive, limit), send)
            return
        entered, status = time.monotonic(), 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.in_flight(self._admission.in_flight)
        try:
            await self._app(scope, _limited(receive, limit), send_noting)
        finally:
            self._admission.leave(place, time.monotonic() - entered if status in _SEARCHED else None)
            self._metrics.in_flight(self._admission.in_flight)

    def _check_key(self, scope: Scope, path: str, headers: Headers) -> None:
        if path in PUBLIC_PATHS:
            return
        if self._keys.open:
            if path.startswith(ADMIN_PREFIX):
                raise ProblemError(
                    403,
                    "forbidden",
                    "this server has no admin keys",
                    remedy="Set serve.keys_file to a file with an admin key.",
                )
            return
        if path.startswith(SIGNED_PREFIXES) and scope["method"] in ("GET", "HEAD"):
            query = parse_qs(scope["query_string"].decode("latin-1"))
            if self._keys.signed(path, *(query.get(name, [None])[0] for name in ("expires", "signature"))):
                return
        role = self._keys.role_of(headers.get("authorization"))
        if role is None:
            self._metrics.rejected("key")
            given = "authorization" in headers
            raise ProblemError(
                401,
                "unauthorized",
                "this key is not known here" if given else "this server asks for a key",
                remedy="Send the header `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": 'Bearer realm="ACE"' + (', error="invalid_token"' if given else "")},
            )
        if path.startswith(ADMIN_PREFIX) and role != "admin":
            raise ProblemError(403, "forbidden", "this key may only read", remedy="Use an admin key.")


def _routed(scope: Scope) -> str:
    """The path that the router will see: behind a route prefix, without it. Both must decide by the same one."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path[len(prefix) :] if prefix and path.startswith(prefix + "/") else path


def _length(headers: Headers) -> int:
    """Bytes of the body as declared; 0 where that is no number, which the HTTP server refuses before."""
    length = headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() else 0


def _too_large(limit: int) -> ProblemError:
    return ProblemError(
        413, "too large", f"the body is larger than {limit} bytes", remedy="Send a smaller file or fewer texts."
    )


def _limited(receive: Receive, limit: int) -> Callable[[], Awaitable[Message]]:
    """``receive`` that ends a body without a declared length when it grows over the limit."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise HTTPException(413, _too_large(limit).problem.detail)
        return message

    return limited
