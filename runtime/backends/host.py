"""Buffers as numpy arrays, whose slices are bound to the graphs of an inference library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..bundle.bundle import Bundle
from ..diffusion.arrays import Array, Float32, Int64
from ..errors import BundleError, UnnoiseError
from .forks import ForkGuard
from .ports import dtype_of, shapes

BINDINGS = 256
"""The number of bindings that are kept."""


@dataclass(frozen=True, slots=True)
class Call:
    """A network call on a slice of the samples.

    Attributes:
        guided: Whether it runs the guided graph.
        current: Which of the two arrays of the state is its input.
        first, count: The samples.
        streams: Into how many parts it is cut; or, for a part, how many run at once.
    """

    guided: bool
    current: int
    first: int
    count: int
    streams: int


class HostBuffers:
    """Buffers as numpy arrays.

    Slices of one allocation are bound, once for each graph, slice and direction. The two `state`
    arrays are input and output in turn.

    spare: Samples of room beyond the batch.
    """

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
        self._bound: dict[Call, Callable[[], object]] = {}
        self._bindings = BINDINGS

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
        call = Call(guided, self._current, first, count, self.streams(guided, count))
        try:
            if call not in self._bound:
                self._make_room()
                self._bound[call] = self._bind(call)
            self._bound[call]()
        except UnnoiseError:
            raise
        except Exception as error:  # inference libraries' own errors share no base class
            raise BundleError(
                f"{self._bundle.path}: {self._guard.name} failed on a batch of {count}: "
                f"{self._said(error)}. Fetch or export the bundle again. If the bundle is intact, "
                "the batch may be too large for this machine's memory: pass a smaller max_batch."
            ) from error

    def _make_room(self) -> None:
        """Drop the oldest binding if there is no room for another one."""
        # Samples that join and leave make ever new slices.
        if len(self._bound) >= self._bindings:
            oldest = next(iter(self._bound))
            del self._bound[oldest]
            # Its twin in the other direction goes too, and with both what only they hold.
            self._bound.pop(replace(oldest, current=1 - oldest.current), None)

    def streams(self, guided: bool, count: int) -> int:
        """Return into how many parts a call is cut: one, unless a backend overrides this."""
        return 1

    def _arrays(self, call: Call) -> dict[str, Array]:
        """The memory of a call's slice by the graph's names."""
        part = slice(call.first, call.first + call.count)
        arrays = {name: array[part] for name, array in self._whole.items()}
        if call.current:
            arrays["state"], arrays["next_state"] = arrays["next_state"], arrays["state"]
        return arrays

    def _bind(self, call: Call) -> Callable[[], object]:
        """Return the function that runs a graph on a slice of this memory."""
        raise NotImplementedError

    def _said(self, error: Exception) -> str:
        """The library's message."""
        return str(error)
