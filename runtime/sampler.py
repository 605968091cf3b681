"""Sampling and editing: what a person asks for, as jobs for the loop. The same bytes every time, in
any batch, from any thread."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, Float32, WholeLoop
from .backends.registry import BACKENDS, open_backend
from .bundle.bundle import Bundle
from .diffusion.noise import MAX_SEED, Stream, noises
from .engine.batch import begin
from .engine.loop import Loop, Preview, Result, StepCallback
from .engine.request import ARRAYS, FIELDS, Planner, Request
from .errors import RequestError
from .errors.arguments import (
    bind,
    choice,
    enough_memory,
    function,
    instance,
    integer,
    is_many,
    many,
    number,
    reason,
    refused,
    unwrapped,
)
from .images import UInt8, read, to_uint8

INVERTING: dict[str, Any] = {"solver": "dpmpp_2m", "grid": "log_snr", "guidance": 1.0}
"""How pictures are inverted where the caller does not say."""
PAINTING: dict[str, Any] = {"solver": "repaint"}
"""How they are painted where the caller does not say."""
EACH = ("label", "guidance", *ARRAYS)
"""Fields of a request that `Sampler`'s methods take once for all samples or once each."""
MAX_SAMPLES = 1_000_000
"""Most samples of one call. A result that does not fit in memory is refused too."""
ARGUMENTS = ("n", *FIELDS, "on_step", "convert")
"""What a misspelled keyword may have meant, beside the solver's options."""


class Inversion(NamedTuple):
    """Where pictures come from: noise [n, *S], an x_T for `sample(start=...)`; back [n, *S], what
    that gives; error [n], its RMS distance."""

    noise: Float32
    back: Float32
    error: NDArray[np.float64]


class Sampler:
    """A bundle ready to sample and to edit. May be used from many threads at once.

    The same bundle, precision, backend, machine, versions and thread count give the same bytes for
    the same request, whatever else is in the batch and wherever in it the request stands.

    Everything is made of requests, see `sample_requests`; the other methods make them. Those that
    take pictures take what `runtime.images.read` does: paths, Pillow images, uint8 arrays, float
    samples; one, or a sequence. Picture i has seed + i.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str | Backend = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_batch: int = 16,
    ) -> None:
        self._named: tuple[str, str, int | None] | None = None  # what `__reduce__` opens again
        self.bundle = instance("bundle", bundle, Bundle, "Sampler.load opens a folder.")
        self.max_batch = integer("max_batch", max_batch, 1, MAX_SAMPLES)
        precision = instance("precision", precision, str, 'Pass a name, such as "fp32".')
        if len(precision) > 60:
            raise refused("precision", "the name of a precision", precision)
        if threads is not None:
            threads = integer("threads", threads, 1, 1024)
        if isinstance(backend, str):
            choice("backend", backend, ["auto", *BACKENDS])
            backend = open_backend(bundle, backend, precision, threads)
            self._named = (backend.name, backend.precision, threads)
        elif not callable(getattr(backend, "bind", None)):
            raise refused(
                "backend", "a name or a Backend", backend, f"Pass one of {', '.join(BACKENDS)}."
            )
        self.backend = backend
        self._loop = Loop(self.backend, bundle.sample_shape, self.max_batch)
        self._planner = Planner(bundle)

    @classmethod
    def load(
        cls,
        path: str | Path,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_batch: int = 16,
    ) -> Sampler:
        """Open a bundle: the folder `path`, or a shipped bundle's name, such as "emoji32".

        threads: of the inference library, None for one a core. max_batch: larger requests run in
        chunks of this many. Raises BundleError (the files), BackendError (the machine),
        RequestError (the arguments).
        """
        return cls(Bundle.load(path), backend, precision, threads, max_batch)

    @property
    def whole(self) -> bool:
        """Whether the backend runs whole programs by itself, which a step callback keeps it
        from."""
        return isinstance(self.backend, WholeLoop)

    def close(self) -> None:
        """Free the device memory that the backend holds. Any later sampling raises BackendError.

        In a forked child this does nothing: the memory belongs to the parent process.
        """
        self._loop.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the bundle and the settings: unpickling, or copying, opens the files again.

        Raises RequestError if the sampler was given a Backend object instead of a name.
        """
        if self._named is None:
            raise RequestError(
                "a sampler made from a Backend object cannot be pickled or copied. "
                f"Pass `backend` by name: {', '.join(BACKENDS)}."
            )
        return type(self), (self.bundle, *self._named, self.max_batch)

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sample(
        self,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        *,
        label: int | str | Sequence[int | str | None] | None = None,
        guidance: float | Sequence[float | None] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        solver: str | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        start: Float32 | None = None,
        strength: float = 1.0,
        on_step: StepCallback | None = None,
        **options: Any,
    ) -> Float32:
        """n samples, float32 [n, *S] in the data's range.

        n: 1 … 1,000,000, as far as the result fits in memory. Numbers may be numpy scalars or 0-d
        arrays.
        seed: sample i has seed + i, or a sequence of n. label: a name or number for all, a sequence
        of n, None for the null label.
        guidance: classifier-free guidance scale, one or n, 1 is none. guidance_interval, start [n,
        *S], strength: see `Request`. solver, steps, grid, options: see `runtime.diffusion.solvers`.
        Raises RequestError for an argument that cannot be used, Cancelled if on_step returns False.
        """
        settings = {
            "label": label,
            "guidance": guidance,
            "guidance_interval": guidance_interval,
            "solver": solver,
        }
        settings |= {"steps": steps, "grid": grid, "start": start, "strength": strength}
        return self._run(n, seed, on_step, **settings, **options)

    def pictures(self, n: int = 1, seed: int | Sequence[int] = 0, **arguments: Any) -> UInt8:
        """n pictures, uint8 [n, H, W, C]; the arguments are those of `sample`."""
        return self.to_uint8(self.sample(n, seed, **arguments))

    def to_uint8(self, samples: Float32) -> UInt8:
        """Samples [..., C, H, W] in the data's range as pictures, uint8 [..., H, W, C]."""
        if not isinstance(samples, np.ndarray) or samples.ndim < 3:
            raise refused("samples", "an array [..., C, H, W]", samples)
        shape = (math.prod(samples.shape[:-3]), *samples.shape[-3:])
        flat = to_uint8(samples.reshape(shape), *self.bundle.sample_range)
        return flat.reshape(*samples.shape[:-3], *flat.shape[1:])

    def sample_requests(
        self, requests: Iterable[Request], on_step: StepCallback | None = None
    ) -> Float32:
        """One sample a request, float32 [n, *S]; the arguments are those of `run`."""
        return self.run(requests, on_step).samples

    def run(self, requests: Iterable[Request], on_step: StepCallback | None = None) -> Result:
        """Run requests, those of different solvers, steps, guidance and starts in one batch.

        Args:
            requests: at most 1,000,000, of any iterable.
            on_step: called after each step, see `sample`.

        Returns:
            `samples`, float32 [n, *S], one a request; and `timings`, how each batch ran that a
            device ran as a whole: none on a CPU, which runs row by row.

        Raises:
            RequestError: an entry is no Request or cannot be used, `requests` raises an error of
                its own while it is read (its cause), or the result does not fit in memory.
            Cancelled: on_step returned False.
        """
        on_step = _callback(on_step)
        listed = _listed(requests)
        self._check_size(len(listed))
        with enough_memory(
            f"a batch of {len(listed)} samples", "Pass fewer, or a smaller max_batch."
        ):
            return self._loop.run([self._planner.job(request) for request in listed], on_step)

    def stylize(
        self,
        pictures: Any,
        strength: float = 0.5,
        seed: int = 0,
        *,
        convert: bool = False,
        **how: Any,
    ) -> Float32:
        """Pictures noised with q(x_t|x_0) to where the grid's last `strength` begins, and brought
        back (SDEdit: Meng et al. 2022).

        strength: 0 … 1, from one step to a picture forgotten. convert: see `runtime.images.read`.
        how: label and the rest of what `sample` takes.
        """
        x = self._read(pictures, convert)
        return self._run(len(x), seed, **_with(how, picture=x, strength=strength))

    def invert(self, pictures: Any, *, convert: bool = False, **how: Any) -> Inversion:
        """The noise that pictures come from: the deterministic process walked upward (DDIM
        inversion: Song et al. 2021, section 4.3).

        how: as in `sample`; guidance is 1 if not given. `solver` is any deterministic one: those of
        higher order find their way back more nearly. To come back: `sample(n, start=noise)` with
        the same `how`. With strength, noise is an x at the level where that part of the grid
        begins.
        """
        x = self._read(pictures, convert)
        how = INVERTING | how
        noise = self._climb(x, how)
        back = self._run(len(x), **_with(how, start=noise))
        apart = (back.astype(np.float64) - x).reshape(len(x), -1)
        return Inversion(noise, back, np.sqrt((apart**2).mean(1)))

    def translate(
        self,
        pictures: Any,
        source: Any,
        target: Any,
        *,
        strength: float = 0.4,
        guidance: float | None = None,
        convert: bool = False,
        **how: Any,
    ) -> Float32:
        """Pictures inverted under the label `source` and brought back under `target` (dual
        diffusion implicit bridges: Su et al. 2023).

        strength: how far up, 1 is all the way to noise: the further, the more of the target and the
        less of the picture. guidance: of the way back; None is 3, or 1 where the bundle cannot be
        guided. Both defaults were measured, see docs/translation.md. how: as in `invert`.
        """
        x = self._read(pictures, convert)
        how = {**INVERTING, "strength": strength, **how}
        if guidance is None:
            guidance = 3.0 if self.bundle.can_guide else 1.0
        noise = self._climb(x, _with(how, label=source))
        return self._run(len(x), **{**_with(how, label=target, start=noise), "guidance": guidance})

    def inpaint(
        self, pictures: Any, mask: Any, seed: int = 0, *, convert: bool = False, **how: Any
    ) -> Float32:
        """Pictures painted anew where `mask` is 0; where it is 1 they are returned to the bit.

        mask: a path or Pillow image (white is 1), or an array of bool or 0 … 1 that goes with [n,
        *S]; between 0 and 1 it mixes.
        how: as in `sample`; solver "repaint" (the default), with its options jump and resample,
        goes back and forth so that the parts agree.
        """
        x = self._read(pictures, convert)
        return self._run(
            len(x), seed, **_with(PAINTING | how, known=x, mask=self._mask(mask, len(x), convert))
        )

    def interpolate(
        self, first: Any, second: Any, n: int = 8, *, convert: bool = False, **how: Any
    ) -> Float32:
        """n samples on the way from `first` to `second`, both ends among them: each a seed or a
        picture, which is inverted.

        The noise is interpolated on the sphere (Shoemake 1985; Song et al. 2021, eq. 67). how: as
        in `invert`.
        """
        n = integer("n", n, 2, MAX_SAMPLES)
        how = INVERTING | how
        begins, ends = (self._noise_of(end, convert, how) for end in (first, second))
        starts = [slerp(begins, ends, t) for t in np.linspace(0.0, 1.0, n)]
        return self._run(n, **_with(how, start=np.stack(starts)))

    def variations(
        self,
        picture: Any,
        n: int = 8,
        amount: float = 0.3,
        seed: int = 0,
        *,
        convert: bool = False,
        **how: Any,
    ) -> Float32:
        """n pictures like this one: its noise, turned by `amount` toward the noise of seeds seed +
        i. how: as in `invert`.

        amount: 0 … 1, from the picture itself (but for the error of inverting) to the samples of
        those seeds.
        """
        n = integer("n", n, 1, MAX_SAMPLES)
        amount = number("amount", amount, 0.0, 1.0)
        how = INVERTING | how
        seed = integer("seed", seed, 0, MAX_SEED - n + 1)
        own = self._noise_of(self._read(picture, convert), convert, how)
        starts = [slerp(own, self._noise_of(seed + i, convert, how), amount) for i in range(n)]
        return self._run(n, seed, **_with(how, start=np.stack(starts)))

    def animate(
        self,
        n: int = 1,
        seed: int = 0,
        *,
        pictures: Any = None,
        convert: bool = False,
        on_step: StepCallback | None = None,
        **how: Any,
    ) -> Float32:
        """Frames [K+1, n, *S]: n samples on the way from noise, K network calls; or, given
        pictures, these on the way to noise.

        The latter is the forward process q(x_t|x_{t-1}), level by level up the grid, with fresh
        noise at each; it needs no network.
        how: as in `sample`; for pictures steps and grid.
        """
        n = integer("n", n, 1, MAX_SAMPLES)
        on_step = _callback(on_step)
        if pictures is not None:
            x = self._read(pictures, convert)
            if n not in (1, len(x)):
                raise RequestError(
                    f"`n` must be the number of pictures, {len(x)}, if these are given, got {n}. "
                    f"Leave `n` out."
                )
            with enough_memory("the animation", "Take fewer images or fewer steps."):
                return bind(
                    "animate with pictures",
                    self._forward,
                    (x, _seeds(seed, len(x))),
                    how,
                    ARGUMENTS,
                )
        jobs = [self._planner.job(request) for request in self.requests(n, seed, **how)]
        with enough_memory(f"an animation of {n} samples", "Take fewer samples or fewer steps."):
            frames = np.empty(
                (len(jobs[0].table.call) + 1, n, *self.bundle.sample_shape), np.float32
            )
        frames[0] = [begin(job, self.bundle.sample_shape) for job in jobs]

        def keep(preview: Preview) -> object:
            frames[preview.step, preview.samples] = preview.x
            return on_step and on_step(preview)

        self._loop.run(jobs, keep)
        return frames

    def _forward(
        self, x: Float32, seeds: list[int], steps: int | None = None, grid: Any = None
    ) -> Float32:
        way = self.bundle.grid(steps, grid)
        levels = np.stack([way.alpha, way.sigma], -1)[::-1]
        frames = [x]
        for k, ((alpha, sigma), (next_alpha, next_sigma)) in enumerate(itertools.pairwise(levels)):
            keep = next_alpha / alpha
            add = np.sqrt((next_sigma - keep * sigma) * (next_sigma + keep * sigma))
            z = noises(seeds, Stream.ENCODE, k, x.shape[1:])
            frames.append((keep * frames[-1] + add * z).astype(np.float32))
        return np.stack(frames)

    def _read(self, pictures: Any, convert: bool) -> Float32:
        return read(pictures, self.bundle.sample_shape, *self.bundle.sample_range, convert=convert)

    def _mask(self, mask: Any, n: int, convert: bool) -> Float32:
        shape = self.bundle.sample_shape
        if not isinstance(mask, np.ndarray):
            mask = read(mask, (1, *shape[1:]), 0.0, 1.0, convert, "mask")
        elif mask.dtype.kind not in "buif":
            raise refused("mask", "an array of bool or numbers", mask)
        with np.errstate(over="ignore"):
            found: Float32 = np.asarray(mask, np.float32)
        if mask.dtype == np.uint8 and found.max(initial=0) > 1:
            found = found / np.float32(255)
        try:
            found = np.broadcast_to(found, (n, *shape))
        except ValueError:
            raise RequestError(
                f"mask has shape {mask.shape}, which does not go with {(n, *shape)}. Pass [H, W] "
                f"or [n, 1, H, W]."
            ) from None
        if not ((found >= 0) & (found <= 1)).all():
            raise RequestError(
                f"`mask` must lie in 0 … 1 (1: known), got {found.min():g} … {found.max():g}."
            )
        return found

    def _climb(self, x: Float32, how: dict[str, Any]) -> Float32:
        """Samples [n, *S] walked up from the least noisy knot, which they are taken to stand at,
        noise apart."""
        start = x * self.bundle.schedule.alpha[0].astype(np.float32)
        return self._run(len(x), **_with(how, start=start, up=True))

    def _noise_of(self, end: Any, convert: bool, how: dict[str, Any]) -> Float32:
        """x_T [*S] of a seed, or of one picture."""
        seed = unwrapped(end)
        if isinstance(seed, int):
            settings = {
                name: value for name, value in how.items() if name not in ("on_step", "seed")
            }
            return begin(
                self._planner.job(self.requests(1, seed, **settings)[0]), self.bundle.sample_shape
            )
        x = self._read(end, convert)
        if len(x) != 1:
            raise RequestError(f"one picture is needed here, got {len(x)}.")
        return self._climb(x, how)[0]

    def _run(
        self, n: int, seed: int | Sequence[int] = 0, on_step: StepCallback | None = None, **how: Any
    ) -> Float32:
        return self.sample_requests(self.requests(n, seed, **how), on_step)

    def _check_size(self, n: int) -> None:
        """Raises RequestError if there is no memory for n samples."""
        with enough_memory(f"a result of {n} samples", "Ask for fewer at a time."):
            np.empty((n, *self.bundle.sample_shape), np.float32)

    def requests(self, n: int = 1, seed: Any = 0, **how: Any) -> list[Request]:
        """The n requests that `sample` makes of the same arguments, without on_step.

        What is a field of `Request` is one for all or one each, the rest are the solver's options.
        """
        n = integer("n", n, 1, MAX_SAMPLES)
        self._check_size(n)
        given = {name: how.pop(name) for name in FIELDS if name in how}
        self.bundle.check_options(given.get("solver"), how, ARGUMENTS)
        each = {name: _each(name, given.pop(name), n) for name in EACH if name in given}
        each["seed"] = _seeds(seed, n)
        return [
            Request(**given, **{name: values[i] for name, values in each.items()}, options=how)
            for i in range(n)
        ]


def slerp(a: Float32, b: Float32, t: float) -> Float32:
    """The point t, 0 … 1, of the way from a to b on the sphere (Shoemake 1985): (sin((1-t)θ)·a +
    sin(tθ)·b)/sin θ, θ the angle between."""
    t = number("t", t, 0.0, 1.0)
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            raise refused(name, "a float array", value)
    if a.shape != b.shape:
        raise RequestError(f"`a` and `b` must have one shape, got {a.shape} and {b.shape}.")
    if t in (0.0, 1.0):
        return b if t else a
    x, y = (v.astype(np.float64).ravel() for v in (a, b))
    norms = np.sqrt((x @ x) * (y @ y))
    cos = np.clip(x @ y / norms, -1.0, 1.0) if norms > 0 else 1.0  # zero has no direction
    angle = np.arccos(cos)
    if (
        np.sin(angle) < 1e-6
    ):  # one direction, or opposite ones, between which no way is the shortest
        return ((1 - t) * a + t * b).astype(np.float32)
    return (
        (np.sin((1 - t) * angle) * a.astype(np.float64) + np.sin(t * angle) * b) / np.sin(angle)
    ).astype(np.float32)


def _with(how: dict[str, Any], **own: Any) -> dict[str, Any]:
    """`how`, and what a method decides itself. Raises RequestError for what was decided twice."""
    if twice := sorted(how.keys() & {"n", *own}):
        raise RequestError(f"`{twice[0]}` is set by this method. Leave it out.")
    return how | own


def _seeds(seed: Any, n: int) -> list[Any]:
    """The seeds of n samples: seed + i, or those given."""
    if is_many(seed):
        return many("seed", seed, n)
    return [integer("seed", seed, 0, MAX_SEED - n + 1) + i for i in range(n)]


def _each(name: str, value: Any, n: int) -> list[Any]:
    """`value` for each of n samples. Raises RequestError for a sequence of another length."""
    return many(name, value, n) if is_many(value) else [value] * n


def _callback(on_step: StepCallback | None) -> StepCallback | None:
    """A step callback whose numpy False is a False. Raises RequestError for what is no function."""
    if on_step is None:
        return None
    called = function("on_step", on_step)
    return lambda preview: unwrapped(called(preview))


def _listed(requests: Any) -> list[Request]:
    """The requests of any iterable as a list. Raises RequestError if it cannot be read as such."""
    if isinstance(requests, (Request, Mapping, str, bytes)):
        raise refused("requests", "a list of Requests", requests, "Pass [request] for one.")
    try:
        entries = iter(requests)
    except Exception:
        raise refused(
            "requests", "a list of Requests", requests, "Pass [request] for one."
        ) from None
    try:
        listed = list(itertools.islice(entries, MAX_SAMPLES + 1))
    except Exception as error:
        raise RequestError(f"`requests` raised {type(error).__name__}: {reason(error)}.") from error
    if len(listed) > MAX_SAMPLES:
        raise RequestError(
            f"`requests` must be at most {MAX_SAMPLES}, got more. Pass fewer at a time."
        )
    return listed
