"""Probes, metrics, and what the service is."""

from __future__ import annotations

import functools
from importlib import resources

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from . import auth
from .fields import FORMATS
from .models import version
from .paths import path_of
from .problems import Problem
from .service import service_of

PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in auth.PAGE_SCRIPTS},
}
"""Files of the page by path, with their media types."""


async def livez(request: Request) -> Response:
    """Whether the event loop answers."""
    return PlainTextResponse("ok\n", headers={"cache-control": "no-store"})


async def readyz(request: Request) -> Response:
    """Whether the service can take work; otherwise why it cannot (503)."""
    reason = service_of(request).unready()
    if reason:
        raise Problem(503, reason, 2.0)
    return PlainTextResponse("ready\n", headers={"cache-control": "no-store"})


async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    body, kind = service_of(request).metrics.expose()
    return Response(body, headers={"content-type": kind, "cache-control": "no-store"})


async def info(request: Request) -> Response:
    """The models with their labels, solvers and defaults; and the limits."""
    service = service_of(request)
    settings = service.settings
    found = {
        "version": version(),
        "opened": service.models.opened,
        "models": [model.info() for model in service.models.all.values()],
        "formats": list(FORMATS),
        "limits": {
            "samples": settings.samples,
            "rows": settings.rows,
            "request_rows": settings.request_rows,
            "json_bytes": settings.json_bytes,
            "upload_bytes": settings.upload_bytes,
            "pixels": settings.pixels,
            "animation_bytes": settings.animation_bytes,
        },
    }
    return JSONResponse(found, headers={"cache-control": "no-store"})


async def page(request: Request) -> Response:
    """A file of the page."""
    name, kind = PAGE[path_of(request.scope)]
    # One of the names in PAGE, so nothing of the request is in the path.
    return Response(_file(name), headers={"cache-control": "no-cache"}, media_type=kind)


@functools.cache
def _file(name: str) -> bytes:
    """The bytes of a file of the page. Raises Problem (404)."""
    file = resources.files("serve") / "page" / name
    if not file.is_file():
        raise Problem(404, "the page is not installed.")
    return file.read_bytes()
