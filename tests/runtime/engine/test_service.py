"""The engine: a sample has the same bytes alone and with others, which may join or leave. The
failure, cancellation or slowness of one request does not affect others."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import (
    BackendError,
    Cancelled,
    ClosedError,
    DeadlineError,
    Engine,
    Limits,
    Overloaded,
    Request,
    RequestError,
    Sampler,
)
from runtime.engine.cost import CostCurve
from runtime.engine.request import resolve
from runtime.engine.stats import TickReport
from runtime.engine.ticket import Ticket

from ...small_bundle import SmallBackend, SmallBuffers, write_small_bundle
from .test_batch import random_request

WAIT_S = 120
"""After this time a test counts as hanging. It is not a bound on speed."""
REQUESTS = 500
DIFFERENT = 150
"""How many of them differ: what each gives alone is computed once."""
SMALL = CostCurve(((1, 1e-3), (4, 2e-3)), ((1, 1e-3), (4, 2e-3)))
"""Four samples per call; plain and guided rows in separate calls."""
MERGING = CostCurve(((1, 1e-3), (8, 1e-3)), ((1, 1e-3), (8, 1e-3)), mergeable=True)
NO_LIMITS = Limits(live=12, samples=10_000, rows=10_000_000, seconds=1e9, flow_share=1.0)


class Gate:
    """Blocks each network call until a test lets it pass."""

    def __init__(self) -> None:
        self._open = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)
        self.calls = 0
        self.shut = False

    def wait(self) -> None:
        if self.shut:
            self.waiting.release()
            assert self._open.acquire(timeout=WAIT_S)
        self.calls += 1

    def arrive(self) -> None:
        """Wait until the engine is in a network call."""
        assert self.waiting.acquire(timeout=WAIT_S)

    def tick(self) -> None:
        """Let one call pass, and wait until the engine is in the next."""
        self._open.release()
        self.arrive()

    def release(self) -> None:
        """Let all calls pass from now on."""
        self.shut = False
        self._open.release(10_000)


class GatedBuffers(SmallBuffers):
    def __init__(self, backend: "GatedBackend", batch: int) -> None:
        super().__init__(backend.bundle, batch)
        self._backend = backend

    def run(self, guided: bool, first: int, count: int) -> None:
        self._backend.gate.wait()
        if self._backend.broken in self.label[first : first + count]:
            raise ZeroDivisionError("a broken label")
        super().run(guided, first, count)


class GatedBackend(SmallBackend):
    """broken: a label that every call with it fails for."""

    broken = -1

    def __init__(self, bundle: Any) -> None:
        super().__init__(bundle)
        self.gate = Gate()

    def bind(self, batch: int) -> GatedBuffers:
        return GatedBuffers(self, batch)


@dataclass
class Rig:
    """An engine with a network in numpy, its gate, and a sampler to compare with."""

    engine: Engine
    sampler: Sampler
    backend: GatedBackend
    reports: list[TickReport]

    @property
    def gate(self) -> Gate:
        return self.backend.gate

    def alone(self, request: Request) -> bytes:
        small = Sampler(self.sampler.bundle, SmallBackend(self.sampler.bundle))
        return small.sample_requests([request]).tobytes()


@pytest.fixture
def rigged(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """rigged(limits, shut): an engine, with its gate shut or open."""
    made: list[Rig] = []

    def make(limits: Limits | None = None, shut: bool = False, **settings: Any) -> Rig:
        bundle = write_small_bundle(tmp_path / "bundle", knots=200)
        backend = GatedBackend(bundle)
        backend.gate.shut = shut
        sampler = Sampler(bundle, backend)
        reports: list[TickReport] = []
        settings = {"curve": SMALL, "on_tick": reports.append, **settings}
        made.append(Rig(Engine(sampler, limits, **settings), sampler, backend, reports))
        return made[-1]

    yield make
    for rig in made:
        rig.gate.release()
        rig.engine.close()


def request(seed: int = 0, steps: int = 5, guided: bool = False, **more: Any) -> Request:
    guidance = 2.0 if guided else 1.0
    return Request(seed, **{"label": 1, "steps": steps, "guidance": guidance, **more})


def nothing_left(engine: Engine) -> bool:
    stats = engine.stats()
    return (stats.live, stats.waiting, stats.flows, stats.backlog_rows) == (0, 0, 0, 0)


@pytest.fixture(scope="module")
def requests(sampler: Sampler) -> list[Request]:
    """Of all solvers, guided or not, with masks and starts, of 1 to 100 steps."""
    generator = np.random.Generator(np.random.Philox(key=3))
    found: list[Request] = []
    seed = 0
    while len(found) < DIFFERENT:
        seed += 1
        candidate = random_request(generator, seed)
        try:
            sampler._planner.job(candidate)
        except RequestError:  # a solver that does not accept this start or this number of steps
            continue
        found.append(candidate)
    return [found[i] for i in generator.integers(DIFFERENT, size=REQUESTS)]


@pytest.fixture(scope="module")
def alone(sampler: Sampler, requests: list[Request]) -> list[bytes]:
    by_seed = {r.seed: r for r in requests}
    found = {seed: sampler.sample_requests([r]).tobytes() for seed, r in by_seed.items()}
    return [found[r.seed] for r in requests]


@pytest.mark.parametrize("curve", [SMALL, MERGING], ids=["two graphs", "merging"])
def test_500_random_requests_have_the_bytes_that_they_have_alone(
    sampler: Sampler, requests: list[Request], alone: list[bytes], curve: CostCurve
) -> None:
    """From four threads and eleven flows; a fifth of the requests are cancelled at a random
    moment."""
    generator = np.random.Generator(np.random.Philox(key=4))
    cancelled = generator.random(REQUESTS) < 0.2
    pauses = generator.exponential(0.002, REQUESTS)
    tickets: dict[int, Ticket] = {}
    engine = Engine(sampler, NO_LIMITS, curve=curve)

    def submit(thread: int) -> None:
        mine: list[Ticket] = []
        for i in range(thread, REQUESTS, 4):
            tickets[i] = engine.submit(requests[i], flow=f"flow {i % 11}", on_preview=i % 3 == 0)
            if cancelled[i]:
                mine.append(tickets[i])
            threading.Event().wait(pauses[i])
            if len(mine) > 3:
                mine.pop(0).cancel()
        for ticket in mine:
            ticket.cancel()

    threads = [threading.Thread(target=submit, args=[k]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    compared = 0
    with engine:
        for i, ticket in tickets.items():
            assert ticket.wait(WAIT_S)
            if ticket.state == "cancelled":
                assert cancelled[i]
                continue
            assert ticket.result().tobytes() == alone[i], requests[i]
            compared += 1
        assert compared >= REQUESTS * (1 - 0.3)
        assert nothing_left(engine)
        stats = engine.stats()
        assert (stats.accepted, stats.done) == (REQUESTS, compared)
        assert stats.cancelled == REQUESTS - compared


def test_a_ticket_of_many_requests_is_finished_together(rigged: Callable[..., Rig]) -> None:
    rig = rigged()
    many = [request(seed, steps=1 + seed, guided=seed % 2 == 0) for seed in range(9)]
    ticket = rig.engine.submit(many)
    assert ticket.result(WAIT_S).shape == (9, 1, 4, 4)
    for x, asked in zip(ticket.result(), many, strict=True):
        assert x.tobytes() == rig.alone(asked)
    assert ticket.rows == sum(1 + seed for seed in range(9)) + 1 + 3 + 5 + 7 + 9
    status = ticket.status()
    assert (status.state, status.rows_left, status.ahead) == ("done", 0, 0)
    assert status.finish_seconds == 0
    assert sum(report.samples for report in rig.reports) == 45
    assert sum(report.finished for report in rig.reports) == 9
    assert rig.engine.stats().rows == ticket.rows


def test_an_empty_submission_is_done_at_once(rigged: Callable[..., Rig]) -> None:
    rig = rigged(shut=True)
    ticket = rig.engine.submit([])
    assert ticket.result(0).shape == (0, 1, 4, 4)
    assert ticket.state == "done"


def test_there_is_no_waiting_window(rigged: Callable[..., Rig]) -> None:
    """The first call runs the first request alone; the next also takes requests that arrived
    since."""
    rig = rigged(shut=True)
    tickets = [rig.engine.submit(request(0))]
    rig.gate.arrive()
    tickets += [rig.engine.submit(request(seed)) for seed in (1, 2)]
    rig.gate.release()
    for ticket in tickets:
        ticket.result(WAIT_S)
    assert [report.samples for report in rig.reports][:2] == [1, 3]


def test_a_request_that_fails_fails_alone(rigged: Callable[..., Rig]) -> None:
    rig = rigged(shut=True)
    rig.backend.broken = 2
    good = [request(seed, steps=6) for seed in range(3)]
    tickets = [rig.engine.submit(r, flow=str(i)) for i, r in enumerate(good)]
    guilty = rig.engine.submit([request(9, label=2), request(10)], flow="guilty")
    rig.gate.arrive()
    rig.gate.release()
    for ticket, asked in zip(tickets, good, strict=True):
        assert ticket.result(WAIT_S).tobytes() == rig.alone(asked)
    with pytest.raises(BackendError, match="a step failed: ZeroDivisionError: a broken label"):
        guilty.result(WAIT_S)
    assert isinstance(guilty.exception().__cause__, ZeroDivisionError)
    assert guilty.state == "failed"
    assert not guilty.cancel()
    after = rig.engine.submit(good[0])
    assert after.result(WAIT_S).tobytes() == rig.alone(good[0])
    assert nothing_left(rig.engine)
    assert rig.engine.stats().failed == 1


def test_previews_survive_a_call_that_fails(rigged: Callable[..., Rig]) -> None:
    """Each sample takes its row again alone, which retires those that finished just before."""
    rig = rigged(shut=True)
    rig.backend.broken = 2
    opening = rig.engine.submit(request(9, steps=1))
    rig.gate.arrive()
    good = [request(seed, steps=1) for seed in range(2)]
    tickets = [rig.engine.submit(r, on_preview=True) for r in good]
    guilty = rig.engine.submit(request(8, label=2), on_preview=True)
    rig.gate.release()
    for ticket, asked in zip(tickets, good, strict=True):
        x = ticket.result(WAIT_S)
        assert x.tobytes() == rig.alone(asked)
        preview = ticket.preview()
        assert preview is not None
        assert preview.x.tobytes() == x.tobytes()
    with pytest.raises(BackendError, match="a broken label"):
        guilty.result(WAIT_S)
    assert guilty.preview() is None
    assert opening.result(WAIT_S) is not None
    assert rig.engine.stats().accepting


def test_a_cancelled_ticket_leaves_the_batch_within_one_tick(rigged: Callable[..., Rig]) -> None:
    rig = rigged(shut=True)
    stays = rig.engine.submit(request(0, steps=20))
    goes = rig.engine.submit([request(1, steps=50), request(2, steps=50)])
    rig.gate.arrive()
    rig.gate.tick()
    rig.gate.tick()
    assert goes.state == "running"
    assert goes.cancel()
    assert goes.cancel()
    assert goes.state == "cancelled"
    assert rig.engine.stats().live == 1
    rig.gate.tick()  # the call that was under way
    assert len(rig.engine._runner) == 1
    rig.gate.release()
    assert stays.result(WAIT_S).tobytes() == rig.alone(request(0, steps=20))
    assert [report.samples for report in rig.reports][-15:] == [1] * 15
    with pytest.raises(Cancelled):
        goes.result()


def test_1000_cancellations_leave_nothing_behind(rigged: Callable[..., Rig]) -> None:
    rig = rigged(NO_LIMITS)
    threads = set(threading.enumerate())
    neighbour = rig.engine.submit([request(seed, steps=60) for seed in range(3)], flow="neighbour")
    cancelled = started = 0
    while cancelled < 1000:
        started += 1
        running = threading.Event()
        ticket = rig.engine.submit(
            request(started, steps=100, guided=started % 3 == 0),
            flow=str(started % 7),
            on_preview=lambda _, running=running: running.set(),
        )
        if started % 4 == 0:
            assert running.wait(WAIT_S)
        cancelled += ticket.cancel()  # a running ticket may be done by now
    for x, seed in zip(neighbour.result(WAIT_S), range(3), strict=True):
        assert x.tobytes() == rig.alone(request(seed, steps=60))
    assert nothing_left(rig.engine)
    assert rig.engine.stats().cancelled == 1000
    assert set(threading.enumerate()) <= threads  # those of earlier tests may end meanwhile
    # The last slots are freed by the inference thread, which one more ticket waits for.
    rig.engine.submit(request(0, steps=1)).result(WAIT_S)
    assert len(rig.engine._runner) == 0
    assert not rig.engine._ledger.orders
    assert not rig.engine._ledger._samples
    assert not rig.engine._ledger.gone


def test_previews_go_to_a_mailbox_of_one(rigged: Callable[..., Rig]) -> None:
    """A reader that reads late gets the newest preview, and nothing waited for it."""
    rig = rigged(shut=True)
    called: list[Ticket] = []
    slow = rig.engine.submit([request(0, steps=6), request(1, steps=4)], on_preview=called.append)
    silent = rig.engine.submit(request(2, steps=6))
    rig.gate.arrive()
    assert slow.preview() is None
    rig.gate.tick()
    first = slow.preview()
    assert first is not None
    assert (first.samples.tolist(), first.step.tolist()) == ([0, 1], [1, 1])
    assert first.steps.tolist() == [6, 4]
    assert first.denoised.shape == (2, 1, 4, 4)
    assert slow.preview() is None
    rig.gate.release()
    x = slow.result(WAIT_S)
    last = slow.preview()
    assert last is not None
    assert last.step.tolist() == [6, 4]
    np.testing.assert_array_equal(last.denoised, x)  # the last row of DDIM is x = D
    assert set(called) == {slow}
    assert len(called) == 6
    silent.result(WAIT_S)
    assert silent.preview() is None
    # One preview of each sample was taken, and one was left: 10 - 2 - 2 were replaced.
    assert rig.engine.stats().previews_dropped == 6


def test_previews_of_every_third_row_and_of_the_last(rigged: Callable[..., Rig]) -> None:
    rig = rigged()
    steps: list[int] = []
    ticket = rig.engine.submit(
        request(0, steps=8),
        on_preview=lambda ticket: steps.extend(ticket.preview().step.tolist()),
        every=3,
    )
    ticket.result(WAIT_S)
    assert steps == [3, 6, 8]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_callbacks_that_raise_change_nothing(
    rigged: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[type] = []
    monkeypatch.setattr(threading, "excepthook", lambda details: raised.append(details.exc_type))

    def fail(_: object) -> None:
        raise KeyError("of the user")

    rig = rigged(shut=True, on_tick=fail)
    ticket = rig.engine.submit(request(0, steps=3), on_preview=fail)
    ticket.add_done_callback(fail)
    done: list[Ticket] = []
    ticket.add_done_callback(done.append)
    rig.gate.arrive()
    rig.gate.release()
    assert ticket.result(WAIT_S).tobytes() == rig.alone(request(0, steps=3))
    ticket.add_done_callback(done.append)  # at once
    rig.engine.close()
    assert done == [ticket, ticket]
    assert raised == [KeyError] * 7  # three previews, three ticks, one end


def test_a_callback_may_submit_and_cancel(rigged: Callable[..., Rig]) -> None:
    rig = rigged(shut=True)
    second: list[Ticket] = []
    victim = rig.engine.submit(request(5, steps=100))
    first = rig.engine.submit(request(0, steps=2))
    first.add_done_callback(lambda _: second.append(rig.engine.submit(request(1))))
    first.add_done_callback(lambda _: victim.cancel())
    rig.gate.arrive()
    rig.gate.release()
    first.result(WAIT_S)
    assert victim.wait(WAIT_S)
    assert victim.state == "cancelled"
    assert second[0].result(WAIT_S).tobytes() == rig.alone(request(1))


def test_an_overloaded_engine_refuses_and_counts(rigged: Callable[..., Rig]) -> None:
    rig = rigged(Limits(samples=5, flow_share=0.6), shut=True)
    rig.engine.submit([request(seed) for seed in range(3)], flow="a")
    rig.gate.arrive()
    with pytest.raises(Overloaded, match=r"one user may hold 60% of the samples") as error:
        rig.engine.submit(request(3), flow="a")
    assert error.value.retry_after > 0
    rig.engine.submit([request(seed) for seed in range(2)], flow="b")
    with pytest.raises(Overloaded, match="at most 5 samples may be under way") as error:
        rig.engine.submit(request(3), flow="c")
    assert error.value.retry_after > 0
    with pytest.raises(RequestError, match="at most 5 samples can be submitted together, got 6"):
        rig.engine.submit([request(seed) for seed in range(6)])
    stats = rig.engine.stats()
    assert stats.rejected == {"flow": 1, "samples": 1}
    assert (stats.accepted, stats.flows) == (2, 2)
    rig.gate.release()


def test_a_submission_of_too_many_rows_is_refused_for_good(rigged: Callable[..., Rig]) -> None:
    rig = rigged(Limits(rows=30))
    with pytest.raises(RequestError, match=r"at most 30 rows .* got 40\. Take fewer steps"):
        rig.engine.submit(request(0, steps=20, guided=True))


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_deadline_that_cannot_be_met_is_refused_at_once(rigged: Callable[..., Rig]) -> None:
    """On the curve, 10 steps alone take 10 ms."""
    rig = rigged(clock=Clock())
    with pytest.raises(DeadlineError, match=r"the request would take 0\.01 s") as error:
        rig.engine.submit(request(0, steps=10), deadline=0.009)
    assert error.value.finish_seconds == pytest.approx(0.01)
    assert rig.engine.stats().rejected == {"deadline": 1}
    rig.engine.submit(request(0, steps=10), deadline=0.011).result(WAIT_S)


def test_a_deadline_that_passes_fails_its_ticket_alone(rigged: Callable[..., Rig]) -> None:
    clock = Clock()
    rig = rigged(shut=True, clock=clock)
    late = rig.engine.submit(request(0, steps=50), deadline=1.0)
    other = rig.engine.submit(request(1, steps=5))
    rig.gate.arrive()
    rig.gate.tick()
    clock.now = 2.0
    rig.gate.release()
    with pytest.raises(DeadlineError, match="the deadline passed"):
        late.result(WAIT_S)
    assert other.result(WAIT_S).tobytes() == rig.alone(request(1, steps=5))
    rig.engine.submit(request(0, steps=1)).result(WAIT_S)
    assert len(rig.engine._runner) == 0


def test_the_status_of_a_ticket(rigged: Callable[..., Rig]) -> None:
    clock = Clock()
    rig = rigged(shut=True, clock=clock)
    first = rig.engine.submit([request(seed, steps=10) for seed in range(4)])
    rig.gate.arrive()
    second = rig.engine.submit(request(5, steps=20, guided=True))
    third = rig.engine.submit(request(6, steps=2), flow="other")
    clock.now = 3.0
    waiting = third.status()
    assert (waiting.state, waiting.ahead, waiting.rows_left) == ("waiting", 1, 2)
    assert (waiting.queue_seconds, waiting.run_seconds) == (3.0, 0.0)
    assert waiting.finish_seconds > 0
    running = first.status()
    assert (running.state, running.ahead, running.rows_left) == ("running", 0, 40)
    assert (running.queue_seconds, running.run_seconds) == (0.0, 3.0)
    assert rig.engine.stats().tick_seconds == 3.0
    assert second.status().rows == 40
    rig.gate.release()
    for ticket in (first, second, third):
        ticket.result(WAIT_S)
    assert first.status().state == "done"
    assert first.status().run_seconds == 3.0


def test_the_status_of_a_ticket_that_is_final_copies_no_queue(
    rigged: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rigged()
    ticket = rig.engine.submit(request(0))
    ticket.result(WAIT_S)
    monkeypatch.setattr(rig.engine._ledger, "snapshot", lambda: pytest.fail("it was copied"))
    assert ticket.status().finish_seconds == 0


def test_close_lets_what_was_accepted_finish(rigged: Callable[..., Rig]) -> None:
    rig = rigged(shut=True)
    tickets = [rig.engine.submit(request(seed, steps=20)) for seed in range(8)]
    rig.gate.arrive()
    closed: list[bool] = []
    closing = threading.Thread(target=lambda: closed.append(rig.engine.close(WAIT_S)))
    closing.start()
    while rig.engine.stats().accepting:
        threading.Event().wait(0.001)
    with pytest.raises(ClosedError, match="accepts nothing more"):
        rig.engine.submit(request(9))
    rig.gate.release()
    closing.join(WAIT_S)
    assert closed == [True]
    assert [ticket.state for ticket in tickets] == ["done"] * 8
    assert not rig.engine._thread.is_alive()
    assert rig.engine.close()


def test_close_waits_no_longer_than_for_the_last_deadline(rigged: Callable[..., Rig]) -> None:
    clock = Clock()
    rig = rigged(shut=True, clock=clock)
    late = rig.engine.submit(request(0, steps=50), deadline=1.0)
    rig.gate.arrive()
    # It would wait for much longer than the test does.
    closing = threading.Thread(target=lambda: rig.engine.close(100 * WAIT_S), daemon=True)
    closing.start()
    while rig.engine.stats().accepting:
        threading.Event().wait(0.001)
    clock.now = 2.0
    rig.gate.release()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    assert late.state == "failed"


def test_close_without_time_fails_what_is_left(rigged: Callable[..., Rig]) -> None:
    rig = rigged()
    tickets = [rig.engine.submit(request(seed, steps=100)) for seed in range(30)]
    assert not rig.engine.close()
    assert all(ticket.final for ticket in tickets)
    failed = [ticket for ticket in tickets if ticket.state == "failed"]
    assert failed
    with pytest.raises(ClosedError, match="closed before it was done"):
        failed[0].result()
    assert nothing_left(rig.engine)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_fails_its_tickets_instead_of_hanging(
    rigged: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rigged()

    def broken(*_: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(rig.engine._ledger, "pick", broken)
    ticket = rig.engine.submit(request(0))
    with pytest.raises(BackendError, match="the engine stopped: AssertionError: a bug"):
        ticket.result(WAIT_S)
    assert not rig.engine.stats().accepting
    with pytest.raises(ClosedError):
        rig.engine.submit(request(0))


def test_result_waits_no_longer_than_it_is_told_to(rigged: Callable[..., Rig]) -> None:
    rig = rigged(shut=True)
    ticket = rig.engine.submit(request(0))
    assert not ticket.wait(0)
    with pytest.raises(TimeoutError, match="is not done after 0 s"):
        ticket.result(0)
    with pytest.raises(TimeoutError):
        ticket.exception(0)


@pytest.mark.parametrize("endless", [float("inf"), 1e10])
def test_a_wait_may_be_longer_than_a_lock_can_wait(
    endless: float, rigged: Callable[..., Rig]
) -> None:
    rig = rigged()
    ticket = rig.engine.submit(request(0))
    assert ticket.wait(endless)
    assert len(ticket.result(endless)) == 1
    assert ticket.exception(endless) is None
    with pytest.raises(RequestError, match="`timeout` must be a number"):
        ticket.result("x")
    with pytest.raises(RequestError, match="`drain_s` must be a number"):
        rig.engine.close("x")
    assert rig.engine.stats().accepting
    assert rig.engine.close(endless)


def test_arguments_are_checked(rigged: Callable[..., Rig]) -> None:
    rig = rigged()
    for bad in (
        {"flow": 3},
        {"deadline": float("nan")},
        {"deadline": -1},
        {"every": 0},
        {"on_preview": 3},
    ):
        with pytest.raises(RequestError, match=next(iter(bad))):
            rig.engine.submit(request(0), **bad)
    with pytest.raises(RequestError, match="`bundle` must be"):
        resolve(Sampler, request(0))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="Request"):
        rig.engine.submit([{"seed": 3}])
    for bad in (3, None, {"seed": 3}, "12"):
        with pytest.raises(RequestError, match="`requests` must be a list of Requests"):
            rig.engine.submit(bad)
    with pytest.raises(RequestError, match="steps"):
        rig.engine.submit(request(0, steps=100_000))
    with pytest.raises(RequestError, match="max_batch"):
        Engine(rig.sampler, max_batch=0)
    with pytest.raises(RequestError, match="limits"):
        Engine(rig.sampler, {"live": 3})
    with pytest.raises(RequestError, match="`curve` must be a CostCurve"):
        Engine(rig.sampler, curve={"plain": []})
    with pytest.raises(RequestError, match="`clock` must be a function"):
        Engine(rig.sampler, curve=SMALL, clock=3)
    with pytest.raises(RequestError, match="`sampler` must be a Sampler, got 'bundles/emoji32'"):
        Engine("bundles/emoji32")
    assert rig.engine.stats().accepted == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("raised", [SystemExit, asyncio.CancelledError, GeneratorExit])
def test_callbacks_that_raise_no_exception_change_nothing(
    rigged: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    """Not even if the hook that reports them raises, as the default one does without a stderr."""

    def hook(_: object) -> None:
        raise BrokenPipeError

    def fail(_: object) -> None:
        raise raised

    monkeypatch.setattr(threading, "excepthook", hook)
    rig = rigged(on_tick=fail)
    ticket = rig.engine.submit(request(0, steps=3), on_preview=fail)
    ticket.add_done_callback(fail)
    assert ticket.result(WAIT_S).tobytes() == rig.alone(request(0, steps=3))
    assert rig.engine.submit(request(1)).result(WAIT_S) is not None
    assert rig.engine.stats().accepting
    with pytest.raises(RequestError, match="`callback` must be a function"):
        ticket.add_done_callback(3)


def test_close_says_whether_all_finished_to_everybody(rigged: Callable[..., Rig]) -> None:
    """A second call without time ends the wait of the first one."""
    rig = rigged(shut=True)
    ticket = rig.engine.submit(request(0, steps=20))
    rig.gate.arrive()
    found: list[bool] = []
    waiting = threading.Thread(target=lambda: found.append(rig.engine.close(WAIT_S)))
    waiting.start()
    while rig.engine.stats().accepting:
        threading.Event().wait(0.001)
    closing = threading.Thread(target=lambda: found.append(rig.engine.close()))
    closing.start()
    with pytest.raises(ClosedError):
        ticket.result(WAIT_S)
    rig.gate.release()
    waiting.join(WAIT_S)
    closing.join(WAIT_S)
    assert found == [False, False]
    assert not rig.engine.close()


def test_close_in_a_callback_waits_for_nothing(rigged: Callable[..., Rig]) -> None:
    """Nothing runs while the inference thread waits."""
    rig = rigged(shut=True)
    first = rig.engine.submit(request(0, steps=1))
    other = rig.engine.submit(request(1, steps=50))
    closed: list[bool] = []
    first.add_done_callback(lambda _: closed.append(rig.engine.close(100 * WAIT_S)))
    rig.gate.arrive()
    rig.gate.release()
    with pytest.raises(ClosedError):
        other.result(WAIT_S)
    rig.engine._thread.join(WAIT_S)
    assert closed == [False]


def test_a_preview_keeps_its_own_sample_alone(rigged: Callable[..., Rig]) -> None:
    rig = rigged()
    many = [request(seed, steps=2) for seed in range(4)]
    ticket = rig.engine.submit(many, on_preview=True)
    ticket.result(WAIT_S)
    for _, _, denoised, x in ticket._mailbox.values():
        assert denoised.base is None
        assert x.base is None


def test_a_ticket_of_another_engine_is_refused(rigged: Callable[..., Rig]) -> None:
    """Both engines count their tickets from 1."""
    one, two = rigged(shut=True), rigged(shut=True)
    mine = one.engine.submit(request(0, steps=20))
    theirs = two.engine.submit(request(0, steps=20))
    assert mine.id == theirs.id
    for use in (one.engine.cancel, one.engine.status):
        with pytest.raises(RequestError, match="ticket 1 is another engine's"):
            use(theirs)
        with pytest.raises(RequestError, match="`ticket` must be a Ticket"):
            use(1)
    assert not mine.final
    assert two.engine.cancel(theirs)


def test_there_is_no_preview_after_the_end(rigged: Callable[..., Rig]) -> None:
    """The call that was under way still makes one."""
    rig = rigged(shut=True)
    called: list[Ticket] = []
    ticket = rig.engine.submit(request(0, steps=20), on_preview=called.append)
    rig.gate.arrive()
    assert ticket.cancel()
    rig.gate.release()
    rig.engine.submit(request(1, steps=2)).result(WAIT_S)
    assert not called
    assert ticket.preview() is None
