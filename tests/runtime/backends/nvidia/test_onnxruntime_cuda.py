"""ONNX Runtime's CUDA backend without a GPU: strict fakes run it on host memory, and the images must
equal those of the onnxruntime backend.

What the fake of ONNX Runtime holds: fake_onnxruntime.py.
"""

import gc
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from runtime import BackendError, Bundle, Cancelled, Request, RequestError, Sampler
from runtime.backends.nvidia import cuda_libraries
from runtime.backends.nvidia.cuda import Cuda
from runtime.backends.nvidia.onnxruntime_cuda import PROVIDER, SESSION
from runtime.backends.nvidia.onnxruntime_engine import RUN
from runtime.errors import (
    CudaLibraryError,
    GpuError,
    GpuMemoryError,
    NoDriverError,
    NoGpuError,
)

from ....root import ROOT
from . import fake_cuda, fake_onnxruntime
from .fake_cuda import FREES, HARMLESS, Cudart, World, use_once
from .fake_onnxruntime import Library


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Library]:
    """machine(…): use a fake machine from now on, with onnxruntime-gpu."""

    def make(**world: Any) -> Library:
        made = Library(World(**world))
        monkeypatch.setitem(sys.modules, "onnxruntime", made)
        monkeypatch.setattr(cuda_libraries, "cudart", lambda _: Cudart(made.world))
        monkeypatch.setattr(cuda_libraries, "loads", made.loads)
        return made

    return make


@pytest.fixture
def library(machine: Callable[..., Library]) -> Iterator[Library]:
    yield machine()
    fake_cuda.ILLEGAL.clear()


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


SCHEDULES: dict[str, tuple[int, ...]] = {
    "late": (),
    "at once": (0, 1),
    "copies at once": (1,),
    "work at once": (0,),
}


@pytest.mark.parametrize("eager", SCHEDULES.values(), ids=SCHEDULES)
def test_the_pictures_are_those_of_onnxruntime_to_the_bit(
    machine: Callable[..., Library], bundle: Bundle, sampler: Sampler, eager: tuple[int, ...]
) -> None:
    library = machine(eager=eager)
    ways: list[dict[str, Any]] = [
        {"n": 3, "label": [1, 2, None], "solver": "ddpm", "steps": 5},
        {"n": 1, "label": 4, "solver": "dpmpp_2m", "steps": 4, "guidance": 3.0},
        {
            "n": 4,
            "label": 7,
            "solver": "ddpm",
            "steps": 11,
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
        ran = found.run(found.requests(**way))
        assert ran.samples.tobytes() == sampler.sample(**way).tobytes()
        assert ran.timings[0].bucket == 4
        assert ran.timings[0].how == "2 graphs"
        assert not ran.timings[0].captured
        assert ran.timings[0].device_ms == 1.5
        assert found.sample_requests(mixed).tobytes() == sampler.sample_requests(mixed).tobytes()
        # The plain and the guided session for 1, 2 and 4 samples, at most.
        assert library.opened <= 6
    with pytest.raises(BackendError, match="was closed"):
        found.sample(1)
    found.close()
    assert not library.world.held()


def test_every_thread_uses_the_same_graphs(
    library: Library, bundle: Bundle, sampler: Sampler
) -> None:
    """They are ours. ONNX Runtime's own belong to a thread: each new one would capture again."""
    way: dict[str, Any] = {"n": 2, "label": 1, "solver": "ddpm", "steps": 3, "guidance": 1.0}
    expected = sampler.sample(**way).tobytes()
    seen = list[bytes]()
    with Sampler(bundle, "onnxruntime-cuda") as found:
        found.sample(**way)
        captures, used = library.world.calls.count("cudaStreamBeginCapture"), library.world.used
        for _ in range(4):
            thread = threading.Thread(target=lambda: seen.append(found.sample(**way).tobytes()))
            thread.start()
            thread.join()
        assert library.world.calls.count("cudaStreamBeginCapture") == captures == 2
        assert library.world.used == used
    assert seen == [expected] * 4


def test_a_graph_survives_other_batch_sizes(
    library: Library, bundle: Bundle, sampler: Sampler
) -> None:
    """Each size has its own sessions: one that runs a larger batch moves memory that graphs read."""
    with Sampler(bundle, "onnxruntime-cuda") as found:
        for n in (1, 4, 1, 4, 2, 1):
            way: dict[str, Any] = {"n": n, "label": 1, "steps": 3, "guidance": 2.0}
            ran = found.run(found.requests(**way))
            assert ran.samples.tobytes() == sampler.sample(**way).tobytes()
            assert not ran.timings[0].note
            stepped = found.sample(**way, on_step=lambda _: None)
            assert stepped.tobytes() == ran.samples.tobytes()
    assert library.opened == 4  # the first plain one serves nobody here
    assert not library.world.held()


def test_a_run_that_allocates_under_capture_leads_to_plain_enqueues(
    library: Library, bundle: Bundle, sampler: Sampler
) -> None:
    """ONNX Runtime may allocate later than in the first runs."""
    world = library.world
    plain = fake_onnxruntime.Session.run_with_iobinding

    def grown(session: Any, binding: Any, options: Any) -> None:
        if world.capturing():
            session.take(8)
        plain(session, binding, options)

    way: dict[str, Any] = {"n": 2, "label": 1, "steps": 3, "guidance": 1.0}
    with (
        pytest.MonkeyPatch.context() as patch,
        Sampler(bundle, "onnxruntime-cuda") as found,
    ):
        patch.setattr(fake_onnxruntime.Session, "run_with_iobinding", grown)
        for _ in range(2):
            ran = found.run(found.requests(**way))
            assert ran.samples.tobytes() == sampler.sample(**way).tobytes()
            assert ran.timings[0].how == "plain enqueues"
            assert "Failed to allocate" in ran.timings[0].note
    assert not world.held()


def test_a_version_that_breaks_in_a_graph_is_refused(
    library: Library, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "__version__", "1.29.1", raising=False)
    with pytest.raises(BackendError, match=r"onnxruntime-gpu 1.29.1 cannot run in a CUDA graph"):
        Sampler(bundle, "onnxruntime-cuda")
    assert not library.opened


@pytest.mark.parametrize("looks", [False, True])
def test_no_other_backend_allocates_while_a_session_settles(
    library: Library, bundle: Bundle, looks: bool
) -> None:
    """A run allocates before it is captured. Then no other thread may be capturing."""
    other = Cuda(Cudart(library.world))
    waited = list[bool]()

    def allocate() -> None:
        with ExitStack() as owner:
            other.memory(16, owner)

    def meanwhile() -> None:
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join(0.1)
        waited.append(thread.is_alive())
        started.append(thread)

    started = list[threading.Thread]()
    library.meanwhile = meanwhile
    with Sampler(bundle, "onnxruntime-cuda") as found:
        how: dict[str, Any] = {"on_step": lambda _: None} if looks else {}
        found.sample(1, label=1, steps=2, guidance=1.0, **how)
    for thread in started:
        thread.join()
    assert waited == [True] * fake_onnxruntime.SETTLED
    assert not library.world.held()


def test_rows_wait_for_nothing(library: Library, bundle: Bundle) -> None:
    """One wait and as many uploads for any number of rows; what a row needs is copied on the
    device."""
    counts = list[tuple[int, int]]()
    with Sampler(bundle, "onnxruntime-cuda") as found:
        for steps in (3, 40, 3, 40):
            library.world.calls.clear()
            library.world.copies.clear()
            found.sample(2, label=1, steps=steps, guidance=1.0)
            waits = library.world.calls.count("cudaStreamSynchronize")
            counts.append((waits, library.world.copies["cudaMemcpyHostToDevice"]))
    assert counts[2] == counts[3]
    assert counts[2][0] == 1


def test_what_a_call_reports_includes_weights_and_arena(library: Library, bundle: Bundle) -> None:
    with Sampler(bundle, "onnxruntime-cuda") as found:
        ran = found.run(found.requests(2, label=1, steps=3, guidance=2.0))
        assert ran.timings[0].device_bytes == library.world.used
        assert found.backend.device_memory["sessions"] == library.held > 0


def test_full_memory_frees_other_batch_sizes(
    library: Library, bundle: Bundle, sampler: Sampler
) -> None:
    world = library.world
    with Sampler(bundle, "onnxruntime-cuda") as found:
        found.sample(4, label=1, steps=2)
        world.capacity = world.used + 1000
        assert (
            found.sample(2, label=1, steps=2).tobytes()
            == sampler.sample(2, label=1, steps=2).tobytes()
        )
        world.capacity = 100
        with pytest.raises(GpuMemoryError, match=r"batch of 1 does not fit .* smaller max_batch"):
            found.sample(1, label=1, steps=2)
        world.capacity = 2**30
        assert (
            found.sample(1, label=1, steps=2).tobytes()
            == sampler.sample(1, label=1, steps=2).tobytes()
        )
    assert not world.held()


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


def test_what_is_missing_is_said_before_a_session_is_opened(
    machine: Callable[..., Library], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(driver=0)
    with pytest.raises(NoDriverError, match="no NVIDIA driver is installed"):
        Sampler(bundle, "onnxruntime-cuda")
    machine(gpus=0)
    with pytest.raises(NoGpuError, match="CUDA_VISIBLE_DEVICES"):
        Sampler(bundle, "onnxruntime-cuda")
    library = machine()
    library.absent = {"libcudnn.so.9", "libcublasLt.so.13"}
    said = r"needs libcublasLt.so.13, libcudnn.so.9, .* pip install 'unnoise\[cuda\]'"
    with pytest.raises(CudaLibraryError, match=said):
        Sampler(bundle, "onnxruntime-cuda")
    assert not library.opened
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match=r"cuda.bindings .* pip install 'unnoise\[cuda\]'"):
        Sampler(bundle, "onnxruntime-cuda")


def test_preloading_prints_nothing(
    machine: Callable[..., Library], bundle: Bundle, capsys: pytest.CaptureFixture
) -> None:
    machine()
    Sampler(bundle, "onnxruntime-cuda").close()
    assert capsys.readouterr() == ("", "")


def test_the_extra_installs_cuda_and_cudnn() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(r.startswith("onnxruntime-gpu[cuda,cudnn]") for r in extra["cuda"])
    assert any(r.startswith("cuda-bindings") for r in extra["cuda"])


def test_a_backend_that_does_not_open_leaves_nothing(library: Library, bundle: Bundle) -> None:
    library.refuses = True
    with pytest.raises(BackendError):
        Sampler(bundle, "onnxruntime-cuda")
    assert not library.world.held()


def test_nothing_falls_back_to_the_cpu(library: Library, bundle: Bundle) -> None:
    library.providers = ["CPUExecutionProvider"]
    with pytest.raises(
        BackendError, match="would run on CPUExecutionProvider, which was not asked for"
    ):
        Sampler(bundle, "onnxruntime-cuda")
    library.refuses = True
    with pytest.raises(BackendError, match=r"CUDA provider does not take it: CUDA failure 999"):
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
    library.fails = "CUDNN_STATUS_EXECUTION_FAILED"
    with pytest.raises(GpuError, match="could not run: CUDNN_STATUS_EXECUTION_FAILED"):
        found.sample(2, label=1, steps=2)
    library.fails = "Failed to allocate memory for requested buffer of size 8"
    with pytest.raises(GpuMemoryError, match=r"Failed to allocate"):
        found.sample(2, label=1, steps=2, on_step=lambda p: None)
    library.fails = ""
    assert len(found.sample(2, label=1, steps=2)) == 2
    found.close()
    assert not library.world.held()


def test_every_call_in_turn_fails_and_nothing_leaks(library: Library, bundle: Bundle) -> None:
    """Any failing call gives the typed error. Everything is released, except what could not be."""
    expected, calls = use_once(bundle, "onnxruntime-cuda"), list(library.world.calls)
    assert not library.world.held()
    assert {"cudaMemcpy2DAsync", "cudaEventElapsedTime", "cudaStreamWaitEvent"} <= set(calls)
    for i, name in enumerate(calls):
        library.world.__init__()
        library.world.fail_at = i
        # A message that cannot be read is no error of its own, and capture is optional.
        if name in HARMLESS:
            assert use_once(bundle, "onnxruntime-cuda") == expected
        else:
            with pytest.raises(GpuError):
                use_once(bundle, "onnxruntime-cuda")
        # The error's frames hold sessions; collecting takes long.
        if sum(library.world.held().values()) > (name in FREES):
            gc.collect()
        lost = sum(library.world.held().values())
        assert lost <= (name in FREES), (i, name, library.world.held())


def test_the_real_library_knows_the_keys_that_it_would_take_in_silence() -> None:
    """The configs of a session and a run accept any key; those in use appear in the library's
    code."""
    folder = Path(onnxruntime.__file__).parent / "capi"
    code = next(
        p for p in folder.iterdir() if p.name.startswith("onnxruntime_pybind11_state")
    ).read_bytes()
    for key in (*SESSION, *RUN):
        assert key.encode() in code


def test_the_installed_onnxruntime_without_cuda_is_told(bundle: Bundle) -> None:
    if PROVIDER in onnxruntime.get_available_providers():
        pytest.skip("this one has CUDA")
    with pytest.raises(BackendError, match="has no CUDA"):
        Sampler(bundle, "onnxruntime-cuda")
