"""/v1/jobs/{id}: where a job stands, its events, its result, and its end."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from . import pictures, results
from .events import EventStream, run_events
from .fields import result_fields
from .jobs import Job
from .pictures import Float32
from .samples import query_of
from .schema import check_all
from .service import flow_of, note_facts, service_of

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
    service = service_of(request)
    job = _job(request)
    if job.cancelled:
        job.check_result()
    seen = request.headers.get("last-event-id", "")
    # Anything else than our own number starts from the beginning.
    after = int(seen) if re.fullmatch(r"[0-9]{1,15}", seen) else 0

    def last(samples: Float32) -> dict[str, object]:
        # The run of a cancelled job may have continued for others.
        job.check_result()
        return job.last(samples)

    # A reader does not use the run: its work must end if the job is cancelled.
    heartbeat_s = service.settings.heartbeat_s
    stream = run_events(job.run, service.encoding, heartbeat_s, last, after)
    return EventStream(stream, lambda: note_facts(request, job.run))


async def result(request: Request) -> Response:
    """Return a job's result, in a format of the reader's choice."""
    service = service_of(request)
    job = _job(request)
    given = check_all("the query", result_fields(job.run.animated), query_of(request))
    job.check_result()
    kind = job.kind
    if "format" in given:
        kind = pictures.format_of(given["format"], "", job.run.model)
    samples = await job.run.result()
    body, media = await service.encode(results.encode, job.run, samples, kind, job.columns)
    return Response(body, headers=NO_STORE, media_type=media)
