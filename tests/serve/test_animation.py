"""POST /v1/edits/animate: the frames are those of `Sampler.animate`."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from runtime import Sampler
from runtime.images import tile
from serve import Settings

from .services import client_of, events_of
from .test_edits import IMAGE, edit
from .test_samples import npy

CASES = [
    ({}, {"steps": 6}),
    ({}, {"n": 3, "seed": 4, "label": ["one", "two", None], "steps": 5, "solver": "ddpm"}),
    ({}, {"n": 2, "label": "one", "guidance": 2, "steps": 7, "solver": "unipc"}),
    ({"image": IMAGE}, {"steps": 6, "seed": 3}),
]


@pytest.mark.parametrize(("parts", "params"), CASES)
def test_an_animation_has_the_bytes_of_the_sampler(
    client: TestClient, small: Sampler, parts: dict, params: dict
) -> None:
    expected = small.animate(pictures=parts.get("image"), **params)
    got = edit(client, "animate", parts, {**params, "format": "npy"})
    assert got.status_code == 200, got.text
    assert npy(got.content).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["png", "webp", "gif"])
@pytest.mark.parametrize("n", [1, 2])
def test_the_formats_of_an_animation(client: TestClient, small: Sampler, kind: str, n: int) -> None:
    got = edit(client, "animate", {}, {"n": n, "steps": 6, "format": kind})
    assert got.headers["content-type"] == f"image/{kind}"
    last = small.to_uint8(small.animate(n, steps=6))[-1]
    expected = last[0] if n == 1 else tile(last)
    with Image.open(io.BytesIO(got.content)) as image:
        # Equal neighbours may be stored as one.
        assert 5 <= image.n_frames <= 7
        image.seek(image.n_frames - 1)
        found = np.asarray(image.convert("L"))
    if kind != "gif":
        np.testing.assert_array_equal(found, expected[..., 0])


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_columns_without_images_take_no_memory(client: TestClient, kind: str) -> None:
    sizes = set()
    for columns in (2, 10_000):
        params = {"n": 2, "steps": 3, "format": kind, "columns": columns}
        got = edit(client, "animate", {}, params)
        assert got.status_code == 200, got.text
        sheet = client.post("/v1/samples", json=params)
        assert sheet.status_code == 200, sheet.text
        for content in (got.content, sheet.content):
            with Image.open(io.BytesIO(content)) as image:
                sizes.add(image.size)
    assert len(sizes) == 1


def test_the_accept_header_may_ask_for_a_gif(client: TestClient) -> None:
    got = edit(client, "animate", {}, {"steps": 3}, headers={"accept": "image/gif"})
    assert got.headers["content-type"] == "image/gif"


def test_the_frames_of_a_job_are_bounded(small: Sampler) -> None:
    # 4 bytes of 16 values in 10 frames.
    size = 4 * 16 * 10
    for most, status in [(size, 202), (size - 1, 400)]:
        with client_of([small], Settings(job_bytes=most)) as client:
            params = {"steps": 9, "solver": "ddim"}
            got = edit(client, "animate", {}, params, headers={"prefer": "respond-async"})
            assert got.status_code == status, got.text


def test_an_animation_as_json(client: TestClient, small: Sampler) -> None:
    expected = small.animate(2, steps=4)
    body = edit(client, "animate", {}, {"n": 2, "steps": 4, "format": "json"}).json()
    assert body["shape"] == list(expected.shape)
    assert base64.b64decode(body["float32"]) == expected.tobytes()
    assert len(body["images"]) == 2
    with Image.open(io.BytesIO(base64.b64decode(body["images"][1]))) as image:
        assert image.format == "PNG"
        assert image.is_animated


def test_an_animation_streams_previews_of_every_second_step(
    client: TestClient, small: Sampler
) -> None:
    params = {"n": 2, "steps": 7, "stream": True, "every": 2}
    events = events_of(edit(client, "animate", {}, params).text)
    assert events[0][0] == "status"
    assert events[-1][0] == "done"
    previews = [json.loads(data)["previews"] for name, data in events if name == "preview"]
    assert {entry["step"] for shown in previews for entry in shown} <= {2, 4, 6, 7}
    last = json.loads(events[-1][1])
    assert base64.b64decode(last["float32"]) == small.animate(2, steps=7).tobytes()
    assert last["urls"] == [None, None]


def test_an_animation_as_a_job(client: TestClient, small: Sampler) -> None:
    headers = {"prefer": "respond-async"}
    got = edit(client, "animate", {}, {"steps": 5}, headers=headers)
    path = got.headers["location"]
    assert events_of(client.get(f"{path}/events").text)[-1][0] == "done"
    found = client.get(f"{path}/result?format=npy")
    assert npy(found.content).tobytes() == small.animate(steps=5).tobytes()
    assert client.get(f"{path}/result?format=gif").headers["content-type"] == "image/gif"
    assert client.get(f"{path}/result").headers["content-type"] == "image/png"
    # A result that is no animation has no such format.
    sample = client.post("/v1/samples", json={"steps": 5}, headers=headers).headers["location"]
    assert events_of(client.get(f"{sample}/events").text)[-1][0] == "done"
    assert client.get(f"{sample}/result?format=gif").status_code == 400


@pytest.mark.parametrize(
    ("parts", "params", "sentence"),
    [
        ({"image": IMAGE}, {"label": "one"}, "label"),
        ({"image": IMAGE}, {"n": 2}, "`n` must be the number of images"),
        ({}, {"format": "jpeg"}, "format"),
        ({}, {"strength": 0.5}, "unknown option of `params`"),
        ({}, {"n": 65}, "`n` must be"),
        (
            {},
            {"solver": "repaint", "steps": 200, "options": {"resample": 400}},
            "at most 5000 rows",
        ),
    ],
)
def test_nonsense_is_refused(client: TestClient, parts: dict, params: dict, sentence: str) -> None:
    got = edit(client, "animate", parts, params)
    assert got.status_code == 400, got.text
    assert sentence in got.json()["detail"]


def test_the_bytes_of_the_frames_are_bounded(small: Sampler) -> None:
    # 4 bytes of 16 values in 10 frames of 2 samples.
    size = 4 * 16 * 10 * 2
    for most, status in [(size, 200), (size - 1, 400)]:
        with client_of([small], Settings(animation_bytes=most)) as client:
            got = edit(client, "animate", {}, {"n": 2, "steps": 9, "solver": "ddim"})
            assert got.status_code == status, got.text


def test_other_edits_have_no_gif(client: TestClient) -> None:
    got = edit(client, "stylize", {"image": IMAGE}, {"format": "gif"})
    assert got.status_code == 400
