"""What a backend is: it runs a bundle's step graph on one inference library, in bound memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..bundle.bundle import Bundle
from ..diffusion.arrays import Array, Bool, Float32, Int64
from ..errors import BackendError, BundleError, UnnoiseError
from .forks import ForkGuard
from .ports import dtype_of, shapes


class Buffers(Protocol):
    """Memory of a batch, bound to the graphs once.

    The caller fills the inputs in place, runs a row, and reads the outputs.

    Attributes:
        noise: [B, *S], z; input.
        call: [B, 6]; input.
        update: [B, R, R+2]; input.
        label: [B]; input.
        conditions: [B, *shape] each, by the names of the graphs' inputs.
        denoised: [B, *S], D of the last row.
    """

    noise: Float32
    call: Float32
    update: Float32
    label: Int64
    conditions: Mapping[str, Array]
    denoised: Float32

    @property
    def state(self) -> Float32:
        """[B, R, *S]: the registers; another array after each `turn`."""
        ...

    def run(self, guided: bool, first: int, count: int) -> None:
        """Run a row of the samples first … first + count - 1.

        The graph's output becomes the state after `turn`.

        guided: Whether to run the null label's half too, for rows whose guidance is not 1.
        """
        ...

    def turn(self) -> None:
        """Make the array that the graphs wrote the state, for all samples."""
        ...

    def step(self, guided: bool) -> None:
        """Run a row of every sample, and turn."""
        ...


class HostBuffers:
    """Buffers as numpy arrays.

    Slices of one allocation are bound, once for each graph, slice and direction. The two `state`
    arrays are input and output in turn.

    spare: Samples of room beyond the batch.
    """

    BINDINGS = 256
    """The number of bindings that are kept."""

    def __init__(self, bundle: Bundle, guard: ForkGuard, batch: int, spare: int = 0) -> None:
        guard.check()
        guard.keep(self)
        self._bundle = bundle
        self._guard = guard
        self._batch = batch
        self._current = 0
        # Zeros: a slice may cover samples that nobody has filled yet.
        self._whole: dict[str, Array] = {
            name: np.zeros(shape, dtype_of(bundle, name))
            for name, shape in shapes(bundle, batch + spare).items()
        }
        self._states = self._whole["state"][:batch], self._whole["next_state"][:batch]
        self.noise: Float32 = self._whole["noise"][:batch]
        self.call: Float32 = self._whole["call"][:batch]
        self.update: Float32 = self._whole["update"][:batch]
        self.label: Int64 = self._whole["label"][:batch]
        self.conditions: Mapping[str, Array] = {
            c.port: self._whole[c.port][:batch] for c in bundle.conditions
        }
        self.denoised: Float32 = self._whole["denoised"][:batch]
        self._bound: dict[tuple[bool, int, int, int], Callable[[], object]] = {}

    @property
    def state(self) -> Float32:
        """[B, R, *S]: see `Buffers`."""
        return self._states[self._current]

    def step(self, guided: bool) -> None:
        """Run a row of every sample, and turn."""
        self.run(guided, 0, self._batch)
        self.turn()

    def turn(self) -> None:
        """Make the array that the graphs wrote the state, for all samples."""
        self._current = 1 - self._current

    def run(self, guided: bool, first: int, count: int) -> None:
        """Run a row of a slice of samples, see `Buffers`.

        Raises:
            BundleError: The library fails.
        """
        self._guard.check()
        key = guided, self._current, first, count
        if key not in self._bound:
            # The oldest binding goes: samples that join and leave make ever new slices.
            if len(self._bound) >= self.BINDINGS:
                del self._bound[next(iter(self._bound))]
            self._bound[key] = self._bind(*key)
        try:
            self._bound[key]()
        except UnnoiseError:
            raise
        except Exception as error:  # inference libraries' own errors share no base class
            raise BundleError(
                f"{self._bundle.path}: {self._guard.name} failed on a batch of {count}: "
                f"{self._said(error)}. Fetch or export the bundle again. If the bundle is intact, "
                "the batch may be too large for this machine's memory: pass a smaller max_batch."
            ) from error

    def _arrays(self, current: int, first: int, count: int) -> dict[str, Array]:
        """The memory of a slice by the graph's names.

        current: Which of the two arrays is the input `state`.
        """
        arrays = {name: array[first : first + count] for name, array in self._whole.items()}
        if current:
            arrays["state"], arrays["next_state"] = arrays["next_state"], arrays["state"]
        return arrays

    def _bind(self, guided: bool, current: int, first: int, count: int) -> Callable[[], object]:
        """Return the function that runs a graph on a slice of this memory."""
        raise NotImplementedError

    def _said(self, error: Exception) -> str:
        """The library's message."""
        return str(error)


class Backend(Protocol):
    """A bundle loaded in one precision.

    Buffers may be used from one thread at a time, different buffers from different threads at once.
    """

    name: str
    precision: str

    def bind(self, batch: int) -> Buffers:
        """Allocate memory for `batch` samples, bound to the graphs."""
        ...


class Rows(NamedTuple):
    """The programs of one batch: B samples, K rows. Shorter programs end with identity rows.

    Attributes:
        x: [B, *S], before the first row.
        conditions: [B, …] each, by the names of the graphs' inputs, with the label.
        call: [K, B, 6].
        update: [K, B, R, R+2].
        guided: [K], whether the row runs the null label's half too.
        noisy: [K], whether the row takes noise.
        draw: draw(k, z) fills z [B, *S] with row k's noise; zero for a sample that takes none.
    """

    x: Float32
    conditions: Mapping[str, Array]
    call: Float32
    update: Float32
    guided: Bool
    noisy: Bool
    draw: Callable[[int, Float32], None]


class Timing(NamedTuple):
    """How the loop of one batch ran on a device.

    Attributes:
        bucket: Samples that ran, the padding included.
        how: "one graph", "3 graphs" or "plain enqueues".
        note: Why nothing was captured; "" if it was.
        captured: Whether this call captured; False if it launched an earlier call's graph.
        device_ms: From the first row to the last, with the waiting for noise.
        device_bytes: What the backend holds by now.
    """

    batch: int
    bucket: int
    rows: int
    how: str
    note: str
    captured: bool
    device_ms: float
    device_bytes: int


@runtime_checkable
class WholeLoop(Protocol):
    """A backend that runs whole programs by itself, with the state on the device.

    It is used if nobody looks at the steps.

    Attributes:
        largest: Samples of the largest batch; None for no limit.
    """

    name: str
    precision: str
    largest: int | None

    def bind(self, batch: int) -> Buffers:
        """Allocate memory for `batch` samples that are stepped from the host."""
        ...

    def run_rows(self, rows: Rows) -> tuple[Float32, Timing]:
        """Run a batch; return x [B, *S] after the last row, and how it ran."""
        ...

    def close(self) -> None:
        """Free the device's memory. A second call does nothing."""
        ...


class BufferPool:
    """Lends buffers with room for a batch to one borrower at a time, and keeps them for the next.

    Buffers serve any smaller batch, so memory grows with the largest batch only.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = Lock()
        self._free: list[tuple[int, Buffers]] = []

    @contextmanager
    def lend(self, batch: int) -> Iterator[Buffers]:
        """Lend buffers of at least this many samples."""
        with self._lock:
            # The smallest that fits, so that a larger one stays free for a larger batch.
            fitting = [entry for entry in self._free if entry[0] >= batch]
            if fitting:
                room, buffers = min(fitting, key=lambda entry: entry[0])
                self._free = [entry for entry in self._free if entry[1] is not buffers]
            else:
                # Those that are too small are replaced by the new ones.
                self._free.clear()
                room = batch
                buffers = None
        buffers = buffers or self._backend.bind(batch)
        try:
            yield buffers
        finally:
            with self._lock:
                self._free.append((room, buffers))

    def clear(self) -> None:
        """Drop the buffers that are not lent."""
        with self._lock:
            self._free.clear()


def missing(library: str, extra: str, error: object) -> BackendError:
    """Make the error for an inference library that cannot be imported."""
    return BackendError(
        f"{library} cannot be imported ({error}). Install it: pip install 'unnoise[{extra}]'."
    )
