"""The model repository for Triton, and a real server: the sampler's bytes, and work that ends when
its client leaves.

TRITON_SERVER names the folder `tritonserver` of an unpacked nvidia-pytriton wheel, which need not be
installed. `tritonclient[grpc]` must be importable.
"""

from __future__ import annotations

import ctypes
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from export.triton import Repository, main, write_repository
from runtime import Bundle, RequestError, Sampler

from ..open_inference import check_conditions, check_server

SERVER = "TRITON_SERVER"
WAIT_S = 600
REQUESTS = 64


@pytest.fixture(scope="module")
def bundle(first_release: Path) -> Bundle:
    return Bundle.load(first_release / "bundle")


def test_the_repository_holds_the_bundle_and_its_tensors(bundle: Bundle, tmp_path: Path) -> None:
    assert write_repository(Repository(bundle=bundle, threads=2), tmp_path) == ["digits"]
    config = (tmp_path / "digits" / "config.pbtxt").read_text()
    ports = re.findall(r'name: "(\w+)", data_type: TYPE_(\w+), dims: (\[[-\d, ]+\])', config)
    assert ports == [
        ("seed", "INT64", "[-1]"),
        ("label", "INT64", "[-1]"),
        ("guidance", "FP32", "[-1]"),
        ("sample", "FP32", "[-1, 1, 8, 8]"),
        ("image", "UINT8", "[-1, 8, 8, 1]"),
    ]
    assert 'key: "threads" value { string_value: "2" }' in config
    copy = Bundle.load(tmp_path / "digits" / "1" / "bundle")
    assert copy.sha256 == bundle.sha256
    assert Sampler(copy, threads=1).sample(1, steps=1).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("name", ["digits", "digits_step"])
def test_what_another_program_wrote_is_not_replaced(
    bundle: Bundle, tmp_path: Path, name: str
) -> None:
    repository = Repository(bundle=bundle, steps=True)
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.pbtxt").write_text("precious")
    with pytest.raises(RequestError, match=f"{name} was not written by this command"):
        write_repository(repository, tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")] == [f"{name}/config.pbtxt"]
    shutil.rmtree(tmp_path / name)
    assert write_repository(repository, tmp_path) == write_repository(repository, tmp_path)


def test_conditions_have_their_shapes(second_format: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(second_format / "bundle")
    names = write_repository(Repository(bundle=bundle, steps=True), tmp_path)
    config = (tmp_path / names[0] / "config.pbtxt").read_text()
    assert 'name: "condition_text", data_type: TYPE_FP32, dims: [-1, 3, 4] }' in config
    assert 'name: "condition_style", data_type: TYPE_INT64, dims: [-1] }' in config
    step = (tmp_path / names[1] / "config.pbtxt").read_text()
    assert 'name: "condition_text", data_type: TYPE_FP32, dims: [3, 4] }' in step
    style = 'name: "condition_style", data_type: TYPE_INT64, dims: [1], reshape: { shape: [] } }'
    assert style in step


def test_step_graphs_are_those_that_the_precision_is_computed_from(
    bundle: Bundle, tmp_path: Path
) -> None:
    """bf16 is computed from the fp32 graphs."""
    repository = Repository(bundle=bundle, backend="openvino", precision="bf16", steps=True)
    assert write_repository(repository, tmp_path) == ["digits", "digits_step", "digits_step_guided"]
    assert (tmp_path / "digits_step" / "1" / "step.onnx").is_file()


def test_nothing_is_written_with_a_wrong_setting(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="`max_batch` must be 1 to 1024"):
        write_repository(Repository(bundle=bundle, steps=True, max_batch=0), tmp_path)
    missed = {"fp32": {"onnxruntime": {"missed": 0}, "openvino": {"missed": 1}}}
    reported = replace(bundle, report=missed)
    with pytest.raises(RequestError, match="missed its bounds there"):
        write_repository(Repository(bundle=reported, backend="openvino"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_paths_of_python_are_code(bundle: Bundle, tmp_path: Path) -> None:
    write_repository(Repository(bundle=bundle, python_path=[Path("/opt/it's")]), tmp_path)
    code = (tmp_path / "digits" / "1" / "model.py").read_text()
    found: dict[str, Any] = {"sys": types.SimpleNamespace(path=[])}
    exec(code.replace("import sys\n", "").partition("from serve")[0], found)
    assert found["sys"].path == ["/opt/it's"]


def test_step_graphs_take_a_batch_in_front(bundle: Bundle, tmp_path: Path) -> None:
    names = write_repository(Repository(bundle=bundle, steps=True), tmp_path)
    assert names == ["digits", "digits_step", "digits_step_guided"]
    config = (tmp_path / "digits_step" / "config.pbtxt").read_text()
    assert 'name: "state", data_type: TYPE_FP32, dims: [4, 1, 8, 8]' in config
    assert "reshape: { shape: [] }" in config
    files = {path.name for path in (tmp_path / "digits_step" / "1").iterdir()}
    assert files == {"step.onnx", "weights.bin"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--backend triton", "unknown backend 'triton'"),
        ("--precision fp64", "unknown precision 'fp64'"),
        ("--precision int8", "has no int8. It has: fp32"),
        ("--threads 0", "`threads` must be 1 to 1024"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    bundle: Bundle,
    arguments: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(bundle.path), *arguments.split(), "--out", str(tmp_path / "repository")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "repository").exists()


class Addresses(NamedTuple):
    """The addresses of a server."""

    http: str
    grpc: str


@pytest.fixture(scope="module")
def server(
    bundle: Bundle, second_format: Path, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Addresses]:
    """A server of the bundle, and of one with conditions."""
    if SERVER not in os.environ:
        pytest.skip(f"{SERVER} names no unpacked server")
    pytest.importorskip("tritonclient.grpc", reason="pip install 'tritonclient[grpc]'")
    folder = Path(os.environ[SERVER])
    repository = tmp_path_factory.mktemp("triton") / "repository"
    paths = [str(root), sysconfig.get_path("purelib")]
    for served in (bundle, Bundle.load(second_format / "bundle")):
        write_repository(Repository(bundle=served, threads=1, python_path=paths), repository)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = "triton_python_backend_stub"
    # The wheel keeps the stubs of all Pythons elsewhere, and the backend looks for one here.
    backends = Path(shutil.copytree(folder / "backends", repository.parent / "backends"))
    shutil.copy(folder / "python_backend_stubs" / version / stub, backends / "python" / stub)
    # Those of the wheel, and the one of this Python.
    libraries = [str(folder.parents[1] / "nvidia_pytriton.libs")]
    libraries.append(sysconfig.get_config_var("LIBDIR") or "")
    ports = [_free() for _ in range(3)]
    names = ("http", "grpc", "metrics")
    options = [f"--{name}-port={port}" for name, port in zip(names, ports, strict=True)]
    log = repository.parent / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                str(folder / "bin" / "tritonserver"),
                f"--model-repository={repository}",
                f"--backend-directory={backends}",
                "--backend-config=python,shm-default-byte-size=8388608",
                *options,
            ],
            env={
                **os.environ,
                "LD_LIBRARY_PATH": os.pathsep.join(libraries),
                "PYTHONHOME": sys.base_prefix,
                "PYTHONPATH": os.pathsep.join(paths),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        addresses = Addresses(f"http://127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}")
        _wait(process, addresses.grpc, log)
        yield addresses
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(WAIT_S)
        finally:
            # Its Python stubs are in its group, and may outlive it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def address(server: Addresses) -> str:
    """The gRPC address of the server."""
    return server.grpc


def _end_with_parent() -> None:
    """Have Linux end this process if the tests are killed: prctl(PR_SET_PDEATHSIG, SIGTERM)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until the server is ready."""
    from tritonclient import grpc

    end = time.monotonic() + WAIT_S
    with grpc.InferenceServerClient(address) as client:
        while process.poll() is None:
            try:
                if client.is_server_ready():
                    return
            except grpc.InferenceServerException:
                pass
            assert time.monotonic() < end
            time.sleep(0.2)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def inputs_of(seeds: list[int], labels: list[int] | None, scale: float) -> list[Any]:
    """The input tensors of a request."""
    from tritonclient import grpc

    arrays = {"seed": np.array(seeds, np.int64)}
    if labels is not None:
        arrays["label"] = np.array(labels, np.int64)
        arrays["guidance"] = np.full(len(seeds), scale, np.float32)
    found = []
    for name, array in arrays.items():
        kind = "FP32" if array.dtype == np.float32 else "INT64"
        tensor = grpc.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


def ask(client: Any, name: str, seeds: list[int], labels: list[int] | None, **how: object) -> None:
    """Send a request over the client's stream."""
    from tritonclient import grpc

    client.async_stream_infer(
        "digits",
        inputs_of(seeds, labels, 2.5),
        request_id=name,
        outputs=[grpc.InferRequestedOutput("sample")],
        parameters=how,
    )


@pytest.mark.slow
def test_mixed_requests_have_the_samplers_bytes(address: str, bundle: Bundle) -> None:
    from tritonclient import grpc

    sampler = Sampler(bundle, threads=1)
    kinds = [("ddim", 5), ("ddpm", 8), ("unipc", 6), ("dpmpp_2m", 4)]
    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(address) as client:
        client.start_stream(partial(lambda result, error: answers.put((result, error))))
        for i in range(REQUESTS):
            solver, steps = kinds[i % 4]
            labels = None if i % 3 == 0 else [i % 10, 3]
            ask(client, str(i), [i, i + 1000], labels, solver=solver, steps=steps)
        found = {}
        while len(found) < REQUESTS:
            result, error = answers.get(timeout=WAIT_S)
            assert error is None
            found[int(result.get_response().id)] = result.as_numpy("sample")
        client.stop_stream()
    for i, samples in found.items():
        solver, steps = kinds[i % 4]
        label = None if i % 3 == 0 else [i % 10, 3]
        how = {"label": label, "guidance": 2.5} if label else {}
        expected = sampler.sample(2, [i, i + 1000], solver=solver, steps=steps, **how)
        assert samples.tobytes() == expected.tobytes(), i


@pytest.mark.slow
def test_the_client_that_talks_to_the_service_talks_to_triton(
    server: Addresses, bundle: Bundle
) -> None:
    check_server(server.http, bundle)


@pytest.mark.slow
def test_conditions_are_inputs(server: Addresses, second_format: Path) -> None:
    check_conditions(server.http, Bundle.load(second_format / "bundle"))


@pytest.mark.slow
def test_a_request_that_cannot_be_used_says_why(address: str) -> None:
    from tritonclient import grpc

    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(address) as client:
        client.start_stream(partial(lambda result, error: answers.put((result, error))))
        for how, message in (
            ({"solver": "dimm"}, "Did you mean 'ddim'"),
            ({"step": 3}, "Did you mean 'steps'"),
            ({"steps": 0}, "`steps` must be"),
        ):
            ask(client, "bad", [1], [3], **how)
            _, error = answers.get(timeout=WAIT_S)
            assert message in str(error)
        ask(client, "good", [1], [3], steps=2)
        result, error = answers.get(timeout=WAIT_S)
        assert error is None
        assert result.as_numpy("sample").shape == (1, 1, 8, 8)
        client.stop_stream()


@pytest.mark.slow
def test_a_client_that_cancels_frees_the_engine(address: str, bundle: Bundle) -> None:
    """A request of hours is cancelled, and the next one does not wait for it."""
    from tritonclient import grpc

    answers: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(address) as client:
        client.start_stream(partial(lambda result, error: answers.put((result, error))))
        # 4,096 samples of 100 guided steps fill every place of the engine.
        ask(client, "long", list(range(4096)), [3] * 4096, solver="ddpm", steps=100)
        time.sleep(1)
        client.stop_stream(cancel_requests=True)
    with grpc.InferenceServerClient(address) as client:
        client.start_stream(partial(lambda result, error: answers.put((result, error))))
        end = time.monotonic() + WAIT_S
        while True:
            # Until the server knows, the engine is full and refuses more.
            ask(client, "next", list(range(4096)), [3] * 4096, solver="ddim", steps=1)
            result, error = answers.get(timeout=WAIT_S)
            if error is None and result.get_response().id == "next":
                break
            assert time.monotonic() < end
            time.sleep(0.2)
        client.stop_stream()
    assert result.as_numpy("sample").shape == (4096, 1, 8, 8)
