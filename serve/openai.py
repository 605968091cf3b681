"""OpenAI's image API: /v1/images/generations, /v1/images/edits and /v1/models.

A prompt is a label's name or number. Without a seed every request gets a new one, as users of that
API expect; each image of the response says which.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import cast

import numpy as np
from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from runtime.diffusion.noise import MAX_SEED
from runtime.errors import RequestError
from runtime.errors.arguments import integer

from . import edits, limits, openai_responses
from .bodies import decode, read_form, read_json
from .edits import Edit
from .events import accepted
from .fields import MOST_URL_TIMES, OPENAI, OPENAI_EDITS, OPENAI_PARTS, SOLVING_NAMES
from .models import Model
from .openai_responses import Asked, size_of
from .problems import Problem
from .samples import fields_of, has_url, how_of, requests_of, url_of
from .schema import check_all
from .service import Service, flow_of, service_of

MOST_RANDOM = 2**32
"""Random seeds are below this, so that every client's numbers hold them."""


async def models(request: Request) -> Response:
    """List the models."""
    service = service_of(request)
    listed = [_model(service, model) for model in service.models.all.values()]
    return JSONResponse({"object": "list", "data": listed})


async def model(request: Request) -> Response:
    """Describe a model."""
    service = service_of(request)
    try:
        found = service.models.get(request.path_params["model"])
    except RequestError as error:
        raise Problem(404, str(error)) from None
    return JSONResponse(_model(service, found))


async def generations(request: Request) -> ASGIApp:
    """Make images of a label."""
    service = service_of(request)
    service.check_accepting()
    given = check_all("the body", OPENAI, await read_json(request, service.settings))
    model = _model_of(service, given)
    seed = _seed(given)
    how = {**_how(given), "label": _label(model, given)}
    requests = requests_of(model, cast("int", given["n"]), seed, how)
    work = await service.runs.plan(model, requests)
    urls = [url_of(model, entry) if has_url(entry) else None for entry in work.resolved]
    asked = Asked("image_generation", given, model, seed, urls)
    deadline = cast("float | None", given.get("deadline"))
    every = _every(given, limits.rows_of(work.resolved[0].options))
    run = service.runs.start(work, flow_of(request), deadline, every)
    await accepted(request.receive, run)
    return await openai_responses.respond(request, service, run, asked)


async def edit(request: Request) -> ASGIApp:
    """Edit an image: with a mask what is transparent there is painted, else it is stylized."""
    service = service_of(request)
    service.check_accepting()
    async with service.uploads:
        # Every entry of a list is a text of its own.
        most = len(OPENAI_EDITS) + MOST_URL_TIMES
        form = await read_form(request, service.settings, texts=most)
        given = check_all("the form", OPENAI_EDITS, fields_of(form.texts))
        model = _model_of(service, given)
        if given.get("response_format") == "url":
            raise RequestError("edited images have no URL. Ask for b64_json.")
        # The official client names the files of a list so.
        files = {name.removesuffix("[]"): data for name, data in form.files.items()}
        if len(files) < len(form.files):
            raise RequestError("a file is given twice, also as NAME[]. Send it once.")
        seed = _seed(given)
        planned = await service.encode(_plan_edit, model, given, files, seed, service)
    asked = Asked("image_edit", given, model, seed, [None] * cast("int", given["n"]))
    deadline = cast("float | None", given.get("deadline"))
    every = _every(given, planned.rows)
    run = await edits.begin(request, service, model, planned, deadline, every)
    return await openai_responses.respond(request, service, run, asked)


def _plan_edit(
    model: Model,
    given: Mapping[str, object],
    files: Mapping[str, bytes],
    seed: int,
    service: Service,
) -> Edit:
    """Check what an edit costs, and decode its images. Raises RequestError."""
    for name in files:
        if name not in OPENAI_PARTS:
            raise RequestError(f"unexpected file {name[:60]!r}. Send `image` and `mask`.")
    if "image" not in files:
        raise RequestError("an edit needs the file `image`. Send one.")
    settings = service.settings
    n = integer("n", given["n"], 1, settings.samples)
    image = decode("image", files["image"], settings)
    holed = decode("mask", files["mask"], settings) if "mask" in files else image
    mask = _alpha(holed)
    if "mask" in files and mask is None:
        raise RequestError("`mask` must have transparent places, which are painted.")
    verb = "stylize" if mask is None else "inpaint"
    label = _label(model, given)
    how = how_of({**_how(given), **({} if label is None else {"label": label})})
    # An inpainting walks the whole grid.
    own = {"strength": given["strength"]} if verb == "stylize" else {}
    rows = edits.check_passes(verb, {**how, **own}, n, model, settings)
    # Without its holes, which would be filled with white.
    flat = image.convert("RGB") if mask is not None else image
    images = {"image": np.repeat(edits.fit_image(flat, model, True), n, axis=0)}
    if mask is not None:
        images["mask"] = edits.fit_mask(mask, model, True)
    return Edit(verb, {"seed": seed, **own}, images, how, rows)


def _alpha(image: Image.Image) -> Image.Image | None:
    """The opacity of an image: white is kept. None if it is opaque everywhere."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    low = alpha.getextrema()[0]
    return alpha if low < 255 else None  # pyright: ignore[reportOperatorIssue]


def _model(service: Service, model: Model) -> dict[str, object]:
    created = int(service.started)
    return {"id": model.name, "object": "model", "created": created, "owned_by": "unnoise"}


def _model_of(service: Service, given: Mapping[str, object]) -> Model:
    """The model of a request; its samples must be images of the size that is asked for."""
    model = service.models.get(cast("str | None", given.get("model")))
    if not model.shows_images:
        raise RequestError(f"the samples of {model.name} are no images. See /v1/samples.")
    if model.bundle.conditions:
        names = ", ".join(condition.name for condition in model.bundle.conditions)
        raise RequestError(
            f"{model.name} needs conditions ({names}), which this API cannot pass. Send them to "
            "/v1/samples."
        )
    size = given.get("size", "auto")
    if size not in ("auto", size_of(model)):
        raise RequestError(f'`size` must be "auto" or "{size_of(model)}", got {size!r}.')
    return model


def _label(model: Model, given: Mapping[str, object]) -> str | None:
    """The label that a prompt names. Raises RequestError for an unknown one."""
    prompt = cast("str", given["prompt"]).strip()
    if not prompt:
        return None
    labels = model.bundle.labels
    names = labels.names if labels else ()
    # Two names may differ in their case alone.
    if prompt in names:
        return prompt
    for name in names:
        if name.lower() == prompt.lower():
            return name
    return prompt


def _how(given: Mapping[str, object]) -> dict[str, object]:
    return {name: given[name] for name in ("guidance", *SOLVING_NAMES) if name in given}


def _seed(given: Mapping[str, object]) -> int:
    """The first image's seed."""
    n = cast("int", given["n"])
    if "seed" in given:
        return integer("seed", given["seed"], 0, MAX_SEED - n + 1)
    # Users of that API expect another image each time.
    return secrets.randbelow(MOST_RANDOM)


def _every(given: Mapping[str, object], rows: int) -> int:
    """Steps between previews, so that a stream has as many as are asked for."""
    partial = cast("int", given["partial_images"])
    return max(1, rows // (partial + 1)) if given["stream"] and partial else 0
