"""The models that are served: each is a bundle on a backend, and an engine."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from threading import Lock

import numpy as np

from runtime import Bundle, Engine, Request, Sampler
from runtime.backends.registry import BACKENDS
from runtime.diffusion.grid import GRIDS
from runtime.diffusion.solvers import SOLVERS
from runtime.engine.request import Planner
from runtime.engine.stats import TickReport
from runtime.errors import BackendError, ClosedError, RequestError, unknown
from runtime.images import is_image

from .problems import Problem
from .settings import Settings

Source = str | Path | Sampler
CHECK_STEPS = 2
"""Steps of the sample that a model must reproduce before it is ready."""


class Model:
    """A bundle with its engine.

    Attributes:
        name: The bundle's.
        planner: Turns the requests of edits into jobs.
        fingerprint: A hash of all that the bytes of a result depend on, apart from the request.
    """

    def __init__(
        self,
        sampler: Sampler,
        settings: Settings,
        on_tick: Callable[[TickReport], object] | None = None,
    ) -> None:
        """Start the engine, and check it against the sampler.

        Raises:
            BackendError: The machine cannot run the bundle, or the engine returned other bytes.
        """
        self.sampler = sampler
        self.bundle: Bundle = sampler.bundle
        self.planner = Planner(sampler.bundle)
        self.name = sampler.bundle.name
        self.engine = Engine(
            sampler, settings.engine, max_batch=settings.max_batch, on_tick=on_tick
        )
        # Part of every ETag, so it must cover everything that can change a byte.
        self.fingerprint = _fingerprint(sampler)
        try:
            self._check()
        except BaseException:
            self.engine.close()
            raise

    @property
    def shows_images(self) -> bool:
        """Whether its samples are images."""
        return is_image(self.bundle.sample_shape)

    def close(self) -> None:
        """Stop the engine. The sampler stays open."""
        self.engine.close()

    def info(self) -> dict[str, object]:
        """Describe the model for a client, as JSON."""
        bundle = self.bundle
        defaults = bundle.defaults
        return {
            "name": self.name,
            "sample_shape": list(bundle.sample_shape),
            "sample_range": list(bundle.sample_range),
            "is_image": self.shows_images,
            "labels": list(bundle.labels.names) if bundle.labels else None,
            "needs_label": bundle.labels is not None and bundle.null_label is None,
            "conditions": [condition.to_json() for condition in bundle.conditions],
            "can_guide": bundle.can_guide,
            "knots": len(bundle.schedule),
            "defaults": {
                "solver": defaults.solver,
                "steps": min(defaults.steps, len(bundle.schedule)),
                "grid": defaults.grid,
                "guidance": defaults.guidance if bundle.can_guide else 1.0,
                "options": dict(defaults.options),
            },
            "solvers": list(SOLVERS) + (["tuned"] if bundle.tuned else []),
            "tuned_steps": sorted(bundle.tuned),
            "grids": list(GRIDS),
            "backend": self.sampler.backend.name,
            "precision": self.sampler.backend.precision,
            "threads": getattr(self.sampler.backend, "threads", None),
            "same_bytes": bundle.same_bytes and self.engine.curve.same_bytes,
            "fingerprint": self.fingerprint,
        }

    def unready(self, hung_s: float) -> str:
        """Say why the model cannot take work; empty if it can."""
        stats = self.engine.stats()
        if not stats.accepting:
            return f"{self.name} has stopped."
        if stats.tick_seconds > hung_s:
            # The thread would not come back to say so itself.
            return f"{self.name} has been in one network call for {stats.tick_seconds:.0f} s."
        return ""

    def _check(self) -> None:
        """Compare a sample of the engine with the sampler's own. Raises BackendError."""
        # Few steps are enough: the check compares two paths, and judges no image.
        needs_label = self.bundle.labels is not None and self.bundle.null_label is None
        label = 0 if needs_label else None
        conditions = {name: c[0] for name, c in self.bundle.draw_conditions(1).items()}
        steps = self.bundle.allowed_steps(CHECK_STEPS)
        request = Request(0, label, conditions=conditions, solver="ddim", steps=steps)
        expected = self.sampler.sample_requests([request])
        found = self.engine.submit(request).result()
        if not np.isfinite(found).all():
            raise BackendError(f"{self.name} returned NaN. Export the bundle again.")
        # A bundle may say of itself that its bytes depend on the batch.
        if self.bundle.same_bytes and found.tobytes() != expected.tobytes():
            raise BackendError(
                f"the engine returned other bytes than the sampler for {self.name}. "
                "Choose another backend."
            )


def _fingerprint(sampler: Sampler) -> str:
    """A hash of the bundle, the backend, and the versions and threads that bytes depend on."""
    backend = sampler.backend
    kind = BACKENDS.get(backend.name)
    library = sys.modules.get(kind.module) if kind else None
    parts = (
        sampler.bundle.sha256,
        backend.name,
        backend.precision,
        getattr(backend, "threads", None),
        getattr(library, "__version__", None),
        np.__version__,
        metadata.version("pillow"),
        version(),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def version() -> str:
    """The version of this package."""
    try:
        return metadata.version("unnoise")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "0"


class Models:
    """The models by name. They are opened in a thread of their own, while the service answers.

    Attributes:
        on_tick: Called with a model's name after each of its network calls, in its thread.
        opened: Whether all are open.
        failure: What opening them has raised.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        settings: Settings,
    ) -> None:
        """sources: bundles' folders, or samplers, which the service does not close."""
        self._sources = list(sources)
        self.settings = settings
        self.on_tick: Callable[[str, TickReport], object] | None = None
        self._lock = Lock()
        self._models: dict[str, Model] = {}
        self._own: list[Sampler] = []
        self._closed = False
        self.opened = False
        self.failure: BaseException | None = None

    @property
    def all(self) -> Mapping[str, Model]:
        """The open models by name, as of now."""
        # A copy, which is atomic: `open` may add a model while the caller iterates.
        return dict(self._models)

    def open(self) -> None:
        """Open all, unless that was done before; a second caller waits for the first.

        Raises:
            ClosedError: `close` was called.
            UnnoiseError: A bundle cannot be served.
        """
        with self._lock:
            if self.failure is not None:
                raise self.failure
            try:
                for source in self._sources[len(self._models) :]:
                    self._check_open()
                    self._open(source)
                self._check_open()
                self.opened = True
            except BaseException as error:
                self.failure = error
                raise
            finally:
                # `close` does not wait for this, and so may have missed the last model.
                if self._closed:
                    self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the service was closed while it opened its bundles.")

    def _open(self, source: Source) -> None:
        sampler = source if isinstance(source, Sampler) else self._load(source)
        try:
            model = self._model(sampler)
        except BaseException:
            if sampler is not source:
                sampler.close()
            raise
        # Only now may `close` reach it: a backend must not be closed while it is measured.
        self._models[model.name] = model
        if sampler is not source:
            self._own.append(sampler)

    def _model(self, sampler: Sampler) -> Model:
        name = sampler.bundle.name
        # Requests name a model by its bundle.
        if name in self._models:
            raise RequestError(f"two bundles are named {name!r}. Serve them in two processes.")

        def ticked(report: TickReport) -> None:
            # Looked up at each tick: the service may come after the models.
            if self.on_tick is not None:
                self.on_tick(name, report)

        return Model(sampler, self.settings, ticked)

    def close(self) -> None:
        """Stop all engines, and close the samplers that were opened here. It opens no more."""
        self._closed = True
        # Read first: `open` adds a model before its sampler, so every one has its engine closed.
        own = tuple(self._own)
        for model in self.all.values():
            model.close()
        for sampler in own:
            sampler.close()

    def unready(self) -> str:
        """Say why the service cannot take work; empty if it can."""
        if self.failure is not None:
            return "a model cannot be opened. The log has the reason."
        if not self.opened:
            return "the models are being opened."
        reasons = (model.unready(self.settings.hung_s) for model in self._models.values())
        return " ".join(filter(None, reasons))

    def get(self, name: str | None) -> Model:
        """Return a model.

        Args:
            name: None selects the only one.

        Raises:
            RequestError: There is no such model, or there are several and none is named.
            Problem: The models are not open yet, or the service cannot open them (503).
        """
        if not self.opened:
            raise Problem(503, self.unready(), 2.0)
        if name is None:
            if len(self._models) == 1:
                return next(iter(self._models.values()))
            raise RequestError(f"`model` must be one of {', '.join(self._models)}. Pass its name.")
        if name not in self._models:
            raise unknown("model", name, self._models)
        return self._models[name]

    def _load(self, source: str | Path) -> Sampler:
        settings = self.settings
        return Sampler.load(
            source,
            settings.backend,
            settings.precision,
            settings.threads,
            streams=settings.streams,
            min_psnr=settings.min_psnr,
        )
