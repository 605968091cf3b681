"""Figures of the HTTP service: python benchmarks/serving_http.py [--seconds 30]

- ready: seconds from the start of the command to a 200 of /readyz.
- overload: requests at ten times the rate that the machine can serve, for --seconds; how long a 429
  and /livez take (p99), how near Retry-After is, and the goodput.
- disconnects: 1,000 clients that leave while their request runs; what they leave behind.
- bombs: how long it takes to refuse what is too large.

It prints its figures and asserts none: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "bundles" / "emoji32"
STEPS = 10


class Service:
    """The command, in a process of its own."""

    def __init__(self, threads: int) -> None:
        command = [sys.executable, "-m", "serve", str(BUNDLE), "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        while not self._ready():
            time.sleep(0.01)
        self.ready_s = time.perf_counter() - begun

    def _ready(self) -> bool:
        return httpx.get(f"{self.address}/readyz").status_code == 200

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        text = httpx.get(f"{self.address}/metrics", timeout=60).text
        return sum(float(v) for v in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))

    def memory_mib(self) -> float:
        """Resident memory of the process."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024

    def threads(self) -> int:
        """Threads of the process."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def stop(self) -> tuple[int, float]:
        """End it with SIGTERM. Returns its exit status and the seconds that it took."""
        begun = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60), time.perf_counter() - begun


def p99(values: list[float]) -> float:
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


async def overload(client: Client, rate: float, seconds: float) -> dict[str, object]:
    """Send `rate` requests a second, at random moments."""
    codes: Counter[int] = Counter()
    refusals: list[float] = []
    probes: list[float] = []
    advice: list[tuple[float, float]] = []
    accepted: list[float] = []
    tasks = set()
    generator = random.Random(0)
    begun = time.perf_counter()

    async def ask(seed: int) -> None:
        asked = time.perf_counter()
        code, body = await client.sample(seed)
        codes[code] += 1
        if code == 200:
            accepted.append(asked)
        if code == 429:
            refusals.append(time.perf_counter() - asked)
            advice.append((asked, json.loads(body)["retry_after"]))

    async def probe() -> None:
        while True:
            asked = time.perf_counter()
            await client.send("GET", "/livez")
            probes.append(time.perf_counter() - asked)
            await asyncio.sleep(0.05)

    probing = asyncio.create_task(probe())
    seed = 10**9
    while (late := time.perf_counter() - begun) < seconds:
        # As many as are due by now: one timer a request would be too slow.
        while seed - 10**9 < rate * late:
            seed += 1
            task = asyncio.create_task(ask(seed))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(generator.uniform(0, 0.02))
    await asyncio.gather(*tasks)
    probing.cancel()
    return {
        "sent": sum(codes.values()),
        "codes": dict(codes),
        "429 p50 ms": 1000 * statistics.median(refusals or [float("nan")]),
        "429 p99 ms": 1000 * p99(refusals),
        "/livez p99 ms": 1000 * p99(probes),
        "retry_after / wait": _advice(advice, accepted),
    }


def _advice(advice: list[tuple[float, float]], accepted: list[float]) -> float:
    """The median of retry_after over the time until the next request was accepted."""
    ratios = []
    for asked, seconds in advice:
        later = [moment for moment in accepted if moment > asked]
        if later:
            ratios.append(seconds / max(min(later) - asked, 1e-3))
    return statistics.median(ratios) if ratios else float("nan")


async def disconnects(client: Client, count: int) -> None:
    """Ask for a long sample, and leave, `count` times, 16 at a time."""
    slots = asyncio.Semaphore(16)

    async def leave(seed: int) -> None:
        async with slots:
            body = {"seed": seed, "steps": 30, "stream": seed % 2 == 0}
            _, writer = await client.open("POST", "/v1/samples", json.dumps(body).encode())
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()

    await asyncio.gather(*(leave(seed) for seed in range(count)))


async def settled(service: Service) -> float:
    """Wait until nothing is live or waiting. Returns the seconds that it took."""
    begun = time.perf_counter()
    while service.metric("unnoise_live") + service.metric("unnoise_waiting"):
        await asyncio.sleep(0.01)
    return time.perf_counter() - begun


class Pace:
    """Network rows a second since it was made."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._begun = time.perf_counter()
        self._rows = service.metric("unnoise_rows_total")

    def rows_a_second(self) -> float:
        rows = self._service.metric("unnoise_rows_total") - self._rows
        return rows / (time.perf_counter() - self._begun)


async def measure(service: Service, seconds: float, clients: int) -> None:
    client = Client(service.address)
    before = Pace(service)
    rate = await saturation(client, min(seconds, 10.0))
    alone = before.rows_a_second()
    print(f"saturation, 16 under way: {rate:.2f} requests a second of {STEPS} steps")
    before = Pace(service)
    overloading = asyncio.create_task(overload(client, 10 * rate, seconds))
    await asyncio.sleep(seconds)
    crowded = before.rows_a_second()
    found = await overloading
    for name, value in found.items():
        text = f"{value:.2f}" if isinstance(value, float) else value
        print(f"overload of {10 * rate:.0f} a second: {name}: {text}")
    share = 100 * crowded / alone
    print(f"goodput: {crowded:.1f} network rows a second, {share:.0f} % of {alone:.1f} alone")
    await settled(service)
    await disconnects(client, 100)  # which fills every pool and cache
    await settled(service)
    memory = service.memory_mib()
    threads = service.threads()
    gone = service.metric("unnoise_disconnects_total")
    await disconnects(client, clients)
    print(f"disconnects: nothing live or waiting after {await settled(service):.2f} s")
    seen = service.metric("unnoise_disconnects_total") - gone
    print(f"disconnects: {seen:.0f} of {clients} seen")
    print(f"disconnects: memory + {service.memory_mib() - memory:.1f} MiB")
    print(f"disconnects: threads + {service.threads() - threads}")
    async with httpx.AsyncClient(base_url=service.address, timeout=120) as ready:
        await bombs(ready)


async def bombs(client: httpx.AsyncClient) -> None:
    """Time the refusal of a program of 100,000 rows and of an image of 2.5 gigapixels."""
    sys.path.insert(0, str(ROOT))
    from tests.serve.test_limits import png_bomb

    body = {"solver": "repaint", "steps": 250, "options": {"resample": 400}}
    files = {"image": ("a.png", png_bomb(50_000, 50_000))}
    for name, how in [("program", {"json": body}), ("image", {"files": files})]:
        path = "/v1/samples" if name == "program" else "/v1/edits/stylize"
        spent = []
        for _ in range(20):
            begun = time.perf_counter()
            got = await client.post(path, **how)
            spent.append(time.perf_counter() - begun)
            assert got.status_code == 400, got.text
        print(
            f"bomb, {name}: {1000 * statistics.median(spent):.1f} ms, most {1000 * max(spent):.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the overload [30]")
    parser.add_argument("--clients", type=int, default=1000, help="that leave [1000]")
    parser.add_argument("--threads", type=int, default=1, help="of the inference library [1]")
    given = parser.parse_args()
    service = Service(given.threads)
    try:
        print(f"ready after {service.ready_s:.2f} s")
        asyncio.run(measure(service, given.seconds, given.clients))
        status, seconds = service.stop()
        print(f"SIGTERM: exit {status} after {seconds:.2f} s")
    finally:
        service.process.kill()


if __name__ == "__main__":
    main()
