"""Figures of the HTTP service: python benchmarks/serving_http.py [--seconds 30]

- ready: seconds from the start of the command to a 200 of /readyz.
- overload: requests at ten times the rate that the machine can serve, for --seconds; how long a 429
  and /livez take (p99), how near Retry-After is, and the goodput (overload.py).
- disconnects: 1,000 clients that leave while their request runs; what they leave behind.
- bombs: how long it takes to refuse what is too large.

It prints its figures and asserts none: seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
from overload import STEPS, Client, overload, saturation

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "bundles" / "emoji32"


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


async def measure(service: Service, seconds: float, clients: int) -> None:
    client = Client(service.address)
    rate = await saturation(client, min(seconds, 10.0))
    print(f"saturation, 16 under way: {rate:.2f} requests a second of {STEPS} steps")
    found = await overload(client, service.process.pid, 10 * rate, seconds)
    for line in found.lines():
        print(f"overload of {10 * rate:.0f} a second: {line}")
    await settled(service)
    if not clients:
        return
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
    parser.add_argument(
        "--clients", type=int, default=1000, help="that leave; 0 ends after overload [1000]"
    )
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
