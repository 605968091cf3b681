"""Services to test: a small bundle, an ASGI client without a socket, and a real server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.testclient import TestClient

from runtime import Sampler
from serve import Settings, create_app
from serve.__main__ import listen
from serve.server import Server

from ..small_bundle import SmallBackend, SmallBuffers, write_small_bundle

WAIT_S = 1800.0
"""After this time a service counts as hanging. It is not a bound on speed."""


class Gate:
    """Network calls wait here while it is shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.calls = 0

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def wait(self) -> None:
        self.calls += 1
        assert self._open.wait(WAIT_S)


class GatedBuffers(SmallBuffers):
    gate: Gate

    def run(self, guided: bool, first: int, count: int) -> None:
        self.gate.wait()
        super().run(guided, first, count)


class GatedBackend(SmallBackend):
    """The small backend, whose calls a test can block."""

    def __init__(self, bundle: object) -> None:
        super().__init__(bundle)  # type: ignore[arg-type]
        self.gate = Gate()

    def bind(self, batch: int) -> GatedBuffers:
        buffers = GatedBuffers(self.bundle, batch)
        buffers.gate = self.gate
        return buffers


def small_sampler(folder: Path, knots: int = 200) -> Sampler:
    """A sampler of the small bundle on a `GatedBackend`."""
    bundle = write_small_bundle(folder / "small", knots)
    return Sampler(bundle, GatedBackend(bundle))


def gate_of(sampler: Sampler) -> Gate:
    assert isinstance(sampler.backend, GatedBackend)
    return sampler.backend.gate


@contextmanager
def client_of(
    samplers: Sequence[Sampler], settings: Settings | None = None, **options: object
) -> Iterator[TestClient]:
    """A client of an application that is ready."""
    app = create_app(samplers, settings)
    with TestClient(app, base_url="http://localhost", **options) as client:  # type: ignore[arg-type]
        until(lambda: ready(app))
        yield client


@contextmanager
def running(app: Starlette) -> Iterator[str]:
    """The address of a server that is ready, in a thread of its own."""
    listener = listen("127.0.0.1", 0)
    server = Server(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        until(lambda: server.started and ready(app))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


def ready(app: Starlette) -> bool:
    """Whether the models of an application are open, or cannot be opened."""
    models = app.state.service.models
    gated = [m for m in models.all.values() if isinstance(m.sampler.backend, GatedBackend)]
    # An idle engine measures network calls. One that waits at a shut gate would hold up work.
    learning = any(model.engine._costs.learning for model in gated)
    return bool(models.opened or models.failure) and not learning


def until(condition: object, seconds: float = WAIT_S) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def events_of(text: str) -> list[tuple[str, str]]:
    """(event, data) of each event of a stream."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "event" in lines:
            found.append((lines["event"], lines["data"]))
    return found
