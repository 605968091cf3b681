"""/v1/jobs/{id}: where a job stands, its events, its result, and its end."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from runtime.errors.arguments import choice

from . import results
from .fields import FORMATS, formats_of
from .jobs import Job
from .service import flow_of, service_of

NO_STORE = {"cache-control": "no-store"}


def _job(request: Request) -> Job:
    return service_of(request).jobs.get(request.path_params["id"], flow_of(request))


async def show(request: Request) -> Response:
    """Return where a job stands."""
    job = _job(request)
    return JSONResponse(await service_of(request).predict(job.to_json), headers=NO_STORE)


async def cancel(request: Request) -> Response:
    """Cancel a job; drop one that has ended. No other job is touched."""
    service = service_of(request)
    job = _job(request)
    if job.ended is None:
        service.jobs.cancel(job)
    else:
        service.jobs.forget(job)
    return JSONResponse(await service.predict(job.to_json), headers=NO_STORE)


async def events(request: Request) -> ASGIApp:
    """Return a job's events. Closing the connection leaves the job alone.

    After a reconnection, Last-Event-ID keeps previews from being sent twice.
    """
    job = _job(request)
    if job.cancelled:
        job.check_result()
    last = request.headers.get("last-event-id", "")
    # Anything else than our own number starts from the beginning.
    after = int(last) if re.fullmatch(r"[0-9]{1,15}", last) else 0
    # The stream uses the run as the job does, and may end without it.
    job.run.join()
    return results.stream(request, service_of(request), job.run, job.last, after)


async def result(request: Request) -> Response:
    """Return a job's result, in a format of the reader's choice."""
    service = service_of(request)
    job = _job(request)
    job.check_result()
    kind = job.kind
    if "format" in request.query_params:
        known = formats_of("animate") if job.run.animated else FORMATS
        kind = choice("format", request.query_params["format"], known)
        kind = results.pictures.format_of(kind, "", job.run.model)
    samples = await job.run.result()
    body, media = await service.encode(results.encode, job.run, samples, kind, job.columns)
    return Response(body, headers=NO_STORE, media_type=media)
