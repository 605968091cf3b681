"""The service on a Ray cluster: serve run serve.ray:app bundles=emoji32 replicas=2

The arguments are those of `Arguments`. Every replica has its own engine, so requests that reach one
replica share its batches. A client that leaves cancels its work, as without Ray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from ray import serve as ray_serve  # type: ignore[import-not-found]
from ray.serve.config import AutoscalingConfig  # type: ignore[import-not-found]
from starlette.applications import Starlette

from runtime.errors import RequestError
from runtime.errors.arguments import integer, number
from runtime.errors.keywords import check_options
from runtime.errors.messages import shown

from .app import create_app
from .auth import read_tokens
from .multiplex import Multiplexed, Opened, named_sources, wait_open
from .service import Service
from .settings import Settings


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of `app`, as a command line or a Serve config gives them.

    Attributes:
        bundles: Folders or names of shipped bundles, with commas between.
        backend, precision: See `runtime.Sampler.load`.
        threads: Of the inference library in a replica; also its CPUs.
        replicas: Their number.
        max_replicas: If it is larger, Ray adds replicas up to this number while requests wait.
        ongoing: Requests that a replica has under way, on average, before Ray adds one.
        gpus: GPUs of a replica; may be a fraction.
        models: If it is above 0, a replica opens a bundle when a request first names it, and keeps
            the last so many open. If it is 0, every replica opens all at its start.
        token_file: See docs/serving.md. Without one, everyone who reaches the proxy may use it.
    """

    bundles: str
    backend: str = "auto"
    precision: str = "auto"
    threads: int = 1
    replicas: int = 1
    max_replicas: int = 0
    ongoing: int = 16
    gpus: float = 0.0
    models: int = 0
    token_file: str = ""

    @classmethod
    def read(cls, given: Mapping[str, object]) -> Arguments:
        """Return checked arguments. Raises RequestError for a name or a value that is wrong."""
        names = [entry.name for entry in fields(cls)]
        check_options("serve.ray:app", given, names)
        if not all(str(given.get("bundles", "")).split(",")):
            raise RequestError(
                "serve.ray:app needs bundles=NAME or bundles=NAME,NAME, such as bundles=emoji32."
            )
        found = {name: _converted(cls, name, value) for name, value in given.items()}
        # Each value has the type of its field by now.
        arguments = cls(**found)  # type: ignore[arg-type]
        integer("threads", arguments.threads, 1, 1024)
        integer("replicas", arguments.replicas, 1, 10_000)
        integer("max_replicas", arguments.max_replicas, 0, 10_000)
        integer("ongoing", arguments.ongoing, 1, 10_000)
        integer("models", arguments.models, 0, 10_000)
        number("gpus", arguments.gpus, 0.0, 1024.0)
        return arguments


def _converted(cls: type[Arguments], name: str, value: object) -> object:
    """Return a value of the type of its field: a command line gives text."""
    kind = type(getattr(cls, name, ""))
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        found = kind(cast("str", value))
        # int(2.5) is 2, and str takes anything.
        if isinstance(value, str) or (found == value and not isinstance(value, bool)):
            return found
    raise RequestError(f"`{name}` must be of type {kind.__name__}, got {shown(value)}.")


class Replica:
    """One process with the service. Ray sends it requests once `check_health` has returned."""

    app: Starlette

    async def check_health(self) -> None:
        """Wait until the models are open. Raises what opening them has raised."""
        service = cast(Service, self.app.state.service)
        await wait_open(service)
        reason = service.unready()
        # Ray replaces a replica whose check fails several times in a row.
        if reason:
            raise RuntimeError(reason)


class ManyReplica:
    """One process with the services of many bundles, which requests open."""


def app(given: Mapping[str, object]) -> ray_serve.Application:
    """Return the application for `serve run` and for Serve configs.

    Args:
        given: See `Arguments`.

    Raises:
        RequestError: An argument cannot be used.
    """
    arguments = Arguments.read(given)
    settings = Settings(
        backend=arguments.backend,
        precision=arguments.precision,
        threads=None if arguments.gpus else arguments.threads,
        tokens=read_tokens(Path(arguments.token_file)) if arguments.token_file else {},
    )
    scaling: AutoscalingConfig | None = None
    if arguments.max_replicas > arguments.replicas:
        scaling = AutoscalingConfig(
            min_replicas=arguments.replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=arguments.ongoing,
        )
    deployed = ray_serve.deployment(
        name="unnoise",
        # The service bounds its own backlog, and says when to try again.
        max_ongoing_requests=settings.connections,
        ray_actor_options={"num_cpus": arguments.threads, "num_gpus": arguments.gpus},
        num_replicas=None if scaling else arguments.replicas,
        autoscaling_config=scaling,
    )
    hosted = _many(arguments, settings) if arguments.models else _one(arguments, settings)
    return cast(ray_serve.Deployment, deployed(hosted)).bind()


def _one(arguments: Arguments, settings: Settings) -> type:
    """Return the class of a replica that opens all bundles at its start."""
    bundles = arguments.bundles.split(",")

    # Called in the replica: engines have threads, which cannot be sent there.
    def build() -> Starlette:
        return create_app(bundles, settings)

    return cast(type, ray_serve.ingress(build)(Replica))


def _many(arguments: Arguments, settings: Settings) -> type:
    """Return the class of a replica that opens the bundles that requests name."""
    sources = named_sources(arguments.bundles.split(","))
    most = arguments.models

    def build() -> Multiplexed:
        @ray_serve.multiplexed(max_num_models_per_replica=most)
        async def opened(name: str) -> Opened:
            found = Opened(create_app([sources[name]], settings))
            await found.open()
            return found

        # Ray's decorator keeps the function's type, but does not say so.
        keeper = cast("Callable[[str], Awaitable[Opened]]", opened)
        return Multiplexed([*sources], ray_serve.get_multiplexed_model_id, keeper, settings)

    return cast(type, ray_serve.ingress(build)(ManyReplica))
