"""The application: its endpoints and what is around them.

    GET    /v1/info                     models, labels, solvers, defaults, limits
    POST   /v1/samples                  make samples
    GET    /v1/samples?...              one image by its URL
    POST   /v1/edits/{verb}             edit an uploaded image
    GET    /v1/jobs/{id}                where a job stands; DELETE cancels it
    GET    /v1/jobs/{id}/events         its previews and its end
    GET    /v1/jobs/{id}/result         its result
    POST   /v1/images/generations       OpenAI's API, as are /v1/images/edits and /v1/models
    GET    /v2/...                      the Open Inference Protocol
    GET    /livez /readyz /metrics /openapi.json

docs/serving.md describes them with examples, `fields.py` their fields.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Thread

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from runtime import Sampler
from runtime.errors import ClosedError, RequestError, UnnoiseError
from runtime.errors.messages import refused

from . import edits, health, job_endpoints, log, openai, openapi, protocol, samples
from .middleware import Gate, Observe
from .models import Models, Source
from .problems import ClientGone, Problem, respond
from .service import Service
from .settings import Settings

Endpoint = Callable[[Request], Awaitable[ASGIApp]]
ENDPOINTS: tuple[tuple[str, str, Endpoint], ...] = (
    ("GET", "/v1/info", health.info),
    ("POST", "/v1/samples", samples.create),
    ("GET", "/v1/samples", samples.show),
    ("POST", "/v1/edits/{verb}", edits.create),
    ("GET", "/v1/jobs/{id}", job_endpoints.show),
    ("DELETE", "/v1/jobs/{id}", job_endpoints.cancel),
    ("GET", "/v1/jobs/{id}/events", job_endpoints.events),
    ("GET", "/v1/jobs/{id}/result", job_endpoints.result),
    ("POST", "/v1/images/generations", openai.generations),
    ("POST", "/v1/images/edits", openai.edit),
    ("GET", "/v1/models", openai.models),
    ("GET", "/v1/models/{model}", openai.model),
    ("GET", "/v2", protocol.server),
    ("GET", "/v2/health/live", protocol.live),
    ("GET", "/v2/health/ready", protocol.ready),
    ("GET", "/v2/models/{model}", protocol.model),
    ("GET", "/v2/models/{model}/ready", protocol.model_ready),
    ("POST", "/v2/models/{model}/infer", protocol.infer),
    ("GET", "/openapi.json", openapi.show),
    ("GET", "/livez", health.livez),
    ("GET", "/readyz", health.readyz),
    ("GET", "/metrics", health.metrics),
    *(("GET", path, health.page) for path in health.PAGE),
)
"""Method, path and function of every endpoint."""


def create_app(bundles: Iterable[Source], settings: Settings | None = None) -> Starlette:
    """Return the ASGI application.

    Args:
        bundles: Folders of bundles, which are opened at the start; or samplers, which stay open
            at the end.
        settings: None is `Settings()`.

    Raises:
        RequestError: There is no bundle, or one is passed without a list.
    """
    # A string is a list, too: of its characters.
    if isinstance(bundles, (str, Path, Sampler)):
        raise refused("bundles", "a list", bundles, "Pass [bundle] for one.")
    sources = list(bundles)
    if not sources:
        raise RequestError("there is no bundle to serve. Pass at least one.")
    return app_of(Models(sources, settings or Settings()))


def app_of(models: Models) -> Starlette:
    """Return the ASGI application of models, which may be opening."""
    service = Service(models)
    handled = (Problem, UnnoiseError, ClientGone, HTTPException)
    app = Starlette(
        routes=_routes(),
        middleware=[Middleware(Observe, service), Middleware(Gate, service)],
        exception_handlers=dict.fromkeys(handled, _respond),
        lifespan=_lifespan,
    )
    app.state.service = service
    return app


async def _respond(request: Request, error: Exception) -> Response:
    # Starlette would call a plain function in a thread.
    return respond(request, error)


def _routes() -> list[Route]:
    """One route a path, so that the Allow header of a 405 lists all its methods."""
    by_path: dict[str, dict[str, Endpoint]] = {}
    for method, path, endpoint in ENDPOINTS:
        by_path.setdefault(path, {})[method] = endpoint
    return [
        Route(path, _entered(path, methods), methods=list(methods))
        for path, methods in by_path.items()
    ]


def _entered(path: str, methods: Mapping[str, Endpoint]) -> Endpoint:
    """The endpoints of a path, which note its template for the log and the metrics."""

    async def enter(request: Request) -> ASGIApp:
        request.scope["state"]["endpoint"] = path
        # Starlette lets HEAD through to any endpoint that takes GET.
        method = "GET" if request.method == "HEAD" else request.method
        return await methods[method](request)

    return enter


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open the models in a thread, while probes are answered; close them at the end."""
    service: Service = app.state.service
    # uvicorn listens only once this has yielded, and no shutdown may wait for a large bundle.
    # `close` ends the thread after the bundle that it is at. It is no daemon, because a process
    # that ends inside an inference library aborts.
    Thread(target=_open, args=(service,), name="unnoise-open").start()
    try:
        yield
    finally:
        await asyncio.to_thread(service.close)


def _open(service: Service) -> None:
    try:
        service.models.open()
        log.write("ready", models=list(service.models.all))
    except ClosedError:
        # The service ends, and the log says why.
        return
    except Exception as error:
        log.write("failed", logging.ERROR, error=str(error))
