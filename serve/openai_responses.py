"""Responses of OpenAI's image API: images in base64, or events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from .events import HEARTBEAT, EventStream, event, unless_gone
from .models import Model
from .paths import prefix_of
from .pictures import as_base64
from .problems import openai_shape, problem_of
from .runs import Run
from .service import Service, note_facts


@dataclass(frozen=True)
class Asked:
    """A request that is checked.

    Attributes:
        verb: The first word of the events' types.
        urls: URL of each image; None if it has none.
    """

    verb: str
    given: Mapping[str, object]
    model: Model
    seed: int
    urls: list[str | None]

    @property
    def kind(self) -> str:
        """The format of the images."""
        return cast("str", self.given["output_format"])


async def respond(request: Request, service: Service, run: Run, asked: Asked) -> ASGIApp:
    """Return a run as OpenAI's API does. The run is left in any case."""

    def end() -> None:
        note_facts(request, run)
        run.leave()

    if asked.given["stream"]:
        return EventStream(_events(service, run, asked), end)
    try:
        samples = await unless_gone(request.receive, run.result())
        images = await service.encode(as_base64, asked.model, samples, asked.kind)
    finally:
        end()
    # From the Host header: the address that the client used.
    address = request.url
    base = f"{address.scheme}://{address.netloc}{prefix_of(request.scope)}"
    data = [_image(asked, i, image, base) for i, image in enumerate(images)]
    body = {"created": int(time.time()), "data": data, "output_format": asked.kind}
    return JSONResponse({**body, "size": size_of(asked.model), "usage": _usage(run)})


async def _events(service: Service, run: Run, asked: Asked) -> AsyncGenerator[bytes, None]:
    """Yield partial images, and then one `completed` an image."""
    common = {
        "created_at": int(time.time()),
        "size": size_of(asked.model),
        "quality": "auto",
        "background": "auto",
        "output_format": asked.kind,
    }
    # How many partial images of each sample were sent.
    sent: dict[int, int] = {}
    most = cast("int", asked.given["partial_images"])
    seen = 0
    while not run.done:
        if not await run.change(seen, service.settings.heartbeat_s):
            yield HEARTBEAT
            continue
        # Previews that arrive while one is encoded belong to the next round.
        version = run.version
        for sample, view in sorted(run.views.items()):
            # The last step's preview is the image itself.
            if view.version <= seen or sent.get(sample, 0) >= most or view.step == view.steps:
                continue
            denoised = view.denoised[None]
            (image,) = await service.encode(as_base64, asked.model, denoised, asked.kind)
            index = sent.get(sample, 0)
            sent[sample] = index + 1
            name = f"{asked.verb}.partial_image"
            yield event(
                name, {"type": name, "b64_json": image, "partial_image_index": index, **common}
            )
        seen = version
    name = f"{asked.verb}.completed"
    try:
        samples = await run.result()
        images = await service.encode(as_base64, asked.model, samples, asked.kind)
    except Exception as error:
        yield event("error", {"type": "error", **openai_shape(problem_of(error))})
        return
    for i, image in enumerate(images):
        own = {"type": name, "b64_json": image, "seed": asked.seed + i}
        yield event(name, {**own, **common, "usage": _usage(run)})


def _image(asked: Asked, i: int, image: str, base: str) -> dict[str, object]:
    url = asked.urls[i]
    if asked.given.get("response_format") == "url" and url is not None:
        return {"url": base + url, "seed": asked.seed + i}
    return {"b64_json": image, "seed": asked.seed + i}


def size_of(model: Model) -> str:
    _, height, width = model.bundle.sample_shape
    return f"{width}x{height}"


def _usage(run: Run) -> dict[str, object]:
    """Network rows, in the place of tokens."""
    rows = sum(ticket.rows for ticket in run.tickets)
    details = {"image_tokens": 0, "text_tokens": 0}
    return {
        "input_tokens": 0,
        "input_tokens_details": details,
        "output_tokens": rows,
        "total_tokens": rows,
    }
