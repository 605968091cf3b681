"""A real server: clients that leave, limits of connections, and the drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from runtime import Sampler
from runtime.errors import ClosedError, RequestError
from serve import Settings, create_app, results
from serve.__main__ import listen, main
from serve.app import app_of
from serve.models import Models
from serve.server import Server

from .services import WAIT_S, client_of, events_of, gate_of, ready, running, small_sampler, until
from .test_edits import IMAGE, png


def dial(address: str) -> socket.socket:
    """A connection."""
    found = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])))
    found.settimeout(WAIT_S)
    return found


def test_the_address_serves(small: Sampler) -> None:
    with running(create_app([small])) as address:
        assert httpx.get(f"{address}/livez").text == "ok\n"
        got = httpx.post(f"{address}/v1/samples", json={"seed": 2, "format": "npy"})
        assert small.sample(1, 2).tobytes() in got.content
        assert "server" not in got.headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_work_alone(small: Sampler, stream: bool) -> None:
    app = create_app([small])
    with running(app) as address, ThreadPoolExecutor(2) as pool:
        service = app.state.service
        engine = service.models.get("small").engine
        expected = small.sample(1, 1, steps=150)
        gate_of(small).shut()
        body = {"seed": 1, "steps": 150, "format": "npy"}
        stays = pool.submit(httpx.post, f"{address}/v1/samples", json=body, timeout=WAIT_S)
        until(lambda: service.runs.live == 1)
        for seed in range(20):
            with dial(address) as leaver:
                text = json.dumps({"seed": 100 + seed, "steps": 150, "stream": stream})
                head = "POST /v1/samples HTTP/1.1\r\nHost: localhost\r\n"
                head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
                leaver.sendall((head + text).encode())
                until(lambda: service.runs.live == 2)
            # Seen while the network call is held: nothing depends on a next step.
            until(lambda: service.runs.live == 1)
        gate_of(small).open()
        assert expected.tobytes() in stays.result().content
        until(lambda: engine.stats().cancelled == 20)
        assert engine.stats().live == engine.stats().waiting == 0
        text = httpx.get(f"{address}/metrics").text
        assert "unnoise_disconnects_total 20.0" in text
        assert 'unnoise_cancelled_total{model="small"} 20.0' in text


def test_a_client_that_leaves_an_edit(small: Sampler) -> None:
    app = create_app([small])
    with running(app) as address:
        service = app.state.service
        gate_of(small).shut()
        client = httpx.Client()
        files = {"image": ("a.png", png(IMAGE))}
        data = {"params": json.dumps({"steps": 50, "stream": True})}
        with client.stream("POST", f"{address}/v1/edits/invert", files=files, data=data) as got:
            # Kept until the assertion: httpx closes the connection of an iterator that is dropped.
            lines = got.iter_lines()
            assert next(lines) == "event: status"
            assert service.edits == 1
        client.close()
        gate_of(small).open()
        until(lambda: not service.runs.live and not service.edits)


def test_a_job_survives_its_client(small: Sampler) -> None:
    app = create_app([small])
    with running(app) as address:
        gate_of(small).shut()
        headers = {"prefer": "respond-async"}
        path = httpx.post(f"{address}/v1/samples", json={}, headers=headers).headers["location"]
        client = httpx.Client()
        with client.stream("GET", f"{address}{path}/events") as got:
            next(got.iter_lines())
        client.close()
        gate_of(small).open()
        assert events_of(httpx.get(f"{address}{path}/events").text)[-1][0] == "done"


def test_heartbeats(small: Sampler) -> None:
    with running(create_app([small], Settings(heartbeat_s=0.02))) as address:
        gate_of(small).shut()
        body = {"stream": True}
        with httpx.stream("POST", f"{address}/v1/samples", json=body, timeout=WAIT_S) as got:
            lines = got.iter_lines()
            beats = 0
            while beats < 3:
                beats += next(lines).startswith(":")
            gate_of(small).open()
            assert any(line == "event: done" for line in lines)


def test_a_slow_reader_misses_previews_and_slows_nobody(small: Sampler) -> None:
    app = create_app([small])
    with running(app) as address:
        body = {"stream": True, "steps": 200, "n": 8, "seed": 5}
        with httpx.stream("POST", f"{address}/v1/samples", json=body, timeout=WAIT_S) as got:
            engine = app.state.service.models.get("small").engine
            until(lambda: engine.stats().done == 2)  # without reading anything
            text = "".join(got.iter_text())
        assert events_of(text)[-1][0] == "done"


def test_a_connection_that_sends_no_headers_is_closed(small: Sampler) -> None:
    # On a busy machine it may be closed before anything is sent.
    with (
        running(create_app([small], Settings(headers_s=0.1))) as address,
        dial(address) as slow,
        contextlib.suppress(ConnectionError),
    ):
        slow.sendall(b"GET / HTTP/1.1\r\nHost: loc")
        assert slow.recv(100) == b""


def test_a_connection_that_sends_half_of_a_second_request_is_closed(small: Sampler) -> None:
    with running(create_app([small], Settings(headers_s=1.0))) as address, dial(address) as slow:
        slow.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in slow.recv(2000)
        slow.settimeout(20)
        # On a busy machine it may be closed before the half is sent.
        with contextlib.suppress(ConnectionError):
            slow.sendall(b"GET / HTTP/1.1\r\nHost: loc")
            while slow.recv(2000):
                pass


def test_a_body_that_does_not_come_gets_408(small: Sampler) -> None:
    with running(create_app([small], Settings(body_s=0.1))) as address, dial(address) as slow:
        head = b"POST /v1/samples HTTP/1.1\r\nHost: localhost\r\n"
        slow.sendall(head + b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in slow.recv(1000)


def test_too_many_requests_under_way_get_429_and_probes_do_not(small: Sampler) -> None:
    app = create_app([small], Settings(connections=2))
    with running(app) as address, ThreadPoolExecutor(2) as pool:
        gate_of(small).shut()
        url = f"{address}/v1/samples"
        held = [
            pool.submit(httpx.post, url, json={"seed": seed}, timeout=WAIT_S) for seed in (1, 2)
        ]
        until(lambda: app.state.service.runs.live == 2)
        assert httpx.post(url, json={}).status_code == 429
        assert httpx.get(f"{address}/livez").status_code == 200
        assert httpx.get(f"{address}/metrics").status_code == 200
        gate_of(small).open()
        assert [found.result().status_code for found in held] == [200, 200]


def test_a_drain_finishes_what_was_accepted(small: Sampler) -> None:
    app = create_app([small])
    with running(app) as address, ThreadPoolExecutor(4) as pool:
        service = app.state.service
        gate_of(small).shut()
        url = f"{address}/v1/samples"
        streams = [
            pool.submit(httpx.post, url, json={"seed": s, "stream": s > 1}, timeout=WAIT_S)
            for s in range(4)
        ]
        until(lambda: service.runs.live == 4)
        service.draining = True
        assert httpx.get(f"{address}/readyz").status_code == 503
        refused = httpx.post(url, json={})
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        gate_of(small).open()
        assert [found.result().status_code for found in streams] == [200] * 4
        assert events_of(streams[3].result().text)[-1][0] == "done"


def test_a_drain_waits_for_results_that_are_encoded(
    small: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    encoding = threading.Event()
    going = threading.Event()
    real = results.encode

    def slow(*arguments: object) -> tuple[bytes, str]:
        encoding.set()
        assert going.wait(WAIT_S)
        order.append("encoded")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(results, "encode", slow)
    with client_of([small]) as client, ThreadPoolExecutor(2) as pool:
        service = client.app.state.service  # type: ignore[attr-defined]
        stop = service._stop
        monkeypatch.setattr(service, "_stop", lambda: order.append("stopped") or stop())
        asked = pool.submit(client.post, "/v1/samples", json={"steps": 3})
        assert encoding.wait(WAIT_S)
        assert not service.runs.live
        assert client.portal is not None
        draining = pool.submit(client.portal.call, service.drain)
        until(lambda: service.draining)
        threading.Timer(0.2, going.set).start()
        assert asked.result().status_code == 200
        draining.result()
        assert order == ["encoded", "stopped"]


def test_a_drain_that_takes_too_long_ends_every_stream(small: Sampler) -> None:
    app = create_app([small], Settings(drain_s=0.05))
    listener = listen("127.0.0.1", 0)
    server = Server(app)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([listener])))
    thread.start()
    until(lambda: ready(app))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/samples"
    gate_of(small).shut()
    with ThreadPoolExecutor(2) as pool:
        streamed = pool.submit(httpx.post, url, json={"stream": True}, timeout=WAIT_S)
        plain = pool.submit(httpx.post, url, json={"seed": 1}, timeout=WAIT_S)
        until(lambda: app.state.service.runs.live == 2)
        loop.call_soon_threadsafe(server.drain)
        events = events_of(streamed.result().text)
        assert events[-1][0] == "error"
        assert json.loads(events[-1][1])["status"] == 503
        assert plain.result().status_code == 503
    gate_of(small).open()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    loop.close()


def test_a_signal_ends_a_service_that_opens_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = threading.Event()
    closed = threading.Event()

    class Slow(Sampler):
        def close(self) -> None:
            super().close()
            closed.set()

    slow = small_sampler(tmp_path)
    slow.__class__ = Slow

    def load(*_: object, **__: object) -> Sampler:
        assert loading.wait(WAIT_S)
        return slow

    monkeypatch.setattr(Sampler, "load", load)
    models = Models(["slow", "never opened"], Settings())
    server = Server(app_of(models))
    listener = listen("127.0.0.1", 0)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve([listener])))
    thread.start()
    try:
        until(lambda: server.started)
        loop.call_soon_threadsafe(server.drain)
        thread.join(20)
        assert not thread.is_alive()
    finally:
        loading.set()
        thread.join(WAIT_S)
    # What was opened too late is closed again.
    until(closed.is_set, 20)
    assert isinstance(models.failure, ClosedError)
    loop.close()


def test_the_service_works_under_a_prefix(small: Sampler) -> None:
    token = "t" * 20
    inner = create_app([small], Settings(tokens={token: "alice"}))
    outer = Starlette(
        routes=[Mount("/unnoise", inner)],
        lifespan=lambda _: inner.router.lifespan_context(inner),  # type: ignore[arg-type]
    )
    with TestClient(outer, base_url="http://localhost") as client:
        until(lambda: inner.state.service.models.opened)
        for path in ("", "style.css", "livez", "readyz"):
            assert client.get(f"/unnoise/{path}").status_code == 200
        client.headers["authorization"] = f"Bearer {token}"
        assert "error" in client.get("/unnoise/v1/models/large").json()
        body = {"steps": 3, "label": 1}
        sample = client.post("/unnoise/v1/samples", json=body)
        assert client.get(sample.headers["content-location"]).content == sample.content
        job = client.post("/unnoise/v1/samples", json=body, headers={"prefer": "respond-async"})
        assert job.headers["location"] == job.json()["self"]
        events = events_of(client.get(job.json()["events"]).text)
        (url,) = json.loads(events[-1][1])["urls"]
        asked = {"prompt": "one", "response_format": "url", "steps": 3, "seed": 0}
        made = client.post("/unnoise/v1/images/generations", json=asked).json()["data"][0]
        for link in (url, job.json()["result"], made["url"]):
            assert client.get(link).content == sample.content


@contextmanager
def command(root: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command that serves emoji32, in a process of its own, and its address."""
    program = [sys.executable, "-m", "serve", str(root / "bundles" / "emoji32"), "--port", "0"]
    process = subprocess.Popen(
        [*program, "--threads", "1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        until(lambda: httpx.get(f"{address}/readyz").status_code == 200, 60)
        yield process, address
    finally:
        process.kill()


def ask_eight(pool: ThreadPoolExecutor, address: str, steps: int) -> list[Future[httpx.Response]]:
    """Send eight requests, every second of them for events, and wait until all are accepted."""
    bodies = [{"seed": s, "steps": steps, "stream": s % 2 == 0} for s in range(8)]
    url = f"{address}/v1/samples"
    asked = [pool.submit(httpx.post, url, json=b, timeout=WAIT_S) for b in bodies]
    # One more is the sample that the engine is checked with.
    accepted = 'unnoise_accepted_total{model="emoji32"} 9.0'
    until(lambda: accepted in httpx.get(f"{address}/metrics").text, 60)
    return asked


def test_sigterm_lets_eight_live_requests_finish(root: Path) -> None:
    with command(root) as (process, address), ThreadPoolExecutor(8) as pool:
        asked = ask_eight(pool, address, steps=12)
        process.send_signal(signal.SIGTERM)
        for found in asked:
            got = found.result()
            assert got.status_code == 200
            if "event-stream" in got.headers["content-type"]:
                assert events_of(got.text)[-1][0] == "done"
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"ready", "request", "draining"} <= {line["event"] for line in lines}
    finished = [line for line in lines if line.get("endpoint") == "/v1/samples"]
    assert len(finished) == 8
    assert all(line["rows"] == 12 and line["code"] == 200 for line in finished)


def test_sigterm_ends_eight_live_requests_that_take_longer_than_the_drain(root: Path) -> None:
    """Each gets a last event or a 503, and the command ends with the drain."""
    drain_s = 0.1
    # 8 · 60 rows take seconds, and fit in the backlog of one user on a machine that is busy, too.
    with (
        command(root, "--drain", str(drain_s)) as (process, address),
        ThreadPoolExecutor(8) as pool,
    ):
        asked = ask_eight(pool, address, steps=60)
        process.send_signal(signal.SIGTERM)
        # Two seconds are promised; a machine that runs other tests may take longer.
        _, log = process.communicate(timeout=drain_s + 30)
        assert process.returncode == 0
        for found in asked:
            got = found.result()
            if "event-stream" in got.headers["content-type"]:
                name, data = events_of(got.text)[-1]
                assert name == "error"
                assert json.loads(data)["status"] == 503
            else:
                assert got.status_code == 503
    ended = [json.loads(line) for line in log.splitlines()]
    assert sum(line.get("endpoint") == "/v1/samples" for line in ended) == 8


SLOW = """
import sys, time
from runtime import Sampler
from serve.__main__ import main

Sampler.load = lambda *_, **__: time.sleep(1e6)
sys.exit(main([sys.argv[1], "--port", "0"]))
"""


def test_the_command_obeys_a_signal_while_it_opens_a_bundle(root: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        until(lambda: httpx.get(f"{address}/livez").status_code == 200, 60)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "draining" in log
        assert "Traceback" not in log
    finally:
        process.kill()


def test_a_bundle_that_cannot_be_opened_ends_the_command(tmp_path: Path, root: Path) -> None:
    command = [sys.executable, "-m", "serve", str(tmp_path), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert "has no bundle.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(root: Path, capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bundle = str(root / "bundles" / "emoji32")
        assert main([bundle, "--port", str(taken.getsockname()[1])]) == 2
    told = capsys.readouterr().err
    assert "cannot listen at 127.0.0.1, port" in told
    assert "Pass another --host or --port" in told


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_that_is_none(root: Path, capsys: pytest.CaptureFixture, port: str) -> None:
    assert main([str(root / "bundles" / "emoji32"), f"--port={port}"]) == 2
    assert "`port` must be 0 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no bundle to serve"),
        ("emoji32", "`bundles` must be a list, got 'emoji32'"),
        (Path("emoji32"), "`bundles` must be a list"),
    ],
)
def test_an_application_needs_a_list_of_bundles(given: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        create_app(given)  # type: ignore[arg-type]
