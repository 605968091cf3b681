"""Backends of a large network keep one copy of its weights, and compute the same bytes."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from runtime import Bundle
from runtime.backends import memory
from runtime.backends.base import Backend
from runtime.backends.host import HostBuffers
from runtime.backends.memory import is_heavy, trim
from runtime.backends.registry import open_backend
from runtime.backends.streams import StreamBuffers, fixed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network counts as large."""
    monkeypatch.setattr(memory, "HEAVY_BYTES", 0)


def rows(backend: Backend, guided: bool, counts: tuple[int, ...] = (1, 2, 3, 2, 1)) -> bytes:
    """Run a row at several sizes of a slice of the same buffers."""
    buffers = backend.bind(3)
    found = b""
    for count in counts:
        noise = np.random.default_rng(0).normal(size=buffers.state.shape)
        buffers.state[:] = noise
        buffers.call[:] = 500, 1, 0.5, 0.5, 1, 2 if guided else 1
        buffers.update[:] = 0.1
        buffers.run(guided, 0, count)
        buffers.turn()
        found += buffers.state[:count].tobytes() + buffers.denoised[:count].tobytes()
    return found


def test_the_weights_of_the_shipped_bundle_are_not_large(precise: Path) -> None:
    bundle = Bundle.load(precise)
    assert not is_heavy(bundle, "fp32")
    assert not is_heavy(bundle, "absent")


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_large_network_has_the_same_bytes(
    precise: Path, name: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name)
    bundle = Bundle.load(precise)
    expected = rows(open_backend(bundle, name, "fp32", 2), guided)
    monkeypatch.setattr(memory, "HEAVY_BYTES", 0)
    assert rows(open_backend(bundle, name, "fp32", 2), guided) == expected


def test_onnxruntime_keeps_no_second_copy(precise: Path, heavy: None) -> None:
    backend = open_backend(Bundle.load(precise), "onnxruntime", "fp32")
    rows(backend, guided=True)
    held = [value for value in vars(backend).values() if isinstance(value, bytes)]
    assert not held
    session = backend.session(False, backend.threads)
    assert not session.get_session_options().enable_mem_pattern


def test_onnxruntime_reads_small_weights_once(
    precise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = open_backend(Bundle.load(precise), "onnxruntime", "fp32")
    monkeypatch.setattr(backend, "_read_weights", lambda: pytest.fail("read again"))
    rows(backend, guided=True)


def test_openvino_frees_what_no_buffers_use(precise: Path, heavy: None) -> None:
    pytest.importorskip("openvino")
    backend = open_backend(Bundle.load(precise), "openvino", "fp32", 1)
    buffers = backend.bind(3)
    for count in (1, 2, 3):
        # In both directions: four bindings are two sizes.
        for _ in range(2):
            buffers.run(False, 0, count)
            buffers.turn()
        gc.collect()
        assert len(backend._compiled) == min(count, 2)
    del buffers
    gc.collect()
    assert not backend._compiled


def test_openvino_keeps_small_models(precise: Path) -> None:
    pytest.importorskip("openvino")
    backend = open_backend(Bundle.load(precise), "openvino", "fp32", 1)
    rows(backend, guided=False)
    gc.collect()
    assert len(backend._compiled) == 3


def test_the_oldest_binding_goes_in_both_directions(
    precise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    buffers = open_backend(Bundle.load(precise), "onnxruntime", "fp32", 1).bind(3)
    assert isinstance(buffers, HostBuffers)
    monkeypatch.setattr(buffers, "_bindings", 4)
    for count in (1, 2):
        for _ in range(2):
            buffers.run(False, 0, count)
            buffers.turn()
    buffers.run(False, 0, 3)
    assert sorted(call.count for call in buffers._bound) == [2, 2, 3]


@pytest.mark.parametrize("streams", [1, 2])
def test_buffers_are_freed_at_once(precise: Path, streams: int) -> None:
    """Without a search for cycles of objects, also if their calls were cut."""
    pytest.importorskip("onnxruntime")
    buffers = open_backend(Bundle.load(precise), "onnxruntime", "fp32", 2).bind(2)
    assert isinstance(buffers, StreamBuffers)
    buffers.cut = fixed(streams)
    buffers.step(False)
    freed = weakref.ref(buffers)
    gc.disable()
    try:
        del buffers
        assert freed() is None
    finally:
        gc.enable()


def test_memory_can_be_given_back_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    trim()
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("no glibc there"))
    trim()
