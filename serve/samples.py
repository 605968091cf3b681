"""POST and GET /v1/samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlencode

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

import runtime
from runtime.errors import RequestError
from runtime.errors.arguments import integer
from runtime.files import from_json
from runtime.sampler import ARGUMENTS

from . import pictures
from .bodies import read_json
from .events import EventStream, Last, Stream, unless_gone
from .fields import ONE_SAMPLE, SAMPLES
from .jobs import Job
from .models import Model
from .pictures import Float32
from .runs import Run, Work
from .schema import check_all
from .service import Service, flow_of, note_facts, service_of

NOT_SAMPLING = ("model", "n", "seed", "format", "columns", "stream", "every", "deadline", "options")
"""Fields of a body that `Sampler.requests` does not take by keyword."""


@dataclass(frozen=True)
class Output:
    """How a result is returned.

    Attributes:
        kind: One of `fields.FORMATS`.
        every: Steps between previews.
        deadline: Seconds from now; None has none.
    """

    kind: str
    columns: int | None
    stream: bool
    every: int
    deadline: float | None
    is_job: bool

    @classmethod
    def of(cls, request: Request, model: Model, given: Mapping[str, object]) -> Output:
        """Read the fields `fields.OUTPUT` and the headers Accept and Prefer."""
        accept = request.headers.get("accept", "")
        return cls(
            kind=pictures.format_of(given.get("format"), accept, model),
            columns=cast("int | None", given.get("columns")),
            stream=bool(given.get("stream")) or "text/event-stream" in accept,
            every=cast("int", given.get("every", 1)),
            deadline=cast("float | None", given.get("deadline")),
            is_job="respond-async" in request.headers.get("prefer", ""),
        )


async def create(request: Request) -> ASGIApp:
    """Make samples: the result itself, an event stream, or a job."""
    service = service_of(request)
    service.check_accepting()
    given = check_all("the body", SAMPLES, await read_json(request, service.settings))
    model = service.models.get(cast("str | None", given.get("model")))
    output = Output.of(request, model, given)
    n = integer("n", given["n"], 1, service.settings.samples)
    requests = requests_of(model, n, given["seed"], given)
    work = await service.runs.plan(model, requests)

    def last(samples: Float32) -> dict[str, object]:
        urls = [url_of(model, entry) for entry in work.resolved]
        return {**pictures.as_json(model, samples), "urls": urls}

    every = output.every if output.stream or output.is_job else 0
    starting = service.runs.start(work, flow_of(request), output.deadline, every)
    run = await unless_gone(request.receive, starting)
    if output.is_job:
        return start_job(request, service, run, output, last)
    if output.stream:
        return stream(request, service, run, last)
    headers = _location(model, work) if n == 1 else {}
    return await finish(request, service, run, output, headers)


async def show(request: Request) -> Response:
    """Return one image by its URL. Its ETag comes from the request, so a 304 costs nothing."""
    service = service_of(request)
    given = check_all("the query", ONE_SAMPLE, query_of(request))
    model = service.models.get(cast("str | None", given.get("model")))
    output = Output.of(request, model, given)
    (entry,) = requests_of(model, 1, given["seed"], given)
    work = await service.runs.plan(model, [entry])
    tag = f'"{work.key[:40]}-{output.kind}"'
    access = "private" if service.settings.tokens else "public"
    headers = {"etag": tag, "cache-control": f"{access}, no-cache", "vary": "accept"}
    if _matches(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    service.check_accepting()
    starting = service.runs.start(work, flow_of(request), output.deadline)
    run = await unless_gone(request.receive, starting)
    return await finish(request, service, run, output, headers)


def requests_of(
    model: Model, n: int, seed: object, given: Mapping[str, object]
) -> list[runtime.Request]:
    """Return the requests that checked fields ask for. Raises RequestError."""
    how = {name: value for name, value in given.items() if name not in NOT_SAMPLING}
    if isinstance(how.get("guidance_interval"), list):
        how["guidance_interval"] = tuple(cast("list[float]", how["guidance_interval"]))
    start = how.get("start")
    if isinstance(start, np.ndarray) and start.ndim == len(model.bundle.sample_shape):
        how["start"] = start[None]
    options = options_of(given)
    return model.sampler.requests(n, seed, **how, **options)


def options_of(given: Mapping[str, object]) -> Mapping[str, object]:
    """Return the solver's own options. Raises RequestError for a name that is no option."""
    options = cast("Mapping[str, object]", given.get("options", {}))
    for name in options:
        if name in ARGUMENTS:
            raise RequestError(f"`options` may not hold `{name}`. Pass it beside `options`.")
    return options


async def finish(
    request: Request, service: Service, run: Run, output: Output, headers: Mapping[str, str]
) -> Response:
    """Wait for a run and return its result. It leaves the run."""
    try:
        samples = await unless_gone(request.receive, run.result())
        timing = note_facts(request, run)
        body, kind = await service.encode(
            pictures.encode, run.model, samples, output.kind, output.columns
        )
    finally:
        run.leave()
    return Response(body, headers={**headers, **timing}, media_type=kind)


def stream(request: Request, service: Service, run: Run, last: Last, after: int = 0) -> EventStream:
    """Return the events of a run. It leaves the run at their end."""
    heartbeat_s = service.settings.heartbeat_s
    events = Stream(run, service.encoding, heartbeat_s, last)

    def end() -> None:
        note_facts(request, run)
        run.leave()

    return EventStream(events.events(after), {}, end)


def start_job(request: Request, service: Service, run: Run, output: Output, last: Last) -> Response:
    """Keep a run as a job, and return where it is."""
    job = Job(flow_of(request), run, output.kind, output.columns, last)
    try:
        service.jobs.add(job)
    except BaseException:
        run.leave()
        raise
    headers = {"location": job.path, "preference-applied": "respond-async"}
    return JSONResponse(job.to_json(), 202, headers)


def query_of(request: Request) -> dict[str, object]:
    """Return the query as the fields of a body. Raises RequestError for a name given twice."""
    found: dict[str, object] = {}
    options: dict[str, object] = {}
    for name, text in request.query_params.multi_items():
        place = options if name.startswith("options.") else found
        name = name.removeprefix("options.")
        if name in place:
            raise RequestError(f"`{name[:60]}` is given twice. Give it once.")
        place[name] = _value(name, text)
    return {**found, "options": options} if options else found


def _value(name: str, text: str) -> object:
    """A value of a query: a number, true or false, a list of numbers, or else a string."""
    if name in ("model", "label", "format", "solver"):
        return text
    if "," in text or (name == "grid" and not text[:1].isalpha()):
        return [_value("", part) for part in text.split(",")]
    if re.fullmatch(r"-?[0-9.eE+-]{1,40}", text) or text in ("true", "false"):
        try:
            return from_json(text)
        except ValueError:
            return text
    return text


def url_of(model: Model, entry: runtime.ResolvedRequest) -> str | None:
    """Return where a sample is found again; None if it starts from an array."""
    if entry.start is not None or entry.picture is not None or entry.known is not None:
        return None
    options = entry.options
    query: dict[str, object] = {"model": model.name, "seed": entry.seed}
    labels = model.bundle.labels
    if labels is not None and entry.label < len(labels.names):
        query["label"] = labels.names[entry.label]
    if model.bundle.can_guide:
        query["guidance"] = options.guidance
    if options.guidance_interval is not None:
        query["guidance_interval"] = _joined(options.guidance_interval)
    query["solver"] = options.solver
    if isinstance(options.grid, tuple):
        query["grid"] = _joined(options.grid)
    else:
        query |= {"steps": options.steps}
        query |= {"grid": options.grid} if options.grid else {}
    for name, value in options.options.items():
        query[f"options.{name}"] = str(value).lower() if isinstance(value, bool) else value
    return "/v1/samples?" + urlencode(query)


def _joined(numbers: Sequence[float]) -> str:
    return ",".join(repr(float(value)) for value in numbers)


def _location(model: Model, work: Work) -> dict[str, str]:
    url = url_of(model, work.resolved[0])
    return {} if url is None else {"content-location": url}


def _matches(header: str, tag: str) -> bool:
    """Whether an If-None-Match header holds a tag, RFC 9110, section 13.1.2."""
    tags = [entry.strip().removeprefix("W/") for entry in header.split(",")]
    return "*" in tags or tag in tags
