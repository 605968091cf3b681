"""Requests that are too large, too many or hostile are rejected before they cost anything."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import struct
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from starlette.types import Message

import runtime.diffusion.solvers as solvers
from runtime import Limits, Overloaded, Request, Sampler, resolve
from runtime.diffusion.solvers import SOLVERS
from runtime.errors import RequestError
from serve import Settings, limits
from serve.bodies import decode, too_large
from serve.events import unless_gone
from serve.problems import Problem
from serve.work import LEAST_WAIT_S, Refusals, Work

from .services import client_of, gate_of, until
from .test_edits import IMAGE, MASK, edit, png

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_no_program_has_more_rows_than_its_bound(small: Sampler, solver: str) -> None:
    bundle = small.bundle
    choices = {"repaint": [{}, {"resample": 3, "jump": 2}, {"resample": 1}], "unipc": [{}]}
    for steps in (1, 2, 3, 10, 57):
        for options in choices.get(solver, [{}]):
            for strength in (1.0, 0.4):
                start = np.zeros(bundle.sample_shape, np.float32)
                how = {"solver": solver, "steps": steps, "strength": strength, "start": start}
                resolved = resolve(bundle, Request(seed=0, options=options, **how)).options
                rows = len(bundle.program_of(resolved).call)
                assert rows <= limits.rows_of(resolved) <= 2 * rows + 2


BOMBS = [
    {"solver": "repaint", "steps": 200, "options": {"resample": 400}},
    {"solver": "repaint", "steps": 200, "options": {"resample": 1000, "jump": 1}},
    {"n": 64, "steps": 200, "solver": "dpmpp_3s", "label": 0, "guidance": 2.0},
    # Python refuses to write a number of more than 4300 digits.
    {"solver": "repaint", "options": {"resample": int("9" * 4300)}},
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_program_that_is_too_large_is_never_made(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, bomb: dict
) -> None:
    def refusing(solver: object) -> object:
        @functools.wraps(solver)  # type: ignore[arg-type]
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a program was made")

        return refuse

    for name, solver in list(SOLVERS.items()):
        monkeypatch.setitem(solvers.SOLVERS, name, refusing(solver))  # type: ignore[arg-type]
    got = client.post("/v1/samples", json=bomb)
    assert got.status_code == 400
    assert "rows" in got.json()["detail"]


def test_an_edit_that_is_too_large_decodes_nothing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.edits.decode", lambda *_: pytest.fail("an image was decoded"))
    params = {"steps": 200, "options": {"resample": 400}}
    got = edit(client, "inpaint", {"image": IMAGE, "mask": MASK}, params)
    assert got.status_code == 400  # type: ignore[attr-defined]
    assert "rows" in got.json()["detail"]  # type: ignore[attr-defined]


HOSTILE = [
    b'{"seed": NaN}',
    b'{"guidance": Infinity}',
    b'{"guidance": 1e999}',
    b'{"seed": 1, "seed": 2}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"seed": ' + b"9" * 40 + b"}",
    b"[" * 50_000,
    b'{"label": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    b'{"label": "\\ud800"}',
    b'{"\\ud800": 1}',
    b'{"label": "\x00"}',
    b"\xff\xfe",
    b"{",
    b"null",
    b'"text"',
    b'{"options": {"\\u0000": 1}}',
    b'{"options": {"eta": "\\ud800"}}',
    b'{"model": "\\ud800"}',
    b'{"grid": [3, 2, -0.0, 1e308]}',
    b'{"start": {"shape": [1000000000, 1000000000], "float32": ""}}',
    b'{"start": {"shape": [-1], "float32": "AAAA"}}',
    b'{"start": {"shape": "abc", "float32": 3}}',
    b'{"solver": {"a": 1}}',
    b'{"deadline": -1}',
    b'{"n": 1e3}',
    b'{"seed": ' + json.dumps(list(range(3000))).encode() + b"}",
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize(
    "path", ["/v1/samples", "/v1/images/generations", "/v2/models/small/infer"]
)
def test_hostile_json_is_refused(client: TestClient, path: str, body: bytes) -> None:
    got = client.post(path, content=body, headers=JSON)
    assert got.status_code == 400, got.text


def test_json_may_have_64_kib(client: TestClient) -> None:
    pad = b" " * (64 * 1024 - 2)
    assert client.post("/v1/samples", content=b"{" + pad + b"}", headers=JSON).status_code == 200
    got = client.post("/v1/samples", content=b"{ " + pad + b"}", headers=JSON)
    assert got.status_code == 413
    chunks = iter([b"{"] + [b" " * 1000] * 70)
    assert client.post("/v1/samples", content=chunks, headers=JSON).status_code == 413


@pytest.mark.parametrize("path", ["/v1/samples", "/v1/edits/animate"])
@pytest.mark.parametrize("as_file", [True, False])
def test_params_may_have_64_kib(client: TestClient, path: str, as_file: bool) -> None:
    def sent(size: int) -> int:
        params = b'{"steps": 2}'.ljust(size)
        files = {"params": ("p", params)} if as_file else {"params": (None, params)}
        return client.post(path, files=files).status_code

    assert sent(64 * 1024) == 200
    assert sent(64 * 1024 + 1) == 413


def test_a_text_of_a_form_may_have_64_kib(client: TestClient) -> None:
    files = {"image": ("a.png", png(IMAGE))}
    for size, status in ((64 * 1024, 400), (64 * 1024 + 1, 413)):  # no label is so long
        got = client.post("/v1/images/edits", files=files, data={"prompt": "x" * size})
        assert got.status_code == status


MULTIPART = {"content-type": "multipart/form-data; boundary=B"}
HEAD = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


def test_an_upload_may_have_8_mib_and_leaves_no_file(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file was made")

    monkeypatch.setattr(tempfile, "_TemporaryFileWrapper", refuse)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    read = 0

    def chunks(size: int):
        nonlocal read
        yield HEAD
        left = size - len(HEAD)
        while left > 0:
            part = min(left, 65536)
            left -= part
            read += part
            yield b"\0" * part

    got = client.post("/v1/edits/stylize", content=chunks(8 * 2**20 + 1), headers=MULTIPART)
    assert got.status_code == 413
    assert "8 MiB" in got.json()["detail"]
    assert read <= 9 * 2**20
    declared = {**MULTIPART, "content-length": str(8 * 2**20 + 1)}
    assert client.post("/v1/edits/stylize", content=b"", headers=declared).status_code == 413
    # One that fits is in memory, too, and is refused for what it holds.
    end = b"\r\n--B--\r\n"
    body = HEAD + b"\0" * (8 * 2**20 - len(HEAD) - len(end)) + end
    got = client.post("/v1/edits/stylize", content=body, headers=MULTIPART)
    assert got.status_code == 400
    assert "`image` cannot be read" in got.json()["detail"]


def chunk(kind: bytes, data: bytes) -> bytes:
    found = struct.pack(">I", len(data)) + kind + data
    return found + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of one colour, whose header alone is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [4001, 20_000, 50_000])
def test_a_png_bomb_is_never_decoded(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    monkeypatch.setattr(
        "PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("a bomb was decoded")
    )
    files = {"image": ("a.png", png_bomb(side, side))}
    got = client.post("/v1/edits/stylize", files=files)
    assert got.status_code == 400
    assert "more than 16000000 pixels" in got.json()["detail"]


@pytest.mark.parametrize("size", [(1, 65_536), (65_536, 1)])
def test_an_image_of_one_pixel_a_row_is_never_decoded(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    files = {"image": ("a.png", png_bomb(*size))}
    got = client.post("/v1/edits/stylize", files=files)
    assert got.status_code == 400
    assert "more than 65535 pixels a side" in got.json()["detail"]


def test_a_body_that_grows_too_large_while_work_runs_gets_413() -> None:
    async def receive() -> Message:
        raise too_large("a body", 8)

    async def use() -> None:
        await unless_gone(receive, asyncio.sleep(1000))

    with pytest.raises(Problem) as raised:
        asyncio.run(use())
    assert raised.value.status == 413


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "ICO", "TGA", "PDF"])
def test_other_formats_are_not_decoded(kind: str) -> None:
    with pytest.raises(RequestError, match="cannot be read as PNG, JPEG or WebP"):
        decode("image", png(IMAGE, kind), Settings())


def test_damaged_images_are_refused() -> None:
    whole = png(np.zeros((64, 64, 3), np.uint8))
    generator = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(3):
            data[generator.integers(8, len(data))] = generator.integers(256)
        with contextlib.suppress(RequestError):
            decode("image", bytes(data[: generator.integers(8, len(data) + 1)]), Settings())


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/samples", "text/plain"),
        ("/v2/models/small/infer", "multipart/form-data; boundary=B"),
        ("/v1/edits/stylize", "application/json"),
        ("/v1/images/edits", "application/x-www-form-urlencoded"),
        ("/v2/models/small/infer", "application/octet-stream"),
    ],
)
def test_other_types_of_bodies(client: TestClient, path: str, kind: str) -> None:
    got = client.post(path, content=b"{}", headers={"content-type": kind})
    assert got.status_code == 415


def test_the_type_of_a_body_has_no_case(client: TestClient) -> None:
    form = b'--B\r\nContent-Disposition: form-data; name="params"\r\n\r\n{}\r\n--B--\r\n'
    for kind, body in (("Multipart/Form-Data; boundary=B", form), ("Application/JSON", b"{}")):
        got = client.post("/v1/samples", content=body, headers={"content-type": kind})
        assert got.status_code == 200, got.text


def test_broken_multipart(client: TestClient) -> None:
    bodies = [
        (b"", "multipart/form-data"),
        (b"nothing", "multipart/form-data; boundary=B"),
        (HEAD + b"x", "multipart/form-data; boundary=B"),
        (b"--B\r\n\r\n\r\n--B--", "multipart/form-data; boundary=B"),
        (HEAD * 9, "multipart/form-data; boundary=B"),
        (HEAD, "multipart/form-data; boundary=" + "B" * 3000),
        (HEAD, "multipart/form-data; boundary=\u00e9"),
        (HEAD, "multipart/form-data; boundary=B; charset=undefined"),
    ]
    for body, kind in bodies:
        raw = [(b"content-type", kind.encode("latin-1"))]
        got = client.post("/v1/edits/stylize", content=body, headers=raw)
        assert got.status_code == 400, kind
    twice = [("image", ("a.png", png(IMAGE))), ("image", ("b.png", png(IMAGE)))]
    assert client.post("/v1/edits/stylize", files=twice).status_code == 400
    many = [(f"image{i}", ("a.png", png(IMAGE))) for i in range(5)]
    got = client.post("/v1/edits/stylize", files=many)
    assert got.status_code == 400


def test_too_much_work_gets_429_and_when_to_come_back(small: Sampler) -> None:
    settings = Settings(engine=Limits(samples=4, flow_share=1.0))
    with client_of([small], settings) as client, ThreadPoolExecutor(4) as pool:
        gate_of(small).shut()
        engine = client.app.state.service.models.get("small").engine  # type: ignore
        waiting = [
            pool.submit(client.post, "/v1/samples", json={"seed": i, "steps": 50}) for i in range(4)
        ]
        until(lambda: engine.stats().live + engine.stats().waiting == 4)
        got = client.post("/v1/samples", json={"seed": 9, "steps": 50})
        assert got.status_code == 429
        assert int(got.headers["retry-after"]) >= 1
        assert got.json()["retry_after"] > 0
        assert "at most 4 samples" in got.json()["detail"]
        # An equal request costs nothing, so it is not refused.
        again = pool.submit(client.post, "/v1/samples", json={"seed": 1, "steps": 50})
        gate_of(small).open()
        assert [found.result().status_code for found in [*waiting, again]] == [200] * 5


def test_a_deadline_that_cannot_be_kept_gets_422(small: Sampler) -> None:
    with client_of([small]) as client:
        body = {"steps": 200, "n": 60, "solver": "dpmpp_3s", "deadline": 0}
        got = client.post("/v1/samples", json=body)
        assert got.status_code == 422
        assert "the deadline is 0 s" in got.json()["detail"]


def test_a_deadline_holds_while_equal_work_is_under_way(small: Sampler) -> None:
    with client_of([small]) as client, ThreadPoolExecutor(2) as pool:
        gate_of(small).shut()
        body = {"steps": 50, "seed": 3}
        service = client.app.state.service  # type: ignore[attr-defined]
        first = pool.submit(client.post, "/v1/samples", json=body)
        until(lambda: service.runs.live)
        (run,) = service.runs._live
        second = pool.submit(client.post, "/v1/samples", json={**body, "deadline": 0})
        until(lambda: second.done() or run.users == 2)
        gate_of(small).open()
        assert second.result().status_code == 422
        assert first.result().status_code == 200


def test_a_deadline_that_passes_gets_504(small: Sampler) -> None:
    with client_of([small]) as client, ThreadPoolExecutor(1) as pool:
        gate_of(small).shut()
        body = {"steps": 5, "deadline": 0.3}
        waiting = pool.submit(client.post, "/v1/samples", json=body)
        engine = client.app.state.service.models.get("small").engine  # type: ignore
        # It may pass before the first call, if the machine is busy: then there is none.
        until(lambda: waiting.done() or engine.stats().tick_seconds > 0.3)
        gate_of(small).open()
        assert waiting.result().status_code == 504


def test_a_hung_network_call_makes_the_service_not_ready(small: Sampler) -> None:
    with client_of([small], Settings(hung_s=0.05)) as client, ThreadPoolExecutor(1) as pool:
        assert client.get("/readyz").status_code == 200
        gate_of(small).shut()
        waiting = pool.submit(client.post, "/v1/samples", json={})
        until(lambda: client.get("/readyz").status_code == 503)
        assert "one network call" in client.get("/readyz").json()["detail"]
        assert client.get("/v2/models/small/ready").status_code == 503
        assert client.get("/livez").status_code == 200
        gate_of(small).open()
        assert waiting.result().status_code == 200
        assert client.get("/readyz").status_code == 200


STRINGS = ["/etc/passwd", "../secret.png", "file:///etc/passwd", "."]


@pytest.mark.parametrize("text", STRINGS)
def test_a_string_is_never_a_path(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Strings everywhere; nothing is opened."""
    opened: list[object] = []
    real = Image.open

    def spy(file: object, *args: object, **kwargs: object) -> object:
        opened.append(file)
        return real(file, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", spy)
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail(f"opened {a}"))
    names = [entry.name for entry in __import__("serve.fields").fields.SAMPLES]
    for name in names:
        client.post("/v1/samples", json={name: text})
        client.get("/v1/samples", params={name: text})
    client.post("/v1/samples", json={"options": {text: text, "eta": text}})
    for verb in ("stylize", "translate", "inpaint", "interpolate", "variations", "invert"):
        for part in ("image", "image2", "mask", "first", "last", text):
            got = client.post(f"/v1/edits/{verb}", files={"params": ("p", "{}")}, data={part: text})
            assert got.status_code == 400
        for name in ("image", "first", "last", "label", "source", "target", "mask"):
            params = {"source": "one", "target": "two", name: text}
            files = {"image": (text, png(IMAGE)), "mask": (text, png(MASK))}
            if verb != "inpaint":
                del files["mask"]
            data = {"params": json.dumps(params)}
            client.post(f"/v1/edits/{verb}", files=files, data=data)
    client.post("/v1/images/generations", json={"prompt": text})
    client.post(
        "/v1/images/edits", files={"mask": ("a", png(MASK))}, data={"image": text, "prompt": text}
    )
    tensor = {"name": "label", "datatype": "BYTES", "shape": [1], "data": [text]}
    seed = {"name": "seed", "datatype": "INT64", "shape": [1], "data": [1]}
    got = client.post("/v2/models/small/infer", json={"inputs": [tensor, seed]})
    assert got.status_code == 400
    assert all(isinstance(file, io.BytesIO) for file in opened)


def test_every_solver_bound_is_of_a_solver() -> None:
    assert solvers.CALLS.keys() <= SOLVERS.keys()
    assert solvers.EXTRA_CALLS.keys() <= SOLVERS.keys()


def test_a_refusal_holds_for_a_moment(small: Sampler) -> None:
    """It is not requested again, neither by the same user nor for less work."""
    now = 100.0
    refusals = Refusals(lambda: now)

    def work(rows: int) -> Work:
        return Work(SimpleNamespace(name="small"), [], [], rows, "")  # type: ignore[arg-type]

    refusals.note(work(50), "alice", Overloaded("full.", 8.0))
    refusals.check(work(49), "alice")
    refusals.check(work(50), "bob")
    now += 0.2
    with pytest.raises(Overloaded) as raised:
        refusals.check(work(50), "alice")
    assert raised.value.retry_after == pytest.approx(7.8)
    refusals.forget("another")
    with pytest.raises(Overloaded):
        refusals.check(work(50), "alice")
    refusals.forget("small")
    refusals.check(work(50), "alice")
    refusals.note(work(50), "alice", Overloaded("full.", 8.0))
    now += 0.3
    refusals.check(work(50), "alice")
    refusals.note(work(50), "alice", Overloaded("full.", 0.05))
    now += 0.06
    refusals.check(work(50), "alice")


def test_one_request_at_a_time_asks_whether_a_refusal_still_holds(small: Sampler) -> None:
    now = 100.0
    refusals = Refusals(lambda: now)
    work = Work(SimpleNamespace(name="small"), [], [], 50, "")  # type: ignore[arg-type]
    smaller = Work(SimpleNamespace(name="small"), [], [], 49, "")  # type: ignore[arg-type]
    refusals.note(work, "alice", Overloaded("full.", 0.1))
    now += 1.0
    refusals.check(work, "alice")
    # The prediction has passed, and the engine is being asked.
    for _ in range(3):
        with pytest.raises(Overloaded) as raised:
            refusals.check(work, "alice")
        assert raised.value.retry_after == LEAST_WAIT_S
    # Smaller work that is accepted says nothing of larger work.
    refusals.note(smaller, "alice", None)
    with pytest.raises(Overloaded):
        refusals.check(work, "alice")
    refusals.note(work, "alice", None)
    for _ in range(3):
        refusals.check(work, "alice")
