"""The cost curve: measured once, cached, and checked when it is read."""

from pathlib import Path

import numpy as np
import pytest

from runtime import Bundle, Sampler
from runtime.backends import cache
from runtime.backends.base import Backend
from runtime.engine.cost import CostCurve
from runtime.engine.costs import Costs, depends

from ...small_bundle import SmallBackend, SmallBuffers, write_small_bundle


def measure(bundle: Bundle, backend: Backend, largest: int, *clock: "Clock") -> CostCurve:
    """The curve with which an engine starts."""
    return Costs(bundle, backend, *clock).curve(largest)


def learn(bundle: Bundle, backend: Backend, largest: int, clock: "Clock") -> CostCurve:
    """The curve that it has after a while without work."""
    costs = Costs(bundle, backend, clock)
    curve = costs.curve(largest)
    while costs.learning:
        curve = costs.learn(lambda: False) or curve
    return curve


class Clock:
    """The duration of network calls, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0

    def __call__(self) -> float:
        return self.now


class TimedBuffers(SmallBuffers):
    def __init__(self, backend: "TimedBackend", batch: int) -> None:
        super().__init__(backend.bundle, batch)
        self._backend = backend

    def run(self, guided: bool, first: int, count: int) -> None:
        clock = self._backend.clock
        clock.calls += 1
        launch, each = self._backend.seconds
        clock.now += launch + each * count * (1 + guided)
        super().run(guided, first, count)
        if guided and self._backend.differs == count:
            self.next_state[first, 0, 0, 0, 0] += np.float32(1e-6)


class TimedBackend(SmallBackend):
    """A call takes launch + each · rows. differs: the batch size at which the graphs disagree."""

    def __init__(self, bundle: Bundle, launch: float, each: float, differs: int = 0) -> None:
        super().__init__(bundle)
        self.seconds = launch, each
        self.differs = differs
        self.clock = Clock()

    def bind(self, batch: int) -> TimedBuffers:
        return TimedBuffers(self, batch)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("UNNOISE_CACHE", str(tmp_path / "cache"))
    return write_small_bundle(tmp_path / "bundle")


def test_the_curve_is_what_the_calls_took(bundle: Bundle) -> None:
    backend = TimedBackend(bundle, 1.0, 0.125)
    curve = measure(bundle, backend, 32, backend.clock)
    assert curve.plain[:3] == ((1, 1.125), (2, 1.25), (4, 1.5))
    assert curve.guided[:3] == ((1, 1.25), (2, 1.5), (4, 2.0))
    assert curve.seconds(3, False) == 1.375


def test_no_larger_batch_is_measured_once_it_is_no_cheaper_a_sample(bundle: Bundle) -> None:
    backend = TimedBackend(bundle, 0.0, 0.001)
    curve = measure(bundle, backend, 1024, backend.clock)
    assert curve.plain[-1][0] == 4
    assert curve.settled
    assert (curve.cap(False), curve.cap(True)) == (1, 1)


def test_nor_once_it_takes_too_long(bundle: Bundle) -> None:
    backend = TimedBackend(bundle, 10.0, 0.001)
    assert measure(bundle, backend, 1024, backend.clock).plain[-1][0] == 4


def test_a_curve_of_a_busy_machine_is_not_kept(bundle: Bundle) -> None:
    """Every call takes longer than the one before, so no two durations agree."""
    backend = TimedBackend(bundle, 1e-3, 1e-6)

    class Busy(TimedBuffers):
        def run(self, guided: bool, first: int, count: int) -> None:
            super().run(guided, first, count)
            backend.clock.now *= 1.1

    backend.clock.now = 1e-3
    backend.bind = lambda batch: Busy(backend, batch)
    assert not learn(bundle, backend, 4, backend.clock).settled
    calls = backend.clock.calls
    backend.clock.now = 1e-3
    measure(bundle, backend, 4, backend.clock)
    assert backend.clock.calls > calls


def test_no_batch_is_larger_than_the_backend_can_run(bundle: Bundle) -> None:
    backend = TimedBackend(bundle, 1e-3, 0.0)
    assert measure(bundle, backend, 12, backend.clock).plain[-1][0] == 12
    backend.largest = 3
    assert [size for size, _ in measure(bundle, backend, 12, backend.clock).plain] == [1, 2, 3]


def test_rows_ride_in_the_guided_graph_only_if_the_bytes_are_equal(bundle: Bundle) -> None:
    """At every size up to the cap, including sizes between the measured ones."""
    backend = TimedBackend(bundle, 1e-3, 1e-6)
    curve = measure(bundle, backend, 16, backend.clock)
    assert curve.could_merge()
    assert curve.mergeable
    backend = TimedBackend(bundle, 1e-3, 1e-6, differs=13)
    assert not measure(bundle, backend, 16, backend.clock).mergeable


def test_a_real_bundle_has_the_same_bytes_at_every_size(sampler: Sampler) -> None:
    curve = measure(sampler.bundle, sampler.backend, 8)
    assert curve.same_bytes
    assert curve.plain[0][0] == curve.guided[0][0] == 1


def test_bytes_that_depend_on_the_batch_are_noticed(bundle: Bundle) -> None:
    class Uneven(TimedBuffers):
        def run(self, guided: bool, first: int, count: int) -> None:
            super().run(guided, first, count)
            if count == 4:
                self.next_state[first] += np.float32(1e-6)

    backend = TimedBackend(bundle, 1e-3, 1e-6)
    backend.bind = lambda batch: Uneven(backend, batch)
    assert not measure(bundle, backend, 8, backend.clock).same_bytes


def test_a_curve_is_measured_once(bundle: Bundle) -> None:
    backend = TimedBackend(bundle, 1e-3, 1e-4)
    first = learn(bundle, backend, 8, backend.clock)
    calls = backend.clock.calls
    assert calls > 0
    assert measure(bundle, backend, 8, backend.clock) == first
    assert backend.clock.calls == calls
    measure(bundle, backend, 4, backend.clock)
    assert backend.clock.calls > calls


def test_a_rough_curve_gets_whole_where_there_is_time(bundle: Bundle) -> None:
    """0.15 s are enough for sizes up to 8 here."""
    backend = TimedBackend(bundle, 2**-7, 2**-11)
    costs = Costs(bundle, backend, backend.clock)
    rough = costs.curve(32)
    assert [size for size, _ in rough.plain] == [1, 2, 4, 8]
    calls = backend.clock.calls
    assert costs.learn(lambda: True) is None
    assert backend.clock.calls == calls
    assert costs.learning
    answers = iter([False, True])
    assert costs.learn(answers.__next__) is None  # stopped between two calls
    assert backend.clock.calls == calls + 1
    whole = learn(bundle, backend, 32, backend.clock)
    assert [size for size, _ in whole.plain] == [1, 2, 4, 8, 16, 32]
    assert whole.plain[:4] == rough.plain
    assert not Costs(bundle, backend, backend.clock).learning


def test_a_long_call_is_not_learned(bundle: Bundle) -> None:
    backend = TimedBackend(bundle, 1.0, 0.125)
    costs = Costs(bundle, backend, backend.clock)
    rough = costs.curve(8)
    calls = backend.clock.calls
    assert costs.learn(lambda: False) == rough
    assert backend.clock.calls == calls


def test_what_cannot_be_learned_leaves_the_rough_curve(bundle: Bundle) -> None:
    backend = TimedBackend(bundle, 2**-6, 2**-10)
    costs = Costs(bundle, backend, backend.clock)
    rough = costs.curve(8)
    backend.bind = None
    assert costs.learn(lambda: False) == rough
    assert not costs.learning


@pytest.mark.parametrize("entry", [b"", b"{}", b'{"plain": [], "guided": []}', b"[1]", b"\xff"])
def test_an_entry_that_is_no_curve_is_measured_anew(
    bundle: Bundle, entry: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "key", lambda *_: "entry")
    cache.store("entry", [entry])
    backend = TimedBackend(bundle, 2**-6, 2**-9)
    assert learn(bundle, backend, 2, backend.clock).plain[0] == (1, 2**-6 + 2**-9)
    assert cache.load("entry")[0].tobytes() != entry


def test_what_a_curve_depends_on(bundle: Bundle) -> None:
    backend = TimedBackend(bundle, 1.0, 0.125)
    one = depends(bundle, backend)
    backend.threads = 3
    assert depends(bundle, backend) != one


def test_an_unlabelled_bundle_has_one_curve(bundle: Bundle) -> None:
    import dataclasses

    plain = dataclasses.replace(bundle, labels=None)
    curve = measure(plain, TimedBackend(plain, 1.0, 0.125), 4)
    assert curve.plain == curve.guided
    assert not curve.mergeable
    assert isinstance(curve, CostCurve)
