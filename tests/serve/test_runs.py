"""Equal requests share work, and nobody's leaving, deadline or size is another's harm."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from runtime import Engine, Request, Sampler, Ticket
from runtime.engine.json_arrays import array_to_json
from serve import Settings
from serve.runs import Run
from serve.work import Results

from .services import client_of, gate_of, until
from .test_edits import IMAGE, edit
from .test_samples import npy

ASYNC = {"prefer": "respond-async"}


def test_only_equal_arrays_make_equal_requests(client: TestClient, small: Sampler) -> None:
    """Arrays are not in a request's JSON, but their values are in the name of its result."""
    for value in (0.25, -0.25):
        start = np.full((1, 1, 4, 4), value, np.float32)
        body = {"seed": 50, "steps": 3, "start": array_to_json(start[0]), "format": "npy"}
        for _ in range(2):
            got = client.post("/v1/samples", json=body)
            assert npy(got.content).tobytes() == small.sample(1, 50, start=start, steps=3).tobytes()
        assert got.headers["server-timing"] == "cached"


def test_a_request_without_a_deadline_does_not_share_one(small: Sampler) -> None:
    with client_of([small]) as client, ThreadPoolExecutor(2) as pool:
        gate_of(small).shut()
        body = {"seed": 51, "steps": 50}
        runs = client.app.state.service.runs  # type: ignore[attr-defined]
        hurried = pool.submit(client.post, "/v1/samples", json={**body, "deadline": 1e6})
        until(lambda: runs.live == 1)
        patient = pool.submit(client.post, "/v1/samples", json=body)
        until(lambda: sum(run.users for run in runs._live) == 2)
        live = runs.live
        gate_of(small).open()
        assert live == 2
        assert {hurried.result().status_code, patient.result().status_code} == {200}


def test_an_equal_request_does_not_join_a_run_that_is_cancelled(client: TestClient) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]

    async def use() -> bytes:
        model = service.models.get("small")
        work = await service.runs.plan(model, [Request(52, steps=20)])
        left = service.runs.start(work, "")
        left.leave()
        assert left.cancelled
        assert not left.done
        run = service.runs.start(work, "")
        assert run is not left
        samples = await run.result()
        run.leave()
        return samples.tobytes()

    assert client.portal is not None
    found = client.portal.call(use)
    assert found == service.models.get("small").sampler.sample(1, 52, steps=20).tobytes()


def test_a_client_that_leaves_does_not_end_the_wait_of_another() -> None:
    async def use() -> None:
        model: Any = SimpleNamespace(name="small")
        run = Run(asyncio.get_running_loop(), model).join().join()
        leaves, stays = (asyncio.ensure_future(run.result()) for _ in range(2))
        await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.wait([leaves])
        run.leave()
        assert not run.cancelled
        samples = np.zeros((1, 1, 4, 4), np.float32)
        run.settle(samples)
        assert await stays is samples

    asyncio.run(use())


def test_work_whose_client_left_while_it_was_planned_is_cancelled() -> None:
    async def use() -> list[bool]:
        model: Any = SimpleNamespace(name="small")
        run = Run(asyncio.get_running_loop(), model).join()
        run.leave()
        cancelled: list[bool] = []
        ticket: Any = SimpleNamespace(cancel=lambda: cancelled.append(True))
        run.attach(ticket)
        return cancelled

    assert asyncio.run(use()) == [True]


def test_kept_results_have_a_bound_and_cannot_be_changed(client: TestClient) -> None:
    one = np.zeros(4, np.float32)
    kept = Results(3 * one.nbytes)
    for key in "abc":
        kept.put(key, one)
    assert kept.get("a") is one
    kept.put("d", one)
    kept.put("larger than all", np.zeros(13, np.float32))
    # What was used last stays.
    assert [key for key in "abcd" if kept.get(key) is not None] == ["a", "c", "d"]
    assert kept.get("larger than all") is None
    client.post("/v1/samples", json={"seed": 53, "steps": 3})
    results = client.app.state.service.runs._results  # type: ignore[attr-defined]
    assert not any(samples.flags.writeable for samples in results._samples.values())


def test_the_etag_tells_formats_apart(client: TestClient) -> None:
    url = "/v1/samples?seed=54&steps=3"
    tags = {}
    for kind in ("image/png", "image/webp", "application/json"):
        got = client.get(url, headers={"accept": kind})
        tags[kind] = got.headers["etag"]
        assert got.headers["vary"] == "accept"
    assert len({*tags.values()}) == 3
    other = {"accept": "image/png", "if-none-match": tags["image/webp"]}
    assert client.get(url, headers=other).status_code == 200


def test_so_many_edits_run_at_once_and_no_more(small: Sampler) -> None:
    with client_of([small], Settings(edits=1)) as client:
        for seed in range(2):  # an edit that has ended counts no more
            ended: Any = edit(client, "stylize", {"image": IMAGE}, {"steps": 3, "seed": seed})
            assert ended.status_code == 200
        service = client.app.state.service  # type: ignore[attr-defined]
        service.edits += 1  # as if one were under way
        refused: Any = edit(client, "stylize", {"image": IMAGE}, {"steps": 3, "seed": 9})
        assert refused.status_code == 429
        assert "too many edits" in refused.json()["detail"]


def test_the_deadline_of_an_edit_is_for_all_of_its_passes(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines: list[float] = []
    real = Engine.submit

    def spy(
        self: Engine, requests: list[Request], flow: str, deadline: float, *more: Any
    ) -> Ticket:
        deadlines.append(deadline)
        return real(self, requests, flow, deadline, *more)

    monkeypatch.setattr(Engine, "submit", spy)
    got: Any = edit(client, "invert", {"image": IMAGE}, {"steps": 4, "deadline": 1000})
    assert got.status_code == 200
    first, second = deadlines
    assert 1000 >= first > second > 0
