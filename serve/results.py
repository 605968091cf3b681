"""A run as a response: its result, an event stream, or a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from runtime.engine.json_arrays import array_to_json

from . import pictures
from .events import EventStream, Last, run_events, unless_gone
from .fields import FORMATS
from .jobs import Job
from .limits import check_job
from .models import Model
from .paths import prefix_of
from .pictures import Float32
from .problems import to_bytes
from .runs import Run
from .service import Service, flow_of, note_facts, service_of


@dataclass(frozen=True)
class Output:
    """How a result is returned.

    Attributes:
        kind: One of `fields.FORMATS`.
        every: Steps between previews, if anybody looks at them.
        deadline: Seconds from now; None has none.
    """

    kind: str
    columns: int | None
    stream: bool
    every: int
    deadline: float | None
    is_job: bool

    @property
    def preview_every(self) -> int:
        """Steps between previews; 0 if nobody looks at them."""
        return self.every if self.stream or self.is_job else 0

    @classmethod
    def of(
        cls,
        request: Request,
        model: Model,
        given: Mapping[str, object],
        formats: Sequence[str] = FORMATS,
    ) -> Output:
        """Read the fields `fields.OUTPUT` and the headers Accept and Prefer.

        Args:
            request: With the headers.
            model: Of the request.
            given: The checked fields.
            formats: Those that the result may have.

        Raises:
            RequestError: The samples are no images, and an image was asked for; or a job's result
                is larger than what is kept.
        """
        accept = request.headers.get("accept", "")
        # A list, which may come on several lines; its words have no case (RFC 7240, section 2).
        is_job = "respond-async" in ",".join(request.headers.getlist("prefer")).lower()
        if is_job:
            n = cast("int", given.get("n", 1))
            check_job(model.bundle, n, service_of(request).settings)
        return cls(
            kind=pictures.format_of(given.get("format"), accept, model, formats),
            columns=cast("int | None", given.get("columns")),
            stream=bool(given.get("stream")) or "text/event-stream" in accept,
            every=cast("int", given.get("every", 1)),
            deadline=cast("float | None", given.get("deadline")),
            is_job=is_job,
        )


async def respond(
    request: Request,
    service: Service,
    run: Run,
    output: Output,
    last: Last,
    headers: Mapping[str, str],
) -> ASGIApp:
    """Return a run as its request asks for. The run is left in any case."""
    if output.is_job:
        return await start_job(request, service, run, output, last)
    if output.stream:
        return stream(request, service, run, last)
    return await finish(request, service, run, output, headers)


async def finish(
    request: Request, service: Service, run: Run, output: Output, headers: Mapping[str, str]
) -> Response:
    """Wait for a run and return its result. It leaves the run."""
    try:
        # A client that leaves ends the wait, and so its part in the run.
        samples = await unless_gone(request.receive, run.result())
        timing = note_facts(request, run)
        body, kind = await service.encode(encode, run, samples, output.kind, output.columns)
    finally:
        run.leave()
    return Response(body, headers={**headers, **timing}, media_type=kind)


def stream(request: Request, service: Service, run: Run, last: Last) -> EventStream:
    """Return the events of a run. It leaves the run at their end."""
    events = run_events(run, service.encoding, service.settings.heartbeat_s, last)

    def end() -> None:
        note_facts(request, run)
        run.leave()

    return EventStream(events, end)


async def start_job(
    request: Request, service: Service, run: Run, output: Output, last: Last
) -> Response:
    """Keep a run as a job, and return where it is."""
    # The job takes over the request's part in the run.
    prefix = prefix_of(request.scope)
    job = Job(flow_of(request), run, output.kind, output.columns, last, prefix)
    try:
        service.jobs.add(job)
    except BaseException:
        run.leave()
        raise
    headers = {"location": job.path, "preference-applied": "respond-async"}
    return JSONResponse(await service.predict(job.to_json), 202, headers)


def encode(run: Run, samples: Float32, kind: str, columns: int | None) -> tuple[bytes, str]:
    """Encode the samples [n, *S] of a run. Returns the bytes and their media type."""
    if run.animated:
        return pictures.encode_animation(run.model, samples, kind, columns)
    if kind == "json":
        return to_bytes(as_json(run, samples)), pictures.MEDIA_TYPES[kind]
    # As in `runtime.edit`: the array is the noise, the image is what it gives back.
    if kind == "npy" and run.inversion is not None:
        samples = run.inversion.noise
    return pictures.encode(run.model, samples, kind, columns)


def as_json(run: Run, samples: Float32) -> dict[str, object]:
    """Return the samples [n, *S] of a run as JSON."""
    if run.animated:
        return pictures.animation_as_json(run.model, samples)
    found = pictures.as_json(run.model, samples)
    if run.inversion is None:
        return found
    noise = array_to_json(run.inversion.noise)
    return {**found, "noise": noise, "rms": run.inversion.error.tolist()}
