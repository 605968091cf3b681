"""POST /v1/edits/{verb}. The methods of `Sampler` plan an edit, and the engine runs its requests
along with all others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL.Image import Image
from starlette.requests import Request
from starlette.types import ASGIApp

from runtime import Cancelled, Inversion, SamplingOptions
from runtime.engine.expand import expand
from runtime.errors import RequestError
from runtime.errors.arguments import integer
from runtime.images import read
from runtime.images.mask import read_mask
from runtime.sampler.animation import Animating
from runtime.sampler.edits import PAINTING
from runtime.sampler.inversion import inverting

from . import limits, results, samples
from .bodies import Form, decode, read_form
from .conditions import PART, conditions_of
from .events import accepted
from .fields import EDIT_PARTS, SOLVING_NAMES, edit_fields, formats_of
from .models import Model
from .passes import EngineEditing, Passes
from .pictures import Float32
from .problems import Problem
from .results import Output
from .runs import Run
from .samples import how_of
from .schema import check_all
from .service import Service, flow_of, service_of
from .settings import Settings

SETTINGS = ("label", "guidance", *SOLVING_NAMES)
"""Fields of an edit that all methods of `Sampler` take."""


@dataclass(frozen=True)
class Edit:
    """An edit that is checked and decoded.

    Attributes:
        given: The fields of `params`.
        images: [n, *S] each, by part; the mask is 0 … 1.
        how: What the method of `Sampler` takes by keyword.
        rows: A bound of the rows of one sample's program.
    """

    verb: str
    given: Mapping[str, object]
    images: Mapping[str, Float32]
    how: Mapping[str, object]
    rows: int


async def create(request: Request) -> ASGIApp:
    """Edit an uploaded image: the result itself, an event stream, or a job."""
    service = service_of(request)
    service.check_accepting()
    verb = request.path_params["verb"]
    if verb not in EDIT_PARTS:
        raise Problem(404, f"unknown edit {verb[:60]!r}. Known: {', '.join(EDIT_PARTS)}.")
    # An upload holds up to 8 MiB, so their number bounds the memory.
    async with service.uploads:
        form = await read_form(request, service.settings, texts=1)
        given = params_of(verb, form, service.settings)
        model = service.models.get(cast("str | None", given.get("model")))
        output = Output.of(request, model, given, formats_of(verb))
        edit = await service.encode(plan, verb, given, form.files, model, service.settings)
        if output.is_job and verb == "animate":
            # Its result is frames.
            count = cast("int", given["n"]) * (edit.rows + 1)
            limits.check_job(model.bundle, count, service.settings)
    run = await begin(request, service, model, edit, output.deadline, output.preview_every)

    def last(samples: Float32) -> dict[str, object]:
        n = samples.shape[1] if run.animated else len(samples)
        return {**results.as_json(run, samples), "urls": [None] * n}

    return await results.respond(request, service, run, output, last, {})


async def begin(
    request: Request,
    service: Service,
    model: Model,
    edit: Edit,
    deadline: float | None,
    every: int,
) -> Run:
    """Start an edit in a thread, and wait until its first pass is accepted.

    Args:
        deadline: Seconds from now for all passes; None has none.
        every: Steps between previews; 0 for none.
    """
    if service.edits >= service.settings.edits:
        raise Problem(429, "too many edits are under way. Try again.", 1.0)
    # Edits are not shared: their requests are known only pass by pass.
    run = service.runs.open(model).join()
    run.animated = edit.verb == "animate"
    passes = Passes(run, service.settings, flow_of(request), deadline, every)
    service.edits += 1
    loop = asyncio.get_running_loop()
    working = loop.run_in_executor(
        service.editing, perform, EngineEditing(model, passes.submit), edit
    )

    def end(done: asyncio.Future[Float32 | Inversion]) -> None:
        # It is called in the event loop.
        service.edits -= 1
        error = Cancelled("stopped.") if done.cancelled() else done.exception()
        found = None if error else done.result()
        if isinstance(found, Inversion):
            run.inversion = found
            found = found.back
        run.settle(found, error)

    working.add_done_callback(end)
    return await accepted(request.receive, run)


def params_of(verb: str, form: Form, settings: Settings) -> dict[str, object]:
    """Check the parts of a form, and return the fields of `params`.

    Raises RequestError, and Problem (413).
    """
    parts = EDIT_PARTS[verb]
    # A text in the place of a file is refused here: it would be a path to `Sampler`.
    for name in form.names:
        known_part = name in parts or name.startswith(PART)
        if name != "params" and not (known_part and name in form.files):
            known = ", ".join(parts)
            raise RequestError(
                f"unexpected part {name[:60]!r}: {verb} takes the files {known}, and the text "
                "`params`."
            )
    for name, required in parts.items():
        if required and name not in form.files:
            raise RequestError(f"{verb} needs the file `{name}`. Send it as a part of that name.")
    return check_all("`params`", edit_fields(verb), samples.params_of(form, settings))


def plan(
    verb: str,
    given: Mapping[str, object],
    files: Mapping[str, bytes],
    model: Model,
    settings: Settings,
) -> Edit:
    """Check all passes of an edit, then decode its images. Raises RequestError."""
    chosen = {name: given[name] for name in SETTINGS if name in given}
    if verb == "translate":
        chosen.pop("label", None)
    how = how_of(chosen)
    n = integer("n", given.get("n", 1), 1, settings.samples)
    bundle = model.bundle
    if conditions := conditions_of(bundle, given, files, settings):
        how["conditions"] = conditions
    asked = {**how, "strength": given["strength"]} if "strength" in given else dict(how)
    if verb == "translate":
        asked["label"] = given["target"]
    # Before any other image is decoded.
    noised = verb == "animate" and "image" in files
    check = check_noising if noised else check_passes
    rows = check(verb, asked, n, model, settings)
    if verb == "animate":
        limits.check_frames(bundle, n, rows, settings)
    convert = bool(given["convert"])
    images: dict[str, Float32] = {}
    for part in EDIT_PARTS[verb]:
        if part in files:
            image = decode(part, files[part], settings)
            # The image itself may be much larger, and the edit may wait for long.
            fit = fit_mask if part == "mask" else fit_image
            images[part] = fit(image, model, convert)
    return Edit(verb, given, images, how, rows)


def fit_image(image: Image, model: Model, convert: bool) -> Float32:
    """Return an image as samples [1, *S]. Raises RequestError."""
    bundle = model.bundle
    return read(image, bundle.sample_shape, *bundle.sample_range, convert=convert)


def fit_mask(image: Image, model: Model, convert: bool) -> Float32:
    """Return a mask as [1, *S], 0 … 1. Raises RequestError."""
    return read_mask(image, 1, model.bundle.sample_shape, convert)


def check_passes(
    verb: str, asked: Mapping[str, object], n: int, model: Model, settings: Settings
) -> int:
    """Check the last pass of an edit, which has most rows, before the first one runs.

    Args:
        asked: What the method of `Sampler` takes by keyword, without images.
        n: Samples of the last pass.

    Returns:
        A bound of the rows of one sample's program.

    Raises:
        RequestError: A field cannot be used, or there are too many rows.
    """
    bundle = model.bundle
    defaults = {"stylize": {}, "animate": {}, "inpaint": PAINTING}.get(
        verb, inverting(bundle, asked)
    )
    how = {**defaults, **asked}
    # What the samples start from changes no row.
    if "strength" in how:
        how["start"] = np.zeros((n, *bundle.sample_shape), np.float32)
    resolved, _ = limits.checked(bundle, expand(bundle, n, 0, how), settings)
    return limits.rows_of(resolved[0].options)


def check_noising(
    verb: str, asked: Mapping[str, object], n: int, model: Model, settings: Settings
) -> int:
    """Do what `check_passes` does for images that are noised, which needs no network."""
    own: dict[str, Any] = {name: asked[name] for name in ("steps", "grid") if name in asked}
    return limits.checked_rows(model.bundle.resolve(SamplingOptions(**own)), settings)


def perform(editing: Animating, edit: Edit) -> Float32 | Inversion:
    """Run an edit, in a thread of its own. Returns samples [n, *S], or frames [K, n, *S]."""
    given = edit.given
    how: dict[str, Any] = dict(edit.how)
    # The form was checked: a verb that needs a file has it.
    image: Any = edit.images.get("image")
    chosen: dict[str, Any] = {name: given[name] for name in OWN[edit.verb] if name in given}
    if edit.verb == "interpolate":
        first = _end(edit, "image", "first")
        last = _end(edit, "image2", "last")
        return editing.interpolate(first, last, **chosen, **how)
    if edit.verb == "inpaint":
        return editing.inpaint(image, edit.images["mask"], **chosen, **how)
    if edit.verb == "animate":
        return editing.animate(pictures=image, **chosen, **how)
    method = getattr(editing, edit.verb)
    return method(image, **chosen, **how)


OWN = {
    "stylize": ("strength", "seed"),
    "invert": ("strength",),
    "translate": ("source", "target", "strength"),
    "inpaint": ("seed",),
    "interpolate": ("n",),
    "variations": ("n", "amount", "seed"),
    "animate": ("n", "seed"),
}
"""Fields that the method of one verb takes."""


def _end(edit: Edit, part: str, seed: str) -> int | Float32:
    """One end of an interpolation: a seed, or an image [1, *S]. RequestError if missing."""
    if part in edit.images:
        return edit.images[part]
    if seed in edit.given:
        return cast("int", edit.given[seed])
    raise RequestError(f"interpolate needs the file `{part}` or the seed `{seed}`. Send one.")
