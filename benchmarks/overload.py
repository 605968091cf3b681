"""A service under ten times the requests that it can serve: the part of serving_http.py that asks.

Rounds alternate: a window of overload, then the accepted work drains. The network is as busy in
both. So the network rows a second of a window, over those of the drain after it, are the share of
the capacity that the refusals leave: the goodput.

Other programs on the machine disturb both parts, but not equally. So the goodput is given once more
without the time that the inference thread was ready and had to wait for a processor.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

STEPS = 10
FULL = 32
"""Samples with which every network call is full."""


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else float("nan")


class Client:
    """HTTP by hand, a connection a request: a library would take more time than the service."""

    def __init__(self, address: str) -> None:
        host, port = address.removeprefix("http://").split(":")
        self.host = host
        self.port = int(port)

    async def send(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Returns the status and the body."""
        reader, writer = await self.open(method, path, body)
        text = await reader.read()
        writer.close()
        head, _, content = text.partition(b"\r\n\r\n")
        return int(head.split(b" ", 2)[1]), content

    async def open(
        self, method: str, path: str, body: bytes
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request and return the connection."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return reader, writer

    async def sample(self, seed: int) -> tuple[int, bytes]:
        """Ask for one sample."""
        return await self.send("POST", "/v1/samples", b'{"seed": %d, "steps": %d}' % (seed, STEPS))

    async def metric(self, *names: str) -> float:
        """The sum of some metrics, over all their labels."""
        _, body = await self.send("GET", "/metrics")
        each = "|".join(names)
        found = re.findall(rf"^(?:{each})(?:{{.*}})? (\S+)$", body.decode(), re.M)
        return sum(map(float, found))

    async def backlog(self) -> float:
        """Samples that are not finished."""
        return await self.metric("unnoise_live", "unnoise_waiting")


@dataclass
class Overload:
    """What was seen in all windows. Seconds, unless a name says otherwise.

    Attributes:
        codes: Responses by status.
        refusals, probes: How long each 429 and each /livez took.
        advice: When each refused request was sent, and the retry_after that it got.
        accepted: When each accepted request was sent.
        goodputs: Of each round.
        unqueued: The same without the time that the inference thread waited for a processor.
        loop_shares: The share of a core that the event loop took in each window.
        backlog: The most samples that were seen unfinished.
    """

    codes: Counter[int] = field(default_factory=Counter)
    refusals: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    advice: list[tuple[float, float]] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    goodputs: list[float] = field(default_factory=list)
    unqueued: list[float] = field(default_factory=list)
    loop_shares: list[float] = field(default_factory=list)
    backlog: float = 0.0

    def advice_ratio(self) -> float:
        """All retry_after over all real waits: until the next request was accepted."""
        told = 0.0
        waited = 0.0
        moments = sorted(self.accepted)
        following = 0
        for asked, seconds in sorted(self.advice):
            while following < len(moments) and moments[following] <= asked:
                following += 1
            if following < len(moments):
                told += seconds
                waited += moments[following] - asked
        return told / waited if waited else float("nan")

    def lines(self) -> list[str]:
        """The figures, for a reader."""
        if not self.refusals:
            return [f"nothing was refused: {dict(self.codes)}"]
        return [
            f"{sum(self.codes.values())} requests: {dict(self.codes)}",
            f"429: p50 {1e3 * statistics.median(self.refusals):.1f} ms, "
            f"p99 {1e3 * p99(self.refusals):.1f} ms",
            f"/livez: p50 {1e3 * statistics.median(self.probes):.1f} ms, "
            f"p99 {1e3 * p99(self.probes):.1f} ms",
            f"retry_after over the real waits: {self.advice_ratio():.2f}",
            f"goodput: {_percents(self.goodputs)}",
            f"goodput without waits for a processor: {_percents(self.unqueued)}",
            f"event loop, of a core: {_percents(self.loop_shares)}",
            f"most samples unfinished: {self.backlog:.0f}",
        ]


def _percents(shares: Sequence[float]) -> str:
    each = ", ".join(f"{100 * share:.0f}" for share in shares)
    return f"median {100 * statistics.median(shares):.1f} % ({each})"


async def saturation(client: Client, seconds: float) -> float:
    """Requests a second that the service serves with 16 always under way."""
    done = 0
    end = time.perf_counter() + seconds

    async def keep(worker: int) -> None:
        nonlocal done
        number = 0
        while time.perf_counter() < end:
            number += 1
            code, _ = await client.sample(10**6 * (worker + 1) + number)
            done += code == 200

    begun = time.perf_counter()
    await asyncio.gather(*(keep(worker) for worker in range(16)))
    return done / (time.perf_counter() - begun)


async def overload(client: Client, process: int, rate: float, seconds: float) -> Overload:
    """Send `rate` requests a second, at random moments, in windows of at most 10 s.

    process: the id of the service's process.
    """
    found = Overload()
    windows = max(round(seconds / 10), 1)
    tasks: set[asyncio.Task[None]] = set()
    for window in range(windows):
        sender = asyncio.create_task(
            _send(client, found, tasks, rate, seconds / windows, 10**9 * (window + 1))
        )
        # The work that fills the queue is not yet an overload.
        while not found.refusals and not sender.done():
            await asyncio.sleep(0.05)
        before = await _Moment.of(client, process)
        probing = asyncio.create_task(_probe(client, found))
        await sender
        probing.cancel()
        between = await _Moment.of(client, process)
        while await client.backlog() > FULL:
            await asyncio.sleep(0.2)
        after = await _Moment.of(client, process)
        found.loop_shares.append(between.loop_share(before))
        found.goodputs.append(between.pace(before) / after.pace(between))
        found.unqueued.append(between.unqueued_pace(before) / after.unqueued_pace(between))
        await asyncio.gather(*tasks)
        # After the last request of a window nobody asks, so nobody knows when there was room.
        last = max(found.accepted, default=0.0)
        found.advice = [(asked, wait) for asked, wait in found.advice if asked < last]
    return found


async def _send(
    client: Client,
    found: Overload,
    tasks: set[asyncio.Task[None]],
    rate: float,
    seconds: float,
    first: int,
) -> None:
    async def ask(seed: int) -> None:
        asked = time.perf_counter()
        code, body = await client.sample(seed)
        found.codes[code] += 1
        if code == 200:
            found.accepted.append(asked)
        if code == 429:
            found.refusals.append(time.perf_counter() - asked)
            found.advice.append((asked, json.loads(body)["retry_after"]))

    generator = random.Random(first)
    begun = time.perf_counter()
    seed = first
    while (late := time.perf_counter() - begun) < seconds:
        # As many as are due by now: one timer a request would be too slow.
        while seed - first < rate * late:
            seed += 1
            task = asyncio.create_task(ask(seed))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(generator.uniform(0, 0.02))


async def _probe(client: Client, found: Overload) -> None:
    while True:
        for _ in range(20):
            asked = time.perf_counter()
            await client.send("GET", "/livez")
            found.probes.append(time.perf_counter() - asked)
            await asyncio.sleep(0.05)
        found.backlog = max(found.backlog, await client.backlog())


@dataclass(frozen=True)
class _Moment:
    """Counters of a service at some moment, in seconds but for the network rows."""

    at: float
    rows: float
    loop: float  # of the processor, that the event loop took
    queued: float  # that the inference thread waited for a processor

    @classmethod
    async def of(cls, client: Client, process: int) -> _Moment:
        rows = await client.metric("unnoise_rows_total")
        threads = {
            int(task.name): (task / "schedstat").read_text().split()
            for task in Path(f"/proc/{process}/task").iterdir()
        }
        loop = int(threads.pop(process)[0])
        # Of the other threads, the inference thread has taken by far the most.
        _, queued, _ = max(threads.values(), key=lambda fields: int(fields[0]))
        return cls(time.perf_counter(), rows, loop / 1e9, int(queued) / 1e9)

    def pace(self, before: _Moment) -> float:
        """Network rows a second since a moment."""
        return (self.rows - before.rows) / (self.at - before.at)

    def unqueued_pace(self, before: _Moment) -> float:
        """The same, of the time that the inference thread did not wait for a processor."""
        queued = self.queued - before.queued
        return (self.rows - before.rows) / (self.at - before.at - queued)

    def loop_share(self, before: _Moment) -> float:
        """The share of a core that the event loop took since a moment."""
        return (self.loop - before.loop) / (self.at - before.at)
