"""POST /v1/edits/{verb}: the bytes are those of the methods of `Sampler`."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from runtime import Engine, Overloaded, Sampler, Ticket
from serve import Settings
from serve.edits import plan

from .services import client_of, events_of, gate_of, until
from .test_samples import npy


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


GENERATOR = np.random.default_rng(1)
IMAGE = GENERATOR.integers(0, 256, (4, 4), np.uint8)
IMAGE2 = GENERATOR.integers(0, 256, (4, 4), np.uint8)
MASK = np.array([[255, 255, 0, 0]] * 4, np.uint8)


def edit(client: TestClient, verb: str, parts: dict, params: dict, **options: object) -> object:
    files = {name: (f"{name}.png", png(array)) for name, array in parts.items()}
    data = {"params": json.dumps(params)}
    if not files:  # a body without files would not be multipart
        files = {"params": ("params.json", json.dumps(params).encode())}
        data = {}
    return client.post(f"/v1/edits/{verb}", files=files, data=data, **options)  # type: ignore


CASES = [
    ("stylize", {"image": IMAGE}, {"strength": 0.6, "seed": 4, "label": "one", "steps": 8}),
    ("invert", {"image": IMAGE}, {"steps": 6, "label": "one"}),
    ("invert", {"image": IMAGE}, {"steps": 6, "strength": 0.5, "solver": "ddim"}),
    ("translate", {"image": IMAGE}, {"source": "one", "target": "two", "steps": 8}),
    ("inpaint", {"image": IMAGE, "mask": MASK}, {"steps": 4, "seed": 2, "label": 0}),
    (
        "inpaint",
        {"image": IMAGE, "mask": MASK},
        {"steps": 4, "options": {"resample": 2, "jump": 2}, "guidance": 1.5, "label": 0},
    ),
    ("interpolate", {"image": IMAGE, "image2": IMAGE2}, {"n": 4, "steps": 5}),
    ("interpolate", {"image": IMAGE}, {"n": 3, "steps": 5, "last": 12}),
    ("interpolate", {}, {"n": 3, "steps": 5, "first": 1, "last": 12, "solver": "unipc"}),
    ("variations", {"image": IMAGE}, {"n": 3, "amount": 0.4, "seed": 9, "steps": 5}),
]


def expected_of(sampler: Sampler, verb: str, parts: dict, params: dict) -> np.ndarray:
    how = {**params, **params.get("options", {})}
    how.pop("options", None)
    if verb == "interpolate":
        first = parts.get("image", how.pop("first", None))
        last = parts.get("image2", how.pop("last", None))
        return sampler.interpolate(first, last, **how)
    if verb == "inpaint":
        return sampler.inpaint(parts["image"], Image.fromarray(parts["mask"]), **how)
    if verb == "translate":
        source, target = how.pop("source"), how.pop("target")
        return sampler.translate(parts["image"], source, target, **how)
    found = getattr(sampler, verb)(parts["image"], **how)
    return found.noise if verb == "invert" else found


@pytest.mark.parametrize(("verb", "parts", "params"), CASES)
def test_an_edit_has_the_bytes_of_the_sampler(
    client: TestClient, small: Sampler, verb: str, parts: dict, params: dict
) -> None:
    expected = expected_of(small, verb, parts, params)
    got = edit(client, verb, parts, {**params, "format": "npy"})
    assert got.status_code == 200, got.text
    assert npy(got.content).tobytes() == expected.tobytes()


def test_inverting_tells_how_nearly_an_image_comes_back(client: TestClient, small: Sampler) -> None:
    expected = small.invert(IMAGE, steps=6)
    body = edit(client, "invert", {"image": IMAGE}, {"steps": 6, "format": "json"}).json()
    assert body["rms"] == expected.error.tolist()
    assert base64.b64decode(body["noise"]["float32"]) == expected.noise.tobytes()
    assert base64.b64decode(body["float32"]) == expected.back.tobytes()
    # And the noise makes the same sample again.
    again = {"start": body["noise"], "steps": 6, "solver": "dpmpp_2m", "grid": "log_snr"}
    got = client.post("/v1/samples", json={**again, "guidance": 1, "format": "npy"})
    assert npy(got.content).tobytes() == expected.back.tobytes()


def test_uploads_are_converted_or_must_fit(client: TestClient) -> None:
    large = np.zeros((9, 12, 3), np.uint8)
    assert edit(client, "stylize", {"image": large}, {"steps": 3}).status_code == 200
    got = edit(client, "stylize", {"image": large}, {"steps": 3, "convert": False})
    assert got.status_code == 400
    assert "12×9 RGB, 4×4 L expected" in got.json()["detail"]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_kinds_of_uploads(client: TestClient, kind: str) -> None:
    files = {"image": ("a", png(np.zeros((4, 4), np.uint8), kind))}
    got = client.post("/v1/edits/stylize", files=files, data={"params": '{"steps": 3}'})
    assert got.status_code == 200


def test_an_edit_streams_its_passes(client: TestClient, small: Sampler) -> None:
    params = {"source": "one", "target": "two", "steps": 40, "strength": 1.0, "stream": True}
    got = edit(client, "translate", {"image": IMAGE}, params)
    events = events_of(got.text)
    assert events[0][0] == "status"
    assert events[-1][0] == "done"
    stages = [json.loads(data)["stage"] for name, data in events if name == "preview"]
    assert stages == sorted(stages)
    del params["stream"]
    expected = expected_of(small, "translate", {"image": IMAGE}, params)
    last = json.loads(events[-1][1])
    assert base64.b64decode(last["float32"]) == expected.tobytes()


def test_an_edit_as_a_job(client: TestClient, small: Sampler) -> None:
    params = {"n": 3, "steps": 5}
    got = edit(client, "variations", {"image": IMAGE}, params, headers={"prefer": "respond-async"})
    assert got.status_code == 202
    events = events_of(client.get(got.headers["location"] + "/events").text)
    assert events[-1][0] == "done"
    result = client.get(got.headers["location"] + "/result?format=npy")
    expected = small.variations(IMAGE, **params)
    assert npy(result.content).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("verb", "parts", "params", "sentence"),
    [
        ("stylize", {}, {}, "stylize needs the file `image`"),
        ("inpaint", {"image": IMAGE}, {}, "inpaint needs the file `mask`"),
        ("stylize", {"image": IMAGE, "mask": MASK}, {}, "unexpected part 'mask'"),
        ("interpolate", {"image": IMAGE}, {}, "the seed `last`"),
        ("translate", {"image": IMAGE}, {"source": "one"}, "needs `target`"),
        ("translate", {"image": IMAGE}, {"source": "a", "target": "two"}, "unknown label"),
        ("stylize", {"image": IMAGE}, {"strength": 2}, "`strength` must be"),
        ("variations", {"image": IMAGE}, {"n": 65}, "`n` must be"),
        ("invert", {"image": IMAGE}, {"solver": "ddpm", "steps": 4}, "a deterministic solver"),
        ("stylize", {"image": IMAGE}, {"amount": 1}, "unknown option of `params`"),
        ("inpaint", {"image": IMAGE, "mask": MASK}, {"options": {"jump": 0}}, "`jump` must be"),
    ],
)
def test_nonsense_is_refused(
    client: TestClient, verb: str, parts: dict, params: dict, sentence: str
) -> None:
    got = edit(client, verb, parts, params)
    assert got.status_code == 400, got.text
    assert sentence in got.json()["detail"]


@pytest.mark.parametrize(
    ("verb", "parts", "params", "sentence"),
    [
        ("translate", {"image": IMAGE}, {"source": "one", "target": "tow"}, "Did you mean 'two'"),
        ("translate", {"image": IMAGE}, {"source": 0, "target": [1, 2]}, "must be one value"),
        ("variations", {"image": IMAGE}, {"n": 11, "steps": 10}, "at most 100 rows"),
        ("interpolate", {"image": IMAGE}, {"n": 11, "steps": 10, "last": 1}, "at most 100 rows"),
        (
            "variations",
            {"image": IMAGE},
            {"n": 6, "steps": 10, "label": 0, "guidance": 2},
            "at most 100 rows",
        ),
    ],
)
def test_an_edit_whose_last_pass_is_refused_runs_no_first_one(
    small: Sampler, verb: str, parts: dict, params: dict, sentence: str
) -> None:
    with client_of([small], Settings(request_rows=100)) as client:
        calls = gate_of(small).calls
        got = edit(client, verb, parts, params, headers={"prefer": "respond-async"})
        assert got.status_code == 400, got.text
        assert sentence in got.json()["detail"]
        assert gate_of(small).calls == calls


def test_an_edit_that_just_fits_runs(small: Sampler) -> None:
    with client_of([small], Settings(request_rows=100)) as client:
        for params in ({"n": 10}, {"n": 5, "label": 0, "guidance": 2}, {"n": 10, "guidance": 2}):
            got = edit(client, "variations", {"image": IMAGE}, {**params, "steps": 10})
            assert got.status_code == 200, got.text


def test_an_animated_image_needs_no_rows_of_the_network(small: Sampler) -> None:
    with client_of([small], Settings(request_rows=1)) as client:
        got = edit(client, "animate", {"image": IMAGE}, {"steps": 5, "format": "npy"})
        expected = small.animate(pictures=IMAGE, steps=5)
        assert npy(got.content).tobytes() == expected.tobytes()


def test_a_planned_edit_keeps_no_large_image(client: TestClient) -> None:
    model = client.app.state.service.models.get("small")  # type: ignore[attr-defined]
    large = png(np.full((64, 64), 255, np.uint8))
    files = {"image": large, "mask": large}
    planned = plan("inpaint", {"convert": True}, files, model, Settings())
    assert {name: array.shape for name, array in planned.images.items()} == {
        "image": (1, 1, 4, 4),
        "mask": (1, 1, 4, 4),
    }


def test_an_edit_that_waits_for_room_ends_with_the_engine(
    small: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()
    real = Engine.submit

    def full(self: Engine, *arguments: Any) -> Ticket:
        if self.stats().accepted >= 2 and self.stats().accepting:
            waits.set()
            raise Overloaded("full.", 60.0)
        return real(self, *arguments)

    with client_of([small], Settings(drain_s=0.0)) as client, ThreadPoolExecutor(1) as pool:
        # The first ticket is the check at the start, the second the first pass.
        monkeypatch.setattr(Engine, "submit", full)
        params = {"n": 2, "steps": 3, "stream": True}
        waiting = pool.submit(edit, client, "variations", {"image": IMAGE}, params)
        until(waits.is_set)
        assert client.portal is not None
        client.portal.call(client.app.state.service.drain)  # type: ignore[attr-defined]
        until(waiting.done, 20)
        events = events_of(waiting.result().text)  # type: ignore[attr-defined]
        assert json.loads(events[-1][1])["status"] == 503


def test_the_rows_of_all_passes_are_logged(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "unnoise.serve")
    stats = client.app.state.service.models.get("small").engine.stats  # type: ignore
    before = stats().rows
    got = edit(client, "invert", {"image": IMAGE}, {"steps": 6, "label": "one"})
    line = json.loads(caplog.records[-1].getMessage())
    assert line["rows"] == stats().rows - before
    queue, run = re.findall(r"dur=([\d.]+)", got.headers["server-timing"])  # type: ignore
    assert float(queue) >= 0
    assert float(run) >= 0


def test_a_deadline_that_passes_between_two_passes_gets_504(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine.submit
    passes = []

    def late(self: Engine, requests: Any, flow: str, deadline: float, *more: Any) -> Ticket:
        passes.append(deadline)
        return real(self, requests, flow, 0.0 if len(passes) > 1 else deadline, *more)

    monkeypatch.setattr(Engine, "submit", late)
    got = edit(client, "invert", {"image": IMAGE}, {"steps": 6, "deadline": 1e6})
    assert len(passes) == 2
    assert got.status_code == 504
    assert got.json()["detail"] == "the deadline passed before the edit was done."


def test_an_unknown_verb(client: TestClient) -> None:
    got = client.post("/v1/edits/paint", files={"image": ("a.png", png(IMAGE))})
    assert got.status_code == 404


def test_the_edits_share_batches_with_samples(client: TestClient, small: Sampler) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    gate_of(small).shut()
    with ThreadPoolExecutor(4) as pool:
        waiting = [
            pool.submit(edit, client, "stylize", {"image": IMAGE}, {"steps": 6, "seed": seed})
            for seed in range(3)
        ]
        waiting.append(pool.submit(client.post, "/v1/samples", json={"steps": 6, "seed": 500}))
        engine = service.models.get("small").engine
        until(lambda: engine.stats().live + engine.stats().waiting == 4)
        ticks = engine.stats().ticks
        gate_of(small).open()
        for found in waiting:
            assert found.result().status_code == 200  # type: ignore[attr-defined]
    # In sequence they would take 3 · 3 + 6 ticks.
    assert engine.stats().ticks - ticks <= 9
