"""The engine's policy on a virtual clock: what runs next, what is accepted, and what is predicted.
The code is the engine's own; a cost curve replaces the network."""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from runtime import RequestError
from runtime.engine.admission import Limits, Refusal, deadline_refusal, refusal
from runtime.engine.cost import CostCurve
from runtime.engine.fair import FairQueue, Tick, Work, network_rows
from runtime.engine.forecast import Forecast, seconds_until_group
from runtime.engine.ledger import Ledger
from runtime.engine.runner import Outcome

from ...root import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import traffic
    from traffic import GUIDED, LAUNCH_BOUND, PLAIN, TWO_CORES
finally:
    sys.path.pop(0)

FLAT = CostCurve(((1, 1.0), (4, 1.0)), ((1, 2.0), (2, 2.0)))
"""Caps of 4 and 2."""


def queue_of(*works: tuple[str, bytes], curve: CostCurve = FLAT, live: int = 64) -> FairQueue:
    """A queue of samples, each in a group of its own."""
    queue = FairQueue(curve, live)
    queue.add(Work(key, flow, key, guided) for key, (flow, guided) in enumerate(works))
    return queue


def ticks(queue: FairQueue) -> Iterator[Tick]:
    """Run to the end."""
    while tick := queue.pick():
        queue.advance(tick.works)
        yield tick


def seconds_until(queue: FairQueue, reached: Callable[[], bool]) -> float:
    """Virtual seconds until a condition holds, if nothing else arrives."""
    now = 0.0
    while not reached():
        tick = queue.pick()
        assert tick is not None
        now += queue.curve.seconds(len(tick.works), tick.guided)
        queue.advance(tick.works)
    return now


def keys(tick: Tick | None) -> list[int]:
    assert tick is not None
    return [work.key for work in tick.works]


def test_an_empty_queue_picks_nothing() -> None:
    assert queue_of().pick() is None


def test_a_guided_row_counts_two() -> None:
    assert network_rows(PLAIN * 3 + GUIDED * 4) == 11
    work = Work(0, "", 0, PLAIN * 3 + GUIDED * 4)
    assert work.left == 11


def test_every_row_runs_once_and_in_one_graph() -> None:
    generator = np.random.Generator(np.random.Philox(key=1))
    works = [
        (f"flow {generator.integers(5)}", bytes(generator.integers(2, size=length).tolist()))
        for length in generator.integers(1, 30, size=60)
    ]
    queue = queue_of(*works, live=10)
    rows = [0] * len(works)
    for tick in ticks(queue):
        assert len(tick.works) <= queue.curve.cap(tick.guided)
        assert queue.started <= queue.live
        for work in tick.works:
            assert works[work.key][1][rows[work.key]] == tick.guided
            rows[work.key] += 1
    assert rows == [len(guided) for _, guided in works]
    assert (len(queue), queue.rows, queue.started, queue.flows) == (0, 0, 0, 0)


def test_flows_share_alike_whatever_they_submit() -> None:
    """One flow of 30 samples alongside one of a single long sample, with two rows per tick."""
    pair = CostCurve(((1, 1.0), (2, 1.0)), ((1, 1.0),))
    queue = queue_of(*[("many", PLAIN * 50)] * 30, ("one", PLAIN * 50), curve=pair)
    for _ in range(50):
        tick = queue.pick()
        assert tick is not None
        assert {work.flow for work in tick.works} == {"many", "one"}
        queue.advance(tick.works)


def test_inside_a_flow_the_least_work_left_goes_first() -> None:
    lone = CostCurve(((1, 1.0),), ((1, 2.0),))
    queue = queue_of(("a", PLAIN * 9), ("a", GUIDED * 2), ("a", PLAIN * 5), curve=lone)
    order = [work.key for tick in ticks(queue) for work in tick.works]
    assert order == [1] * 2 + [2] * 5 + [0] * 9


def test_a_submission_is_ranked_by_the_work_of_all_its_samples() -> None:
    lone = CostCurve(((1, 1.0),), ((1, 2.0),))
    queue = FairQueue(lone, 8)
    queue.add(Work(key, "a", 7, PLAIN * 4) for key in range(5))
    queue.add([Work(9, "a", 8, PLAIN * 10)])
    order = [work.key for tick in ticks(queue) for work in tick.works]
    assert order[:10] == [9] * 10


def test_a_flow_that_was_idle_has_saved_nothing_up() -> None:
    lone = CostCurve(((1, 1.0),), ((1, 2.0),))
    queue = queue_of(("busy", PLAIN * 1000), curve=lone)
    for _ in range(500):
        queue.advance(queue.pick().works)
    queue.add([Work(1, "new", 1, PLAIN * 100)])
    served = [queue.pick() for _ in range(20)]
    assert sum(tick.works[0].flow == "new" for tick in served) == 10


def test_a_flow_that_comes_back_keeps_its_debt() -> None:
    """A flow that sends one short request after another gets no more than its share."""
    lone = CostCurve(((1, 1.0),), ((1, 2.0),))
    queue = queue_of(("long", PLAIN * 1000), ("short", PLAIN * 2), curve=lone)
    served = {"long": 0, "short": 0}
    for key in range(2, 400):
        tick = queue.pick()
        served[tick.works[0].flow] += 1
        if queue.advance(tick.works):
            queue.add([Work(key, "short", key, PLAIN * 2)])
    assert abs(served["long"] - served["short"]) <= 2


def test_a_long_guided_request_beside_16_endless_short_flows_is_not_starved() -> None:
    queue = queue_of(("long", GUIDED * 1000), curve=TWO_CORES)
    queue.add(Work(key, f"short {key}", key, PLAIN * 4) for key in range(1, 17))
    fresh = 17
    rows = long_rows = 0
    while tick := queue.pick():
        rows += tick.rows
        long_rows += 2 * sum(work.flow == "long" for work in tick.works)
        for work in queue.advance(tick.works):
            if work.flow == "long":
                assert long_rows >= 0.9 / 17 * rows
                return
            queue.add([Work(fresh, work.flow, fresh, PLAIN * 4)])
            fresh += 1


def test_one_graph_cannot_take_all_slots_from_the_other() -> None:
    """Long guided samples wait in every slot available to them; plain calls are still full."""
    works = [(f"guided {i}", GUIDED * 500) for i in range(40)]
    works += [(f"plain {i}", PLAIN * 10) for i in range(400)]
    queue = queue_of(*works, curve=TWO_CORES, live=20)
    sizes = [
        len(tick.works)
        for tick, _ in zip(ticks(queue), range(800), strict=False)
        if not tick.guided
    ]
    assert len(sizes) > 300
    assert np.mean(sizes) > 0.95 * TWO_CORES.cap(False)


def test_live_is_raised_to_a_full_call_of_each_graph() -> None:
    assert FairQueue(FLAT, 1).live == 6


def test_plain_rows_ride_in_the_guided_graph_only_where_that_is_allowed_and_cheaper() -> None:
    def first(curve: CostCurve, plain: int, guided: int) -> Tick:
        works = [("a", PLAIN)] * plain + [("b", GUIDED)] * guided
        tick = queue_of(*works, curve=curve).pick()
        assert tick is not None
        return tick

    allowed = CostCurve(((1, 2.0), (8, 2.1)), ((1, 2.1), (4, 2.4)), mergeable=True)
    assert allowed.could_merge()
    assert first(allowed, 2, 2).guided
    assert len(first(allowed, 2, 2).works) == 4
    assert len(first(allowed, 3, 2).works) < 5  # they do not all fit
    refused = CostCurve(allowed.plain, allowed.guided, mergeable=False)
    assert len(first(refused, 2, 2).works) == 2
    assert not CostCurve(TWO_CORES.plain, TWO_CORES.guided, mergeable=True).could_merge()


def test_the_cap_is_the_smallest_batch_that_is_nearly_as_cheap_as_any() -> None:
    assert (TWO_CORES.cap(False), TWO_CORES.cap(True)) == (8, 4)
    assert CostCurve(((1, 1.0), (2, 3.0)), ((1, 1.0),)).cap(False) == 1
    assert TWO_CORES.seconds(3, False) == pytest.approx((2 * 6.78 + 4 * 5.92) / 2e3)
    assert FLAT.seconds(8, False) == 2.0


@pytest.mark.parametrize("seed", range(3))
def test_short_requests_are_quick_at_70_percent_load(seed: int) -> None:
    load = 0.7 * traffic.saturation(traffic.one_at_a_time, TWO_CORES)
    arrivals = traffic.poisson(load, 2000, seed)
    fair = traffic.fair(arrivals, TWO_CORES)
    assert traffic.percentile(fair, arrivals, 10, 95) <= 0.5
    assert traffic.percentile(fair, arrivals, 100, 95) <= 8
    alone = traffic.one_at_a_time(arrivals, TWO_CORES)
    assert traffic.percentile(alone, arrivals, 10, 95) > 5 * traffic.percentile(
        fair, arrivals, 10, 95
    )


@pytest.mark.parametrize(("curve", "times"), [(TWO_CORES, 1.35), (LAUNCH_BOUND, 7.0)])
def test_saturation_against_one_request_at_a_time(curve: CostCurve, times: float) -> None:
    one = traffic.saturation(traffic.one_at_a_time, curve)
    assert traffic.saturation(traffic.fair, curve) >= times * one


def overloaded(
    curve: CostCurve, limits: Limits, clients: int, seed: int, samples: int
) -> tuple[FairQueue, list[Work], Refusal]:
    """A queue under far more load than it can handle, and a submission that it rejects."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    queue = FairQueue(curve, limits.live)
    refused = 0
    for number, arrival in enumerate(traffic.poisson(1.0, 2000, seed, clients)):
        works = [
            Work(samples * number + i, arrival.flow, number, arrival.guided) for i in range(samples)
        ]
        found = refusal(Forecast(queue), works, limits)
        if found is None:
            queue.add(works)
        else:
            refused += 1
            if refused > 20:
                return queue, works, found
        assert len(queue) <= limits.samples
        assert queue.rows <= limits.rows
        for _ in range(generator.integers(3)):
            queue.advance(queue.pick().works)
    raise AssertionError("nothing was refused")


BOUNDS = [
    Limits(flow_share=1.0, seconds=1e9),
    Limits(flow_share=1.0, samples=100_000, rows=3000),
    Limits(flow_share=1.0, samples=100_000, seconds=4.0),
    Limits(samples=200, seconds=20.0),
]


@pytest.mark.parametrize("limits", BOUNDS)
@pytest.mark.parametrize("clients", [1, 50])
@pytest.mark.parametrize("curve", [TWO_CORES, LAUNCH_BOUND], ids=["two cores", "launch bound"])
def test_retry_after_is_the_time_until_the_same_submission_is_accepted(
    curve: CostCurve, clients: int, limits: Limits
) -> None:
    """Within 30 % and four ticks: several samples finish together, at the end of a tick."""
    for seed in range(3):
        queue, works, found = overloaded(curve, limits, clients, seed, samples=16)
        predicted = Forecast(queue).seconds
        draining = copy.deepcopy(queue)
        drained = seconds_until(draining, lambda draining=draining: not len(draining))
        assert predicted == pytest.approx(drained, rel=0.3)

        def accepted(queue: FairQueue = queue, works: list[Work] = works) -> bool:
            return refusal(Forecast(queue), works, limits) is None

        tick = Forecast(queue).tick_seconds
        real = seconds_until(queue, accepted)
        assert abs(found.seconds - real) <= 0.3 * real + 4 * tick, found


@pytest.mark.parametrize("limits", BOUNDS)
def test_a_busy_machine_accepts_as_much_and_says_to_wait_longer(limits: Limits) -> None:
    queue, works, found = overloaded(TWO_CORES, limits, 5, 0, samples=16)
    twice = refusal(Forecast(queue, pace=2.0), works, limits)
    assert twice is not None
    assert twice.why == found.why
    assert twice.seconds == pytest.approx(2 * found.seconds)


@pytest.mark.parametrize("running", [0.0, 0.3, 0.8])
def test_room_is_made_at_the_end_of_a_call(running: float) -> None:
    """A wait ends with a whole number of calls, less what the present one has taken."""
    queue = queue_of(*[("a", PLAIN * 10)] * 16, curve=TWO_CORES)
    now = Forecast(queue)
    tick = now.tick_seconds
    for seconds, calls in ((0.0, 1), (0.2, 1), (1.0, 1), (1.1, 2), (5.5, 6)):
        found = now.end_of_call(seconds * tick, running * tick)
        assert found == pytest.approx((calls - running) * tick)
    # A call that takes longer than predicted ends soon, and not in the past.
    assert now.end_of_call(0.0, 50 * tick) == pytest.approx(0.1 * tick)


def test_the_pace_of_the_machine_is_an_average_of_seconds_and_not_of_calls() -> None:
    """Five seconds of calls that take twice as long move it by 63 %, however many they are."""
    for calls in (10, 1000):
        ledger = Ledger(TWO_CORES, Limits())
        seconds = 5.0 / calls
        tick = Tick(False, (Work(0, "", 0, PLAIN),))
        scaled = replace(TWO_CORES, plain=((1, seconds / 2),))
        ledger.curve = scaled
        for _ in range(calls):
            ledger.note(tick, Outcome(), seconds)
        assert ledger.stats(0.0).pace == pytest.approx(2 - math.exp(-1), rel=1e-6)


@pytest.mark.parametrize("bound", ["samples", "rows", "seconds"])
def test_a_flow_cannot_fill_the_whole_backlog(bound: str) -> None:
    queue = queue_of(*[("greedy", PLAIN * 10)] * 10, curve=TWO_CORES)
    held = {"samples": 10, "rows": 100, "seconds": Forecast(queue).seconds}
    limits = Limits(**{bound: 2 * held[bound]}, flow_share=0.5)
    one_more = refusal(Forecast(queue), [Work(99, "greedy", 99, PLAIN)], limits)
    assert one_more is not None
    assert one_more.why == "flow"
    assert f"one user may hold 50% of the {bound}" in one_more.sentence
    assert refusal(Forecast(queue), [Work(99, "other", 99, PLAIN)], limits) is None


def test_an_idle_engine_accepts_what_takes_longer_than_the_limit() -> None:
    works = [Work(0, "", 0, PLAIN * 100)]
    assert refusal(Forecast(queue_of()), works, Limits(seconds=0.01)) is None


@pytest.mark.parametrize("curve", [TWO_CORES, LAUNCH_BOUND])
def test_the_finish_of_a_lone_request_is_predicted_exactly(curve: CostCurve) -> None:
    works = [Work(0, "", 7, PLAIN * 10 + GUIDED * 5)]
    needed = 10 * curve.seconds(1, False) + 5 * curve.seconds(1, True)
    empty = FairQueue(curve, 64)
    assert seconds_until_group(empty, 7, works) == pytest.approx(needed)
    assert seconds_until_group(empty, 7, works, pace=2.0) == pytest.approx(2 * needed)
    assert seconds_until_group(empty, 8, works) == 0
    assert (len(empty), works[0].row) == (0, 0)
    assert deadline_refusal(needed, needed) is None
    found = deadline_refusal(needed, 0.99 * needed)
    assert found is not None
    assert (found.why, found.seconds) == ("deadline", needed)


@pytest.mark.parametrize(
    "rows", [PLAIN * 10, PLAIN * 100, GUIDED * 100], ids=["short", "long", "guided"]
)
def test_the_finish_of_a_request_in_a_queue_is_predicted(rows: bytes) -> None:
    """Exactly, if it is near; else half of the predictions are within 20 %."""
    ratios = []
    for seed in range(20):
        queue = FairQueue(TWO_CORES, 64)
        for key, arrival in enumerate(traffic.poisson(1.0, 80, seed, clients=8)):
            queue.add([Work(key, arrival.flow, key, arrival.guided)])
            queue.advance(queue.pick().works)
        new = Work(1000, "client 3", 1000, rows)
        predicted = seconds_until_group(queue, 1000, [new])
        queue.add([new])
        real = seconds_until(queue, lambda new=new: new.row == len(new.guided))
        ratios.append(predicted / real)
    ratios.sort()
    assert np.median(np.abs(np.log(ratios))) < np.log(1.2), ratios
    if len(rows) == 10:
        assert ratios[3:-3] == pytest.approx([1.0] * 14), ratios


def test_a_copy_of_a_queue_goes_the_same_way() -> None:
    queue = FairQueue(TWO_CORES, 64)
    for key, arrival in enumerate(traffic.poisson(1.0, 60, 5, clients=8)):
        queue.add([Work(key, arrival.flow, key, arrival.guided)])
        queue.advance(queue.pick().works)
    other = queue.copy()
    for _ in range(200):
        tick, same = queue.pick(), other.pick()
        assert (tick.guided, keys(tick)) == (same.guided, keys(same))
        assert keys(Tick(True, tuple(queue.advance(tick.works)))) == keys(
            Tick(True, tuple(other.advance(same.works)))
        )
        assert (queue.rows, queue.started) == (other.rows, other.started)


def test_predictions_follow_the_pace_of_the_machine() -> None:
    queue = queue_of(*[("a", PLAIN * 10), ("b", GUIDED * 3)] * 4, curve=TWO_CORES)
    assert Forecast(queue, pace=2.0).seconds == pytest.approx(2 * Forecast(queue).seconds)


def test_limits_are_checked() -> None:
    with pytest.raises(RequestError, match="`flow_share` must be a number from"):
        Limits(flow_share=0.0).checked()
    with pytest.raises(RequestError, match="`samples` must be"):
        Limits(samples=0).checked()
