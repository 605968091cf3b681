"""runtime.engine.batch: a sample has the bytes that it has alone, even if others join or leave."""

import numpy as np
import pytest

from runtime import RequestError, Sampler
from runtime.diffusion.solvers import SOLVERS
from runtime.engine.batch import Batch
from runtime.engine.job import Job
from runtime.engine.request import Planner, Request

CAPACITY = 8
INTERLEAVINGS = 500
CANCELLED = 0.2
SHAPE = (1, 8, 8)


def random_request(generator: np.random.Generator, seed: int) -> Request:
    """Any solver, guided or not, with a mask or a start, of 1 to 100 steps; mostly few."""
    solver = str(generator.choice(sorted(SOLVERS)))
    steps = int(generator.choice([1, 2, 3, 4, 5, 8, 12, 100], p=[0.1, *[0.15] * 5, 0.11, 0.04]))
    guidance = float(generator.choice([1.0, 1.0, 2.5]))
    settings: dict = {"label": int(generator.integers(10)), "guidance": guidance}
    image = generator.uniform(-1, 1, SHAPE).astype(np.float32)
    if generator.random() < 0.2:
        settings["guidance_interval"] = (0.3, 3.0)
    kind = generator.choice(["noise", "start", "picture", "known"], p=[0.55, 0.15, 0.15, 0.15])
    if kind == "start":
        settings["start"] = image
    elif kind == "picture":
        settings |= {"picture": image, "strength": 0.6}
    elif kind == "known":
        mask = (generator.random(SHAPE) < 0.5).astype(np.float32)
        settings |= {"known": image, "mask": mask}
    return Request(seed, solver=solver, steps=steps, **settings)


@pytest.fixture(scope="module")
def jobs(sampler: Sampler) -> list[Job]:
    generator = np.random.Generator(np.random.Philox(key=7))
    planner = Planner(sampler.bundle)
    found = []
    while len(found) < 150:
        try:
            found.append(planner.job(random_request(generator, len(found))))
        except RequestError:  # a solver that does not accept this start or this number of steps
            continue
    return found


@pytest.fixture(scope="module")
def alone(sampler: Sampler, jobs: list[Job]) -> list[bytes]:
    """What each job gives alone."""
    found = []
    for job in jobs:
        batch = Batch(sampler.backend.bind(1), SHAPE, 1)
        slot = batch.admit(job)
        results: dict = {}
        while slot not in results:
            batch.step()
            results = batch.finished()
        found.append(results[slot].tobytes())
    return found


def test_500_interleavings_give_the_bytes_that_each_job_gives_alone(
    sampler: Sampler, jobs: list[Job], alone: list[bytes]
) -> None:
    """One batch after another from the same buffers, as in a service, for 500 jobs.

    A fifth of them are cancelled, each at a row of its own.
    """
    assert max(len(job.table.call) for job in jobs) >= 100
    generator = np.random.Generator(np.random.Philox(key=8))
    batch = Batch(sampler.backend.bind(CAPACITY), SHAPE, CAPACITY)
    order = [int(i) for i in generator.integers(len(jobs), size=INTERLEAVINGS)]
    under_way: dict[int, int] = {}
    left: dict[int, int] = {}
    compared = cancelled = 0
    while order or under_way:
        while order and len(batch) < CAPACITY and generator.random() < 0.7:
            job = order.pop()
            slot = batch.admit(jobs[job])
            under_way[slot] = job
            if generator.random() < CANCELLED:
                left[slot] = int(generator.integers(len(jobs[job].table.call)))
        for slot in [slot for slot, rows in left.items() if not rows]:
            batch.cancel(slot)
            del under_way[slot], left[slot]
            cancelled += 1
        batch.step()
        left = {slot: rows - 1 for slot, rows in left.items()}
        for slot, x in batch.finished().items():
            job = under_way.pop(slot)
            assert x.tobytes() == alone[job], f"job {job}"
            compared += 1
    assert compared + cancelled == INTERLEAVINGS
    assert 0.15 * INTERLEAVINGS < cancelled < 0.25 * INTERLEAVINGS


def test_only_some_of_the_samples_step_and_have_the_same_bytes(
    sampler: Sampler, jobs: list[Job], alone: list[bytes]
) -> None:
    """More samples than the buffers hold. Each step takes some of them, and some steps run plain
    rows in the guided graph."""
    generator = np.random.Generator(np.random.Philox(key=9))
    room = 3
    batch = Batch(sampler.backend.bind(room), SHAPE, CAPACITY, room)
    order = [int(i) for i in generator.permutation(len(jobs))][:100]
    under_way: dict[int, int] = {}
    compared = 0
    while order or under_way:
        while order and len(batch) < CAPACITY and generator.random() < 0.7:
            job = order.pop()
            under_way[batch.admit(jobs[job])] = job
        number = min(int(generator.integers(room + 1)), len(under_way))
        slots = [int(slot) for slot in generator.permutation(sorted(under_way))[:number]]
        before = {slot: batch.preview(slot) for slot in under_way}
        batch.step(slots, merged=bool(generator.random() < 0.3))
        for slot in under_way.keys() - {*slots}:
            after = batch.preview(slot)
            assert after.step == before[slot].step
            assert after.x.tobytes() == before[slot].x.tobytes()
            assert after.denoised.tobytes() == before[slot].denoised.tobytes()
        if slots and generator.random() < CANCELLED / 4:
            slot = int(generator.choice(sorted(under_way)))
            batch.cancel(slot)
            del under_way[slot]
        for slot, x in batch.finished().items():
            job = under_way.pop(slot)
            assert x.tobytes() == alone[job], f"job {job}"
            compared += 1
    assert compared > 50
    assert len(batch) == 0


def test_live_counts_samples_that_are_parked_or_not_seated_yet(
    sampler: Sampler, jobs: list[Job]
) -> None:
    batch = Batch(sampler.backend.bind(2), SHAPE, 4, 2)
    slots = [batch.admit(job) for job in jobs[:4]]
    assert batch.live == 4
    batch.step(slots[:2])
    batch.step(slots[2:])
    finished: dict = {}
    while batch.live:
        batch.step([slot for slot in slots if slot not in finished][:2])
        finished |= batch.finished()
    assert sorted(finished) == sorted(slots)


def test_a_step_of_the_wrong_samples_is_refused(sampler: Sampler, jobs: list[Job]) -> None:
    batch = Batch(sampler.backend.bind(2), SHAPE, 3, 2)
    slots = [batch.admit(max(jobs, key=lambda job: len(job.table))) for _ in range(3)]
    with pytest.raises(RequestError, match="at most 2 samples can step together, got 3"):
        batch.step()
    with pytest.raises(RequestError, match="one step at a time"):
        batch.step([slots[0], slots[0]])
    with pytest.raises(RequestError, match="no sample is running in slot 7"):
        batch.step([7])
    batch.step([])
    assert [batch.preview(slot).step for slot in slots] == [0, 0, 0]
    batch.step(slots[1:])
    assert [batch.preview(slot).step for slot in slots] == [0, 1, 1]


def test_the_kinds_of_job_are_all_there(jobs: list[Job]) -> None:
    assert {bool(job.table.guided.any()) for job in jobs} == {True, False}
    assert any(job.known is not None for job in jobs)
    assert any(job.x is not None for job in jobs)
    assert any(job.table.noisy.any() for job in jobs)
    assert max(len(job.table) for job in jobs) >= 12


def test_a_preview_is_of_its_slot(sampler: Sampler, jobs: list[Job]) -> None:
    planner = Planner(sampler.bundle)
    first, second = (
        planner.job(Request(seed, label=1, solver="ddim", steps=steps))
        for seed, steps in ((0, 2), (1, 4))
    )
    batch = Batch(sampler.backend.bind(2), SHAPE, 2)
    a = batch.admit(first)
    batch.step()
    b = batch.admit(second)
    assert (batch.preview(a).step, batch.preview(b).step) == (1, 0)
    assert not batch.preview(b).denoised.any()
    batch.step()
    assert (batch.preview(a).step, batch.preview(b).step) == (2, 1)
    assert batch.live == 1
    assert list(batch.finished()) == [a]
    batch.step()
    with pytest.raises(RequestError, match="no sample is running in slot"):
        batch.preview(a)


def test_a_full_batch_refuses_and_slots_are_used_again(sampler: Sampler, jobs: list[Job]) -> None:
    batch = Batch(sampler.backend.bind(2), SHAPE, 2)
    slots = {batch.admit(jobs[0]), batch.admit(jobs[1])}
    assert slots == {0, 1}
    with pytest.raises(RequestError, match="at most 2 samples"):
        batch.admit(jobs[2])
    batch.cancel(0)
    assert batch.admit(jobs[2]) == 0
    batch.clear()
    assert len(batch) == 0
    with pytest.raises(RequestError, match="slot 0"):
        batch.cancel(0)
    batch.step()  # of nothing
    assert batch.finished() == {}


def test_memory_grows_with_the_largest_batch_alone(sampler: Sampler) -> None:
    """Batches of 1 to 8 and back use the buffers of the largest."""
    made = []
    bind = sampler.backend.bind

    class Counting:
        name = sampler.backend.name
        precision = sampler.backend.precision

        def bind(self, batch: int):
            made.append(batch)
            return bind(batch)

    counted = Sampler(sampler.bundle, Counting())
    # The first calls also measure how calls are cut, with buffers that are not kept.
    for n in (8, 4, 2):
        counted.sample(n, label=1, steps=2)
    made.clear()
    for n in (8, 1, 5, 8, 3):
        expected = sampler.sample(n, label=1, steps=2)
        assert counted.sample(n, label=1, steps=2).tobytes() == expected.tobytes()
    assert made == []


def test_wrong_arguments_are_refused_and_cost_no_slot(sampler: Sampler, jobs: list[Job]) -> None:
    buffers = sampler.backend.bind(2)
    for capacity, room, name in ((0, None, "capacity"), ("2", None, "capacity"), (2, 3, "room")):
        with pytest.raises(RequestError, match=f"`{name}` must be"):
            Batch(buffers, SHAPE, capacity, room)
    batch = Batch(buffers, SHAPE, 1)
    with pytest.raises(RequestError, match=r"`job` must be a Job.* Planner\.job makes one"):
        batch.admit(Request(0))  # type: ignore[arg-type]
    assert batch.admit(jobs[0]) == 0
