"""What a backend is: it runs a bundle's step graph on one inference library, in memory bound
once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..bundle.bundle import Bundle
from ..diffusion.program import R
from ..errors import BackendError, BundleError, UnnoiseError
from .forks import ForkGuard

Float32 = NDArray[np.float32]


class Buffers(Protocol):
    """Memory of a batch, bound to the graphs once. The caller fills the inputs in place, runs a
    row, and reads the outputs.

    noise [B, *S], call [B, 6], update [B, R, R+2], label [B] int64: inputs. denoised [B, *S]: D of
    the last row.
    """

    noise: Float32
    call: Float32
    update: Float32
    label: NDArray[np.int64]
    denoised: Float32

    @property
    def state(self) -> Float32:
        """[B, R, *S]: the registers; another array after each `turn`."""
        ...

    def run(self, guided: bool, first: int, count: int) -> None:
        """Run a row of the samples first … first + count - 1.

        guided: with the null label's half, for rows whose guidance is not 1. What the graph writes
        is the state after `turn`.
        """
        ...

    def turn(self) -> None:
        """The array that the graphs wrote becomes the state, for all samples."""
        ...

    def step(self, guided: bool) -> None:
        """Run a row of every sample, and turn."""
        ...


def shapes(bundle: Bundle, batch: int) -> dict[str, tuple[int, ...]]:
    """Of the step graph's inputs and outputs, by name."""
    S = bundle.sample_shape
    return {
        "state": (batch, R, *S),
        "noise": (batch, *S),
        "call": (batch, 6),
        "update": (batch, R, R + 2),
        "label": (batch,),
        "next_state": (batch, R, *S),
        "denoised": (batch, *S),
    }


class HostBuffers:
    """Buffers as numpy arrays. Slices of one allocation are bound, once for each graph, slice and
    direction; the two `state` arrays are input and output in turn.

    spare: samples of room beyond the batch.
    """

    BINDINGS = 256
    """How many bindings are kept."""

    def __init__(self, bundle: Bundle, guard: ForkGuard, batch: int, spare: int = 0) -> None:
        guard.check()
        guard.keep(self)
        self._bundle = bundle
        self._guard = guard
        self._batch = batch
        self._current = 0
        kinds = {"label": np.int64}
        self._whole: dict[str, Any] = {
            name: self._array(shape, kinds.get(name, np.float32))
            for name, shape in shapes(bundle, batch + spare).items()
        }
        self._states = self._whole["state"][:batch], self._whole["next_state"][:batch]
        self.noise: Float32 = self._whole["noise"][:batch]
        self.call: Float32 = self._whole["call"][:batch]
        self.update: Float32 = self._whole["update"][:batch]
        self.label: NDArray[np.int64] = self._whole["label"][:batch]
        self.denoised: Float32 = self._whole["denoised"][:batch]
        self._bound: dict[tuple[bool, int, int, int], Callable[[], object]] = {}

    @property
    def state(self) -> Float32:
        return self._states[self._current]

    def step(self, guided: bool) -> None:
        self.run(guided, 0, self._batch)
        self.turn()

    def turn(self) -> None:
        self._current = 1 - self._current

    def run(self, guided: bool, first: int, count: int) -> None:
        self._guard.check()
        key = guided, self._current, first, count
        if key not in self._bound:
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

    def _array(self, shape: tuple[int, ...], kind: Any) -> Any:
        """Memory of zeros."""
        return np.zeros(shape, kind)

    def _arrays(self, current: int, first: int, count: int) -> dict[str, Any]:
        """The memory of a slice by the graph's names, the state in the one or the other array."""
        arrays = {name: array[first : first + count] for name, array in self._whole.items()}
        if current:
            arrays["state"], arrays["next_state"] = arrays["next_state"], arrays["state"]
        return arrays

    def _bind(self, guided: bool, current: int, first: int, count: int) -> Callable[[], object]:
        """What runs a graph on a slice of this memory."""
        raise NotImplementedError

    def _said(self, error: Exception) -> str:
        """The library's message."""
        return str(error)


class Backend(Protocol):
    """A bundle loaded in one precision. Buffers may be used from one thread at a time; different
    buffers from different threads at once."""

    name: str
    precision: str

    def bind(self, batch: int) -> Buffers: ...


class Rows(NamedTuple):
    """Whole programs of one batch: B samples, K rows, of which samples whose program is shorter end
    with identity rows."""

    x: Float32  # [B, *S] before the first row
    label: NDArray[np.int64]  # [B]
    call: Float32  # [K, B, 6]
    update: Float32  # [K, B, R, R+2]
    guided: NDArray[np.bool_]  # [K]: whether the row runs with the null label's half
    noisy: NDArray[np.bool_]  # [K]: whether the row takes noise
    draw: Callable[
        [int, Float32], None
    ]  # fills [B, *S] with a row's noise, zero where a sample takes none


class Timing(NamedTuple):
    """How the loop of one batch ran on a device."""

    batch: int
    bucket: int  # samples that ran, the padding among them
    rows: int
    how: str  # "one graph", "3 graphs", "plain enqueues"
    note: str  # why nothing was captured; "" where it was
    captured: bool  # in this call; False where an earlier call's graph was launched again
    device_ms: float  # on the device, from the first row to the last, waiting for noise included
    device_bytes: int  # held by the backend by now


@runtime_checkable
class WholeLoop(Protocol):
    """A backend that runs whole programs by itself, with the state on the device, where nobody
    looks at the steps."""

    name: str
    precision: str
    largest: int | None
    """Samples of the largest batch; None: any."""

    def bind(self, batch: int) -> Buffers: ...

    def run_rows(self, rows: Rows) -> tuple[Float32, Timing]:
        """x [B, *S] after the last row, and how it ran."""
        ...

    def close(self) -> None:
        """Give back the device's memory; the backend is of no use after that. Twice is no error."""
        ...


class BufferPool:
    """Lends buffers with room for a batch, one borrower at a time, and keeps them for the next.

    Buffers serve any smaller batch, so that memory grows with the largest batch alone.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = Lock()
        self._free: list[tuple[int, Buffers]] = []

    @contextmanager
    def lend(self, batch: int) -> Iterator[Buffers]:
        """Buffers of at least this many samples."""
        with self._lock:
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
        """Drop the buffers that nobody borrows."""
        with self._lock:
            self._free.clear()


def missing(library: str, extra: str, error: Any) -> BackendError:
    """The error for an inference library that cannot be imported."""
    return BackendError(
        f"{library} cannot be imported ({error}). Install it: pip install 'unnoise[{extra}]'."
    )
