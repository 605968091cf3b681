"""Errors as responses: problem details (RFC 9457), with the library's own sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from runtime.engine.loop import Cancelled
from runtime.errors import ClosedError, DeadlineError, Overloaded, RequestError, UnnoiseError

from .paths import path_of

GONE = 499
"""The status in the log of a request whose client left; nobody receives it."""
TITLES = {GONE: "Client Closed Request"}


class ClientGone(Exception):
    """The client closed the connection before it had its response."""


class Problem(Exception):
    """An error response.

    Attributes:
        status: The HTTP status.
        detail: A sentence for the user.
        retry_after: Predicted seconds until the same request may succeed; None says nothing.
        headers: More headers.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after = retry_after
        self.headers = dict(headers or {})

    @property
    def title(self) -> str:
        """The name of the status."""
        return TITLES.get(self.status) or HTTPStatus(self.status).phrase

    def to_json(self) -> dict[str, object]:
        """Return the body, RFC 9457, section 3."""
        found: dict[str, object] = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.retry_after is not None:
            found["retry_after"] = round(self.retry_after, 3)
        return found

    def all_headers(self) -> dict[str, str]:
        """Return the headers, Retry-After among them, which is in whole seconds."""
        if self.retry_after is None:
            return dict(self.headers)
        # The header knows whole seconds only, and 0 would ask for a storm.
        seconds = max(1, math.ceil(self.retry_after))
        # The milliseconds are for OpenAI's client, which prefers them.
        exact = max(1, math.ceil(1000 * self.retry_after))
        return {**self.headers, "retry-after": str(seconds), "retry-after-ms": str(exact)}


def problem_of(error: BaseException) -> Problem:
    """Return the response to an error."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestError):
        return Problem(400, str(error))
    if isinstance(error, Overloaded):
        return Problem(429, str(error), error.retry_after)
    if isinstance(error, DeadlineError):
        # A refused deadline asks for too much; only one that was accepted can be missed.
        return Problem(422 if error.finish_seconds else 504, str(error))
    # Before its base class, BackendError, below.
    if isinstance(error, ClosedError):
        return Problem(503, "the service is shutting down. Try again.", 5.0)
    if isinstance(error, Cancelled):
        return Problem(409, "the job was cancelled. Submit it again.")
    if isinstance(error, ClientGone):
        return Problem(GONE, "the client left.")
    if isinstance(error, HTTPException):
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        return Problem(error.status_code, _sentence(error), headers=headers)
    if isinstance(error, UnnoiseError):
        return Problem(500, str(error))
    # Nothing about an unforeseen error may reach the client: it is in the log.
    return Problem(500, "the server failed. The log has the reason under this request's id.")


def _sentence(error: HTTPException) -> str:
    sentences = {
        404: "there is no such resource. GET /openapi.json lists them all.",
        405: "this resource has no such method. The Allow header lists those that it has.",
    }
    return sentences.get(error.status_code, error.detail)


def respond(request: Request, error: BaseException) -> Response:
    """Return the response to an error, in the shape of the API that was called."""
    problem = problem_of(error)
    path = path_of(request.scope)
    # Clients of other people's APIs read errors in the shape of these.
    if path.startswith(("/v1/images", "/v1/models")):
        return _response(problem, "application/json", openai_shape(problem))
    if path.startswith("/v2"):
        return _response(problem, "application/json", {"error": problem.detail})
    return _response(problem, "application/problem+json", problem.to_json())


def openai_shape(problem: Problem) -> dict[str, object]:
    """Return an error as OpenAI's API has it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    server = "server_error" if problem.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": problem.detail,
            "type": kinds.get(problem.status, server),
            "param": None,
            "code": None,
        }
    }


def _response(problem: Problem, kind: str, body: Mapping[str, object]) -> Response:
    headers = {"cache-control": "no-store", **problem.all_headers()}
    return Response(to_bytes(body), problem.status, headers, kind)


def to_bytes(value: object) -> bytes:
    """Return a JSON value as ASCII bytes: strings of a request may not be valid UTF-8."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
