"""POST /v1/edits/{verb}. The methods of `Sampler` plan an edit, and the engine runs its requests
along with all others."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image
from starlette.requests import Request
from starlette.types import ASGIApp

from runtime import Cancelled, Inversion, SamplingOptions
from runtime.errors import RequestError
from runtime.errors.arguments import integer
from runtime.images import read
from runtime.sampler.animation import Animating
from runtime.sampler.edits import PAINTING
from runtime.sampler.inversion import inverting

from . import limits, results, samples
from .bodies import Form, decode, read_form
from .conditions import PART, conditions_of
from .events import accepted
from .fields import EDIT_PARTS, SOLVING_NAMES, edit_fields
from .models import Model
from .passes import EngineEditing, Passes
from .pictures import Float32
from .problems import Problem
from .results import Output
from .runs import Run
from .samples import how_of, options_of
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
        images: [1, *S] each, by part.
        how: What the method of `Sampler` takes by keyword.
        rows: A bound of the rows of one sample's program.
    """

    verb: str
    given: Mapping[str, object]
    images: Mapping[str, Float32]
    mask: Image.Image | None
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
        given = params_of(verb, form)
        model = service.models.get(cast("str | None", given.get("model")))
        output = Output.of(request, model, given)
        edit = await service.encode(plan, verb, given, form.files, model, service.settings)
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


def params_of(verb: str, form: Form) -> dict[str, object]:
    """Check the parts of a form, and return the fields of `params`. Raises RequestError."""
    parts = EDIT_PARTS[verb]
    # A text in the place of a file is refused here: it would be a path to `Sampler`.
    for name in (*form.files, *form.texts):
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
    return check_all("`params`", edit_fields(verb), samples.params_of(form))


def plan(
    verb: str,
    given: Mapping[str, object],
    files: Mapping[str, bytes],
    model: Model,
    settings: Settings,
) -> Edit:
    """Check what an edit costs, then decode its images. Raises RequestError."""
    chosen = {name: given[name] for name in SETTINGS if name in given}
    if verb == "translate":
        chosen.pop("label", None)
    how = how_of(chosen)
    n = integer("n", given.get("n", 1), 1, settings.samples)
    # Before any image is decoded.
    rows = check_cost(verb, given, model, settings)
    if verb == "animate":
        limits.check_frames(model.bundle, n, rows, settings)
    convert = bool(given["convert"])
    bundle = model.bundle
    parts = EDIT_PARTS[verb]
    decoded = {name: decode(name, files[name], settings) for name in parts if name in files}
    images = {
        name: read(image, bundle.sample_shape, *bundle.sample_range, convert=convert)
        for name, image in decoded.items()
        if name != "mask"
    }
    if conditions := conditions_of(bundle, given, files, settings):
        how["conditions"] = conditions
    return Edit(verb, given, images, decoded.get("mask"), how, rows)


def check_cost(verb: str, given: Mapping[str, object], model: Model, settings: Settings) -> int:
    """Bound the rows of a verb's program. Raises RequestError if there are too many."""
    defaults = {"stylize": {}, "animate": {}, "inpaint": PAINTING}.get(
        verb, inverting(model.bundle)
    )
    names = ("solver", "steps", "grid", "strength")
    asked: dict[str, Any] = {**defaults, **{name: given[name] for name in names if name in given}}
    options = SamplingOptions(**asked, options=options_of(given))
    return limits.checked_rows(model.bundle.resolve(options), settings)


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
        convert = bool(given["convert"])
        mask: Any = edit.mask
        return editing.inpaint(image, mask, convert=convert, **chosen, **how)
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
