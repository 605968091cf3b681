"""The sampler: a bundle on a backend, which turns requests into samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Unpack

import numpy as np

from ..backends.base import Backend, Float32, WholeLoop
from ..backends.registry import BACKENDS, open_backend
from ..bundle.bundle import Bundle
from ..bundle.sampling import SolverOptions
from ..engine.expand import MAX_SAMPLES, callback_of, check_memory, expand, listed
from ..engine.loop import Loop, Result, StepCallback
from ..engine.request import Planner, Request
from ..errors import RequestError
from ..errors.arguments import choice, enough_memory, instance, integer, number
from ..errors.keywords import named
from ..errors.messages import refused
from ..images import UInt8, to_uint8
from .animation import Animating

# For type checkers alone: making the TypedDicts would slow `import runtime`.
if TYPE_CHECKING:
    from ..engine.conditions import Conditions
    from ..engine.costs import Costs
    from ..engine.fastest import Choice
    from ..engine.keywords import RequestKeywords, SampleKeywords


class Sampler(Animating):
    """A bundle, ready to sample and to edit. May be used from many threads at once.

    The same bundle, precision, backend, machine, versions and thread count give the same bytes for
    the same request. The other requests in the batch do not matter.

    Every method makes requests, see `Request`, and runs them with `run`. Methods that take images
    accept paths, Pillow images, uint8 arrays and float samples, one or a sequence, see
    `runtime.images.read`. Image i has seed + i.
    """

    @named
    def __init__(
        self,
        bundle: Bundle,
        backend: str | Backend = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_batch: int = 16,
        streams: int | None = None,
        min_psnr: float | None = None,
    ) -> None:
        """Open a loaded bundle, see `load`.

        Args:
            backend: A name, or a backend that is open.
        """
        self._named: tuple[str, str, int | None] | None = None  # what `__reduce__` opens again
        self._streams = None if streams is None else integer("streams", streams, 1, 1024)
        self.bundle = instance("bundle", bundle, Bundle, "Sampler.load opens a folder.")
        self.max_batch = integer("max_batch", max_batch, 1, MAX_SAMPLES)
        precision = instance("precision", precision, str, 'Pass a name, such as "fp32".')
        # The backend suggests the nearest name, and comparing very long strings takes seconds.
        if len(precision) > 60:
            raise refused("precision", "the name of a precision", precision)
        if threads is not None:
            threads = integer("threads", threads, 1, 1024)
        self.chosen: Choice | None = None
        """What backend="fastest" chose, and from what; None for any other."""
        if min_psnr is not None:
            min_psnr = number("min_psnr", min_psnr, 0.0, 1000.0)
            if backend != "fastest":
                raise refused("min_psnr", 'None unless backend is "fastest"', min_psnr)
        if isinstance(backend, str):
            choice("backend", backend, ["auto", "fastest", *BACKENDS])
            if backend == "fastest":
                from ..engine.fastest import Wish, fastest

                wish = Wish(precision, min_psnr, threads, self._streams)
                self.chosen, backend = fastest(bundle, wish)
            else:
                backend = open_backend(bundle, backend, precision, threads, self._streams)
            self._named = (backend.name, backend.precision, threads)
        elif not callable(getattr(backend, "bind", None)):
            raise refused(
                "backend", "a name or a Backend", backend, f"Pass one of {', '.join(BACKENDS)}."
            )
        self.backend = backend
        self._costs: Costs | None = None
        self._lock = Lock()
        self._loop = Loop(self.backend, bundle.sample_shape, self.max_batch, self._cut)
        self._planner = Planner(bundle)

    @property
    def costs(self) -> Costs:
        """What calls of the network cost on this machine, and how they are cut."""
        # One for all threads: two that measure at once would disturb each other.
        with self._lock:
            if self._costs is None:
                # Here, because a lone sample needs none, and importing it takes time.
                from ..engine.costs import Costs

                self._costs = Costs(self.bundle, self.backend)
            return self._costs

    def _cut(self, guided: bool, count: int) -> int:
        return self.costs.streams(guided, count)

    @classmethod
    @named
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_batch: int = 16,
        streams: int | None = None,
        min_psnr: float | None = None,
    ) -> Sampler:
        """Open a bundle.

        Args:
            path: The folder, made by `python -m export.build`; a shipped bundle's name, such as
                "emoji32"; or "hf:USER/NAME@REVISION", a bundle of the Hugging Face Hub.
            backend: The inference library, see `runtime.backends.registry.BACKENDS`; "auto" is
                onnxruntime. "fastest" times the CPU's for at most 2 seconds, keeps the answer in
                the cache, and says in `chosen` what it chose.
            precision: One that the bundle holds; "auto" is fp32.
            threads: Of the inference library, 1 … 1024; None is one a core.
            max_batch: The most samples of one batch. Larger calls are run in several.
            streams: Into how many parts a call of the network is cut, 1 … 1024. They run at once
                and share the threads. None measures what is fastest once, and keeps the answer in
                the cache. For CPU backends.
            min_psnr: For "fastest": the least PSNR in dB, 0 … 1000, of a precision's images
                compared with fp32's when the bundle was exported. None allows fp32 alone.

        Raises:
            BundleError: The files are missing, damaged or invalid.
            BackendError: This machine cannot run the backend.
            RequestError: An argument cannot be used.
        """
        return cls(Bundle.load(path), backend, precision, threads, max_batch, streams, min_psnr)

    @property
    def whole(self) -> bool:
        """Whether the backend runs whole programs by itself, unless a step callback is given."""
        return isinstance(self.backend, WholeLoop)

    def close(self) -> None:
        """Free the device memory that the backend holds. Any later sampling raises BackendError.

        In a forked child this does nothing: the memory belongs to the parent process.
        """
        self._loop.close()

    def sample(
        self,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        label: int | str | Sequence[int | str | None] | None = None,
        conditions: Conditions | None = None,
        guidance: float | Sequence[float | None] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        solver: str | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        start: Float32 | None = None,
        strength: float = 1.0,
        convert: bool = False,
        on_step: StepCallback | None = None,
        **options: Unpack[SolverOptions],
    ) -> Float32:
        """Draw n samples. None selects the bundle's default. Numbers may be numpy scalars.

        Args:
            n: 1 … 1,000,000, as far as the result fits in memory.
            seed: Sample i has seed + i, 0 … 2^64 - 1; or a sequence of n.
            label: A name or a number for all samples, or a sequence of n; None is the null label.
            conditions: By name, one for all samples or n: numbers [*shape] or [n, *shape], or
                images, see `runtime.images.read`; None is the null value.
            guidance: The classifier-free guidance scale, one or n; 1 is none.
            guidance_interval: (low, high], in sigma/alpha, where guidance holds; None is
                everywhere.
            solver: A name, see `runtime.diffusion.solvers`.
            steps: The number of grid intervals.
            grid: A name, or the grid's times.
            start: An x [n, *S] at the level where the grid begins, instead of the seed's noise.
            strength: 0 … 1, the share of the grid that is used, counted from its clean end.
            convert: Fit images of conditions, see `runtime.images.read`.
            on_step: Called after each step with a `Preview`; it cancels the call by returning
                False.
            options: The solver's own options.

        Returns:
            float32 [n, *S] in the data's range.

        Raises:
            RequestError: An argument cannot be used.
            Cancelled: on_step returned False.
        """
        settings = {
            "label": label,
            "conditions": conditions,
            "convert": convert,
            "guidance": guidance,
            "guidance_interval": guidance_interval,
            "solver": solver,
            "steps": steps,
            "grid": grid,
            "start": start,
            "strength": strength,
            **options,
        }
        return self.run(expand(self.bundle, n, seed, settings), on_step).samples

    def pictures(
        self, n: int = 1, seed: int | Sequence[int] = 0, **arguments: Unpack[SampleKeywords]
    ) -> UInt8:
        """Draw n images, uint8 [n, H, W, C]; the arguments are those of `sample`."""
        return self.to_uint8(self.sample(n, seed, **arguments))

    def to_uint8(self, samples: Float32) -> UInt8:
        """Convert samples [..., C, H, W] in the data's range to images, uint8 [..., H, W, C]."""
        if not isinstance(samples, np.ndarray) or samples.ndim < 3:
            raise refused("samples", "an array [..., C, H, W]", samples)
        # Frames of an animation have a second axis before the image.
        shape = (math.prod(samples.shape[:-3]), *samples.shape[-3:])
        flat = to_uint8(samples.reshape(shape), *self.bundle.sample_range)
        return flat.reshape(*samples.shape[:-3], *flat.shape[1:])

    def requests(
        self,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        **how: Unpack[RequestKeywords],
    ) -> list[Request]:
        """Return the n requests that `sample` makes of the same arguments, without on_step.

        Args:
            how: Fields of `Request`, for all samples; label, guidance, conditions and arrays
                [n, *S] also one each. The rest are the solver's options.

        Raises:
            RequestError: An argument cannot be used.
        """
        return expand(self.bundle, n, seed, how)

    def sample_requests(
        self, requests: Iterable[Request], on_step: StepCallback | None = None
    ) -> Float32:
        """Return one sample a request, float32 [n, *S]; the arguments are those of `run`."""
        return self.run(requests, on_step).samples

    def run(self, requests: Iterable[Request], on_step: StepCallback | None = None) -> Result:
        """Run requests as one batch. They may differ in solver, steps, guidance and start.

        Args:
            requests: At most 1,000,000, of any iterable.
            on_step: Called after each step, see `sample`.

        Returns:
            `samples`, float32 [n, *S], one a request; and `timings`, one for each batch that a
            device ran as a whole. On a CPU there are none, because it runs row by row.

        Raises:
            RequestError: An entry is not a usable Request, `requests` raises an error of its own
                while it is read (the cause), or the result does not fit in memory.
            Cancelled: on_step returned False.
        """
        on_step = callback_of(on_step)
        entries = listed(requests)
        check_memory(len(entries), self.bundle.sample_shape)
        with enough_memory(
            f"a batch of {len(entries)} samples", "Pass fewer, or a smaller max_batch."
        ):
            return self._loop.run([self._planner.job(request) for request in entries], on_step)

    def __reduce__(self) -> tuple[type[Sampler], tuple[object, ...]]:
        """Pickle the bundle and the settings: unpickling, or copying, opens the files again.

        Raises RequestError if the sampler was given a Backend object instead of a name.
        """
        if self._named is None:
            raise RequestError(
                "a sampler made from a Backend object cannot be pickled or copied. "
                f"Pass `backend` by name: {', '.join(BACKENDS)}."
            )
        return type(self), (self.bundle, *self._named, self.max_batch, self._streams)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
