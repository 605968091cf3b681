"""The GPU backends on real hardware: make test-gpu. Skipped without an NVIDIA GPU; test_tensorrt.py
tests the same loop on fakes."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export.graph.cached_engines import Order, build_all
from export.graph.sensitivity import median_psnr
from runtime import BackendError, Bundle, Sampler
from runtime.backends.nvidia import cuda
from runtime.backends.nvidia.cuda import Cuda, cudart
from runtime.backends.registry import offered
from runtime.errors import CaptureError

pytestmark = pytest.mark.gpu
LEAST_DB = {"fp16": 40.0, "int8-trt": 35.0}
"""Against float32, as in docs/precisions.md."""
BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda")
WAYS = (
    {"solver": "dpmpp_2m", "steps": 20, "label": 3, "guidance": 1.0},
    {"solver": "ddpm", "steps": 30, "label": 3, "guidance": 2.0, "guidance_interval": (0.2, 5.0)},
)


@pytest.fixture(scope="module")
def device() -> Cuda:
    try:
        return Cuda(cudart())
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reference(shipped: Bundle) -> list[np.ndarray]:
    return [Sampler(shipped).sample(3, 7, **way) for way in WAYS]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(
    request: pytest.FixtureRequest,
    device: Cuda,
    shipped: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A backend of this machine, with its engines in a separate cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNNOISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        try:
            if request.param != "onnxruntime-cuda":
                build_all(
                    shipped, Order(request.param, buckets=(1, 4)), ["fp32", "fp16", "int8-trt"]
                )
            Sampler(shipped, request.param).close()
        except BackendError as error:
            pytest.skip(str(error))
        yield request.param


@pytest.fixture(params=["fp32", "fp16", "int8-trt"])
def opened(request: pytest.FixtureRequest, backend: str, shipped: Bundle) -> Iterator[Sampler]:
    if (backend, request.param) not in offered(shipped):
        pytest.skip(f"{backend} does not compute {request.param}")
    with Sampler(shipped, backend, request.param) as sampler:
        yield sampler


def test_the_pictures_are_onnxruntimes_within_the_bounds(
    opened: Sampler, reference: list[np.ndarray]
) -> None:
    for way, expected in zip(WAYS, reference, strict=True):
        found = opened.sample(3, 7, **way)
        if opened.backend.precision == "fp32":
            assert np.abs(found - expected).max() < 2e-3
        else:
            psnr = median_psnr(found[None], expected[None], opened.bundle.sample_range)
            assert psnr >= LEAST_DB[opened.backend.precision]


def test_the_loop_is_one_graph_and_gives_the_same_bytes_again(
    opened: Sampler, capsys: pytest.CaptureFixture
) -> None:
    for way in WAYS:
        first = opened.sample(3, 7, **way)
        ran = opened.run(opened.requests(3, 7, **way))
        assert ran.samples.tobytes() == first.tobytes()
        (timing,) = ran.timings
        assert timing.how.endswith(("graph", "graphs")), timing.note
        assert not timing.captured
        begun = time.perf_counter()
        opened.sample(3, 7, **way)
        spent = 1e3 * (time.perf_counter() - begun)
        with capsys.disabled():
            name = f"{opened.backend.name} {opened.backend.precision} {way['solver']}"
            print(
                f"\n{name}: {timing.rows} rows of {timing.bucket}: {timing.device_ms:.2f} ms on "
                f"the device, {spent:.2f} ms in all"
            )


def test_an_identity_row_returns_the_state_bit_for_bit(opened: Sampler) -> None:
    buffers = opened.backend.bind(3)
    state = np.random.default_rng(1).standard_normal(buffers.state.shape).astype(np.float32)
    for guided in (False, True):
        buffers.state[:], buffers.call[:], buffers.update[:] = (
            state,
            (999, 1, 0, 0, 1, 2),
            np.eye(4, 6),
        )
        buffers.step(guided)
        assert buffers.state.tobytes() == state.tobytes()


def test_plain_enqueues_give_what_the_graph_gives(
    opened: Sampler, shipped: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphed = [opened.sample(3, 7, **way) for way in WAYS]

    def refuse(*_: object) -> None:
        raise CaptureError("refused by the test")

    monkeypatch.setattr(cuda.Cuda, "capture", refuse)
    with Sampler(shipped, opened.backend.name, opened.backend.precision) as plain:
        for way, expected in zip(WAYS, graphed, strict=True):
            ran = plain.run(plain.requests(3, 7, **way))
            assert ran.samples.tobytes() == expected.tobytes()
            assert ran.timings[0].how == "plain enqueues"


def test_a_graph_survives_other_batch_sizes(opened: Sampler) -> None:
    for way in WAYS:
        first = opened.sample(1, 7, **way).tobytes()
        for n in (opened.backend.largest or 64, 1, 3, 1):
            opened.sample(n, 7, **way, on_step=(lambda _: None) if n == 3 else None)
        assert opened.sample(1, 7, **way).tobytes() == first


def test_closing_gives_the_memory_back(
    backend: str, shipped: Bundle, device: Cuda, tmp_path: Path
) -> None:
    def once() -> int:
        with Sampler(shipped, backend) as sampler:
            sampler.sample(4, steps=5)
        return device.free_bytes()

    once()
    assert abs(once() - once()) < 8 * 2**20
