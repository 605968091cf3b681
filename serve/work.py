"""Work before and after it runs: requests that are checked, and results that are kept."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime import Overloaded, Request, ResolvedRequest

from . import limits
from .models import Model
from .problems import to_bytes
from .settings import Settings

Float32 = NDArray[np.float32]
HOLD_S = 0.25
"""Seconds that a refusal holds without asking the engine again, at most."""
MOST_FLOWS = 10_000


@dataclass(frozen=True)
class Work:
    """Requests that are checked and ready to run.

    Attributes:
        requests: As they are submitted.
        resolved: The same with every default filled in.
        rows: A bound of their network rows.
        key: Equal for requests with equal results.
    """

    model: Model
    requests: list[Request]
    resolved: list[ResolvedRequest]
    rows: int
    key: str


def prepare(model: Model, requests: Sequence[Request], settings: Settings) -> Work:
    """Check requests and name their result. Raises RequestError, see `limits.checked`."""
    resolved, rows = limits.checked(model.bundle, requests, settings)
    digest = hashlib.sha256(model.fingerprint.encode())
    for entry in resolved:
        digest.update(to_bytes(entry.to_json()))
        known = entry.known or ()
        # Arrays are not in the JSON, and None is unlike any array.
        for part in (entry.start, entry.picture, *known):
            digest.update(b"none" if part is None else np.ascontiguousarray(part).tobytes())
    return Work(model, list(requests), resolved, rows, digest.hexdigest())


class Results:
    """The newest results by key, at most so many bytes of them."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._held = 0
        self._samples: OrderedDict[str, Float32] = OrderedDict()

    def get(self, key: str) -> Float32 | None:
        """Return samples, float32 [n, *S], or None."""
        if key in self._samples:
            self._samples.move_to_end(key)
        return self._samples.get(key)

    def put(self, key: str, samples: Float32) -> None:
        """Keep samples, float32 [n, *S]; the oldest ones go."""
        # One result must not push out all others for nothing.
        if samples.nbytes > self._most or key in self._samples:
            return
        self._samples[key] = samples
        self._held += samples.nbytes
        while self._held > self._most:
            _, oldest = self._samples.popitem(last=False)
            self._held -= oldest.nbytes


class Refusals:
    """The newest refusal of each user. The engine's prediction says how long it holds, so most
    requests of an overload are refused without planning them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._newest: dict[tuple[str, str], tuple[float, int, Overloaded]] = {}

    def note(self, work: Work, flow: str, error: Overloaded) -> None:
        """Remember that the engine refused work of a user."""
        if len(self._newest) >= MOST_FLOWS:
            self._newest.clear()
        self._newest[work.model.name, flow] = (self._clock(), work.rows, error)

    def forget(self, model: str) -> None:
        """Forget the refusals of a model: cancelled work made room earlier than predicted."""
        self._newest = {key: value for key, value in self._newest.items() if key[0] != model}

    def check(self, work: Work, flow: str) -> None:
        """Raises Overloaded if work of the user that was no larger was refused a moment ago."""
        noted, rows, error = self._newest.get((work.model.name, flow), (0.0, 0, None))
        passed = self._clock() - noted
        # The engine may be faster than it predicted: so it holds for a moment only.
        if error is None or work.rows < rows or passed >= min(HOLD_S, error.retry_after):
            return
        raise Overloaded(str(error), error.retry_after - passed)
