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
LEAST_WAIT_S = 0.01
"""The `retry_after` if the prediction has passed, and the engine is being asked."""
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
        conditions = entry.conditions.values()
        for part in (entry.start, entry.picture, *known, *conditions):
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


@dataclass(slots=True)
class _Refusal:
    """A refusal of the engine.

    Attributes:
        at: When, in seconds of the clock.
        rows: Network rows of the work that was refused.
        asking: Whether work was let through since, to ask the engine again.
    """

    at: float
    rows: int
    error: Overloaded
    asking: bool = False


class Refusals:
    """The newest refusal of each user. The engine's prediction says how long it holds, so most
    requests of an overload are refused without planning them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._newest: dict[tuple[str, str], _Refusal] = {}

    def note(self, work: Work, flow: str, error: Overloaded | None) -> None:
        """Remember what came of submitting work of a user: whether the engine refused it."""
        user = (work.model.name, flow)
        if error is not None:
            if len(self._newest) >= MOST_FLOWS:
                self._newest.clear()
            self._newest[user] = _Refusal(self._clock(), work.rows, error)
        elif user in self._newest and work.rows >= self._newest[user].rows:
            # It was not refused for want of room, so the next one may ask too.
            del self._newest[user]

    def forget(self, model: str) -> None:
        """Forget the refusals of a model: cancelled work made room earlier than predicted."""
        self._newest = {key: value for key, value in self._newest.items() if key[0] != model}

    def check(self, work: Work, flow: str) -> None:
        """Raises Overloaded if work of the user that was no larger was refused a moment ago.

        If this returns, the work must be submitted, and `note` called.
        """
        newest = self._newest.get((work.model.name, flow))
        if newest is None or work.rows < newest.rows:
            return
        left = newest.error.retry_after - (self._clock() - newest.at)
        # The engine may be faster than it predicted: so it holds for a moment only.
        if self._clock() - newest.at >= min(HOLD_S, newest.error.retry_after):
            # One request asks the engine, and the others need not wait for its answer.
            if not newest.asking:
                newest.asking = True
                return
            left = max(left, LEAST_WAIT_S)
        raise Overloaded(str(newest.error), left)
