"""Many bundles, of which some are open: without Ray, whose part a dictionary plays."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette

from runtime import BundleError, RequestError, Sampler
from serve import Settings, create_app
from serve.multiplex import HEADER, Multiplexed, Opened, named_sources

from .services import WAIT_S, gate_of, ready, small_sampler, until

SAMPLE = {"format": "npy", "seed": 4, "label": 1, "steps": 3}
TOKEN = "t" * 20
Client = httpx.AsyncClient


@pytest.fixture(scope="module")
def samplers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sampler]:
    return {name: small_sampler(tmp_path_factory.mktemp(name)) for name in ("one", "two")}


class Host:
    """Keeps one bundle open, as a replica with models=1 does."""

    def __init__(self, samplers: dict[str, Sampler], settings: Settings | None = None) -> None:
        self._samplers = samplers
        self._open: dict[str, Opened] = {}
        self.opened: list[str] = []
        self.named = ""
        names = [*samplers, "broken"]
        self.app = Multiplexed(names, lambda: self.named, self.open, settings or Settings())

    async def open(self, name: str) -> Opened:
        if name == "broken":
            raise BundleError("a secret path")
        if name not in self._open:
            for other in self._open.values():
                # Ray calls it in a thread of its own.
                await asyncio.to_thread(other.__del__)
            self._open = {name: Opened(create_app([self._samplers[name]]))}
            self.opened.append(name)
            await self._open[name].open()
        return self._open[name]

    def opened_app(self, name: str) -> Starlette:
        return self._open[name].app

    async def ask(self, client: Client, name: str, **body: object) -> httpx.Response:
        self.named = name
        return await client.post("/v1/samples", json={**SAMPLE, **body}, timeout=WAIT_S)

    async def close(self) -> None:
        for opened in self._open.values():
            await opened.close()


def hosted(samplers: dict[str, Sampler], use: Callable, settings: Settings | None = None) -> Host:
    """Call use(host, client) in an event loop."""
    host = Host(samplers, settings)

    async def main() -> None:
        transport = httpx.ASGITransport(host.app)
        async with Client(transport=transport, base_url="http://localhost") as client:
            await use(host, client)
        await host.close()

    asyncio.run(main())
    return host


def test_each_request_reaches_the_bundle_that_it_names(samplers: dict[str, Sampler]) -> None:
    async def use(host: Host, client: Client) -> None:
        for name in ("one", "one", "two", "one"):
            response = await host.ask(client, name)
            assert response.status_code == 200, response.text
            expected = samplers[name].sample(1, 4, label=1, steps=3)
            assert response.content.endswith(expected.tobytes())
            assert np.isfinite(expected).all()

    assert hosted(samplers, use).opened == ["one", "two", "one"]


def test_a_bundle_is_closed_after_its_requests(samplers: dict[str, Sampler]) -> None:
    async def use(host: Host, client: Client) -> None:
        assert (await host.ask(client, "one")).status_code == 200
        # An engine that measures calls would wait at the gate with one of them.
        while not ready(host.opened_app("one")):
            await asyncio.sleep(0.005)
        gate = gate_of(samplers["one"])
        gate.shut()
        waiting = asyncio.create_task(host.ask(client, "one", seed=99))
        calls = gate.calls
        while gate.calls == calls:
            await asyncio.sleep(0.005)
        threading.Timer(0.2, gate.open).start()
        # It opens when the first one has had its response.
        assert (await host.ask(client, "two")).status_code == 200
        assert waiting.done()
        assert (await waiting).status_code == 200

    hosted(samplers, use)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": f"Bearer {TOKEN}", "host": "evil.example"}, 421),
        ({"authorization": f"Bearer {TOKEN}", "origin": "https://evil.example"}, 403),
    ],
)
def test_a_stranger_opens_no_bundle(
    samplers: dict[str, Sampler], headers: dict[str, str], status: int
) -> None:
    async def use(host: Host, client: Client) -> None:
        host.named = "one"
        assert (await client.post("/v1/samples", headers=headers)).status_code == status
        # A service answers these to everybody, but here they would open it.
        if status == 401:
            for path in ("/", "/livez", "/readyz"):
                assert (await client.get(path, headers=headers)).status_code == 401

    settings = Settings(tokens={TOKEN: "alice"}, hosts=("localhost",))
    assert hosted(samplers, use, settings).opened == []


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("", 400, f"in the header {HEADER}: one of one, two"),
        ("tow", 404, "Did you mean 'two'"),
        ("broken", 503, "broken cannot be opened. The log has the reason."),
    ],
)
def test_a_request_that_names_no_bundle_says_so(
    samplers: dict[str, Sampler], name: str, status: int, message: str
) -> None:
    async def use(host: Host, client: Client) -> None:
        response = await host.ask(client, name)
        assert response.status_code == status
        assert message in response.json()["detail"]

    hosted(samplers, use)


def test_a_bundle_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path) -> None:
    async def main() -> None:
        opened = Opened(create_app([tmp_path / "none"]))
        with pytest.raises(BundleError, match="is not a folder"):
            await opened.open()
        opened.__del__()

    before = set(threading.enumerate())
    asyncio.run(main())  # ends with the threads of its loop's own pool
    until(lambda: set(threading.enumerate()) <= before)


def test_bundles_are_named_by_their_folders() -> None:
    given = ["emoji32", "/models/digits", "hf:user/cats@main"]
    assert named_sources(given) == {"emoji32": given[0], "digits": given[1], "cats": given[2]}
    with pytest.raises(RequestError, match="two bundles are named 'digits'"):
        named_sources(["/a/digits", "/b/digits"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replicas": 2.5}, "`replicas` must be of type int, got 2.5"),
        ({"replicas": True}, "`replicas` must be of type int, got True"),
        ({"gpus": False}, "`gpus` must be of type float"),
        ({"bundles": ["emoji32"]}, "`bundles` must be of type str"),
        ({"token_file": None}, "`token_file` must be of type str"),
        ({"replicas": float("inf")}, "`replicas` must be of type int"),
    ],
)
def test_arguments_of_a_serve_config_are_taken_as_they_are(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, object], message: str
) -> None:
    for name in ("ray", "ray.serve", "ray.serve.config"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.delitem(sys.modules, "serve.ray", raising=False)
    arguments = importlib.import_module("serve.ray").Arguments
    del sys.modules["serve.ray"]  # the real one may be imported later
    read = arguments.read({"bundles": "emoji32", "replicas": 2.0, "gpus": 1, "threads": "3"})
    assert (read.replicas, read.gpus, read.threads) == (2, 1.0, 3)
    with pytest.raises(RequestError, match=message):
        arguments.read({"bundles": "emoji32", **given})
