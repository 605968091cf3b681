"""Which backend and precision samples a bundle fastest on this machine: `backend="fastest"`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..backends import cache
from ..backends.base import Backend
from ..backends.registry import BACKENDS, check_precision, offered, open_backend
from ..bundle.bundle import Bundle
from ..errors import BackendError, RequestError
from .costs import FORMAT, Costs, graphs_here
from .probe import Clock

LIMIT_S = 2.0
"""Seconds for all pairs. One that would not be done by then is left out; the first never is. The
next process measures those that were left out, so after some of them all are measured."""
PAIR_S = 0.1
"""Seconds for the calls of one pair."""


@dataclass(frozen=True)
class Choice:
    """A pair of a backend and a precision, and what it was chosen from.

    Attributes:
        backend, precision: The chosen pair.
        ms: Milliseconds of a network call of one sample, by "backend precision".
        left_out: Why a pair was not measured, by "backend precision".
        settled: Whether every pair was measured, and twice alike. If not, the choice is not kept.
    """

    backend: str
    precision: str
    ms: Mapping[str, float]
    left_out: Mapping[str, str]
    settled: bool = True

    def __str__(self) -> str:
        times = ", ".join(f"{pair} {ms:.1f} ms" for pair, ms in self.ms.items())
        left = "".join(f"; left out: {pair}, {why}" for pair, why in self.left_out.items())
        return f"fastest: {self.backend} {self.precision} ({times}{left})"


@dataclass(frozen=True)
class Wish:
    """What is asked of the fastest pair.

    Attributes:
        precision: Of the pair; "auto" allows all that are near enough.
        min_psnr: The least PSNR in dB of its images compared with fp32's, by the bundle's report.
            None allows fp32 alone, unless `precision` names another.
        threads, streams: As for `open_backend`.
    """

    precision: str = "auto"
    min_psnr: float | None = None
    threads: int | None = None
    streams: int | None = None


def fastest(bundle: Bundle, wish: Wish, clock: Clock = time.perf_counter) -> tuple[Choice, Backend]:
    """Open the fastest pair that was proved when the bundle was exported: from the cache, or
    measured.

    GPU backends are left out, because opening one may take minutes.

    Raises:
        RequestError: No pair meets the wish.
        BackendError: This machine can run none of them.
    """
    pairs = proved(bundle, wish)
    name = cache.key("fastest", FORMAT, _depends(bundle, pairs), asdict(wish))
    choice = _read(name, pairs)
    opened: dict[tuple[str, str], Backend] = {}
    if choice is None:
        choice = _measured(bundle, pairs, wish, opened, clock)
        if choice.settled:
            cache.store(name, [json.dumps(asdict(choice)).encode()])
    backend = opened.get((choice.backend, choice.precision)) or open_backend(
        bundle, choice.backend, choice.precision, wish.threads, wish.streams
    )
    return choice, backend


def proved(bundle: Bundle, wish: Wish) -> list[tuple[str, str]]:
    """List the pairs that meet a wish by the bundle's report, the most promising first.

    Raises:
        RequestError: There are none, or the precision is unknown.
    """
    check_precision(bundle, wish.precision)
    found: list[tuple[float, tuple[str, str]]] = []
    for backend, precision in offered(bundle):
        figures: Any = bundle.report.get(precision, {}).get(backend)
        # An export that did not check a pair reports no figures for it.
        if BACKENDS[backend].gpu or not figures or not _near(precision, figures, wish):
            continue
        times = figures.get("ms_a_call", {}).values()
        found.append((min(times, default=0.0), (backend, precision)))
    if not found:
        near = "" if wish.min_psnr is None else f" with a PSNR of {wish.min_psnr:g} dB or more"
        remedy = "another precision" if wish.min_psnr is None else "a smaller min_psnr"
        raise RequestError(
            f"no pair of a backend and a precision ({wish.precision}) of {bundle.name} was "
            f"proved{near}. Pass {remedy}, or a backend by name."
        )
    return [pair for _, pair in sorted(found)]


def _near(precision: str, figures: Mapping[str, Any], wish: Wish) -> bool:
    """Whether a precision is one that is wished for, and its images near enough to fp32's."""
    if wish.precision == "auto" and wish.min_psnr is None:
        return precision == "fp32"
    if wish.precision not in ("auto", precision):
        return False
    return wish.min_psnr is None or figures.get("psnr_db", 0.0) >= wish.min_psnr


def _measured(
    bundle: Bundle,
    pairs: list[tuple[str, str]],
    wish: Wish,
    opened: dict[tuple[str, str], Backend],
    clock: Clock,
) -> Choice:
    """Time a lone sample on each pair, and keep the open backends in `opened`."""
    from_before = {pair: _kept_ms(_entry(bundle, pair, wish)) for pair in pairs}
    begun = clock()
    ms: dict[str, float] = {}
    left_out: dict[str, str] = {}
    settled = True
    longest = 0.0
    for pair in pairs:
        name = " ".join(pair)
        if kept := from_before[pair]:
            ms[name] = kept
            continue
        started = clock()
        if opened and started + longest - begun > LIMIT_S:
            left_out[name] = f"after {LIMIT_S:g} s"
            settled = False  # the next process takes up here, as the times of the others are kept
            continue
        try:
            backend = open_backend(bundle, *pair, wish.threads, wish.streams)
        except BackendError as error:
            left_out[name] = str(error).partition(":")[0]
            continue
        point = Costs(bundle, backend, clock).lone(PAIR_S)
        opened[pair] = backend
        ms[name] = 1e3 * point.seconds
        settled &= point.settled
        if point.settled:
            cache.store(_entry(bundle, pair, wish), [json.dumps(ms[name]).encode()])
        longest = max(longest, clock() - started)
    if not ms:
        whys = "; ".join(f"{pair}: {why}" for pair, why in left_out.items())
        raise BackendError(f"this machine runs none of the proved pairs of {bundle.name}: {whys}.")
    timed = [pair for pair in pairs if " ".join(pair) in ms]
    backend_name, precision = min(timed, key=lambda pair: ms[" ".join(pair)])
    return Choice(backend_name, precision, ms, left_out, settled)


def _entry(bundle: Bundle, pair: tuple[str, str], wish: Wish) -> str:
    """The name of the cached time of a pair."""
    given = wish.threads, wish.streams
    return cache.key("fastest ms", FORMAT, _depends(bundle, [pair]), given)


def _kept_ms(name: str) -> float:
    """The cached time of a pair; 0 if there is none."""
    parts = cache.load(name)
    try:
        ms = float(json.loads(parts[0].tobytes())) if parts else 0.0
    except (ValueError, TypeError):
        return 0.0
    return ms if 0 < ms < float("inf") else 0.0


def _read(name: str, pairs: list[tuple[str, str]]) -> Choice | None:
    """The cached choice; None if there is none, or it is not one of the pairs."""
    parts = cache.load(name)
    if parts is None:
        return None
    try:
        value = json.loads(parts[0].tobytes())
        ms = {str(pair): float(time) for pair, time in value["ms"].items()}
        left_out = {str(pair): str(why) for pair, why in value["left_out"].items()}
        choice = Choice(value["backend"], value["precision"], ms, left_out)
        if (choice.backend, choice.precision) in pairs:
            return choice
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    cache.forget(name)
    return None


def _depends(bundle: Bundle, pairs: list[tuple[str, str]]) -> tuple[object, ...]:
    """What the answer depends on, of which nothing needs an inference library to be imported."""
    modules = sorted({BACKENDS[backend].module for backend, _ in pairs})
    return *graphs_here(bundle), pairs, [_version(m) for m in modules]


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return ""
