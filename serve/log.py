"""The log: one line of JSON for each request, and for each event of the service."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping

from starlette.types import Scope

LOGGER = logging.getLogger("unnoise.serve")
MOST_TEXT = 500
"""Characters of a value in the log."""


def request(
    scope: Scope,
    name: str,
    endpoint: str,
    code: int,
    seconds: float,
    sent: int,
    user: str | None,
    facts: Mapping[str, object],
    error: BaseException | None,
) -> None:
    """Log a request that has ended.

    Args:
        scope: ASGI's.
        name: The request's id.
        endpoint: The route's template.
        code: The status; 499 if the client left.
        seconds: That it took.
        sent: Bytes of the response's body.
        user: Whose token it had.
        facts: What else is known, such as rows.
        error: What an endpoint raised.
    """
    client = scope.get("client")
    values: dict[str, object] = {
        "id": name,
        "client": client[0] if client else None,
        "user": user,
        "method": scope["method"],
        "path": scope["path"][:MOST_TEXT],
        "endpoint": endpoint,
        "code": code,
        "seconds": round(seconds, 4),
        "bytes": sent,
        **facts,
    }
    if error is not None:
        values["error"] = "".join(traceback.format_exception(error))[-4000:]
    write("request", logging.ERROR if error is not None else logging.INFO, **values)


def write(event: str, level: int = logging.INFO, **values: object) -> None:
    """Log an event with its values."""
    # JSON escapes line breaks, so a request's path cannot forge a second line.
    LOGGER.log(level, json.dumps({"time": round(time.time(), 3), "event": event, **values}))


class _OneLine(logging.Formatter):
    """Lines of JSON: ours, and those of the libraries."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == LOGGER.name:
            return record.getMessage()
        values = {"time": round(record.created, 3), "event": "log", "logger": record.name}
        return json.dumps({**values, "message": super().format(record)[:4000]})


def to_stderr() -> None:
    """Write the log to standard error. For the command; a library leaves this to its user."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logging.getLogger().addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    # Pillow warns of damaged files: these lines must be JSON, too.
    logging.captureWarnings(True)
    # It warns of every broken body. The response to the client already reports it.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
