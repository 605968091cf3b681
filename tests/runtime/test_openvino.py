"""The OpenVINO backend: the same promises as ONNX Runtime's in fp32, bf16 and int8, from memory alone, with a cache that may be damaged."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime import BackendError, Bundle, BundleError, RequestError, Sampler
from runtime.backends import offered, open_backend
from runtime.backends.onnxfile import with_weights
from runtime.backends.openvino import CACHE, OpenVino, cache_folder
from runtime.program import R

openvino = pytest.importorskip("openvino")
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
PRECISIONS = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(not BF16, reason="this processor has no bf16")),
    "int8",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "openvino"


@pytest.fixture(params=PRECISIONS)
def opened(request: pytest.FixtureRequest, precise: Path) -> OpenVino:
    return open_backend(Bundle.load(precise), "openvino", request.param)


def one_row(backend: OpenVino, state: np.ndarray, guided: bool, time: float = 999) -> tuple[np.ndarray, np.ndarray]:
    buffers = backend.bind(len(state))
    buffers.state[:], buffers.label[:] = state, np.arange(len(state))
    buffers.call[:], buffers.update[:] = (time, 1, 0, 1, np.inf, 2), np.eye(R, R + 2)
    buffers.step(guided)
    return buffers.state.copy(), buffers.denoised.copy()


@pytest.mark.parametrize("guided", [False, True])
def test_an_identity_row_returns_the_state_bit_for_bit(opened: OpenVino, guided: bool) -> None:
    state = np.random.default_rng(0).normal(size=(3, R, 1, 8, 8)).astype(np.float32) * 1e4
    assert one_row(opened, state, guided)[0].tobytes() == state.tobytes()


def test_a_sample_keeps_its_bytes_whatever_its_batch(opened: OpenVino) -> None:
    sampler = Sampler(opened.bundle, opened)
    labels = [3, None, 7, 0, 3, 3, 9]
    batch = sampler.sample(7, 20, label=labels, solver="dpmpp_2m", steps=6)
    for i in (0, 1, 4, 6):
        assert sampler.sample(1, 20 + i, label=labels[i], solver="dpmpp_2m", steps=6).tobytes() == batch[i].tobytes()
    mixed = sampler.sample(3, 20, label=labels[:3], guidance=[2.0, None, 1.0], solver="dpmpp_2m", steps=6)
    assert mixed[0].tobytes() == batch[0].tobytes()


def test_the_time_is_not_rounded_to_bf16(precise: Path) -> None:
    """bf16 has no 999 and no 1001 beside 1000: the difference that one of them makes must be float32's."""
    if not BF16:
        pytest.skip("this processor has no bf16")
    state = np.random.default_rng(1).normal(size=(2, R, 1, 8, 8)).astype(np.float32)
    exact, rounded = (OpenVino(Bundle.load(precise), p, 1) for p in ("fp32", "bf16"))
    answers = {t: one_row(rounded, state, False, t)[1] for t in (996.0, 998.0, 1000.0)}
    assert len({a.tobytes() for a in answers.values()}) == 3, "bf16 would round all three times to 1000 or 996"
    error = np.abs(answers[998.0] - one_row(exact, state, False, 998.0)[1]).max()
    assert 0 < error < 0.05


def test_float32_agrees_with_onnx_runtime(precise: Path, sampler: Sampler) -> None:
    other = Sampler.load(precise, "openvino")
    settings = {"label": [1, 2, 3, None], "solver": "ddpm", "steps": 20}
    assert np.abs(other.sample(4, 0, **settings) - sampler.sample(4, 0, **settings)).max() < 2e-3


def test_int8_is_offered_where_it_was_checked_and_nowhere_else(precise: Path, edited) -> None:
    bundle = Bundle.load(precise)
    assert ("openvino", "int8") in offered(bundle)
    unchecked = {p: {b: w for b, w in entry.items() if b != "openvino"} for p, entry in bundle.report.items()}
    object.__setattr__(bundle, "report", unchecked)
    with pytest.raises(
        RequestError, match="int8 of tiny was not checked on openvino; export it where openvino is installed"
    ):
        open_backend(bundle, "openvino", "int8")
    with pytest.raises(RequestError, match="openvino does not compute int8-trt, which is for GPUs"):
        open_backend(bundle, "openvino", "int8-trt")


def test_a_processor_without_bf16_is_told(precise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def get_property(self, *_: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Core)
    with pytest.raises(BackendError, match="no bf16 arithmetic: use precision fp32 or int8"):
        open_backend(Bundle.load(precise), "openvino", "bf16")


def test_a_missing_library_says_how_to_install_it(precise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install 'unnoise\[openvino\]'"):
        Sampler.load(precise, "openvino")


def test_the_cache_is_the_users_alone_and_can_be_turned_off(
    precise: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Sampler.load(precise, "openvino").sample(1, label=0, steps=2)
    assert list(cache.glob("*.blob"))
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    again = Sampler.load(precise, "openvino").sample(1, label=0, steps=2)
    assert again.tobytes() == expected.tobytes()
    monkeypatch.setenv(CACHE, "")
    assert cache_folder() is None
    assert Sampler.load(precise, "openvino").sample(1, label=0, steps=2).tobytes() == expected.tobytes()


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_cache_changes_nothing(precise: Path, cache: Path, damage: str) -> None:
    """In a process of its own: whatever OpenVINO makes of it must not be a crash."""
    expected = Sampler.load(precise, "openvino").sample(1, label=0, steps=2)
    for blob in cache.glob("*.blob"):
        data = blob.read_bytes()
        noise = np.random.default_rng(0).bytes(len(data))
        blob.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": noise}[damage])
    code = (
        "import sys; from runtime import Sampler\n"
        f"sys.stdout.buffer.write(Sampler.load({str(precise)!r}, 'openvino').sample(1, label=0, steps=2).tobytes())"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, env=dict(os.environ), capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout == expected.tobytes()


def test_weights_are_put_inside_byte_for_byte(precise: Path) -> None:
    for name in ("step.onnx", "sampler_guided.onnx"):
        folder = precise / "fp32"
        inlined = onnx.load_model_from_string(
            with_weights((folder / name).read_bytes(), (folder / "weights.bin").read_bytes())
        )
        assert inlined.SerializeToString(deterministic=True) == onnx.load(folder / name).SerializeToString(
            deterministic=True
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../secret", "lies in the file '../secret'"),
        ("location", "/etc/passwd", "keep weights in 'weights.bin' alone"),
        ("offset", str(10**12), "which has"),
        ("length", "-1", "is said to lie at byte"),
    ],
)
def test_no_path_in_a_graph_is_followed(precise: Path, key: str, value: str, message: str) -> None:
    model = onnx.load(precise / "fp32" / "step.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == key).value = value
    with pytest.raises(BundleError, match=message):
        with_weights(model.SerializeToString(), (precise / "fp32" / "weights.bin").read_bytes())


@pytest.mark.parametrize("data", [b"\xff" * 40, b"\x0a\xff\xff\xff\xff\x0f", b"\x3a\x7f\x00", bytes(range(1, 200))])
def test_what_is_no_onnx_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="no step graph"):
        with_weights(data, b"")
