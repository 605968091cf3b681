"""POST and GET /v1/samples: the bytes are those of `Sampler`."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from runtime import Request, Sampler
from runtime.bundle.distilled import Distilled
from runtime.bundle.spec import Defaults
from runtime.errors import RequestError
from runtime.images import tile
from serve.pictures import animation_bytes, image_bytes

from .services import client_of, events_of, gate_of, until


def npy(content: bytes) -> np.ndarray:
    return np.load(io.BytesIO(content))


def pixels(content: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(content)))
    return image if image.ndim == 3 else image[..., None]


ASKED = [
    {},
    {"seed": 5, "label": "one"},
    {"n": 3, "seed": [4, 1, 9], "label": ["one", None, 2], "guidance": [1.0, None, 3.5]},
    {"n": 2, "solver": "ddpm", "steps": 7, "grid": "linspace"},
    {"solver": "unipc", "steps": 6, "options": {"order": 3, "corrector": False}},
    {"label": 1, "guidance": 2.0, "guidance_interval": [0.1, 5.0]},
    {"grid": [0.9, 0.5, 0.1], "solver": "euler"},
]


@pytest.mark.parametrize("asked", ASKED)
def test_the_samples_have_the_bytes_of_the_sampler(
    client: TestClient, small: Sampler, asked: dict
) -> None:
    grid = asked.get("grid")
    if isinstance(grid, list):
        asked = {**asked, "grid": small.bundle.schedule.time[[150, 80, 10]].tolist()}
    how = {name: value for name, value in asked.items() if name not in ("n", "seed", "options")}
    how |= asked.get("options", {})
    expected = small.sample(asked.get("n", 1), asked.get("seed", 0), **how)
    got = client.post("/v1/samples", json={**asked, "format": "npy"})
    assert got.status_code == 200, got.text
    assert got.headers["content-type"] == "application/x-npy"
    assert npy(got.content).tobytes() == expected.tobytes()
    for kind in ("png", "webp"):
        got = client.post("/v1/samples", json={**asked, "format": kind, "columns": 2})
        shown = small.to_uint8(expected)
        sheet = shown[0] if len(shown) == 1 else tile(shown, 2)
        found = pixels(got.content)[..., : sheet.shape[2]]
        assert (found == sheet).all()
    body = client.post("/v1/samples", json={**asked, "format": "json"}).json()
    data = np.frombuffer(base64.b64decode(body["float32"]), "<f4").reshape(body["shape"])
    assert data.tobytes() == expected.tobytes()
    assert len(body["images"]) == len(expected)


def test_an_array_to_start_from(client: TestClient, small: Sampler) -> None:
    start = np.random.default_rng(0).normal(size=(1, 1, 4, 4)).astype(np.float32)
    field = Request(seed=0, start=start[0]).to_json()["start"]
    got = client.post("/v1/samples", json={"start": field, "strength": 0.5, "format": "npy"})
    assert npy(got.content).tobytes() == small.sample(start=start, strength=0.5).tobytes()
    assert "content-location" not in got.headers
    many = client.post("/v1/samples", json={"n": 3, "start": field, "format": "npy"})
    assert npy(many.content).tobytes() == small.sample(3, start=start.repeat(3, 0)).tobytes()


def test_the_accept_header_chooses_the_format(client: TestClient) -> None:
    for accept, kind in [
        ("image/webp", "image/webp"),
        ("application/json", "application/json"),
        ("application/x-npy", "application/x-npy"),
        ("*/*", "image/png"),
        ("image/avif,image/webp,image/png,*/*;q=0.8", "image/png"),
    ]:
        got = client.post("/v1/samples", json={}, headers={"accept": accept})
        assert got.headers["content-type"] == kind


def test_a_url_gives_the_same_bytes_and_then_304(client: TestClient, small: Sampler) -> None:
    asked = {"seed": 8, "label": "two", "guidance": 1.5, "solver": "unipc", "steps": 5}
    asked |= {"options": {"order": 3, "variant": "bh1", "corrector": False}}
    asked |= {"guidance_interval": [0.5, 20.0]}
    posted = client.post("/v1/samples", json=asked)
    url = posted.headers["content-location"]
    got = client.get(url)
    assert got.content == posted.content
    assert got.headers["cache-control"] == "public, no-cache"
    calls = gate_of(small).calls
    for tag in (got.headers["etag"], f'"x", W/{got.headers["etag"]}', "*"):
        again = client.get(url, headers={"if-none-match": tag})
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == got.headers["etag"]
    assert client.get(url, headers={"if-none-match": '"other"'}).status_code == 200
    assert gate_of(small).calls == calls
    other = client.get(url.replace("seed=8", "seed=9"))
    assert other.headers["etag"] != got.headers["etag"]


def test_a_url_may_leave_out_what_has_a_default(client: TestClient) -> None:
    full = client.post("/v1/samples", json={}).headers["content-location"]
    assert client.get("/v1/samples").headers["etag"] == client.get(full).headers["etag"]


def test_explicit_times_in_a_url(client: TestClient, small: Sampler) -> None:
    times = small.bundle.schedule.time[[150, 80, 10]].tolist()
    posted = client.post("/v1/samples", json={"grid": times, "format": "png"})
    assert client.get(posted.headers["content-location"]).content == posted.content


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({"label": "onee"}, "Did you mean 'one'?"),
        ({"stepss": 3}, "Did you mean 'steps'?"),
        ({"solver": "dim"}, "Did you mean 'ddim'?"),
        ({"options": {"etaa": 1}}, "Did you mean 'eta'?"),
        ({"options": {"label": 1}}, "Pass it next to `options`"),
        ({"steps": 0}, "`steps` must be"),
        ({"steps": 2.5}, "`steps` must be an integer"),
        ({"steps": True}, "`steps` must be an integer"),
        ({"steps": 201}, "`steps` must be 1 to 200"),
        ({"n": 65}, "`n` must be 1 to 64"),
        ({"n": 2, "seed": [1]}, "`seed` must be"),
        ({"guidance": "strong"}, "`guidance` must be"),
        ({"strength": 0.5}, "Pass `picture` or `start` too"),
        ({"format": "gif"}, "unknown format 'gif'"),
        ({"start": {"shape": [2], "float32": "AAAA"}}, "`start` must be"),
        ({"start": {"shape": [4, 4, 1], "float32": ""}}, "`start` must be"),
        ({"model": "large"}, "unknown model 'large'"),
        ([1], "must be a JSON object"),
        ({"grid": "spiral"}, "unknown grid"),
    ],
)
def test_nonsense_gets_the_librarys_own_sentence(
    client: TestClient, body: object, sentence: str
) -> None:
    got = client.post("/v1/samples", json=body)
    assert got.status_code == 400
    assert got.headers["content-type"] == "application/problem+json"
    problem = got.json()
    assert problem["status"] == 400
    assert sentence in problem["detail"]


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_text_that_holds_json_holds_no_other_numbers(client: TestClient, number: str) -> None:
    options = f'{{"eta": {number}}}'
    got = client.get("/v1/samples", params={"solver": "ddim", "options": options})
    assert got.status_code == 400
    assert "`options.eta` must be" in got.json()["detail"]
    seed = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [1]}
    body = {"inputs": [seed], "parameters": {"solver": "ddim", "options": options}}
    got = client.post("/v2/models/small/infer", json=body)
    assert got.status_code == 400
    assert "`options.eta` must be" in got.json()["error"]


def test_equal_requests_share_one_run(small: Sampler) -> None:
    with client_of([small]) as client, ThreadPoolExecutor(8) as pool:
        gate = gate_of(small)
        gate.shut()
        body = {"seed": 77, "steps": 5, "format": "npy"}
        asked = [pool.submit(client.post, "/v1/samples", json=body) for _ in range(8)]
        service = client.app.state.service  # type: ignore[attr-defined]
        until(lambda: any(run.users == 8 for run in service.runs._live))
        gate.open()
        contents = {found.result().content for found in asked}
        assert len(contents) == 1
        engine = service.models.get("small").engine
        # The first ticket is the check at the start.
        assert engine.stats().accepted == 2
        assert client.post("/v1/samples", json=body).headers["server-timing"] == "cached"
        assert engine.stats().accepted == 2


def test_a_stream_has_previews_and_a_result(client: TestClient, small: Sampler) -> None:
    gate_of(small).shut()
    with ThreadPoolExecutor(1) as pool:
        body = {"n": 2, "steps": 20, "seed": 3, "label": "one", "stream": True}
        asked = pool.submit(client.post, "/v1/samples", json=body)
        service = client.app.state.service  # type: ignore[attr-defined]
        until(lambda: service.runs.live)
        gate_of(small).open()
        got = asked.result()
    assert got.headers["content-type"].startswith("text/event-stream")
    events = events_of(got.text)
    assert events[0][0] == "status"
    assert events[-1][0] == "done"
    assert {name for name, _ in events[1:-1]} <= {"preview"}
    steps = [
        (entry["sample"], entry["step"])
        for name, data in events
        if name == "preview"
        for entry in json.loads(data)["previews"]
    ]
    assert steps == sorted(set(steps), key=lambda pair: (pair[1], pair[0]))
    last = json.loads(events[-1][1])
    expected = small.sample(2, 3, label="one", steps=20)
    assert base64.b64decode(last["float32"]) == expected.tobytes()
    for i, url in enumerate(last["urls"]):
        assert (pixels(client.get(url).content) == small.to_uint8(expected)[i]).all()


def test_several_models(small: Sampler, tmp_path: object) -> None:
    from dataclasses import replace

    from .services import GatedBackend

    other = Sampler(replace(small.bundle, name="other"), GatedBackend(small.bundle))
    with client_of([small, other]) as client:
        told = client.get("/v1/info").json()
        assert [model["name"] for model in told["models"]] == ["small", "other"]
        assert told["opened"]
        missing = client.post("/v1/samples", json={})
        assert missing.status_code == 400
        assert "`model` must be one of small, other" in missing.json()["detail"]
        got = client.post("/v1/samples", json={"model": "other", "format": "npy"})
        assert npy(got.content).tobytes() == small.sample().tobytes()
        first = client.get("/v1/samples?model=small").headers["etag"]
        assert client.get("/v1/samples?model=other").headers["etag"] != first


def test_a_student_is_served_with_its_numbers_of_calls(small: Sampler) -> None:
    """A network that was distilled: by default its own steps, and any others are refused."""
    times = [float(t) for t in small.bundle.schedule.time[[199, 120, 60, 20]]]
    student = Sampler(
        dataclasses.replace(
            small.bundle,
            distilled=Distilled({1: (times[0],), 2: (times[0], times[2]), 4: tuple(times)}, {}),
            defaults=Defaults("lcm", 4, "trailing", 1.0),
            labels=dataclasses.replace(small.bundle.labels, null_trained=False),
        ),
        small.backend,
    )
    with client_of([student]) as client:
        for steps in (None, 1, 2, 4):
            asked = {"n": 2, "seed": 3, "label": 1, "format": "npy"}
            asked |= {} if steps is None else {"steps": steps}
            got = client.post("/v1/samples", json=asked)
            assert got.status_code == 200, got.text
            expected = student.sample(2, 3, label=1, steps=steps or 4, solver="lcm")
            assert npy(got.content).tobytes() == expected.tobytes()
        for asked, message in (
            ({"steps": 3, "label": 1}, "`steps` must be one of 1, 2, 4"),
            ({"grid": "trailing", "label": 1}, "levels of its own"),
            ({"guidance": 2.0, "label": 1}, "guidance"),
        ):
            got = client.post("/v1/samples", json=asked)
            assert got.status_code == 400, got.text
            assert message in got.json()["detail"]


@pytest.mark.parametrize(("kind", "side"), [("webp", 16_384), ("jpeg", 65_501), ("gif", 65_536)])
def test_an_image_too_large_for_its_format_names_another(kind: str, side: int) -> None:
    picture = np.zeros((side, 1, 1), np.uint8)
    encode = animation_bytes if kind == "gif" else image_bytes
    with pytest.raises(RequestError, match=r"at most \d+ pixels a side .* Ask for png"):
        encode([picture] if kind == "gif" else picture, kind)  # type: ignore[arg-type]
    assert image_bytes(picture, "png")
