"""What the service reports about itself: metrics, the log, and the page's files."""

from __future__ import annotations

import json
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from runtime import Sampler
from serve import Settings, log
from serve.health import PAGE

from .services import GatedBuffers, client_of, gate_of, until

SECRET = "a user's own words"


def values(client: TestClient) -> dict[tuple[str, ...], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happens(client: TestClient) -> None:
    client.post("/v1/samples", json={"n": 2, "steps": 5, "label": "one", "guidance": 3})
    client.post("/v1/samples", json={"label": SECRET})
    client.get(f"/v1/jobs/{SECRET}")
    client.get(f"/{SECRET}")
    found = values(client)
    assert found["unnoise_requests_total", "200", "/v1/samples"] == 1
    assert found["unnoise_requests_total", "400", "/v1/samples"] == 1
    assert found["unnoise_requests_total", "404", "/v1/jobs/{id}"] == 1
    assert found["unnoise_requests_total", "404", "none"] == 1
    assert found["unnoise_tick_seconds_count", "guided", "small"] >= 5
    # Two rows of the check at the start, and two guided samples of five.
    assert found["unnoise_rows_total", "small"] == 2 + 2 * 2 * 5
    assert found["unnoise_live", "small"] == found["unnoise_waiting", "small"] == 0
    assert found["unnoise_queue_seconds_count",] == 1
    assert SECRET not in client.get("/metrics").text


def test_the_allow_header_lists_all_methods_of_a_path(client: TestClient) -> None:
    for path, methods in (("/v1/samples", "GET, HEAD, POST"), ("/v1/jobs/x", "DELETE, GET, HEAD")):
        got = client.put(path)
        assert got.status_code == 405
        assert ", ".join(sorted(got.headers["allow"].split(", "))) == methods
    assert client.head("/v1/samples").status_code == 200


def test_models_may_be_listed_while_they_are_opened(client: TestClient) -> None:
    models = client.app.state.service.models  # type: ignore[attr-defined]
    listed = iter(models.all)
    models._models["another"] = models.get("small")  # as the thread that opens them does
    assert list(listed) == ["small"]
    del models._models["another"]


def test_metrics_show_what_waits(client: TestClient, small: Sampler) -> None:
    gate_of(small).shut()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.post, "/v1/samples", json={"n": 3, "steps": 5, "deadline": 60})
        until(lambda: values(client)["unnoise_backlog_rows", "small"] == 15)
        assert values(client)["unnoise_backlog_seconds", "small"] > 0
        got = client.post("/v1/samples", json={"n": 60, "steps": 20, "deadline": 0})
        assert got.status_code == 422
        assert values(client)["unnoise_rejected_total", "small", "deadline"] == 1
        gate_of(small).open()
        assert waiting.result().status_code == 200


def test_one_line_of_log_for_each_request(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "unnoise.serve")
    caplog.clear()
    body = {"seed": 1, "steps": 4, "label": 2, "guidance": 2, "solver": "ddim"}
    client.post("/v1/samples", json=body, headers={"x-request-id": "mine"})
    client.get("/v1/samples/%0A{}", headers={"x-request-id": "two\nlines"})
    first, second = (json.loads(record.getMessage()) for record in caplog.records)
    assert first["id"] == "mine"
    assert first["endpoint"] == "/v1/samples"
    assert first["code"] == 200
    assert first["rows"] == 8
    assert first["bytes"] > 0
    assert {"seconds", "queue_s", "run_s", "client", "method", "path", "time"} <= first.keys()
    assert second["code"] == 404
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_a_warning_of_a_library_is_a_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = logging.getLogger()
    before = [*root.handlers]
    level = log.LOGGER.level
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        try:
            log.to_stderr()
            warnings.warn("Corrupt EXIF data.\nTwice.", stacklevel=1)
        finally:
            logging.captureWarnings(False)
            log.LOGGER.setLevel(level)
            for handler in {*root.handlers} - {*before}:
                root.removeHandler(handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert "Corrupt EXIF data" in json.loads(line)["message"]


def test_an_unforeseen_error_stays_in_the_log(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("the inner workings")

    monkeypatch.setattr("serve.samples.requests_of", fail)
    got = client.post("/v1/samples", json={})
    assert got.status_code == 500
    assert "inner workings" not in got.text
    assert got.headers["x-request-id"]
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert "the inner workings" in lines[-1]["error"]


def test_a_step_that_fails_is_a_500_with_a_sentence(
    client: TestClient, small: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("the device is gone")

    monkeypatch.setattr(gate_of(small), "wait", fail)
    got = client.post("/v1/samples", json={})
    assert got.status_code == 500
    assert "a step failed" in got.json()["detail"]
    monkeypatch.undo()
    assert client.post("/v1/samples", json={}).status_code == 200


def test_starting(small: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    with client_of([small]) as client:
        monkeypatch.setattr(client.app.state.service.models, "opened", False)  # type: ignore
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        got = client.post("/v1/samples", json={})
        assert got.status_code == 503
        assert got.headers["retry-after"]


def test_an_engine_that_returns_other_bytes_is_not_served(
    small: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = small.sample(1, 99, steps=2)
    monkeypatch.setattr(small, "sample_requests", lambda _: other)
    with client_of([small]) as client:
        failure = client.app.state.service.models.failure  # type: ignore[attr-defined]
        assert "returned other bytes" in str(failure)
        assert client.get("/readyz").status_code == 503


def test_a_network_that_returns_nan_is_not_served(
    small: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = GatedBuffers.run

    def broken(self: GatedBuffers, guided: bool, first: int, count: int) -> None:
        run(self, guided, first, count)
        self.next_state[first : first + count] = np.nan

    monkeypatch.setattr(GatedBuffers, "run", broken)
    with client_of([small]) as client:
        failure = client.app.state.service.models.failure  # type: ignore[attr-defined]
        assert "small returned NaN" in str(failure)
        assert client.get("/readyz").status_code == 503


def test_two_bundles_of_one_name(small: Sampler) -> None:
    with client_of([small, small]) as client:
        failure = client.app.state.service.models.failure  # type: ignore[attr-defined]
        assert "two bundles are named 'small'" in str(failure)


def test_the_page(client: TestClient, root: Path) -> None:
    for path, (name, kind) in PAGE.items():
        file = root / "serve" / "page" / name
        got = client.get(path)
        if file.exists():
            assert got.content == file.read_bytes()
            assert got.headers["content-type"].startswith(kind)
        else:
            assert got.status_code == 404


def test_nothing_else_of_the_package_is_served(client: TestClient) -> None:
    for path in ("/page/index.html", "/index.html", "/app.py", "/..%2fapp.py", "/%2e%2e/app.py"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("name", ["samples", "rows", "uploads", "body_s", "drain_s", "cache_bytes"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        Settings(**{name: -1})
