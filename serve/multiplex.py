"""Many bundles on few replicas: a replica opens a bundle when a request first names it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from runtime.errors import RequestError, unknown

from . import auth
from .problems import Problem, respond
from .service import Service
from .settings import Settings

HEADER = "serve_multiplexed_model_id"
"""The header in which a request names its bundle. Ray sends it to a replica that has it open."""
LOOK_S = 0.05
"""How often something that waits for models looks whether they are open."""


async def wait_open(service: Service) -> None:
    """Wait until the models of a service are open. Raises what opening them has raised."""
    while not service.models.opened:
        if service.models.failure is not None:
            raise service.models.failure
        await asyncio.sleep(LOOK_S)


class Opened:
    """The service of one bundle. Ray calls `__del__` to have it closed."""

    def __init__(self, app: Starlette) -> None:
        self.app = app
        self._service: Service = app.state.service
        self._lifespan = app.router.lifespan_context(app)
        self._loop = asyncio.get_running_loop()
        self._closed = False

    async def open(self) -> None:
        """Open the bundle. Raises what that has raised."""
        await self._lifespan.__aenter__()
        try:
            await wait_open(self._service)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let accepted requests finish, and free the bundle."""
        if not self._closed:
            self._closed = True
            await self._service.drain()
            await self._lifespan.__aexit__(None, None, None)

    def __del__(self) -> None:
        """Close it, and wait for that: the next bundle needs the memory. In a thread of Ray's."""
        if not self._closed and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()


class Multiplexed:
    """The services of many bundles as one ASGI application."""

    def __init__(
        self,
        names: Sequence[str],
        named: Callable[[], str],
        opened: Callable[[str], Awaitable[Opened]],
        settings: Settings,
    ) -> None:
        """Take what finds the service of a request.

        Args:
            names: Of the bundles.
            named: Returns the bundle that the present request names, or "".
            opened: Opens a bundle, or returns it if it is open.
            settings: Of the services.
        """
        self._names = names
        self._named = named
        self._opened = opened
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        try:
            # Of a service some paths are open to strangers. Here every path opens a bundle.
            auth.check(Headers(scope=scope), scope["method"], "", self._settings)
            app = await self._app()
        except Problem as problem:
            app = respond(Request(scope), problem)
        await app(scope, receive, send)

    async def _app(self) -> Starlette:
        """Return the service of the present request. Raises Problem."""
        name = self._named()
        if not name:
            names = ", ".join(self._names)
            raise Problem(400, f"name the bundle in the header {HEADER}: one of {names}.")
        if name not in self._names:
            raise Problem(404, str(unknown("bundle", name, self._names)))
        try:
            return (await self._opened(name)).app
        except Exception as error:  # of the bundle, or of its inference library
            reason = f"{name} cannot be opened. The log has the reason."
            raise Problem(503, reason, 5.0) from error


async def _lifespan(receive: Receive, send: Send) -> None:
    """Confirm the start and the end: bundles are opened by requests."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def named_sources(bundles: Sequence[str]) -> dict[str, str]:
    """Return the bundles by the last part of their path, without a revision.

    Raises:
        RequestError: Two have the same name.
    """
    found: dict[str, str] = {}
    for bundle in bundles:
        name = Path(bundle).name.partition("@")[0]
        if name in found:
            raise RequestError(f"two bundles are named {name!r}. Rename one of the folders.")
        found[name] = bundle
    return found
