"""The service on Ray Serve: two replicas return the sampler's bytes, a client that leaves frees its
work, and a replica that is killed is replaced."""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import Bundle, RequestError, Sampler

from ..ray_cluster import CPUS, TRIES, cluster, limited, processes

pytestmark = [
    pytest.mark.slow,
    # Ray leaves sockets and files to the end of the process.
    pytest.mark.filterwarnings("ignore"),
]
WAIT_S = 600


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    with limited():
        yield


@pytest.fixture(scope="module")
def bundle(first_release: Path) -> Bundle:
    return Bundle.load(first_release / "bundle")


@pytest.fixture(scope="module")
def address(bundle: Bundle) -> Iterator[str]:
    """Two replicas on two CPUs, behind Ray's proxy."""
    pytest.importorskip("ray.serve", reason="pip install 'unnoise[ray]'")
    from ray import serve as ray_serve

    from serve.ray import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A busy machine is not a dead proxy.
    patience = {
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "300",
    }
    with cluster(patience):
        for left in reversed(range(TRIES)):
            try:
                with limited():
                    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
                break
            except TimeoutError:  # the proxy has 60 seconds to start
                if not left:
                    raise
        with limited():
            ray_serve.run(app({"bundles": str(bundle.path), "replicas": str(CPUS)}))
        yield f"http://127.0.0.1:{port}"
        ray_serve.shutdown()


def samples_of(address: str, **fields: object) -> np.ndarray:
    """One sample of the service, float32."""
    httpx = pytest.importorskip("httpx")
    body = {"format": "npy", **fields}
    response = httpx.post(f"{address}/v1/samples", json=body, timeout=WAIT_S)
    assert response.status_code == 200, response.text
    return np.load(io.BytesIO(response.content))


def replicas() -> list[int]:
    """The processes of the replicas."""
    return processes("ServeReplica")


def test_mixed_requests_have_the_samplers_bytes(address: str, bundle: Bundle) -> None:
    sampler = Sampler(bundle, threads=1)
    kinds = [
        {"solver": solver, "steps": steps, "label": label, "guidance": scale}
        for solver, steps in (("ddim", 5), ("ddpm", 8), ("unipc", 6))
        for label, scale in ((3, 1.0), (5, 2.5))
    ]
    found: dict[int, np.ndarray] = {}

    def ask(seed: int) -> None:
        found[seed] = samples_of(address, seed=seed, **kinds[seed % len(kinds)])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(found) == 24
    for seed, samples in found.items():
        expected = sampler.sample(1, seed, **kinds[seed % len(kinds)])
        assert samples.tobytes() == expected.tobytes()


def test_a_client_that_leaves_cancels_its_work(address: str) -> None:
    httpx = pytest.importorskip("httpx")

    def counted(name: str) -> float:
        """A counter, from as many responses as it takes to reach every replica."""
        totals = []
        for _ in range(20):
            text = httpx.get(f"{address}/metrics", timeout=WAIT_S).text
            lines = [line for line in text.splitlines() if line.startswith(f"{name} ")]
            totals += [float(line.split()[1]) for line in lines]
        return max(totals)

    before = counted("unnoise_disconnects_total")
    body = {"seed": 1, "n": 64, "solver": "ddpm", "steps": 100, "label": 3, "guidance": 2}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/samples", json=body, timeout=httpx.Timeout(WAIT_S, read=1.0))
    end = time.monotonic() + WAIT_S
    while counted("unnoise_disconnects_total") == before:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_replica_that_is_killed_is_replaced(address: str, bundle: Bundle) -> None:
    httpx = pytest.importorskip("httpx")
    before = replicas()
    assert len(before) == CPUS
    os.kill(before[0], signal.SIGKILL)
    expected = Sampler(bundle, threads=1).sample(1, 77, label=3, steps=5)
    succeeded = 0
    end = time.monotonic() + WAIT_S
    # The proxy may fail requests until it knows. None may hang, and none may be wrong.
    while succeeded < 20 or len(replicas()) < CPUS:
        assert time.monotonic() < end
        body = {"format": "npy", "seed": 77, "label": 3, "steps": 5}
        response = httpx.post(f"{address}/v1/samples", json=body, timeout=WAIT_S)
        if response.status_code == 200:
            assert response.content.endswith(expected.tobytes())
            succeeded += 1
        time.sleep(0.05)
    assert before[0] not in replicas()


def test_a_replica_opens_the_bundle_that_a_request_names(
    address: str, bundle: Bundle, tmp_path: Path
) -> None:
    """The last test that needs the other replicas' processors."""
    httpx = pytest.importorskip("httpx")
    from ray import serve as ray_serve

    from serve.ray import app

    ray_serve.delete("default")
    folders = [shutil.copytree(bundle.path, tmp_path / name) for name in ("first", "second")]
    ray_serve.run(app({"bundles": ",".join(map(str, folders)), "models": "1"}))
    expected = Sampler(bundle, threads=1).sample(1, 5, label=3, steps=4)
    body = {"format": "npy", "seed": 5, "label": 3, "steps": 4}
    for name in ("first", "second", "first"):
        headers = {"serve_multiplexed_model_id": name}
        response = httpx.post(f"{address}/v1/samples", json=body, headers=headers, timeout=WAIT_S)
        assert response.status_code == 200, response.text
        assert response.content.endswith(expected.tobytes())
    response = httpx.post(f"{address}/v1/samples", json=body, timeout=WAIT_S)
    assert response.status_code == 400
    assert "one of first, second" in response.json()["detail"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs bundles=NAME"),
        ({"bundle": "emoji32"}, "Did you mean 'bundles'"),
        ({"bundles": "emoji32", "replicas": "0"}, "`replicas` must be 1 to"),
        ({"bundles": "emoji32", "threads": "many"}, "`threads` must be of type int"),
        ({"bundles": "emoji32,"}, "needs bundles=NAME"),
        ({"bundles": "emoji32", "gpus": "-1"}, "`gpus` must be a number from 0"),
        ({"bundles": "a/x,b/x", "models": "1"}, "two bundles are named 'x'"),
    ],
)
def test_wrong_arguments_are_refused(given: dict[str, str], message: str) -> None:
    pytest.importorskip("ray.serve", reason="pip install 'unnoise[ray]'")
    from serve.ray import app

    with pytest.raises(RequestError, match=message.replace("`", ".")):
        app(given)
