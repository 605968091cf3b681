"""Jobs: their life, their owners, and how long results are kept."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.testclient import TestClient

from runtime import Cancelled, Sampler
from runtime.engine.json_arrays import array_to_json
from runtime.engine.ticket import TicketPreview, TicketStatus
from runtime.errors import RequestError
from serve import Settings, create_app
from serve.events import status_json
from serve.passes import Passes
from serve.runs import Run
from serve.work import Work

from .services import WAIT_S, client_of, events_of, gate_of, running, until
from .test_samples import npy

ASYNC = {"prefer": "respond-async"}


def start(client: TestClient, body: dict, **headers: str) -> str:
    got = client.post("/v1/samples", json=body, headers={**ASYNC, **headers})
    assert got.status_code == 202, got.text
    assert got.headers["preference-applied"] == "respond-async"
    assert got.headers["location"] == got.json()["self"]
    return got.headers["location"]


def test_the_life_of_a_job(client: TestClient, small: Sampler) -> None:
    gate_of(small).shut()
    body = {"n": 2, "seed": 21, "steps": 6, "format": "npy"}
    path = start(client, body)
    until(lambda: client.get(path).json()["state"] == "running")
    status = client.get(path).json()
    assert status["rows"] == 12
    assert status["rows_left"] == 12
    assert status["finish_seconds"] >= 0
    early = client.get(f"{path}/result")
    assert early.status_code == 409
    assert early.headers["retry-after"]
    gate_of(small).open()
    events = events_of(client.get(f"{path}/events").text)
    assert events[-1][0] == "done"
    assert client.get(path).json()["state"] == "done"
    expected = small.sample(2, 21, steps=6)
    result = client.get(f"{path}/result")
    assert npy(result.content).tobytes() == expected.tobytes()
    assert client.get(f"{path}/result?format=png").headers["content-type"] == "image/png"
    assert client.get(f"{path}/result?format=gif").status_code == 400
    assert client.delete(path).json()["state"] == "done"
    assert client.get(path).status_code == 404


def test_cancelling_touches_one_job_alone(client: TestClient, small: Sampler) -> None:
    gate_of(small).shut()
    paths = [start(client, {"seed": seed, "steps": 9}) for seed in range(3)]
    assert client.delete(paths[1]).json()["state"] == "cancelled"
    gate_of(small).open()
    for i in (0, 2):
        assert events_of(client.get(f"{paths[i]}/events").text)[-1][0] == "done"
    assert client.get(paths[1]).json()["state"] == "cancelled"
    assert client.get(f"{paths[1]}/result").status_code == 409
    assert client.get(f"{paths[1]}/events").status_code == 409
    service = client.app.state.service  # type: ignore[attr-defined]
    until(lambda: not service.runs.live)
    assert service.models.get("small").engine.stats().cancelled == 1


def test_cancelling_one_of_two_equal_jobs(client: TestClient, small: Sampler) -> None:
    gate_of(small).shut()
    first = start(client, {"seed": 40, "steps": 9})
    second = start(client, {"seed": 40, "steps": 9})
    client.delete(first)
    gate_of(small).open()
    assert events_of(client.get(f"{second}/events").text)[-1][0] == "done"
    assert client.get(first).json()["state"] == "cancelled"


@pytest.mark.parametrize("shared", [False, True])
def test_cancelling_a_job_ends_its_events(client: TestClient, small: Sampler, shared: bool) -> None:
    gate_of(small).shut()
    body = {"seed": 41, "steps": 9}
    path = start(client, body)
    other = start(client, body) if shared else None
    service = client.app.state.service  # type: ignore[attr-defined]
    engine = service.models.get("small").engine
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(client.get, f"{path}/events")
        until(lambda: service.inside == 1)
        assert client.delete(path).json()["state"] == "cancelled"
        cancelled = engine.stats().cancelled
        gate_of(small).open()
        name, data = events_of(reading.result().text)[-1]
    assert name == "error"
    assert json.loads(data)["status"] == 409
    assert cancelled == (not shared)
    if other is not None:
        assert events_of(client.get(f"{other}/events").text)[-1][0] == "done"


def test_a_job_that_keeps_its_deadline(client: TestClient) -> None:
    path = start(client, {"steps": 5, "deadline": 1e6})
    assert events_of(client.get(f"{path}/events").text)[-1][0] == "done"


def test_a_job_that_fails_says_why(client: TestClient, small: Sampler) -> None:
    gate_of(small).shut()
    path = start(client, {"steps": 5, "deadline": 0.3})
    engine = client.app.state.service.models.get("small").engine  # type: ignore[attr-defined]
    # It may pass before the first call, if the machine is busy: then there is none.
    jobs = client.app.state.service.jobs._jobs.values()  # type: ignore[attr-defined]
    until(lambda: engine.stats().tick_seconds > 0.3 or all(job.ended for job in jobs))
    gate_of(small).open()
    name, data = events_of(client.get(f"{path}/events").text)[-1]
    assert name == "error"
    assert json.loads(data)["status"] == 504
    status = client.get(path).json()
    assert status["state"] == "failed"
    assert status["error"]["status"] == 504


def test_a_reconnection_gets_no_event_twice(client: TestClient) -> None:
    path = start(client, {"steps": 30, "seed": 6})
    events_of(client.get(f"{path}/events").text)
    again = client.get(f"{path}/events", headers={"last-event-id": "10000"}).text
    names = [name for name, _ in events_of(again)]
    assert names == ["status", "done"]


def test_a_reconnection_gets_no_preview_twice(
    small: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = threading.Semaphore(0)
    with running(create_app([small], Settings(heartbeat_s=0.02))) as address:
        monkeypatch.setattr(gate_of(small), "wait", lambda: calls.acquire(timeout=WAIT_S))
        path = httpx.post(f"{address}/v1/samples", json={"steps": 6}, headers=ASYNC).json()[
            "events"
        ]
        calls.release(3)
        with httpx.stream("GET", address + path, timeout=WAIT_S) as got:
            lines = got.iter_lines()
            number = ""
            for line in lines:
                number = line.removeprefix("id: ") if line.startswith("id: ") else number
                if line.startswith("data: ") and '"step":3' in line:
                    break
        headers = {"last-event-id": number}
        with httpx.stream("GET", address + path, headers=headers, timeout=WAIT_S) as got:
            lines = got.iter_lines()
            begun = []
            # Signs of life say that nothing else is to come.
            for line in lines:
                begun.append(line)
                if line.startswith(":"):
                    break
            assert [line for line in begun if line.startswith("event: ")] == ["event: status"]
            calls.release(1000)
            rest = "\n".join(lines)
    found = [json.loads(data) for name, data in events_of(rest) if name == "preview"]
    steps = [entry["step"] for data in found for entry in data["previews"]]
    assert steps == sorted({*steps} - {1, 2, 3})
    assert events_of(rest)[-1][0] == "done"


def test_a_job_belongs_to_its_user(small: Sampler) -> None:
    settings = Settings(tokens={"a" * 20: "alice", "b" * 20: "bob"})
    with client_of([small], settings) as client:
        alice = {"authorization": f"Bearer {'a' * 20}"}
        bob = {"authorization": f"Bearer {'b' * 20}"}
        path = start(client, {"steps": 3}, **alice)
        assert client.get(path, headers=alice).status_code == 200
        for method in ("get", "delete"):
            assert getattr(client, method)(path, headers=bob).status_code == 404
        assert client.get(f"{path}/events", headers=bob).status_code == 404
        assert client.get(f"{path}/result", headers=bob).status_code == 404
        assert client.get(path, headers=alice).status_code == 200


def test_results_are_dropped(small: Sampler) -> None:
    with client_of([small], Settings(job_s=0.0)) as client:
        path = start(client, {"n": 4, "steps": 3})
        jobs = client.app.state.service.jobs  # type: ignore[attr-defined]
        until(lambda: all(job.ended for job in jobs._jobs.values()))
        assert client.get(path).status_code == 404
        assert not jobs._held
        assert not jobs._ended


def test_a_job_that_would_push_out_all_others_is_refused(small: Sampler) -> None:
    one = 4 * int(np.prod(small.bundle.sample_shape))
    with client_of([small], Settings(job_bytes=3 * one)) as client:
        path = start(client, {"n": 3, "steps": 3})
        got = client.post("/v1/samples", json={"n": 4}, headers={"prefer": "respond-async"})
        assert got.status_code == 400
        assert f"at most {3 * one} bytes" in got.json()["detail"]
        until(lambda: client.get(path).json()["state"] == "done")
        assert client.post("/v1/samples", json={"n": 4, "steps": 3}).status_code == 200


def test_the_oldest_results_are_dropped_first(small: Sampler) -> None:
    one = 4 * int(np.prod(small.bundle.sample_shape))
    with client_of([small], Settings(job_bytes=3 * one)) as client:
        jobs = client.app.state.service.jobs  # type: ignore[attr-defined]
        paths = []
        for n in (1, 1, 2):
            paths.append(start(client, {"n": n, "steps": 3, "seed": len(paths)}))
            until(lambda: all(job.ended for job in jobs._jobs.values()))
        assert jobs._held == 4 * one
        assert [client.get(path).status_code for path in paths] == [404, 200, 200]
        assert jobs._held == 3 * one
        client.delete(paths[1])
        assert jobs._held == 2 * one


def test_results_make_room_for_other_jobs(
    client: TestClient, small: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.jobs.MOST_JOBS", 2)
    jobs = client.app.state.service.jobs  # type: ignore[attr-defined]
    paths = []
    for seed in range(3):
        paths.append(start(client, {"steps": 3, "seed": seed}))
        until(lambda: all(job.ended for job in jobs._jobs.values()))
    assert [client.get(path).status_code for path in paths] == [404, 200, 200]
    gate_of(small).shut()
    for seed in (3, 4):
        start(client, {"steps": 3, "seed": seed})
    assert client.post("/v1/samples", json={"seed": 5}, headers=ASYNC).status_code == 429


def test_a_misspelled_query_of_a_result(client: TestClient) -> None:
    path = start(client, {"steps": 3})
    assert events_of(client.get(f"{path}/events").text)[-1][0] == "done"
    got = client.get(f"{path}/result?fromat=npy")
    assert got.status_code == 400
    assert "Did you mean 'format'?" in got.json()["detail"]


@pytest.mark.parametrize(
    "lines", [["wait=9", "respond-async"], ["wait=9, Respond-Async"], ["respond-async"]]
)
def test_the_header_of_a_job_is_a_list(client: TestClient, lines: list[str]) -> None:
    headers = [("prefer", line) for line in lines]
    assert client.post("/v1/samples", json={"steps": 3}, headers=headers).status_code == 202


def test_an_unknown_job(client: TestClient) -> None:
    got = client.get("/v1/jobs/../../etc/passwd")
    assert got.status_code == 404
    got = client.get("/v1/jobs/nothing")
    assert got.status_code == 404
    assert "no such job" in json.loads(got.text)["detail"]


def used_run() -> Run:
    """A run with one user, in the running loop."""
    return Run(asyncio.get_running_loop(), SimpleNamespace(name="small")).join()  # type: ignore


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "done"), (RequestError("no."), "failed"), (Cancelled("stopped."), "cancelled")],
)
def test_the_state_is_not_that_of_the_first_pass(error: Exception | None, state: str) -> None:
    async def states() -> list[object]:
        run = used_run()
        found = [status_json(run)["state"]]
        ticket: Any = SimpleNamespace(status=lambda: TicketStatus("done", 4, 0, 0, 0.0, 0.0, 0.0))
        run.attach(ticket)
        found.append(status_json(run)["state"])
        run.settle(None if error else np.zeros((1, 1, 4, 4), np.float32), error)
        return [*found, status_json(run)["state"]]

    assert asyncio.run(states()) == ["waiting", "running", state]


@pytest.mark.parametrize("done", [True, False])
def test_previews_are_dropped_with_the_last_reader(done: bool) -> None:
    async def use() -> None:
        run = used_run().join()
        one = np.zeros((1, 1, 4, 4), np.float32)
        preview = TicketPreview(np.array([0]), np.array([1]), np.array([5]), one, one)
        run.show(preview)
        if done:
            run.settle(one)
        run.leave()
        assert run.views
        run.leave()
        # The last preview of cancelled work comes late.
        run.show(preview)
        assert not run.views

    asyncio.run(use())


def test_an_error_keeps_nothing_of_an_edit() -> None:
    kept = []

    def fail() -> None:
        image = np.zeros(4)
        kept.append(weakref.ref(image))
        raise RequestError("no.")

    async def use() -> None:
        run = used_run()
        try:
            fail()
        except RequestError as error:
            run.settle(None, error)
        assert kept[0]() is None
        with pytest.raises(RequestError, match="no"):
            await run.result()

    asyncio.run(use())


def test_a_ticket_keeps_no_frames_of_an_animation(small: Sampler) -> None:
    class Step:
        def __call__(self, _: object) -> bool:
            return True

    async def use() -> None:
        run = used_run()
        shown: list[object] = []

        def submit(*arguments: object) -> Any:
            shown.append(arguments[3])
            return SimpleNamespace(result=lambda: np.zeros(1))

        model: Any = SimpleNamespace(bundle=small.bundle, engine=SimpleNamespace(submit=submit))
        run.model = model
        step = Step()
        kept = weakref.ref(step)
        Passes(run, Settings(), "", None, 0).submit([], step)
        del step
        assert shown
        assert kept() is None

    asyncio.run(use())


@pytest.mark.parametrize("cancelled", [True, False])
def test_a_job_does_not_keep_its_input(
    client: TestClient, small: Sampler, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    kept: list[weakref.ref] = []
    plan = service.runs.plan

    async def spy(*arguments: Any) -> Work:
        work = await plan(*arguments)
        kept.extend(map(weakref.ref, [work, *work.requests, *work.resolved]))
        return work

    monkeypatch.setattr(service.runs, "plan", spy)
    gate_of(small).shut()
    values = np.full((1, 4, 4), float(cancelled), np.float32)
    path = start(client, {"n": 2, "steps": 3, "start": array_to_json(values)})
    if cancelled:
        client.delete(path)
    gate_of(small).open()
    until(lambda: not service.runs.live)
    assert len(kept) == 5
    until(lambda: gc.collect() >= 0 and not any(ref() for ref in kept), 20)
    assert client.get(path).json()["state"] == ("cancelled" if cancelled else "done")
