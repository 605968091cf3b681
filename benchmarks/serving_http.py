"""Figures of the HTTP service: python benchmarks/serving_http.py [--seconds 30]

- ready: seconds from the start of the command to a 200 of /readyz.
- overload: requests at ten times the rate that the machine can serve, for --seconds; how long a 429
  and /livez take (p99), how near Retry-After is, and the share of the machine's rate that is served.
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
HEADERS = {"content-type": "application/json"}


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
        text = httpx.get(f"{self.address}/metrics").text
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


async def saturation(client: httpx.AsyncClient, seconds: float) -> float:
    """Requests a second that the service serves with 16 always under way."""
    done = 0
    end = time.perf_counter() + seconds

    async def keep(worker: int) -> None:
        nonlocal done
        number = 0
        while time.perf_counter() < end:
            number += 1
            seed = 10**6 * (worker + 1) + number
            got = await client.post("/v1/samples", json={"seed": seed, "steps": STEPS})
            done += got.status_code == 200

    begun = time.perf_counter()
    await asyncio.gather(*(keep(worker) for worker in range(16)))
    return done / (time.perf_counter() - begun)


async def overload(client: httpx.AsyncClient, rate: float, seconds: float) -> dict[str, object]:
    """Send `rate` requests a second, at random moments."""
    codes: Counter[int] = Counter()
    refusals: list[float] = []
    probes: list[float] = []
    advice: list[tuple[float, float]] = []
    tasks = set()
    generator = random.Random(0)
    begun = time.perf_counter()

    async def ask(seed: int) -> None:
        asked = time.perf_counter()
        got = await client.post("/v1/samples", json={"seed": seed, "steps": STEPS})
        codes[got.status_code] += 1
        if got.status_code == 429:
            refusals.append(time.perf_counter() - asked)
            advice.append((time.perf_counter() - begun, got.json()["retry_after"]))

    async def probe() -> None:
        while True:
            asked = time.perf_counter()
            await client.get("/livez")
            probes.append(time.perf_counter() - asked)
            await asyncio.sleep(0.05)

    probing = asyncio.create_task(probe())
    seed = 10**9
    while time.perf_counter() - begun < seconds:
        seed += 1
        task = asyncio.create_task(ask(seed))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        await asyncio.sleep(generator.expovariate(rate))
    served = codes[200]
    await asyncio.gather(*tasks)
    probing.cancel()
    return {
        "sent": sum(codes.values()),
        "codes": dict(codes),
        "served a second": served / seconds,
        "429 p50 ms": 1000 * statistics.median(refusals or [float("nan")]),
        "429 p99 ms": 1000 * p99(refusals),
        "/livez p99 ms": 1000 * p99(probes),
        "retry_after median s": statistics.median([s for _, s in advice] or [float("nan")]),
    }


async def disconnects(service: Service, count: int) -> None:
    """Connect, ask for a long sample, and leave, `count` times, 16 at a time."""
    host, port = service.address.removeprefix("http://").split(":")
    slots = asyncio.Semaphore(16)

    async def leave(seed: int) -> None:
        async with slots:
            _, writer = await asyncio.open_connection(host, int(port))
            body = json.dumps({"seed": seed, "steps": 500, "stream": seed % 2 == 0})
            head = f"POST /v1/samples HTTP/1.1\r\nHost: {host}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write((head + body).encode())
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()

    await asyncio.gather(*(leave(seed) for seed in range(count)))


async def measure(service: Service, seconds: float, clients: int) -> None:
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(
        base_url=service.address, timeout=120, limits=limits, headers={"user-agent": "bench"}
    ) as client:
        rate = await saturation(client, min(seconds, 10.0))
        print(f"saturation, 16 under way: {rate:.2f} requests a second of {STEPS} steps")
        found = await overload(client, 10 * rate, seconds)
        for name, value in found.items():
            text = f"{value:.2f}" if isinstance(value, float) else value
            print(f"overload of {10 * rate:.0f} a second: {name}: {text}")
        share = found["served a second"]
        assert isinstance(share, float)
        print(f"overload: served {100 * share / rate:.0f} % of saturation")
        while service.metric("unnoise_live") + service.metric("unnoise_waiting"):
            await asyncio.sleep(0.05)
        await disconnects(service, 100)  # which fills every pool and cache
        before = service.memory_mib(), service.threads()
        gone = service.metric("unnoise_disconnects_total")
        await disconnects(service, clients)
        left = time.perf_counter()
        while service.metric("unnoise_live") + service.metric("unnoise_waiting"):
            await asyncio.sleep(0.01)
        print(f"disconnects: nothing live or waiting after {time.perf_counter() - left:.2f} s")
        seen = service.metric("unnoise_disconnects_total") - gone
        print(f"disconnects: {seen:.0f} of {clients} seen")
        print(f"disconnects: memory + {service.memory_mib() - before[0]:.1f} MiB")
        print(f"disconnects: threads + {service.threads() - before[1]}")
        await bombs(client)


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
