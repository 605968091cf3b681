"""Every setting of the service, checked once, at the start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.engine.admission import Limits
from runtime.errors import RequestError
from runtime.errors.arguments import integer, number

KIB = 1024
MIB = 1024 * KIB
LEAST_TOKEN = 16
"""Characters of the shortest token that is accepted."""


@dataclass(frozen=True)
class Settings:
    """How the service runs and what it accepts.

    Attributes:
        backend, precision, threads, streams, min_psnr: See `runtime.Sampler.load`.
        max_batch: Most samples of a network call.
        engine: How much work an engine accepts before requests get a 429.
        samples: Most samples of one request.
        rows: Most rows of one sample's program, counted before the program is made.
        request_rows: Most network rows of one request.
        json_bytes: Most bytes of a JSON body.
        upload_bytes: Most bytes of any other body.
        parts: Most files of a multipart body.
        pixels: Most pixels of an uploaded image, read from its header.
        animation_bytes: Most bytes of the frames of an animation, as float32.
        uploads: Most uploads that are received and decoded at a time.
        edits: Most edits under way; each holds a thread.
        connections: Most requests under way.
        body_s: Seconds in which a body must arrive.
        headers_s: Seconds in which a request line and its headers must arrive, from the connection
            or the last response on.
        heartbeat_s: Seconds between signs of life on an event stream.
        job_s: Seconds that the result of a job is kept.
        job_bytes: Most bytes of all kept results together.
        cache_bytes: Most bytes of results that equal requests get again.
        hung_s: A network call that takes longer makes the service not ready.
        drain_s: Seconds that accepted work has to finish after SIGTERM.
        tokens: Users' names by token; empty for no authentication.
        hosts: Names that the Host header may have; empty for any.
        cors: Whether pages of other origins may use the service.
        proxies: Addresses whose X-Forwarded-For is believed.
    """

    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    streams: int | None = None
    min_psnr: float | None = None
    max_batch: int = 32
    engine: Limits = field(default_factory=Limits)
    samples: int = 64
    rows: int = 5_000
    request_rows: int = 50_000
    json_bytes: int = 64 * KIB
    upload_bytes: int = 8 * MIB
    parts: int = 4
    pixels: int = 16_000_000
    animation_bytes: int = 16 * MIB
    uploads: int = 32
    edits: int = 16
    connections: int = 1024
    body_s: float = 30.0
    headers_s: float = 10.0
    heartbeat_s: float = 10.0
    job_s: float = 600.0
    job_bytes: int = 64 * MIB
    cache_bytes: int = 64 * MIB
    hung_s: float = 5.0
    drain_s: float = 30.0
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    hosts: tuple[str, ...] = ()
    cors: bool = False
    proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every number. Raises RequestError if one of them cannot be used."""
        self.engine.checked()
        counts = ("samples", "rows", "request_rows", "json_bytes", "upload_bytes", "parts")
        counts += ("pixels", "animation_bytes", "uploads", "edits", "connections", "max_batch")
        for name in counts:
            integer(name, getattr(self, name), 1, 10**12)
        for name in ("job_bytes", "cache_bytes"):
            integer(name, getattr(self, name), 0, 10**12)
        for name in ("body_s", "headers_s", "heartbeat_s", "hung_s"):
            number(name, getattr(self, name), 0.01, 1e6)
        for name in ("job_s", "drain_s"):
            number(name, getattr(self, name), 0.0, 1e6)
        if not all(re.fullmatch("[!-~]+", token) for token in self.tokens):
            raise RequestError(
                "a token may have ASCII characters alone, without spaces: clients cannot send "
                "others. Choose another one."
            )
        if any(len(token) < LEAST_TOKEN for token in self.tokens):
            raise RequestError(
                f"a token must have at least {LEAST_TOKEN} characters. Make one with: "
                "python -c 'import secrets; print(secrets.token_urlsafe())'"
            )
