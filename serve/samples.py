"""POST and GET /v1/samples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import cast
from urllib.parse import urlencode

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

import runtime
from runtime.engine.expand import ARGUMENTS, expand
from runtime.engine.tensors import setting_of
from runtime.errors import RequestError
from runtime.errors.arguments import integer
from runtime.files import from_json

from . import pictures, results
from .bodies import Form, media_type, read_form, read_json, too_large
from .conditions import PART, conditions_of
from .events import accepted
from .fields import IGNORED, MOST_URL_TIMES, ONE_SAMPLE, SAMPLES
from .models import Model
from .paths import prefix_of
from .pictures import Float32
from .results import Output
from .schema import check_all
from .service import Service, flow_of, service_of
from .settings import Settings

NOT_SAMPLING = ("model", "n", "seed", "format", "columns", "stream", "every", "deadline")
NOT_SAMPLING += ("convert", "conditions")
"""Fields of a body that `Sampler.requests` does not take by keyword."""
TEXTS = ("model", "label", "format", "solver", "prompt", "size", "output_format", *IGNORED)
"""Fields whose text is never read as a number."""
OPTION = re.compile(r"options(?:\.(.*)|\[(.+)\])")
"""The name of a text that holds one of a solver's options."""


async def create(request: Request) -> ASGIApp:
    """Make samples: the result itself, an event stream, or a job."""
    service = service_of(request)
    service.check_accepting()
    given, files = await _read(request, service)
    model = service.models.get(cast("str | None", given.get("model")))
    output = Output.of(request, model, given)
    # Before the requests are made, one a sample.
    n = integer("n", given["n"], 1, service.settings.samples)
    conditions = {}
    if files or given.get("conditions"):
        # Decoding an image takes too long for the event loop.
        settings = service.settings
        conditions = await service.encode(conditions_of, model.bundle, given, files, settings)
    requests = requests_of(model, n, given["seed"], given, conditions)
    work = await service.runs.plan(model, requests)

    prefix = prefix_of(request.scope)
    # A job keeps these for minutes. Requests with a URL hold no arrays.
    linked = [entry if has_url(entry) else None for entry in work.resolved]

    def last(samples: Float32) -> dict[str, object]:
        urls = [entry and prefix + url_of(model, entry) for entry in linked]
        return {**pictures.as_json(model, samples), "urls": urls}

    run = service.runs.start(work, flow_of(request), output.deadline, output.preview_every)
    await accepted(request.receive, run)
    first = linked[0]
    headers = {"content-location": prefix + url_of(model, first)} if n == 1 and first else {}
    return await results.respond(request, service, run, output, last, headers)


async def show(request: Request) -> Response:
    """Return one image by its URL. Its ETag comes from the request, so a 304 costs nothing."""
    service = service_of(request)
    given = check_all("the query", ONE_SAMPLE, query_of(request))
    model = service.models.get(cast("str | None", given.get("model")))
    output = Output.of(request, model, given)
    (entry,) = requests_of(model, 1, given["seed"], given)
    work = await service.runs.plan(model, [entry])
    # The key holds all that the bytes depend on, so it is known without them.
    tag = f'"{work.key[:40]}-{output.kind}"'
    access = "private" if service.settings.tokens else "public"
    headers = {"etag": tag, "cache-control": f"{access}, no-cache", "vary": "accept"}
    if _matches(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    # A 304 is given even while the service shuts down.
    service.check_accepting()
    run = service.runs.start(work, flow_of(request), output.deadline)
    await accepted(request.receive, run)
    return await results.finish(request, service, run, output, headers)


async def _read(request: Request, service: Service) -> tuple[dict[str, object], dict[str, bytes]]:
    """Return the fields of a JSON body, or of the part `params` of a form, and the form's files."""
    if media_type(request) != "multipart/form-data":
        body = await read_json(request, service.settings)
        return check_all("the body", SAMPLES, body), {}
    async with service.uploads:
        form = await read_form(request, service.settings, texts=1)
    files = {name: data for name, data in form.files.items() if name != "params"}
    for name in form.names:
        if name != "params" and not (name in files and name.startswith(PART)):
            raise RequestError(
                f"unexpected part {name[:60]!r}: send images as files named {PART}NAME, and the "
                "text `params`."
            )
    return check_all("`params`", SAMPLES, params_of(form, service.settings)), files


def params_of(form: Form, settings: Settings) -> object:
    """Return the JSON value of the part `params`. Raises RequestError, and Problem (413)."""
    # A browser sends JSON with a type of its own as a file.
    text = form.files.get("params") or dict(form.texts).get("params", "{}")
    if len(text) > settings.json_bytes:
        raise too_large("`params`", settings.json_bytes)
    try:
        return from_json(text)
    except ValueError:
        raise RequestError("`params` must be a JSON object.") from None


def requests_of(
    model: Model,
    n: int,
    seed: object,
    given: Mapping[str, object],
    conditions: Mapping[str, object] | None = None,
) -> list[runtime.Request]:
    """Return the requests that checked fields ask for, under decoded conditions.

    Raises RequestError.
    """
    how = how_of({name: value for name, value in given.items() if name not in NOT_SAMPLING})
    start = how.get("start")
    if isinstance(start, np.ndarray) and start.ndim == len(model.bundle.sample_shape):
        # One start [*S] for all samples.
        how["start"] = np.broadcast_to(start, (n, *start.shape))
    return expand(model.bundle, n, seed, {**how, "conditions": conditions or {}})


def how_of(given: Mapping[str, object]) -> dict[str, object]:
    """Return checked fields as the methods of `Sampler` take them. Raises RequestError."""
    how = {name: value for name, value in given.items() if name != "options"}
    # JSON has no tuples.
    if isinstance(how.get("guidance_interval"), list):
        how["guidance_interval"] = tuple(cast("list[float]", how["guidance_interval"]))
    return {**how, **options_of(given)}


def options_of(given: Mapping[str, object]) -> Mapping[str, object]:
    """Return the solver's own options. Raises RequestError for a name that is no option."""
    options = cast("Mapping[str, object]", given.get("options", {}))
    for name in options:
        if name in ARGUMENTS:
            raise RequestError(f"`options` may not hold `{name}`. Pass it next to `options`.")
    return options


def query_of(request: Request) -> dict[str, object]:
    """Return the query as the fields of a body. Raises RequestError for a name given twice."""
    return fields_of(request.query_params.multi_items())


def fields_of(texts: Iterable[tuple[str, str]]) -> dict[str, object]:
    """Return texts with their names as the fields of a body.

    An option of a solver is options.NAME or options[NAME], and an entry of a list is NAME[], as
    OpenAI's client sends them. Raises RequestError for a name given twice.
    """
    found: dict[str, object] = {}
    options: dict[str, object] = {}
    lists: dict[str, list[object]] = {}
    for name, text in texts:
        if name.endswith("[]"):
            lists.setdefault(name.removesuffix("[]"), []).append(value_of("", text))
            continue
        option = OPTION.fullmatch(name)
        place = found if option is None else options
        key = name if option is None else option[1] or option[2] or ""
        _check_once(key, place)
        place[key] = value_of(key, text)
    grouped = {**lists, **({"options": options} if options else {})}
    for name in grouped:
        _check_once(name, found)
    return {**found, **grouped}


def _check_once(name: str, found: Mapping[str, object]) -> None:
    if name in found:
        raise RequestError(f"`{name[:60]}` is given twice. Give it once.")


def value_of(name: str, text: str) -> object:
    """Read a text field: a number, true or false, a list of these, JSON, or else a string.

    Raises RequestError if it begins like a list or an object, and is not JSON.
    """
    if name in TEXTS:
        return text
    if text.startswith(("[", "{")):
        return setting_of(name, text)
    if "," in text or (name == "grid" and not text[:1].isalpha()):
        return [value_of("", part) for part in text.split(",")]
    if re.fullmatch(r"-?[0-9.eE+-]{1,40}", text) or text in ("true", "false"):
        try:
            return from_json(text)
        except ValueError:
            return text
    return text


def has_url(entry: runtime.ResolvedRequest) -> bool:
    """Whether a request fits in a URL: numbers and names, no arrays and no endless lists."""
    grid = entry.options.grid
    arrays = (entry.start, entry.picture, entry.known)
    short = not isinstance(grid, tuple) or len(grid) <= MOST_URL_TIMES
    return short and not entry.conditions and all(part is None for part in arrays)


def url_of(model: Model, entry: runtime.ResolvedRequest) -> str:
    """Return where the sample of a request that has a URL is found again."""
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


def _matches(header: str, tag: str) -> bool:
    """Whether an If-None-Match header holds a tag, RFC 9110, section 13.1.2."""
    tags = [entry.strip().removeprefix("W/") for entry in header.split(",")]
    return "*" in tags or tag in tags
