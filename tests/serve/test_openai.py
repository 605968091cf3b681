"""OpenAI's image API, with the official client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from runtime import Engine, Sampler, Ticket
from runtime.engine.ticket import TicketPreview
from serve import Settings, create_app, openai_responses
from serve import openai as openai_module
from serve.openai_responses import Asked
from serve.runs import Run

from ..lazily import Lazy
from .services import running
from .test_edits import IMAGE, MASK, png
from .test_samples import pixels

if TYPE_CHECKING:
    import openai
else:
    openai = Lazy("openai")


@pytest.fixture
def service(small: Sampler) -> Iterator[openai.OpenAI]:
    with (
        running(create_app([small])) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as found,
    ):
        yield found


def image_of(text: str | None) -> np.ndarray:
    return pixels(base64.b64decode(text or ""))


def test_models(service: openai.OpenAI) -> None:
    assert [model.id for model in service.models.list()] == ["small"]
    assert service.models.retrieve("small").owned_by == "unnoise"


def test_generate(service: openai.OpenAI, small: Sampler) -> None:
    found = service.images.generate(
        model="small",
        prompt="Two",
        n=2,
        size="4x4",
        quality="high",
        user="me",
        extra_body={"seed": 7, "steps": 5, "solver": "unipc", "guidance": 1.5},
    )
    expected = small.pictures(2, 7, label="two", steps=5, solver="unipc", guidance=1.5)
    assert found.data is not None
    assert [image_of(entry.b64_json).tobytes() for entry in found.data] == [
        picture.tobytes() for picture in expected
    ]
    assert found.usage is not None
    assert found.usage.total_tokens == 20


def test_a_prompt_is_the_label_of_its_own_case_first(small: Sampler) -> None:
    labels = replace(small.bundle.labels, names=("A", "a", "B"))
    model: Any = SimpleNamespace(bundle=SimpleNamespace(labels=labels))
    for prompt, label in (("A", "A"), ("a", "a"), ("b", "B"), ("2", "2"), (" a ", "a")):
        assert openai_module._label(model, {"prompt": prompt}) == label


def test_a_file_under_both_of_its_names(client: TestClient) -> None:
    files: Any = [(name, ("a.png", png(IMAGE))) for name in ("image", "image[]")]
    got = client.post("/v1/images/edits", files=files, data={"prompt": "one"})
    assert got.status_code == 400
    assert "given twice" in got.json()["error"]["message"]


def test_a_url(service: openai.OpenAI, small: Sampler) -> None:
    found = service.images.generate(prompt="one", response_format="url", extra_body={"seed": 3})
    assert found.data is not None
    assert found.data[0].url is not None
    picture = pixels(httpx.get(found.data[0].url).content)
    assert (picture == small.pictures(1, 3, label="one")[0]).all()


def test_without_a_seed_each_request_has_its_own(service: openai.OpenAI) -> None:
    seeds = set()
    for _ in range(3):
        found = service.images.generate(prompt="", size="auto", output_format="webp")
        assert found.data is not None
        seeds.add(found.data[0].seed)  # type: ignore[attr-defined]
    assert len(seeds) == 3


def test_stream(service: openai.OpenAI, small: Sampler) -> None:
    events = list(
        service.images.generate(
            prompt="1", n=1, stream=True, partial_images=2, extra_body={"seed": 7, "steps": 60}
        )
    )
    partial = [e for e in events if e.type == "image_generation.partial_image"]
    assert len(partial) <= 2
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert events[-1].type == "image_generation.completed"
    expected = small.pictures(1, 7, label=1, steps=60)[0]
    assert (image_of(events[-1].b64_json) == expected).all()


def test_edit_without_a_mask(service: openai.OpenAI, small: Sampler) -> None:
    found = service.images.edit(
        image=("a.png", png(IMAGE)),
        prompt="one",
        n=2,
        extra_body={"seed": 5, "steps": 8, "strength": 0.6},
    )
    images = np.stack([IMAGE[..., None]] * 2)
    expected = small.to_uint8(small.stylize(images, 0.6, 5, label="one", steps=8))
    assert found.data is not None
    for entry, picture in zip(found.data, expected, strict=True):
        assert (image_of(entry.b64_json) == picture).all()


@pytest.mark.parametrize("separate", [True, False])
def test_edit_paints_what_is_transparent(
    service: openai.OpenAI, small: Sampler, separate: bool
) -> None:
    rgba = np.concatenate([np.stack([IMAGE] * 3, -1), MASK[..., None]], -1)
    opaque = np.stack([IMAGE] * 3, -1)
    image = png(opaque if separate else rgba)
    extra = {"mask": ("m.png", png(rgba))} if separate else {}
    found = service.images.edit(
        image=("a.png", image), prompt="2", extra_body={"seed": 5, "steps": 4}, **extra
    )
    expected = small.to_uint8(small.inpaint(IMAGE, Image.fromarray(MASK), 5, label=2, steps=4))
    assert found.data is not None
    assert (image_of(found.data[0].b64_json) == expected[0]).all()


@pytest.mark.parametrize("as_json", [False, True])
def test_an_edit_takes_all_that_samples_take(
    service: openai.OpenAI, small: Sampler, as_json: bool
) -> None:
    times = small.bundle.schedule.time[[150, 80, 10]].tolist()
    how: dict[str, Any] = {"grid": times, "guidance_interval": [0.1, 5.0], "options": {"eta": 0.5}}
    shown = {name: json.dumps(value) for name, value in how.items()} if as_json else how
    found = service.images.edit(
        image=("a.png", png(IMAGE)),
        prompt="one",
        user="x,y",
        extra_body={"seed": 5, "solver": "ddim", "guidance": 2.0, "strength": 0.6, **shown},
    )
    given = {"solver": "ddim", "guidance": 2.0, "grid": times, "guidance_interval": (0.1, 5.0)}
    expected = small.to_uint8(small.stylize(IMAGE, 0.6, 5, label="one", eta=0.5, **given))
    assert found.data is not None
    assert (image_of(found.data[0].b64_json) == expected[0]).all()


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([("steps", "3"), ("steps", "4")], "`steps` is given twice"),
        ([("options.eta", "1"), ("options[eta]", "1")], "`eta` is given twice"),
        ([("options", '{"eta": 1}'), ("options[eta]", "1")], "`options` is given twice"),
        ([("grid", "karras"), ("grid[]", "1")], "`grid` is given twice"),
        ([("grid", "[1, 2")], "cannot be read as JSON"),
        ([("sizes[]", "1")], "unknown option of the form: 'sizes'"),
    ],
)
def test_a_form_that_nobody_can_read(
    client: TestClient, texts: list[tuple[str, str]], sentence: str
) -> None:
    files: Any = [("image", ("a.png", png(IMAGE)))]
    files += [(name, (None, text)) for name, text in (("prompt", "one"), *texts)]
    got = client.post("/v1/images/edits", files=files)
    assert got.status_code == 400
    assert sentence in got.json()["error"]["message"]


def test_a_stream_of_edits(service: openai.OpenAI) -> None:
    events = list(
        service.images.edit(
            image=io.BytesIO(png(IMAGE)), prompt="one", stream=True, partial_images=1
        )
    )
    assert events[-1].type == "image_edit.completed"


@pytest.mark.parametrize(
    ("painted", "rows"),
    [(False, 4), (True, 8)],  # `strength` is half of the grid, and means nothing to inpainting
)
def test_a_stream_of_edits_has_the_previews_that_are_asked_for(
    service: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, painted: bool, rows: int
) -> None:
    submitted: list[int] = []
    real = Engine.submit

    def spy(self: Engine, *arguments: Any) -> Ticket:
        submitted.append(arguments[-1])
        return real(self, *arguments)

    monkeypatch.setattr(Engine, "submit", spy)
    rgba = np.concatenate([np.stack([IMAGE] * 3, -1), MASK[..., None]], -1)
    image = png(rgba if painted else IMAGE)
    how = {"steps": 8, "strength": 0.5, "solver": "ddpm"}
    events = list(
        service.images.edit(
            image=("a.png", image), prompt="1", stream=True, partial_images=1, extra_body=how
        )
    )
    assert submitted == [rows // 2]
    assert [event.type for event in events][-1] == "image_edit.completed"
    assert len(events) <= 2


def test_errors_have_the_clients_shape(service: openai.OpenAI) -> None:
    for how, sentence in [
        ({"prompt": "dog"}, "unknown label 'dog'"),
        ({"prompt": "one", "size": "1024x1024"}, '`size` must be "auto" or "4x4"'),
        ({"prompt": "one", "n": 11}, "`n` must be"),
        ({"prompt": "one", "model": "gpt-image-2"}, "unknown model"),
        ({"prompt": "one", "extra_body": {"step": 2}}, "Did you mean 'steps'"),
    ]:
        with pytest.raises(openai.BadRequestError) as raised:
            service.images.generate(**how)
        assert sentence in str(raised.value)
    with pytest.raises(openai.NotFoundError):
        service.models.retrieve("large")
    opaque = np.full((4, 4, 4), 255, np.uint8)
    with pytest.raises(openai.BadRequestError, match="transparent places"):
        service.images.edit(image=("a.png", png(IMAGE)), mask=("m.png", png(opaque)), prompt="one")


def test_a_preview_that_comes_while_another_is_encoded_is_sent(small: Sampler) -> None:
    async def sent() -> list[int]:
        model: Any = SimpleNamespace(bundle=small.bundle)
        run = Run(asyncio.get_running_loop(), model).join()
        nothing = np.zeros((1, *small.bundle.sample_shape), np.float32)
        encoded = 0

        def show(sample: int) -> None:
            step, steps = np.array([1]), np.array([5])
            run.show(TicketPreview(np.array([sample]), step, steps, nothing, nothing))

        async def encode(*_: object) -> list[str]:
            nonlocal encoded
            encoded += 1
            if encoded == 1:
                show(1)
            else:
                run.settle(nothing)
            return ["image"]

        service: Any = SimpleNamespace(settings=Settings(), encode=encode)
        show(0)
        given = {"partial_images": 1, "output_format": "png"}
        asked = Asked("image_generation", given, run.model, 0, [None, None])
        events = [e async for e in openai_responses._events(service, run, asked)]
        return [b"partial_image_index" in event for event in events].count(True)

    assert asyncio.run(sent()) == 2
