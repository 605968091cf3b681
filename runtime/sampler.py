"""Sampling and editing: what a person asks for, as jobs for the loop. The same bytes every time, in any batch, from any thread."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arguments import bind, integer, number
from .backends import Backend, Float32, Timing, WholeLoop, open_backend
from .bundle import Bundle
from .errors import RequestError
from .loop import Loop, Preview, StepCallback, begin
from .noise import MAX_SEED, Stream, noises
from .pictures import UInt8, read, to_uint8
from .request import Planner, Request

INVERTING: dict[str, Any] = {"solver": "dpmpp_2m", "grid": "log_snr", "guidance": 1.0}
"""How pictures are inverted where the caller does not say."""
PAINTING: dict[str, Any] = {"solver": "repaint"}
"""How they are painted where the caller does not say."""
OWN = {"label", "guidance", "start", "picture", "known", "mask"}
"""What `Sampler`'s methods take once for all samples or once each."""
SHARED = {"solver", "steps", "grid", "guidance_interval", "strength", "up"}


class Inversion(NamedTuple):
    """Where pictures come from: noise [n, *S], an x_T for `sample(start=...)`; back [n, *S], what that gives; error [n], its RMS distance."""

    noise: Float32
    back: Float32
    error: NDArray[np.float64]


class Sampler:
    """A bundle ready to sample and to edit. May be used from many threads at once.

    The same bundle, precision, backend, machine, versions and thread count give the same bytes for the same request, whatever
    else is in the batch and wherever in it the request stands.

    Everything is made of requests, see `sample_requests`; the other methods make them. Those that take pictures take what
    `runtime.pictures.read` does: paths, Pillow images, uint8 arrays, float samples; one, or a sequence. Picture i has seed + i.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str | Backend = "auto",
        precision: str = "auto",
        threads: int | None = None,
        max_batch: int = 16,
    ) -> None:
        self.bundle = bundle
        self.max_batch = integer("max_batch", max_batch, 1)
        self.backend = open_backend(bundle, backend, precision, threads) if isinstance(backend, str) else backend
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
        """Open the bundle in the folder `path`.

        threads: of the inference library, None for one a core. max_batch: larger requests run in chunks of this many.
        Raises BundleError (the files), BackendError (the machine), RequestError (the arguments).
        """
        return cls(Bundle.load(path), backend, precision, threads, max_batch)

    @property
    def timings(self) -> tuple[Timing, ...]:
        """How each batch of this thread's last call ran on the device; empty where the host ran it step by step, as on a CPU."""
        return self._loop.timings

    @property
    def whole(self) -> bool:
        """Whether the backend runs whole programs by itself, which a step callback keeps it from."""
        return isinstance(self.backend, WholeLoop)

    def close(self) -> None:
        """Give back the memory of a device that the backend holds. A CPU backend holds none."""
        if isinstance(self.backend, WholeLoop):
            self.backend.close()

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

        seed: sample i has seed + i, or a sequence of n. label: a name or number for all, a sequence of n, None for the null label.
        guidance: classifier-free guidance scale, one or n, 1 is none. guidance_interval, start [n, *S], strength: see `Request`.
        solver, steps, grid, options: see `runtime.solvers`.
        Raises RequestError for what makes no sense, Cancelled where on_step returns False.
        """
        settings = {"label": label, "guidance": guidance, "guidance_interval": guidance_interval, "solver": solver}
        settings |= {"steps": steps, "grid": grid, "start": start, "strength": strength}
        return self._run(n, seed, on_step, **settings, **options)

    def pictures(self, n: int = 1, seed: int | Sequence[int] = 0, **arguments: Any) -> UInt8:
        """n pictures, uint8 [n, H, W, C]; the arguments are those of `sample`."""
        return self.to_uint8(self.sample(n, seed, **arguments))

    def to_uint8(self, samples: Float32) -> UInt8:
        """Samples [..., C, H, W] in the data's range as pictures, uint8 [..., H, W, C]."""
        flat = to_uint8(samples.reshape(-1, *samples.shape[-3:]), *self.bundle.sample_range)
        return flat.reshape(*samples.shape[:-3], *flat.shape[1:])

    def sample_requests(self, requests: Iterable[Request], on_step: StepCallback | None = None) -> Float32:
        """One sample a request, float32 [n, *S]; requests of different solvers, steps, guidance and starts run in one batch."""
        return self._loop.run([self._planner.job(request) for request in requests], on_step)

    def stylize(
        self, pictures: Any, strength: float = 0.5, seed: int = 0, *, convert: bool = False, **how: Any
    ) -> Float32:
        """Pictures noised with q(x_t|x_0) to where the grid's last `strength` begins, and brought back (SDEdit: Meng et al. 2022).

        strength: 0 … 1, from one step to a picture forgotten. convert: see `runtime.pictures.read`. how: label and the rest of what `sample` takes.
        """
        x = self._read(pictures, convert)
        return self._run(len(x), seed, **_with(how, picture=x, strength=strength))

    def invert(self, pictures: Any, *, convert: bool = False, **how: Any) -> Inversion:
        """The noise that pictures come from: the deterministic process walked upward (DDIM inversion: Song et al. 2021, section 4.3).

        how: as in `sample`; guidance is 1 if not given. `solver` is any deterministic one: those of higher order find their way back more nearly.
        To come back: `sample(n, start=noise)` with the same `how`. With strength, noise is an x at the level where that part of the grid begins.
        """
        x, how = self._read(pictures, convert), INVERTING | how
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
        """Pictures inverted under the label `source` and brought back under `target` (dual diffusion implicit bridges: Su et al. 2023).

        strength: how far up, 1 is all the way to noise: the further, the more of the target and the less of the picture. guidance: of the way
        back; None is 3, or 1 where the bundle cannot be guided. Both defaults were measured, see docs/translation.md. how: as in `invert`.
        """
        x, how = self._read(pictures, convert), {**INVERTING, "strength": strength, **how}
        if guidance is None:
            guidance = 3.0 if self.bundle.can_guide else 1.0
        noise = self._climb(x, _with(how, label=source))
        return self._run(len(x), **{**_with(how, label=target, start=noise), "guidance": guidance})

    def inpaint(self, pictures: Any, mask: Any, seed: int = 0, *, convert: bool = False, **how: Any) -> Float32:
        """Pictures painted anew where `mask` is 0; where it is 1 they are returned to the bit.

        mask: a path or Pillow image (white is 1), or an array of bool or 0 … 1 that goes with [n, *S]; between 0 and 1 it mixes.
        how: as in `sample`; solver "repaint" (the default), with its options jump and resample, goes back and forth so that the parts agree.
        """
        x = self._read(pictures, convert)
        return self._run(len(x), seed, **_with(PAINTING | how, known=x, mask=self._mask(mask, len(x), convert)))

    def interpolate(self, first: Any, second: Any, n: int = 8, *, convert: bool = False, **how: Any) -> Float32:
        """n samples on the way from `first` to `second`, both ends among them: each a seed or a picture, which is inverted.

        The noise is interpolated on the sphere (Shoemake 1985; Song et al. 2021, eq. 67). how: as in `invert`.
        """
        how = INVERTING | how
        begins, ends = (self._noise_of(end, convert, how) for end in (first, second))
        starts = [slerp(begins, ends, t) for t in np.linspace(0.0, 1.0, integer("n", n, 2))]
        return self._run(n, **_with(how, start=np.stack(starts)))

    def variations(
        self, picture: Any, n: int = 8, amount: float = 0.3, seed: int = 0, *, convert: bool = False, **how: Any
    ) -> Float32:
        """n pictures like this one: its noise, turned by `amount` toward the noise of seeds seed + i. how: as in `invert`.

        amount: 0 … 1, from the picture itself (but for the error of inverting) to the samples of those seeds.
        """
        n, amount, how = integer("n", n, 1), number("amount", amount, 0.0, 1.0), INVERTING | how
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
        """Frames [K+1, n, *S]: n samples on the way from noise, K network calls; or, given pictures, these on the way to noise.

        The latter is the forward process q(x_t|x_{t-1}), level by level up the grid, with fresh noise at each; it needs no network.
        how: as in `sample`; for pictures steps and grid.
        """
        if pictures is not None:
            x = self._read(pictures, convert)
            if n not in (1, len(x)):
                raise RequestError(
                    f"n is the number of pictures, {len(x)}, where these are given, found {n}: leave it out."
                )
            return bind("animate with pictures", self._forward, x, _seeds(seed, len(x)), **how)
        jobs = [self._planner.job(request) for request in self._requests(n, seed, **how)]
        frames = np.empty((len(jobs[0].table.call) + 1, n, *self.bundle.sample_shape), np.float32)
        frames[0] = [begin(job, self.bundle.sample_shape) for job in jobs]

        def keep(preview: Preview) -> object:
            frames[preview.step, preview.samples] = preview.x
            return on_step and on_step(preview)

        self._loop.run(jobs, keep)
        return frames

    def _forward(self, x: Float32, seeds: list[int], steps: int | None = None, grid: Any = None) -> Float32:
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
            raise RequestError(f"mask must be an array of bool or numbers, found {mask.dtype}.")
        found: Float32 = np.asarray(mask, np.float32)
        if mask.dtype == np.uint8 and found.max(initial=0) > 1:
            found = found / np.float32(255)
        try:
            found = np.broadcast_to(found, (n, *shape))
        except ValueError:
            raise RequestError(
                f"mask has shape {mask.shape}, which does not go with {(n, *shape)}: give [H, W] or [n, 1, H, W]."
            ) from None
        if not ((found >= 0) & (found <= 1)).all():
            raise RequestError(f"mask must lie in 0 … 1 (1: known), found {found.min():g} … {found.max():g}.")
        return found

    def _climb(self, x: Float32, how: dict[str, Any]) -> Float32:
        """Samples [n, *S] walked up from the least noisy knot, which they are taken to stand at, noise apart."""
        start = x * self.bundle.schedule.alpha[0].astype(np.float32)
        return self._run(len(x), **_with(how, start=start, up=True))

    def _noise_of(self, end: Any, convert: bool, how: dict[str, Any]) -> Float32:
        """x_T [*S] of a seed, or of one picture."""
        if isinstance(end, (int, np.integer)):
            settings = {name: value for name, value in how.items() if name != "on_step"}
            return begin(self._planner.job(self._requests(1, end, **settings)[0]), self.bundle.sample_shape)
        x = self._read(end, convert)
        if len(x) != 1:
            raise RequestError(f"one picture is needed here, found {len(x)}.")
        return self._climb(x, how)[0]

    def _run(self, n: int, seed: int | Sequence[int] = 0, on_step: StepCallback | None = None, **how: Any) -> Float32:
        return self.sample_requests(self._requests(n, seed, **how), on_step)

    def _requests(self, n: int, seed: Any, **how: Any) -> list[Request]:
        """n requests: what is a field of `Request`, one for all or one each, and the rest as the solver's options."""
        n = integer("n", n, 1)
        own = {"seed": _seeds(seed, n), **{name: _each(name, how.pop(name), n) for name in OWN & how.keys()}}
        shared = {name: how.pop(name) for name in SHARED & how.keys()}
        return [Request(**{name: values[i] for name, values in own.items()}, **shared, options=how) for i in range(n)]


def slerp(a: Float32, b: Float32, t: float) -> Float32:
    """The point t, 0 … 1, of the way from a to b on the sphere (Shoemake 1985): (sin((1-t)θ)·a + sin(tθ)·b)/sin θ, θ the angle between."""
    if t in (0.0, 1.0):
        return b if t else a
    x, y = (v.astype(np.float64).ravel() for v in (a, b))
    cos = np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0)
    angle = np.arccos(cos)
    if np.sin(angle) < 1e-6:  # one direction, or opposite ones, between which no way is the shortest
        return ((1 - t) * a + t * b).astype(np.float32)
    return ((np.sin((1 - t) * angle) * a.astype(np.float64) + np.sin(t * angle) * b) / np.sin(angle)).astype(np.float32)


def _with(how: dict[str, Any], **own: Any) -> dict[str, Any]:
    """`how`, and what a method decides itself. Raises RequestError for what was decided twice."""
    if twice := sorted(how.keys() & own.keys()):
        raise RequestError(f"{twice[0]!r} is not the caller's here, the method decides it: leave it out.")
    return how | own


def _seeds(seed: Any, n: int) -> list[Any]:
    """The seeds of n samples: seed + i, or those given."""
    if _many(seed):
        return _each("seed", seed, n)
    return [integer("seed", seed, 0, MAX_SEED - n + 1) + i for i in range(n)]


def _many(value: object) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)


def _each(name: str, value: Any, n: int) -> list[Any]:
    """`value` for each of n samples. Raises RequestError where it is a sequence of another length."""
    if not _many(value):
        return [value] * n
    if len(value) != n:
        raise RequestError(f"{name} must be one value{f' or {n} of them' if n > 1 else ''}, found {len(value)}.")
    return list(value)
