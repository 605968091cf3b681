"""A batch cut into streams has the bytes of the whole one, on every library."""

import functools
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from runtime import BackendError, Bundle, BundleError, Engine, Request, RequestError, Sampler
from runtime.backends.base import Buffers
from runtime.backends.host import Call
from runtime.backends.onnxruntime import OnnxRuntime
from runtime.backends.registry import open_backend
from runtime.backends.streams import fixed, whole
from runtime.diffusion.program import GUIDANCE, Program
from runtime.diffusion.solvers import SOLVERS
from runtime.engine.costs import Costs
from runtime.engine.ticket import Ticket

from ...small_bundle import write_small_bundle
from ...small_streams import StreamedBackend

WAIT_S = 60
"""After this time a test counts as hanging."""
BATCHES = {"onnxruntime": range(1, 17), "openvino": (1, 5)}
"""OpenVINO compiles a model for each size of a part: seconds each in int8."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path: Path) -> Bundle:
    return write_small_bundle(tmp_path / "bundle")


@functools.cache
def programs_of(bundle: Bundle) -> list[Program]:
    """A program of each solver."""
    return [bundle.program(solver, steps=4) for solver in SOLVERS]


def fill(buffers: Buffers, bundle: Bundle, count: int, guided: bool) -> None:
    """Each sample at a row of another solver, with noise, and registers that hold something."""
    generator = np.random.Generator(np.random.Philox(key=count))
    programs = programs_of(bundle)
    for i in range(count):
        program = programs[i % len(programs)]
        buffers.call[i] = program.call[i % len(program)]
        buffers.update[i] = program.update[i % len(program)]
        buffers.label[i] = i % max(bundle.num_classes, 1)
    buffers.call[:count, GUIDANCE] = 2.0 if guided else 1.0
    for array in (buffers.state, buffers.noise):
        array[:count] = generator.standard_normal(array[:count].shape)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_bytes_are_those_of_one_stream(
    precise: Path, name: str, precision: str, guided: bool
) -> None:
    """Over 1 to 3 streams, 1 to 3 threads, and several batches."""
    pytest.importorskip(name)
    bundle = Bundle.load(precise)
    expected: dict[int, bytes] = {}
    for threads, cuts in ((1, (1,)), (2, (1, 2, 3)), (3, (1,))):
        try:
            backend = open_backend(bundle, name, precision, threads)
        except (BackendError, RequestError) as error:
            pytest.skip(str(error))
        buffers = backend.bind(16)
        for streams in cuts:
            buffers.cut = fixed(streams)
            for count in BATCHES[name]:
                fill(buffers, bundle, count, guided)
                buffers.run(guided, 0, count)
                buffers.turn()
                found = buffers.state[:count].tobytes() + buffers.denoised[:count].tobytes()
                assert expected.setdefault(count, found) == found, (threads, streams, count)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_shipped_bundle_samples_alike_in_two_streams_and_alone(
    name: str, precision: str
) -> None:
    """Over four of its steps, a lone sample in int8 once differed by 0.09 on two threads."""
    pytest.importorskip(name)
    settings = {"solver": "dpmpp_2m", "steps": 4}
    labels = [0, 1, 9]
    guidance = [1.0, 1.0, 3.0]
    try:
        samplers = [Sampler.load("emoji32", name, precision, 2, streams=n) for n in (1, 2)]
    except BackendError as error:
        pytest.skip(str(error))
    one, two = (s.sample(3, 0, label=labels, guidance=guidance, **settings) for s in samplers)
    assert one.tobytes() == two.tobytes()
    for i, x in enumerate(one):
        alone = samplers[0].sample(1, i, label=labels[i], guidance=guidance[i], **settings)
        assert alone.tobytes() == x.tobytes()


def test_parts_cover_the_slice_once(small: Bundle) -> None:
    backend = StreamedBackend(small)
    buffers = backend.bind(16)
    buffers.cut = fixed(3)
    for first in range(3):
        for count in range(1, 12):
            backend.ran.clear()
            buffers.run(False, first, count)
            covered = [i for start, size, _ in backend.ran for i in range(start, start + size)]
            assert sorted(covered) == list(range(first, first + count))
            assert len(backend.ran) == min(3, count)
            sizes = [size for _, size, _ in backend.ran]
            assert max(sizes) - min(sizes) <= 1


def test_no_part_is_smaller_than_the_least(small: Bundle) -> None:
    buffers = StreamedBackend(small, least=2).bind(8)
    buffers.cut = fixed(4)
    assert [buffers.streams(False, count) for count in (1, 2, 3, 4, 5, 8)] == [1, 1, 1, 2, 2, 4]


def test_an_error_of_one_part_waits_for_the_others(small: Bundle) -> None:
    backend = StreamedBackend(small)
    buffers = backend.bind(2)
    buffers.cut = fixed(2)
    failed = threading.Event()
    ended = threading.Event()

    def bind_part(part: Call):
        def fail() -> None:
            failed.set()
            raise ValueError("no")

        def late() -> None:
            failed.wait(10)
            ended.set()

        return late if part.first else fail

    buffers._bind_part = bind_part
    with pytest.raises(BundleError, match="failed on a batch of 2: no"):
        buffers.run(False, 0, 2)
    assert ended.is_set()


def test_what_is_tried(small: Bundle) -> None:
    def choices(threads: int, count: int, streams: int | None = None) -> tuple[int, ...]:
        return StreamedBackend(small, {}, threads, streams).bind(count).choices(False, count)

    assert choices(2, 1) == (1,)
    assert choices(1, 16) == (1,)
    assert choices(2, 16) == (1, 2)
    assert choices(16, 16) == (1, 8, 16)
    assert choices(64, 8) == (1, 4, 8)
    assert choices(2, 16, streams=3) == (1, 3)


def test_the_fastest_cut_is_used_and_kept(small: Bundle) -> None:
    backend = StreamedBackend(small, {1: 1.0, 2: 0.8})
    assert Costs(small, backend, backend.clock).streams(False, 4) == 2
    ran = len(backend.ran)
    assert ran
    costs = Costs(small, backend, backend.clock)
    # Between powers of two, two parts pay if they are even enough: 4/3 > 1.25 > 6/5.
    assert [costs.streams(False, n) for n in (4, 5, 6)] == [2, 2, 2]
    assert len(backend.ran) == ran
    assert [costs.streams(False, n) for n in (2, 3)] == [2, 1]
    backend = StreamedBackend(small, {1: 0.8, 2: 1.0})
    backend.precision = "int8"
    assert Costs(small, backend, backend.clock).streams(False, 4) == 1


def test_a_cut_that_is_not_known_is_not_measured_during_work(small: Bundle) -> None:
    backend = StreamedBackend(small, {1: 0.01, 2: 0.008})
    costs = Costs(small, backend, backend.clock)
    assert [costs.known_streams(False, n) for n in (4, 5, 8)] == [1, 1, 1]
    assert not backend.ran
    costs.curve(8)
    assert {streams for _, _, streams in backend.ran} == {1}
    while costs.learning:
        costs.learn(lambda: False)
    assert [costs.known_streams(False, n) for n in (2, 4, 8)] == [2, 2, 2]
    again = Costs(small, backend, backend.clock)
    assert [again.known_streams(False, n) for n in (2, 4, 8)] == [2, 2, 2]


def test_an_engine_learns_when_it_has_nothing_to_do(small: Bundle) -> None:
    backend = StreamedBackend(small)
    with Engine(Sampler(small, backend), max_batch=8) as engine:
        requests = [Request(label=0, guidance=1.0, seed=seed) for seed in range(8)]
        whole = engine.submit(requests).result(WAIT_S)
        end = time.monotonic() + WAIT_S
        while engine._costs.learning and time.monotonic() < end:
            time.sleep(0.01)
        assert {streams for _, _, streams in backend.ran} == {1, 2}
        assert engine.submit(requests).result(WAIT_S).tobytes() == whole.tobytes()
        assert engine.curve is engine._ledger.curve


def test_a_busy_machine_uses_streams_unless_they_are_far_slower(small: Bundle) -> None:
    for slower, expected in ((1.2, 2), (1.5, 1)):
        backend = StreamedBackend(small, {1: 0.1, 2: 0.1 * slower}, growth=1.1)
        backend.precision = str(slower)
        costs = Costs(small, backend, backend.clock)
        assert costs.streams(False, 4) == expected
        assert not costs._points[False, 4].settled


def test_a_moment_of_other_work_does_not_decide(small: Bundle) -> None:
    backend = StreamedBackend(small, {1: 0.1, 2: 0.09}, disturbed={2: 4})
    assert Costs(small, backend, backend.clock).streams(False, 4) == 2


def test_cuts_that_differ_much_are_not_compared_for_long(small: Bundle) -> None:
    backend = StreamedBackend(small, {1: 0.1, 2: 0.05})
    assert Costs(small, backend, backend.clock).streams(False, 4) == 2
    assert backend.calls[2] < 4


def test_a_heavy_call_is_not_cut(small: Bundle) -> None:
    backend = StreamedBackend(small, {1: 1.5, 2: 0.5})
    assert Costs(small, backend, backend.clock).streams(False, 16) == 1
    # One that binds, and one that is timed: a third would tell nothing.
    assert [streams for _, _, streams in backend.ran] == [1, 1]


def test_streams_with_other_bytes_are_refused(small: Bundle) -> None:
    backend = StreamedBackend(small, {1: 1.0, 2: 0.5}, unlike=2)
    assert Costs(small, backend, backend.clock).streams(False, 4) == 1
    asked = StreamedBackend(small, streams=2, unlike=2)
    with pytest.raises(BackendError, match=r"streams=2 is not available: .* has other bytes"):
        Costs(small, asked, asked.clock).streams(False, 4)
    with pytest.raises(BackendError, match="streams=2 is not available"):
        Sampler(small, asked).sample(2, label=0)
    alike = StreamedBackend(small, streams=2)
    alike.precision = "int8"
    Sampler(small, alike).sample(2, label=0)
    assert (1, 1, 2) in alike.ran


def test_a_lone_sample_is_never_cut_or_measured(small: Bundle) -> None:
    backend = StreamedBackend(small)
    Sampler(small, backend).sample(1, label=0, guidance=1)
    assert len(backend.ran) == small.defaults.steps
    assert whole(False, 7) == 1


def test_only_batches_hold_the_weights_once(precise: Path) -> None:
    backend = OnnxRuntime(Bundle.load(precise), "fp32", 2)
    buffers = backend.bind(4)
    buffers.cut = fixed(2)
    buffers.run(False, 0, 4)
    assert list(backend._sessions) == [(False, 1)]
    buffers.run(False, 0, 1)
    assert list(backend._sessions) == [(False, 1), (False, 2)]


def test_a_lone_sample_in_int8_takes_one_thread_of_two_and_an_empty_one_beside_more(
    precise: Path,
) -> None:
    """Several threads would cut its convolutions, and sum in another order."""
    bundle = Bundle.load(precise)
    two = OnnxRuntime(bundle, "int8", 2)
    two.bind(4).run(False, 0, 1)
    assert list(two._sessions) == [(False, 1)]
    three = OnnxRuntime(bundle, "int8", 3, streams=2)
    assert [three.bind(4)._least(guided) for guided in (False, True)] == [2, 1]
    # So two samples are no two streams there.
    assert three.bind(4).streams(False, 2) == 1
    assert OnnxRuntime(bundle, "int8", 2, streams=2).bind(4).streams(False, 2) == 2


def test_a_gpu_has_one_stream(precise: Path) -> None:
    with pytest.raises(RequestError, match="streams=2 is not available on tensorrt"):
        open_backend(Bundle.load(precise), "tensorrt", "fp32", streams=2)
    for wrong in (0, 2000, 1.5):
        with pytest.raises(RequestError, match="streams"):
            Sampler.load("emoji32", streams=wrong)


def test_a_thread_that_cannot_start_leaves_no_call_for_later(
    small: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool queues a call before it starts the thread for it."""
    backend = StreamedBackend(small)
    buffers = backend.bind(4)
    buffers.cut = fixed(2)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    buffers.state[:] = 8
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        buffers.run(False, 0, 4)
    assert sorted(backend.ran) == [(0, 2, 2), (2, 2, 2)]
    buffers.turn()
    backend.ran.clear()
    buffers.run(False, 0, 4)
    assert threading.Thread.start is start
    assert sorted(backend.ran) == [(0, 2, 2), (2, 2, 2)]
    buffers.turn()
    assert (buffers.state == 2).all()


def test_what_a_library_raises_when_memory_is_bound_is_typed(small: Bundle) -> None:
    buffers = StreamedBackend(small).bind(2)

    def refuse(part: Call) -> None:
        raise RuntimeError("no room for the request")

    buffers._bind_part = refuse
    with pytest.raises(BundleError, match="failed on a batch of 2: no room for the request"):
        buffers.run(False, 0, 2)


def test_a_curve_that_was_learned_when_work_came_is_used_later(small: Bundle) -> None:
    backend = StreamedBackend(small)
    with Engine(Sampler(small, backend), max_batch=4) as engine:
        request = Request(label=0, guidance=1.0, seed=0)
        learn = engine._costs.learn
        tickets: list[Ticket] = []

        def busy(wanted):
            found = learn(wanted)
            if found is not None:
                tickets.append(engine.submit(request))
            return found

        engine._costs.learn = busy
        end = time.monotonic() + WAIT_S
        while not tickets and time.monotonic() < end:
            time.sleep(0.01)
        tickets[0].result(WAIT_S)
        while engine._learned and time.monotonic() < end:
            time.sleep(0.01)
        assert engine.curve is engine._ledger.curve
        assert len(engine.curve.plain) == 3
