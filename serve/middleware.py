"""The ASGI middleware around all endpoints. It passes `receive` on, so that endpoints see a client
leave; Starlette's BaseHTTPMiddleware does not."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import MutableMapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import auth, log
from .bodies import too_large
from .paths import path_of
from .problems import GONE, Problem, respond
from .service import Service

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROBES = ("/livez", "/readyz", "/metrics")
"""Paths that are answered however many requests are under way."""
SECURITY = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}
SAME_ORIGIN = {"cross-origin-resource-policy": "same-origin"}
CORS = {
    "access-control-allow-origin": "*",
    "access-control-expose-headers": "content-location, etag, location, retry-after, x-request-id",
}
PREFLIGHT = {
    **CORS,
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-allow-headers": "authorization, content-type, prefer, if-none-match, "
    # The star stands for all but authorization: OpenAI's client for browsers sends its own.
    "last-event-id, x-request-id, *",
    "access-control-max-age": "3600",
}


class Observe:
    """Gives a request its id, and logs and counts it when it has ended."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        # Keep a client's own id only if it is safe in a header and in the log.
        name = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        seen = _Seen(send, name, self._service.settings.cors)
        facts: MutableMapping[str, object] = {}
        scope["state"] = {"facts": facts, "request_id": name}
        begun = time.perf_counter()
        error: BaseException | None = None
        try:
            await self._app(scope, receive, seen.send)
        except Exception as raised:
            error = raised
            # The response has begun: all that is left is to break it off.
            if seen.code:
                raise
            await respond(Request(scope), raised)(scope, receive, seen.send)
        finally:
            seconds = time.perf_counter() - begun
            code = GONE if "gone" in facts else seen.code or GONE
            endpoint = scope["state"].get("endpoint", "none")
            queue_s = facts.get("queue_s")
            queued = queue_s if isinstance(queue_s, float) else None
            self._service.metrics.count(endpoint, code, seconds, queued)
            user = scope["state"].get("user")
            log.request(scope, name, endpoint, code, seconds, seen.bytes, user, facts, error)


class _Seen:
    """A `send` that adds headers and notes what is sent."""

    def __init__(self, send: Send, name: str, cors: bool) -> None:
        self._send = send
        self._name = name
        self._cors = cors
        self.code = 0
        self.bytes = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.code = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._name
            for name, value in {**SECURITY, **(CORS if self._cors else SAME_ORIGIN)}.items():
                headers[name] = value
        elif message["type"] == "http.response.body":
            self.bytes += len(message.get("body", b""))
        await self._send(message)


class Gate:
    """Refuses what may not come in: other hosts and origins, strangers, and too much."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        settings = self._service.settings
        headers = Headers(scope=scope)
        # A busy service must still be able to say so.
        path = path_of(scope)
        probe = path in PROBES
        if settings.cors and _is_preflight(scope["method"], headers):
            raw = [(name.encode(), value.encode()) for name, value in PREFLIGHT.items()]
            await send({"type": "http.response.start", "status": 204, "headers": raw})
            await send({"type": "http.response.body", "body": b""})
            return
        try:
            # The cheapest checks come first, and nothing is read before them.
            scope["state"]["user"] = auth.check(headers, scope["method"], path, settings)
            if self._service.inside >= settings.connections and not probe:
                raise Problem(429, "too many requests are under way. Try again.", 1.0)
            _check_length(headers, settings.upload_bytes)
        except Problem as problem:
            await respond(Request(scope), problem)(scope, receive, send)
            return
        self._service.inside += not probe
        try:
            # `receive` is passed on, wrapped in a plain object, so that a disconnect gets through.
            await self._app(scope, _Counted(receive, settings.upload_bytes), send)
        finally:
            self._service.inside -= not probe


class _Counted:
    """A `receive` that raises a 413 once a body has grown too large, however it is sent."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._most = most
        self._bytes = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            if self._bytes > self._most:
                raise too_large("a body", self._most)
        return message


def _is_preflight(method: str, headers: Headers) -> bool:
    return method == "OPTIONS" and "access-control-request-method" in headers


def _check_length(headers: Headers, most: int) -> None:
    """Raises Problem (413) if the body says that it is too large."""
    # A client that says so early saves both sides the transfer.
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > most):
        raise too_large("a body", most)
