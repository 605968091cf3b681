"""What a backend is: it runs a bundle's step graph on one inference library, in bound memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from ..diffusion.arrays import Array, Bool, Float32, Int64
from ..errors import BackendError


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
        how: The launches: "one graph", "3 graphs" or "plain enqueues".
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


def missing(library: str, extra: str, error: object) -> BackendError:
    """Make the error for an inference library that cannot be imported."""
    return BackendError(
        f"{library} cannot be imported ({error}). Install it: pip install 'unnoise[{extra}]'."
    )
