"""ONNX Runtime's CUDA backend without a GPU: sessions and values on the CPU under the GPU's names.
The images must be the same.

The fake replays CUDA graphs as ONNX Runtime does: a graph reads and writes the memory that it was
captured with, not what is bound later.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from runtime import BackendError, Bundle, Cancelled, Request, RequestError, Sampler
from runtime.backends.nvidia.onnxruntime_cuda import OPTIONS, PROVIDER, SESSION
from runtime.errors import GpuError

KNOWN_OPTIONS = {"device_id", "enable_cuda_graph", "use_tf32"}
"""Of the CUDA provider, from its documentation (C API, CUDA execution provider)."""


class Options(onnxruntime.SessionOptions):
    """The real options; the CPU session that computes here would not accept an empty list of
    fallbacks."""

    def add_session_config_entry(self, key: str, value: str) -> None:
        assert (key, value) == ("session.disable_cpu_ep_fallback", "1")


class Binding:
    def __init__(self, session: Any) -> None:
        self.real, self.values = session.io_binding(), dict[str, Any]()

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.values[name] = value
        self.real.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.values[name] = value
        self.real.bind_ortvalue_output(name, value)


class Session:
    """A session on the CPU that reports `providers`, for example the GPU's."""

    def __init__(
        self,
        fake: "Library",
        model: bytes,
        options: Any,
        providers: list[Any],
        enable_fallback: int,
    ) -> None:
        assert enable_fallback == 0
        assert providers == [(PROVIDER, OPTIONS)]
        assert OPTIONS.keys() <= KNOWN_OPTIONS
        if fake.refuses:
            raise RuntimeError("CUDA failure 35: CUDA driver version is insufficient")
        self._fake, self._graphs = fake, dict[int, Any]()
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )
        self.get_inputs, self.get_outputs = self._session.get_inputs, self._session.get_outputs
        self.io_binding = lambda: Binding(self._session)

    def get_providers(self) -> list[str]:
        return self._fake.providers

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        graph = int(options.get_run_config_entry("gpu_graph_id"))
        assert graph > 0
        assert binding.values.keys() == {p.name for p in (*self.get_inputs(), *self.get_outputs())}
        assert len({value.data_ptr() for value in binding.values.values()}) == len(binding.values)
        if self._fake.fails:
            raise RuntimeError("Failed to allocate memory for requested buffer")
        self._fake.graphs.add((id(self), graph))
        self._session.run_with_iobinding(self._graphs.setdefault(graph, binding).real)


class Value:
    """onnxruntime.OrtValue with the one constructor in use."""

    @staticmethod
    def ortvalue_from_numpy(array: Any, device: str, number: int) -> Any:
        assert (device, number) == ("cuda", 0)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array.copy(), "cpu", 0)


class Library:
    """The module onnxruntime, with CUDA."""

    OrtValue, SessionOptions = Value, Options

    def __init__(self) -> None:
        self.providers, self.refuses, self.fails = [PROVIDER, "CPUExecutionProvider"], False, False
        self.available, self.graphs = [PROVIDER, "CPUExecutionProvider"], set[tuple[int, int]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(onnxruntime, name)

    def get_available_providers(self) -> list[str]:
        return self.available

    def InferenceSession(
        self, model: bytes, options: Any, providers: list[Any], enable_fallback: int
    ) -> Session:
        return Session(self, model, options, providers, enable_fallback)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setitem(sys.modules, "onnxruntime", made)
    return made


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


def test_the_pictures_are_those_of_onnxruntime_to_the_bit(
    library: Library, bundle: Bundle, sampler: Sampler
) -> None:
    ways: list[dict[str, Any]] = [
        {"n": 3, "label": [1, 2, None], "solver": "ddpm", "steps": 5},
        {"n": 1, "label": 4, "solver": "dpmpp_2m", "steps": 4, "guidance": 3.0},
        {
            "n": 4,
            "label": 7,
            "solver": "ddpm",
            "steps": 6,
            "guidance": 2.0,
            "guidance_interval": (0.3, 2.0),
        },
        {"n": 3, "label": 1, "solver": "ddim", "steps": 3, "guidance": 1.0},
    ]
    mixed = [
        Request(1, label=3, guidance=2.0, solver="ddim", steps=4),
        Request(2, label=1, solver="ddpm", steps=6),
    ]
    with Sampler(bundle, "onnxruntime-cuda") as found:
        for way in ways:
            ran = found.run(found.requests(**way))
            assert ran.samples.tobytes() == sampler.sample(**way).tobytes(), way
        assert ran.timings[0].bucket == 4
        assert ran.timings[0].how == "a graph a row"
        assert not ran.timings[0].captured
        assert found.sample_requests(mixed).tobytes() == sampler.sample_requests(mixed).tobytes()
        # Both graphs at buckets 1, 2 and 4 at most, in both directions of the state.
        assert len(library.graphs) <= 12
    with pytest.raises(BackendError, match="was closed"):
        found.sample(1)


@pytest.fixture(scope="module")
def conditioned(second_format: Path) -> Sampler:
    """On the CPU; it is opened before a test replaces onnxruntime."""
    found = Sampler.load(second_format / "bundle")
    found.backend.bind(1).step(True)
    return found


def test_conditions_go_up_with_the_batch(library: Library, conditioned: Sampler) -> None:
    """Whole programs, and steps from the host, for a batch that is padded."""
    given = conditioned.bundle.draw_conditions(3)
    way: dict[str, Any] = {"n": 3, "label": [0, None, 2], "solver": "ddpm", "steps": 4}
    way |= {"conditions": {**given, "text": [None, *given["text"][1:]]}, "guidance": 2.0}
    expected = conditioned.sample(**way)
    with Sampler(conditioned.bundle, "onnxruntime-cuda") as found:
        assert found.sample(**way).tobytes() == expected.tobytes()
        assert found.sample(**way, on_step=lambda _: None).tobytes() == expected.tobytes()


def test_who_looks_at_the_steps_gets_them_one_by_one(
    library: Library, bundle: Bundle, sampler: Sampler
) -> None:
    found = Sampler(bundle, "onnxruntime-cuda")
    seen: list[list[bytes]] = [[], []]
    for who, kept in zip((found, sampler), seen, strict=True):
        who.sample(3, label=[1, 2, 3], guidance=[1.0, 2.0, 2.0], steps=3, solver="ddpm",
                   on_step=lambda p, k=kept: k.append(p.x.tobytes() + p.denoised.tobytes()))  # fmt: skip
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
    with pytest.raises(Cancelled):
        found.sample(1, on_step=lambda p: False)
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    known = sampler.sample(2, label=1, steps=3)
    assert (
        found.inpaint(known, mask, label=2, steps=3).tobytes()
        == sampler.inpaint(known, mask, label=2, steps=3).tobytes()
    )


def test_nothing_falls_back_to_the_cpu(library: Library, bundle: Bundle) -> None:
    library.providers = ["CPUExecutionProvider"]
    with pytest.raises(
        BackendError, match="would run on CPUExecutionProvider, which was not asked for"
    ):
        Sampler(bundle, "onnxruntime-cuda")
    library.refuses = True
    with pytest.raises(BackendError, match=r"CUDA provider does not take it: CUDA failure 35"):
        Sampler(bundle, "onnxruntime-cuda")
    library.available = ["CPUExecutionProvider"]
    with pytest.raises(
        BackendError,
        match=r"has no CUDA: pip uninstall onnxruntime, then pip install 'unnoise\[cuda\]'",
    ):
        Sampler(bundle, "onnxruntime-cuda")
    with pytest.raises(RequestError, match="leave them out"):
        Sampler(bundle, "onnxruntime-cuda", threads=1)


def test_a_run_that_fails_is_a_typed_error(library: Library, bundle: Bundle) -> None:
    found = Sampler(bundle, "onnxruntime-cuda")
    library.fails = True
    with pytest.raises(
        GpuError, match=r"could not run a batch of 2: Failed to allocate .* smaller max_batch"
    ):
        found.sample(2, label=1, steps=2)
    with pytest.raises(GpuError, match="could not run a batch of 2"):
        found.sample(2, label=1, steps=2, on_step=lambda p: None)


def test_the_real_library_knows_the_keys_that_it_would_take_in_silence() -> None:
    """The configs of a session and a run accept any key; those in use appear in the library's
    code."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    code = next(
        p for p in folder.iterdir() if p.name.startswith("onnxruntime_pybind11_state")
    ).read_bytes()
    for key in (*SESSION, "gpu_graph_id"):
        assert key.encode() in code


def test_the_installed_onnxruntime_without_cuda_is_told(bundle: Bundle) -> None:
    if PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this one has CUDA")
    with pytest.raises(BackendError, match="has no CUDA"):
        Sampler(bundle, "onnxruntime-cuda")
