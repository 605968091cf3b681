"""uvicorn, with a drain that lets accepted work finish and ends every stream with an event."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import log
from .service import Service
from .settings import Settings

SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_S = 1
"""Seconds that connections have to take their last bytes after the drain."""


class Server(uvicorn.Server):
    """A server that drains on SIGTERM and Ctrl-C; a second signal ends it at once.

    uvicorn's own handler closes connections before the application knows, and waits for open
    streams, which would never end.
    """

    def __init__(self, app: Starlette) -> None:
        self.service: Service = app.state.service
        settings = self.service.settings
        super().__init__(_config(app, settings))
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the event loop, for as long as the server runs."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            # Not in another thread, and not on Windows: there `drain` must be called.
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self.drain)
        try:
            yield
        finally:
            for number in SIGNALS:
                with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                    loop.remove_signal_handler(number)

    async def on_tick(self, counter: int) -> bool:
        """Stop if a bundle cannot be opened. Called ten times a second."""
        return await super().on_tick(counter) or self.service.models.failure is not None

    def drain(self) -> None:
        """Finish accepted work, then stop. In the event loop's thread."""
        if self._draining is not None:
            # The second signal: nobody wants to wait.
            self.force_exit = True
            self.should_exit = True
            return
        log.write("draining", live=self.service.runs.live, at_most_s=self.service.settings.drain_s)
        # The task is kept here, because the loop holds it weakly.
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        try:
            await self.service.drain()
        finally:
            self.should_exit = True


class _Protocol(H11Protocol):
    """uvicorn's protocol, which closes a connection that sends no next request in time."""

    headers_s = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._restart()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # The timer would keep the connection's memory until it rings.
        if self._timer is not None:
            self._timer.cancel()

    def _restart(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(self.headers_s, self._check)

    def _check(self) -> None:
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and not self.transport.is_closing():
            self.transport.close()


def _config(app: Starlette, settings: Settings) -> uvicorn.Config:
    # uvicorn makes the protocol itself and passes it no setting of ours.
    protocol = type("Protocol", (_Protocol,), {"headers_s": settings.headers_s})
    return uvicorn.Config(
        app,
        http=protocol,
        # Signals and connections are handled as this loop does, also if uvloop is installed.
        loop="asyncio",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # Otherwise any local process could choose its address, and so its flow.
        proxy_headers=bool(settings.proxies),
        forwarded_allow_ips=list(settings.proxies),
        # The application answers 429 first; this bounds what does not get that far.
        limit_concurrency=2 * settings.connections,
        timeout_graceful_shutdown=LAST_S,
    )
