"""The TensorRT backends without a GPU: strict fakes run the loop on host memory, and the images
must equal those of the onnxruntime backend.

What the fakes hold: tests/runtime/backends/nvidia/fake_cuda.py, fake_tensorrt.py. Real hardware:
tests/runtime/backends/nvidia/test_gpu.py.
"""

import contextlib
import gc
import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import BackendError, Bundle, Cancelled, Request, RequestError, Sampler
from runtime.backends import forks
from runtime.backends.base import Timing
from runtime.backends.nvidia import cuda, device_loop, device_noise, tensorrt
from runtime.backends.nvidia import engine_cache as engines
from runtime.backends.nvidia.engine_cache import LIBRARIES, Gpu, Recipe
from runtime.backends.onnxfile import with_weights
from runtime.errors import EngineError, GpuError, GpuMemoryError, NoDriverError, NoGpuError

from . import fake_cuda, fake_tensorrt
from .fake_cuda import FREES, HARMLESS, RETURNED, Cudart, World, use_once
from .fake_tensorrt import Library, Strict, plan, real

BUCKETS = (1, 2, 4)
VERSION = "11.4.0"
SCHEDULES: dict[str, tuple[int, ...]] = {
    "late": (),
    "at once": (0, 1),
    "copies at once": (1,),
    "work at once": (0,),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(tiny_bundle)


def keep(
    bundle: Bundle,
    library: str,
    gpu: Gpu,
    buckets: tuple[int, ...] = BUCKETS,
    version: str = VERSION,
    graphs: Sequence[str] = ("step.onnx", "step_guided.onnx"),
) -> None:
    """Put the fakes' engines of the graphs into the cache."""
    weights = bundle.read("fp32/weights.bin")
    for graph in graphs:
        module = LIBRARIES[library]
        onnx = engines.source(bundle, "fp32", graph)
        recipe = Recipe(
            bundle.name,
            "fp32",
            graph,
            onnx,
            module,
            version,
            engines.target(module, gpu),
            buckets,
            (),
        )
        engines.store(recipe, plan(with_weights(bundle.read(f"fp32/{graph}"), weights), buckets))


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def library(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> Callable[..., World]:
    """machine(library, …): use a fake machine from now on, with its engines in the cache."""

    def make(library: str, engines_for: tuple[int, ...] = BUCKETS, **world: Any) -> World:
        made = World(**world)
        monkeypatch.setattr(cuda, "cudart", lambda: Cudart(made))
        monkeypatch.setattr(tensorrt, "cudart", lambda _: Cudart(made))
        monkeypatch.setattr(
            tensorrt, "load_library", lambda name: Library(made, LIBRARIES[name], VERSION)
        )
        monkeypatch.setattr(cuda, "PROC", Path("/nowhere"))
        if engines_for:
            keep(bundle, library, Gpu("Fake L4", "8.9", "CUDA 13.0"), engines_for)
        return made

    return make


@pytest.fixture
def gpu(
    machine: Callable[..., World], library: str, bundle: Bundle
) -> Iterator[tuple[Sampler, World]]:
    """A sampler on a fake machine; after the test everything is released."""
    world = machine(library)
    with Sampler(bundle, library) as sampler:
        yield sampler, world
    assert not world.held()


MIXED = [
    Request(1, label=3, guidance=2.0, solver="ddim", steps=4),
    Request(2, label=1, guidance=1.0, solver="ddpm", steps=7),
    Request(3, label=None, solver="dpmpp_2m", steps=3),
    Request(4, label=2, guidance=2.0, solver="ddpm", steps=2),
    Request(5, label=5, guidance=3.0, solver="ddim", steps=6, options={"eta": 1.0}),
]
WAYS: list[dict[str, Any]] = [
    {"n": 2, "label": 1, "solver": "ddim", "steps": 4, "guidance": 1.0},
    {"n": 3, "label": [1, 2, None], "solver": "ddpm", "steps": 5, "guidance": 1.0},
    {"n": 1, "label": 4, "solver": "dpmpp_2m", "steps": 5, "guidance": 3.0},
    {
        "n": 4,
        "label": 7,
        "solver": "ddpm",
        "steps": 6,
        "guidance": 2.0,
        "guidance_interval": (0.3, 2.0),
    },
    {"n": 6, "label": 7, "solver": "heun", "steps": 3, "guidance": 2.0},
]


@pytest.mark.parametrize("eager", SCHEDULES.values(), ids=SCHEDULES)
def test_the_pictures_are_those_of_onnxruntime_to_the_bit(
    machine: Callable[..., World],
    library: str,
    bundle: Bundle,
    sampler: Sampler,
    eager: tuple[int, ...],
) -> None:
    """The fake computes with ONNX Runtime, whose samples do not depend on their batch. So only the
    loop differs."""
    world = machine(library, eager=eager)
    with Sampler(bundle, library) as found:
        for way in WAYS:
            ran = found.run(found.requests(**way))
            assert ran.samples.tobytes() == sampler.sample(**way).tobytes(), way
            assert ran.timings
            assert all(t.how.endswith(("graph", "graphs")) and not t.note for t in ran.timings)
        assert found.sample_requests(MIXED).tobytes() == sampler.sample_requests(MIXED).tobytes()
    assert not world.held()


def test_conditions_go_up_with_the_batch(
    machine: Callable[..., World], library: str, second_format: Path
) -> None:
    """Whole programs, and steps from the host, for a batch that is padded."""
    conditioned = Bundle.load(second_format / "bundle")
    world = machine(library)
    keep(conditioned, library, Gpu("Fake L4", "8.9", "CUDA 13.0"))
    given = conditioned.draw_conditions(3)
    way: dict[str, Any] = {"n": 3, "label": [0, None, 2], "solver": "ddpm", "steps": 4}
    way |= {"conditions": {**given, "text": [None, *given["text"][1:]]}, "guidance": 2.0}
    expected = Sampler(conditioned).sample(**way)
    with Sampler(conditioned, library) as found:
        assert found.sample(**way).tobytes() == expected.tobytes()
        assert found.sample(**way, on_step=lambda _: None).tobytes() == expected.tobytes()
    assert not world.held()


def test_a_batch_is_padded_to_its_bucket_and_split_where_none_is_large_enough(
    gpu: tuple[Sampler, World], sampler: Sampler
) -> None:
    found, _ = gpu
    ran = found.run(found.requests(7, label=1, steps=3))
    assert ran.samples.tobytes() == sampler.sample(7, label=1, steps=3).tobytes()
    assert [(t.batch, t.bucket, t.rows) for t in ran.timings] == [(4, 4, 3), (3, 4, 3)]
    assert ran.timings[0].captured
    assert not ran.timings[1].captured
    assert ran.timings[0].device_ms == 1.5
    assert ran.timings[0].device_bytes >= sum(size for _, size in gpu[1].device.values()) > 0
    with pytest.raises(RequestError, match="larger than the engine's largest, 4"):
        found.backend.bind(5)


def test_a_few_graphs_serve_any_number_of_rows(
    gpu: tuple[Sampler, World], sampler: Sampler
) -> None:
    """1, 2, 4, 8, 16 and 32 rows: no later program captures."""
    found, world = gpu
    for steps in (63, 31, 5, 44, 150):
        way = {"n": 2, "label": 1, "steps": steps, "solver": "ddim", "guidance": 1.0}
        ran = found.run(found.requests(**way, seed=steps))
        assert ran.samples.tobytes() == sampler.sample(**way, seed=steps).tobytes()
        assert ran.timings[0].captured == (steps == 63)
        assert ran.timings[0].how == f"{steps // 32 + (steps % 32).bit_count()} graphs"
    assert world.calls.count("cudaStreamBeginCapture") == 6
    assert world.held()["Executable"] == 6
    assert world.held()["Graph"] == 0


def test_the_longest_graph_does_not_grow_with_the_steps(gpu: tuple[Sampler, World]) -> None:
    found, world = gpu
    found.sample(1, label=1, steps=100, guidance=1.0)
    graphs = [g for g in world.handles.values() if isinstance(g, fake_cuda.Executable)]
    assert max(len(g.ops) for g in graphs) == device_loop.WINDOW == 32


def test_a_graph_is_launched_again_for_another_program(
    gpu: tuple[Sampler, World], sampler: Sampler
) -> None:
    found, world = gpu
    way: dict[str, Any] = {"n": 2, "label": 1, "steps": 4, "guidance": 1.0}
    for seed, (solver, grid) in enumerate(
        [("ddim", None), ("dpmpp_2m", None), ("euler", "trailing"), ("ddim", None)]
    ):
        way |= {"solver": solver, "seed": seed, "grid": grid}
        assert found.sample(**way).tobytes() == sampler.sample(**way).tobytes()
    assert world.calls.count("cudaStreamBeginCapture") == 1
    found.sample(2, label=1, steps=4, solver="ddpm", guidance=1.0)  # takes noise: another graph
    found.sample(2, label=1, steps=4, solver="ddim", guidance=2.0)  # guided
    assert world.calls.count("cudaStreamBeginCapture") == 3


def test_rows_are_cut_into_powers_of_two_that_are_alike() -> None:
    guided = np.array([False] * 3 + [True] * 37 + [False] * 2)
    noisy = np.zeros(42, bool)
    noisy[40] = True
    cut = list(device_loop.windows(guided, noisy, 16))
    assert [(w.first, w.kind.length) for w in cut] == [
        (0, 2), (2, 1), (3, 16), (19, 16), (35, 4), (39, 1), (40, 2)
    ]  # fmt: skip
    assert [w.kind.guided for w in cut] == [False] * 2 + [True] * 4 + [False]
    assert [w.kind.parity for w in cut] == [0, 0, 1, 1, 1, 1, 0]
    assert [w.kind.noisy for w in cut] == [False] * 6 + [True]


@pytest.mark.parametrize("eager", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("piece", [1, 2, 8])
def test_noise_travels_in_pieces_while_the_loop_runs(
    machine: Callable[..., World], bundle: Bundle, sampler: Sampler, monkeypatch: pytest.MonkeyPatch,
    eager: tuple[int, ...], piece: int,
) -> None:  # fmt: skip
    """Every piece is written again while the device may still use it."""
    monkeypatch.setattr(device_noise, "PIECE_BYTES", piece * device_noise.stride(2 * 64))
    world = machine("tensorrt", eager=eager)
    with Sampler(bundle, "tensorrt") as found:
        for seed, steps in ((0, 9), (10, 6), (20, 37)):
            way = {"n": 2, "seed": seed, "label": 1, "solver": "ddpm", "steps": steps}
            way["guidance"] = 1.0
            ran = found.run(found.requests(**way))
            assert ran.samples.tobytes() == sampler.sample(**way).tobytes()
            launches = steps // piece + (steps % piece).bit_count()
            assert ran.timings[0].how == f"{launches} graphs"
    assert not world.held()


def test_the_first_launch_waits_for_one_piece_of_noise_only(
    machine: Callable[..., World], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machine("tensorrt")
    drawn = list[int]()
    real_draw = device_noise.Noise.send

    def send(self: Any, rows: Any, first: int, count: int) -> int:
        drawn.append(world.calls.count("cudaGraphLaunch"))
        return real_draw(self, rows, first, count)

    monkeypatch.setattr(device_noise.Noise, "send", send)
    with Sampler(bundle, "tensorrt") as found:
        found.sample(1, label=1, solver="ddpm", steps=32, guidance=1.0)
    assert drawn == [0, 1, 2, 3]


def test_only_one_register_of_the_state_travels(gpu: tuple[Sampler, World]) -> None:
    found, _ = gpu
    with pytest.MonkeyPatch.context() as patch:
        moved = list[tuple[int, ...]]()
        plain = fake_cuda.cudaMemcpy2DAsync
        patch.setattr(
            fake_cuda, "cudaMemcpy2DAsync", lambda w, *a: moved.append(a[:6]) or plain(w, *a)
        )
        found.sample(4, label=1, steps=2)
    register = 64 * 4
    columns = [(a[1], a[3], a[4], a[5]) for a in moved if a[5] > 1]
    assert columns == [(4 * register, register, register, 4), (register, 4 * register, register, 4)]


REFUSED = {
    "cudaStreamBeginCapture": fake_cuda.E.cudaErrorStreamCaptureUnsupported,
    "cudaStreamEndCapture": fake_cuda.E.cudaErrorStreamCaptureInvalidated,
    "cudaGraphInstantiate": fake_cuda.E.cudaErrorUnknown,
    "is_stream_capturable": True,
}


@pytest.mark.parametrize("call", REFUSED)
def test_where_capture_is_refused_the_rows_are_enqueued_plainly_and_the_timing_says_so(
    machine: Callable[..., World], bundle: Bundle, sampler: Sampler, call: str
) -> None:
    world = machine("tensorrt-rtx")
    world.fail_named[call] = REFUSED[call]
    with Sampler(bundle, "tensorrt-rtx") as found:
        for _ in range(2):
            way = {"n": 3, "label": 1, "solver": "ddpm", "steps": 5}
            ran = found.run(found.requests(**way))
            assert ran.samples.tobytes() == sampler.sample(**way).tobytes()
            (timing,) = ran.timings
            assert timing.how == "plain enqueues"
            assert "captured" in timing.note
            assert not timing.captured
        assert world.calls.count(call) == 1
    assert not world.held()


def test_an_enqueue_that_fails_under_capture_ends_the_capture(
    machine: Callable[..., World],
    library: str,
    bundle: Bundle,
    sampler: Sampler,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = machine(library)
    plain = world.fails
    monkeypatch.setattr(
        world,
        "fails",
        lambda name: plain(name) or (name == "execute_async_v3" and world.capturing()),
    )
    with Sampler(bundle, library) as found:
        ran = found.run(found.requests(2, label=1, steps=3))
        assert ran.samples.tobytes() == sampler.sample(2, label=1, steps=3).tobytes()
        assert "could not be enqueued" in ran.timings[0].note
        assert (
            world.calls.count("cudaStreamEndCapture") == world.calls.count("cudaGetLastError") == 1
        )
    assert not world.held()


def test_who_looks_at_the_steps_or_paints_gets_them_one_by_one(
    gpu: tuple[Sampler, World], sampler: Sampler
) -> None:
    found, world = gpu
    seen: dict[str, list[bytes]] = {"here": [], "there": []}
    for who, name in ((found, "here"), (sampler, "there")):
        who.sample(3, label=[1, 2, 3], guidance=[1.0, 2.0, 2.0], steps=3, solver="ddpm",
                   on_step=lambda p, n=name: seen[n].append(p.x.tobytes() + p.denoised.tobytes()))  # fmt: skip
    assert seen["here"] == seen["there"]
    assert len(seen["here"]) == 3
    assert found.run(found.requests(1, label=1, steps=1), lambda _: None).timings == ()
    known = sampler.sample(2, label=1, steps=3)
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    how = {"label": 2, "steps": 3}
    assert (
        found.inpaint(known, mask, **how).tobytes() == sampler.inpaint(known, mask, **how).tobytes()
    )
    with pytest.raises(Cancelled):
        found.sample(1, steps=3, on_step=lambda p: False)
    assert "cudaStreamBeginCapture" not in world.calls


def test_an_identity_row_returns_the_state_bit_for_bit(gpu: tuple[Sampler, World]) -> None:
    buffers = gpu[0].backend.bind(3)
    state = np.random.default_rng(1).standard_normal(buffers.state.shape).astype(np.float32)
    for guided in (False, True):
        buffers.state[:], buffers.call[:], buffers.update[:] = (
            state,
            (999, 1, 0, 0, 1, 2),
            np.eye(4, 6),
        )
        buffers.step(guided)
        assert buffers.state.tobytes() == state.tobytes()


def test_threads_take_turns(gpu: tuple[Sampler, World], sampler: Sampler) -> None:
    found, _ = gpu
    expected = [
        sampler.sample(2, seed=i, label=1, steps=3 + i % 2, solver="ddpm") for i in range(6)
    ]
    results: dict[int, tuple[bytes, tuple[Timing, ...]]] = {}

    def work(i: int) -> None:
        got = found.run(found.requests(2, i, label=1, steps=3 + i % 2, solver="ddpm"))
        results[i] = got.samples.tobytes(), got.timings

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i][0] for i in range(6)] == [e.tobytes() for e in expected]
    assert all(results[i][1][0].rows == 3 + i % 2 for i in range(6))


def test_a_full_device_under_capture_frees_other_loops_and_captures_again(
    machine: Callable[..., World], bundle: Bundle, sampler: Sampler
) -> None:
    """It is no reason for plain enqueues, which would stay for good."""
    world = machine("tensorrt")
    full = fake_cuda.E.cudaErrorMemoryAllocation
    plain = world.fails
    with Sampler(bundle, "tensorrt") as found:
        found.sample(4, label=1, steps=3)
        before = world.held()["Executable"]
        once = iter([True])
        world.fails = lambda name: (
            plain(name) or (full if name == "cudaGraphInstantiate" and next(once, False) else None)
        )
        ran = found.run(found.requests(2, label=1, steps=3))
        assert ran.samples.tobytes() == sampler.sample(2, label=1, steps=3).tobytes()
        assert ran.timings[0].captured
        assert not ran.timings[0].note
        assert world.held()["Executable"] == before  # those of four samples are gone
        world.fails = lambda name: plain(name) or (full if name == "cudaGraphInstantiate" else None)
        with pytest.raises(GpuMemoryError, match="cudaGraphInstantiate"):
            found.sample(1, label=1, steps=3)
        world.fails = plain
        assert (
            found.sample(1, label=1, steps=3).tobytes()
            == sampler.sample(1, label=1, steps=3).tobytes()
        )
    assert not world.held()


def test_a_context_that_lacks_memory_is_a_memory_error(
    machine: Callable[..., World], library: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machine(library)
    refuse = fake_tensorrt.Engine.create_execution_context

    def context(engine: Any, how: Any) -> Any:
        made = refuse(engine, how)
        if made is None:
            logger = engine._logger
            logger.log(real.ILogger.Severity.ERROR, "[defaultAllocator] Error 1 (out of memory)")
        return made

    monkeypatch.setattr(fake_tensorrt.Engine, "create_execution_context", context)
    with Sampler(bundle, library) as found:
        world.fail_named["create_execution_context"] = True
        with pytest.raises(GpuMemoryError, match="out of memory"):
            found.sample(1, label=1, steps=2)
        monkeypatch.setattr(fake_tensorrt.Engine, "create_execution_context", refuse)
        with pytest.raises(GpuError, match="no reason given") as caught:
            found.sample(1, label=1, steps=2)
        assert not isinstance(caught.value, GpuMemoryError)
        world.fail_named.clear()


def test_garbage_is_not_collected_under_capture(machine: Callable[..., World]) -> None:
    """A forgotten object that frees device memory would break the capture."""
    world = machine("tensorrt", engines_for=())
    device = cuda.Cuda(Cudart(world))
    with contextlib.ExitStack() as owner:
        stream = device.stream(owner)

        class Forgotten:
            def __init__(self) -> None:
                self.me = self
                self.memory = contextlib.ExitStack()
                device.memory(16, self.memory)

            def __del__(self) -> None:
                self.memory.close()

        def enqueue() -> None:
            alive.clear()
            gc.set_threshold(1)
            kept = [[i] for i in range(1000)]  # many objects, which start a collection
            assert len(kept) == 1000

        thresholds = gc.get_threshold()
        # No collection before: it would keep the object among the old, which are rarely looked at.
        gc.set_threshold(0)
        try:
            alive = [Forgotten()]
            device.destroy(device.capture(enqueue, stream))
        finally:
            gc.set_threshold(*thresholds)
        assert gc.isenabled()
        gc.collect()
    assert not world.held()


def test_what_was_closed_is_of_no_use_and_closing_twice_is_no_error(
    machine: Callable[..., World], library: str, bundle: Bundle
) -> None:
    world = machine(library)
    with Sampler(bundle, library) as found:
        buffers = found.backend.bind(1)
        buffers.step(False)
    found.close()
    assert not world.held()
    for use in (
        lambda: found.sample(1, steps=2),
        lambda: found.backend.bind(1),
        lambda: buffers.step(False),
    ):
        with pytest.raises(BackendError, match="was closed"):
            use()


def test_no_driver_and_no_gpu_are_told_apart(
    machine: Callable[..., World], library: str, bundle: Bundle
) -> None:
    machine(library, driver=0)
    with pytest.raises(NoDriverError, match="no NVIDIA driver is installed"):
        Sampler(bundle, library)
    world = machine(library)
    world.fail_named["cudaGetDeviceCount"] = fake_cuda.E.cudaErrorInsufficientDriver
    with pytest.raises(NoDriverError, match="older than CUDA needs"):
        Sampler(bundle, library)
    machine(library, gpus=0)
    with pytest.raises(NoGpuError, match="CUDA_VISIBLE_DEVICES"):
        Sampler(bundle, library)


def test_full_memory_says_what_was_needed_and_what_would_fit(
    machine: Callable[..., World], library: str, bundle: Bundle, sampler: Sampler
) -> None:
    world = machine(library)
    with Sampler(bundle, library) as found:
        found.sample(2, label=1, steps=3)
        enough = world.used
    assert not world.held()
    world.capacity = enough + 1000
    with Sampler(bundle, library) as found:
        with pytest.raises(GpuMemoryError) as caught:
            found.sample(4, label=1, steps=3)
        needed, free = (float(x) for x in re.findall(r"([\d.]+) MB", str(caught.value)))
        assert needed > free
        assert "A batch of 2 would fit: give max_batch=2." in str(caught.value)
        assert (
            found.sample(2, label=1, steps=3).tobytes()
            == sampler.sample(2, label=1, steps=3).tobytes()
        )
        world.capacity = 100
        with pytest.raises(GpuMemoryError, match="No smaller batch would fit"):
            found.sample(1, label=1, steps=4)
    assert not world.held()


def test_memory_that_another_loop_holds_is_given_to_a_new_one(
    machine: Callable[..., World], bundle: Bundle, sampler: Sampler
) -> None:
    world = machine("tensorrt")
    with Sampler(bundle, "tensorrt") as found:
        found.sample(4, steps=8)
        world.capacity = world.used + 3000
        assert found.sample(2, steps=8).tobytes() == sampler.sample(2, steps=8).tobytes()
        assert world.held()["Executable"] == 1
    assert not world.held()


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (
            {"gpu": Gpu("Other", "8.6", "CUDA 13.0")},
            r"there is one for another GPU \(.* of compute capability 8.6\)",
        ),
        ({"version": "10.12"}, "there is one by version 10.12"),
        (
            None,
            r"no engine of tiny fp32 step.onnx for tensorrt.* on Fake L4 of compute capability 8.9",
        ),
    ],
)
def test_an_engine_for_another_machine_is_not_loaded_and_the_error_says_how_to_build_one(
    machine: Callable[..., World],
    library: str,
    bundle: Bundle,
    kept: dict[str, Any] | None,
    said: str,
) -> None:
    world = machine(library, engines_for=())
    if kept is not None:
        keep(bundle, library, **{"gpu": Gpu("Fake L4", "8.9", "CUDA 13.0"), **kept})
    with pytest.raises(EngineError, match=said) as caught:
        Sampler(bundle, library)
    assert (
        f"python -m export.engines build {bundle.path} --engine {library} --precision fp32"
        in str(caught.value)
    )
    assert not world.held()


def test_tensorrts_engines_are_for_one_driver(
    machine: Callable[..., World], bundle: Bundle
) -> None:
    machine("tensorrt", engines_for=())
    keep(bundle, "tensorrt", Gpu("Fake L4", "8.9", "CUDA 12.9"))
    with pytest.raises(EngineError, match=r"there is one for driver CUDA 12.9"):
        Sampler(bundle, "tensorrt")


def test_an_engine_that_was_changed_or_does_not_load_is_an_error(
    machine: Callable[..., World], library: str, bundle: Bundle, place: Path
) -> None:
    world = machine(library)
    for path in (place / "engines").glob("*.engine"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EngineError, match="is not what was built"):
        Sampler(bundle, library)
    engines.clear()
    world = machine(library)
    world.fail_named["deserialize_cuda_engine"] = True
    with pytest.raises(EngineError, match="does not load here"):
        Sampler(bundle, library)
    world.capacity = 100
    with pytest.raises(GpuMemoryError, match="did not fit"):
        Sampler(bundle, library)
    assert not world.held()


def test_an_engine_of_something_else_is_refused(
    machine: Callable[..., World], library: str, bundle: Bundle, shipped: Bundle
) -> None:
    world = machine(library, engines_for=())
    gpu, module = Gpu("Fake L4", "8.9", "CUDA 13.0"), LIBRARIES[library]
    onnx = engines.source(bundle, "fp32", "step.onnx")
    recipe = Recipe(
        "x", "fp32", "step.onnx", onnx, module, VERSION, engines.target(module, gpu), (1,), ()
    )
    model = with_weights(shipped.read("fp32/step.onnx"), shipped.read("fp32/weights.bin"))
    engines.store(recipe, plan(model, (1,)))
    with pytest.raises(EngineError, match="is not that of a step graph"):
        Sampler(bundle, library)
    assert not world.held()


def test_a_network_without_labels_on_samples_of_any_shape(
    machine: Callable[..., World], library: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Signals of 2×5: slices whose size is not a multiple of 256 bytes, and an engine without the
    input `label`."""
    import torch

    from export.build import build
    from export.proof.plan import QUICK
    from export.sources.module import from_module

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, x: Any, time: Any) -> Any:
            return self.layer(x) + 0.001 * time[:, None, None]

    out = tmp_path_factory.getbasetemp() / "signals"
    if not out.exists():
        module = Network().eval().requires_grad_(False)
        given = {"sample_shape": (2, 5), "prediction": "epsilon", "schedule": "linear", "clip": 1.0}
        build(from_module(module, name="signals", **given), out, None, QUICK)
    signals = Bundle.load(out)
    world, gpu, module = (
        machine(library, engines_for=()),
        Gpu("Fake L4", "8.9", "CUDA 13.0"),
        LIBRARIES[library],
    )
    onnx = engines.source(signals, "fp32", "step.onnx")
    recipe = Recipe(
        "signals",
        "fp32",
        "step.onnx",
        onnx,
        module,
        VERSION,
        engines.target(module, gpu),
        (1, 4),
        (),
    )
    model = with_weights(signals.read("fp32/step.onnx"), signals.read("fp32/weights.bin"))
    engines.store(recipe, plan(model, (1, 4)))
    sampler = Sampler(signals)
    with Sampler(signals, library) as found:
        for way in (
            {"n": 3, "solver": "ddpm", "steps": 4},
            {"n": 1, "solver": "unipc", "steps": 5},
        ):
            ran = found.run(found.requests(**way))
            assert ran.samples.tobytes() == sampler.sample(**way).tobytes()
            assert not ran.timings[0].note
    assert not world.held()


def test_threads_are_a_cpus(machine: Callable[..., World], library: str, bundle: Bundle) -> None:
    machine(library)
    with pytest.raises(RequestError, match="leave them out"):
        Sampler(bundle, library, threads=2)


def test_every_call_in_turn_fails_and_nothing_leaks(
    machine: Callable[..., World], library: str, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """Any failing call gives the typed error, or the right images if the call is optional.
    Everything is released, except what could not be."""
    caplog.set_level(logging.CRITICAL)
    world = machine(library)
    use_once(bundle, library)  # now TensorRT-RTX's kernels are in the cache
    world.__init__()
    expected, calls = use_once(bundle, library), list(world.calls)
    assert not world.held()
    assert {
        "cudaGraphLaunch",
        "execute_async_v3",
        "cudaMemcpyAsync",
        "cudaEventElapsedTime",
    } <= set(calls)
    unmoved, errors = [], list[tuple[str, BackendError]]()
    for i, name in enumerate(calls):
        world.__init__()
        world.fail_at = i
        try:
            assert use_once(bundle, library) == expected
            unmoved.append(name)
        except BackendError as error:
            errors.append((name, error))
        assert name == "cudaStreamSynchronize" or not fake_cuda.ILLEGAL, (i, name)
        fake_cuda.ILLEGAL.clear()
        lost = sum(world.held().values())
        assert lost <= (name in FREES), (i, name, world.held())
    assert all(isinstance(error, (GpuError, EngineError)) and str(error) for _, error in errors), (
        errors
    )
    harmless = HARMLESS | {"cudaGetLastError", "serialize", "deserialize"}
    harmless |= {"set_tensor_address", "execute_async_v3", "is_stream_capturable"}  # under capture
    assert set(unmoved) <= harmless, set(unmoved) - harmless


def test_every_fake_of_cuda_answers_with_as_many_values_as_the_real_call() -> None:
    """Without a driver the real calls return their error, with as many further values."""
    api = fake_cuda.real
    if api.cudaGetDeviceCount()[0] == api.cudaError_t.cudaSuccess:
        pytest.skip("a GPU is there, and these calls would do something")
    stream, event, graph = api.cudaStream_t(0), api.cudaEvent_t(0), api.cudaGraph_t(0)
    run = api.cudaGraphExec_t(0)
    arguments: dict[str, tuple[Any, ...]] = {
        "cudaGetDeviceProperties": (0,), "cudaGetErrorString": (api.cudaError_t.cudaSuccess,), "cudaMalloc": (1,), "cudaFree": (0,),
        "cudaMemcpy2DAsync": (1, 1, 1, 1, 1, 1, api.cudaMemcpyKind.cudaMemcpyHostToDevice, stream),
        "cudaMallocHost": (1,), "cudaFreeHost": (0,), "cudaMemcpyAsync": (1, 1, 0, api.cudaMemcpyKind.cudaMemcpyHostToDevice, stream),
        "cudaMemsetAsync": (1, 0, 0, stream), "cudaStreamCreateWithFlags": (1,), "cudaStreamDestroy": (stream,),
        "cudaStreamSynchronize": (stream,), "cudaStreamWaitEvent": (stream, event, 0), "cudaEventCreateWithFlags": (0,),
        "cudaEventDestroy": (event,), "cudaEventRecord": (event, stream), "cudaEventSynchronize": (event,),
        "cudaEventElapsedTime": (event, event), "cudaStreamEndCapture": (stream,), "cudaGraphInstantiate": (graph, 0),
        "cudaStreamBeginCapture": (stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
        "cudaGraphDestroy": (graph,), "cudaGraphLaunch": (run, stream), "cudaGraphExecDestroy": (run,),
    }  # fmt: skip
    for name, count in RETURNED.items():
        assert len(getattr(api, name)(*arguments.get(name, ()))) == 1 + count, name


def test_the_fakes_know_no_call_that_does_not_exist() -> None:
    fake: Any = Cudart(World())
    with pytest.raises(AttributeError):
        fake.cudaMalocc(1)
    with pytest.raises(TypeError):
        fake.cudaMalloc(1, 2)
    with pytest.raises(AssertionError, match="has no execute_async_v4"):

        class Wrong(Strict, like=real.IExecutionContext):
            def execute_async_v4(self) -> None: ...

    class Right(Strict, like=real.IExecutionContext):
        def execute_async_v3(self, stream_handle: int) -> bool:
            return True

    assert Right().execute_async_v3(1)
    for arguments in ((), (1, 2), ("1",)):
        with pytest.raises(AssertionError, match="is none of"):
            Right().execute_async_v3(*arguments)


def test_a_fork_of_a_process_that_started_cuda_says_so(
    machine: Callable[..., World],
    library: str,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's own error there is that it does not start, so it is asked for nothing."""
    world = machine(library)
    monkeypatch.setattr(forks, "_inherited", {"CUDA"})
    with pytest.raises(BackendError, match="CUDA was started before this process was forked"):
        Sampler(bundle, library)
    assert not world.calls


def test_engines_for_other_batches_are_refused(
    machine: Callable[..., World], library: str, bundle: Bundle, sampler: Sampler
) -> None:
    """As a build leaves them that was interrupted between the two graphs."""
    machine(library)
    keep(bundle, library, Gpu("Fake L4", "8.9", "CUDA 13.0"), (1, 3, 4), graphs=["step.onnx"])
    with Sampler(bundle, library) as found:
        way = {"n": 3, "label": 1, "steps": 2, "guidance": 1.0}
        assert found.sample(**way).tobytes() == sampler.sample(**way).tobytes()
        with pytest.raises(EngineError, match=r"batches 1,2,4, .* --batch-buckets 1,3,4"):
            found.sample(**way | {"guidance": 2.0})
