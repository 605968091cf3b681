"""The bundle: a folder that `export` writes and `runtime` reads. Nothing in it can run code.

Every file is read once, checked against the size and sha256 in bundle.json, and handed on as bytes,
so that no path inside a file is ever followed. Hashes find corruption; they do not stop an author
who means harm, who can write matching ones.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .arguments import (
    check_options,
    choice,
    flag,
    integer,
    number,
    path_of,
    refused,
    shown,
    shown_path,
    unwrapped,
)
from .diffusion.grid import Grid, make_grid, spacing_of
from .diffusion.program import PREDICTIONS, Program
from .diffusion.schedule import Schedule
from .diffusion.solvers import SOLVERS, make_program, options_of
from .diffusion.tuned import TUNED, Tuned
from .errors import BundleError, RequestError, UnnoiseError
from .files import from_json, to_json

FORMAT = 1
"""The format that this version writes and the newest that it reads."""
MANIFEST = "bundle.json"
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class Defaults:
    """How a bundle is sampled when the caller does not say."""

    solver: str = "ddim"
    steps: int = 50
    grid: str = "trailing"
    guidance: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Labels:
    """The classes by name, in the network's order, and whether the null label, number len(names),
    was trained."""

    names: tuple[str, ...]
    null_trained: bool


@dataclass(frozen=True)
class File:
    sha256: str
    size: int


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle on disk, its bundle.json checked. `sample_shape` is *S, without the batch; `clip`
    bounds |D|, None for no bound.

    tuned: the solvers fitted to its network, by their number of calls. same_bytes: whether a sample
    has the same bytes in any batch; bundles exported with --no-same-bytes may say that it has not.
    """

    path: Path
    name: str
    sample_shape: tuple[int, ...]
    sample_range: tuple[float, float]
    prediction: str
    schedule: Schedule
    clip: float | None
    labels: Labels | None
    defaults: Defaults
    files: Mapping[str, File]
    provenance: Mapping[str, Any]
    report: Mapping[str, Mapping[str, Mapping[str, Any]]]  # by precision and backend
    tuned: Mapping[int, Tuned] = field(default_factory=lambda: MappingProxyType({}))
    same_bytes: bool = True

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Read and check the folder's bundle.json; the other files are checked when they are read.

        Raises RequestError if `path` is no path. Raises BundleError: no folder, no bundle.json,
        not JSON, a newer format, or values that are missing or make no sense (all of them named).
        """
        path = path_of("path", path)
        manifest = path / MANIFEST
        if not _is_folder(path):
            raise BundleError(
                f"{shown_path(path)} is not a folder. "
                f"A bundle is a folder with a {MANIFEST}, made by python -m export.build."
            )
        try:
            value = from_json(manifest.read_bytes())
        except FileNotFoundError:
            raise BundleError(
                f"{path} has no {MANIFEST}, so it is no bundle. python -m export.build makes one."
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{manifest} cannot be read as JSON ({error}). Fetch or export the bundle again."
            ) from error
        found = cls(path=path, **_Reader(manifest, value).fields())
        try:
            found.program()
        except (RequestError, TypeError) as error:
            raise BundleError(
                f"{manifest}: its 'defaults' cannot be sampled with: {error} Fetch or export the "
                f"bundle again."
            ) from error
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the absolute path and the text of bundle.json, which unpickling checks again."""
        return _restored, (str(self.path.absolute()), to_json(self.to_json()))

    def __copy__(self) -> Bundle:
        return self

    def __deepcopy__(self, _: object) -> Bundle:
        return self

    def to_json(self) -> dict[str, Any]:
        """The value of bundle.json."""
        return {
            "format": FORMAT,
            "name": self.name,
            "sample": {
                "shape": list(self.sample_shape),
                "range": list(self.sample_range),
                "layout": _layout(self.sample_shape),
            },
            "prediction": self.prediction,
            "clip": self.clip,
            "labels": None
            if self.labels is None
            else {"names": list(self.labels.names), "null_trained": self.labels.null_trained},
            "defaults": {**vars(self.defaults), "options": dict(self.defaults.options)},
            **(
                {"tuned": {str(K): found.to_json() for K, found in sorted(self.tuned.items())}}
                if self.tuned
                else {}
            ),
            "same_bytes": self.same_bytes,
            "report": dict(self.report),
            "provenance": dict(self.provenance),
            "files": {name: vars(file) for name, file in sorted(self.files.items())},
            "schedule": self.schedule.to_json(),
        }

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for none. Also the number of the null label."""
        return len(self.labels.names) if self.labels else 0

    @property
    def can_guide(self) -> bool:
        """Whether guidance has something to guide away from: labels, and a null label that was
        trained."""
        return self.labels is not None and self.labels.null_trained

    @cached_property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that have a step graph, fp32 first."""
        found = {name.split("/")[0] for name in self.files if name.endswith("/step.onnx")}
        return tuple(sorted(found, key=lambda p: (p != "fp32", p)))

    def read(self, name: str) -> bytes:
        """The bytes of a file that bundle.json lists, whole and unchanged. Raises BundleError
        otherwise."""
        if not isinstance(name, str) or name not in self.files:
            raise BundleError(
                f"{self.path / MANIFEST} lists no file {shown(name)}. It lists: "
                f"{', '.join(sorted(self.files)) or 'none'}."
            )
        path, expected = self.path / name, self.files[name]
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise BundleError(
                f"{path} leads out of the bundle's folder, which a bundle may not do. Do not use "
                f"it."
            )
        again = "Fetch or export the bundle again."
        try:
            size = path.stat().st_size
            if size != expected.size:
                raise BundleError(f"{path} has {size} bytes, {expected.size} expected. {again}")
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(
                f"{path} cannot be read: {error.strerror or error}. {again}"
            ) from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected.sha256:
            raise BundleError(
                f"{path} has sha256 {digest}, {expected.sha256} expected: it was changed or "
                f"damaged. {again}"
            )
        return data

    def label_number(self, label: int | str | None) -> int:
        """The number of a label given by name or number; None is the null label. Raises
        RequestError where there is no such label."""
        label = unwrapped(label)
        if self.labels is None:
            if label is not None:
                raise RequestError(
                    f"{self.name} has no labels, got label={shown(label)}. Leave `label` out."
                )
            return 0
        names, count = self.labels.names, self.num_classes
        if label is None:
            if not self.labels.null_trained:
                raise RequestError(
                    f"{self.name} was trained with labels only: give one of {', '.join(names)}."
                )
            return count
        if isinstance(label, str):
            if label in names:
                return names.index(label)
            if not re.fullmatch("-?[0-9]{1,18}", label):
                choice("label", label, names)  # raises, with the nearest name
            label = int(label)
        try:
            return integer("label", label, 0, count - 1)
        except RequestError:
            pass
        if isinstance(label, int) and not isinstance(label, bool):
            raise RequestError(
                f"label {shown(label)} is out of range: "
                f"{self.name} has labels 0 to {count - 1} ({names[0]} … {names[-1]})."
            )
        raise refused("label", f"a name or a number from 0 to {count - 1}", label)

    @property
    def solvers(self) -> list[str]:
        """The names of the solvers that `program` takes."""
        return [*SOLVERS, TUNED]

    def check_options(
        self, solver: str | None, options: Mapping[Any, Any], arguments: Iterable[str]
    ) -> None:
        """Raises RequestError for an option that the solver does not take, with the nearest name.

        solver: None is the bundle's default. arguments: what the caller's function takes by name
        beside options: a misspelled option may have meant one of these.
        """
        if not options:
            return
        name = self.defaults.solver if solver is None else choice("solver", solver, self.solvers)
        if name == TUNED:
            mistaken = [option for option in options if get_close_matches(str(option), arguments)]
            check_options(f"solver {name!r}", dict.fromkeys(mistaken), [], arguments)
        else:
            check_options(f"solver {name!r}", options, options_of(name), arguments)

    def grid(self, steps: int | None = None, grid: str | Sequence[float] | None = None) -> Grid:
        """The grid of the bundle's schedule; what is None takes the bundle's default. Raises
        RequestError, see `make_grid`."""
        spacing = spacing_of(self.defaults.grid if grid is None else grid)
        if steps is None and isinstance(spacing, str):
            steps = min(self.defaults.steps, len(self.schedule))
        return make_grid(self.schedule, spacing, steps)

    def program(
        self,
        solver: str | None = None,
        steps: int | None = None,
        grid: str | Sequence[float] | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        strength: float = 1.0,
        up: bool = False,
        **options: Any,
    ) -> Program:
        """The program for this bundle's network; what is None takes the bundle's default.

        strength: the share of the grid, from its clean end, that is walked. up: walk it upward,
        unclipped (inversion). Raises RequestError, see `make_program`.
        """
        if solver is None:
            solver = self.defaults.solver
            options = {**self.defaults.options, **options}
        solver = choice("solver", solver, self.solvers)
        self.check_options(solver, options, ARGUMENTS)
        up = flag("up", up)
        strength = number("strength", strength, 0.0, 1.0)
        how: dict[str, Any] = {"guidance": guidance, "guidance_interval": guidance_interval}
        if solver == TUNED:
            asked = {"a grid": grid is not None, "strength": strength != 1, "a way up": up}
            found = _tuned_for(
                self, steps, [name for name, given in asked.items() if given] + list(options)
            )
            return found.program(self.schedule, self.prediction, clip=self.clip, **how)
        way = self.grid(steps, grid).tail(strength)
        return make_program(
            self.schedule,
            self.prediction,
            solver,
            grid=way.climbing() if up else way,
            clip=None if up else self.clip,
            **how,
            **options,
        )


ARGUMENTS = ("solver", "steps", "grid", "guidance", "guidance_interval", "strength", "up")
"""What `Bundle.program` takes beside a solver's own options."""


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long, or a folder above it may not be read
        return False


def _restored(path: str, text: str) -> Bundle:
    """The bundle that `Bundle.__reduce__` pickled. Its files are compared with the hashes when
    read."""
    folder = Path(path)
    return Bundle(path=folder, **_Reader(folder / MANIFEST, from_json(text)).fields())


def _layout(shape: Sequence[int]) -> str:
    return {1: "L", 2: "CL", 3: "CHW"}.get(len(shape), "")


def _tuned_for(bundle: Bundle, steps: int | None, asked: Sequence[str]) -> Tuned:
    """The solver fitted for `steps` calls; None: for the bundle's default number where there is
    one, else for the most.

    asked: what the caller asked for that a tuned solver cannot do. Raises RequestError for any, and
    where no solver was fitted for so many.
    """
    if asked:
        raise RequestError(
            f"solver {TUNED!r} walks its own levels, from pure noise down, and takes no options, "
            f"found {', '.join(str(name)[:60] for name in asked)}: leave it out, or use another "
            f"solver."
        )
    if not bundle.tuned:
        raise RequestError(
            f"{bundle.name} carries no tuned solver. One is fitted to it by: python -m "
            f"export.tune {bundle.path}"
        )
    if steps is None:
        steps = (
            bundle.defaults.steps if bundle.defaults.steps in bundle.tuned else max(bundle.tuned)
        )
    known = sorted(bundle.tuned)
    fitted = ", ".join(map(str, known))
    count = integer("steps", steps, 1, None, f"Pass one of {fitted}.")
    if count not in bundle.tuned:
        raise RequestError(
            f"solver {TUNED!r} of {bundle.name} was fitted for steps of {fitted}, found "
            f"steps={shown(steps)}."
        )
    return bundle.tuned[count]


class _Reader:
    """Checks a bundle.json value field by field, and reports every fault at once."""

    def __init__(self, manifest: Path, value: Any) -> None:
        self.manifest, self.faults = manifest, []
        self.value: Mapping[str, Any] = value if isinstance(value, dict) else {}
        found = self.value.get("format")
        if isinstance(found, int) and found > FORMAT:
            raise BundleError(
                f"{manifest} has format {found}, newer than {FORMAT}, which this version reads. "
                f"Upgrade: pip install -U unnoise."
            )
        if found != FORMAT or isinstance(found, bool):
            raise BundleError(
                f"{manifest} is not a bundle's: format is {found!r}, {FORMAT} expected."
            )

    def fields(self) -> dict[str, Any]:
        found = {
            "name": self.take("name", str, bool),
            "sample_shape": self.shape(),
            "sample_range": self.range(),
            "prediction": self.take(
                "prediction", str, lambda v: v in PREDICTIONS, f"one of {', '.join(PREDICTIONS)}"
            ),
            "schedule": self.schedule(),
            "clip": self.take(
                "clip",
                (int, float, type(None)),
                lambda v: v is None or (_real(v) and v > 0),
                "a number above 0, or null",
            ),
            "labels": self.labels(),
            "defaults": self.defaults(),
            "files": self.files(),
            "provenance": self.take("provenance", dict),
            "report": self.take("report", dict, _is_report, "figures by precision and backend"),
            "tuned": {},
            "same_bytes": "same_bytes" not in self.value or self.take("same_bytes", bool),
        }
        if not self.faults:
            found["tuned"] = self.tuned(found["schedule"], found["prediction"], found["clip"])
        if self.faults:
            raise BundleError(
                f"{self.manifest} is damaged: {'; '.join(self.faults)}. Fetch or export the "
                f"bundle again."
            )
        return found

    def take(
        self,
        name: str,
        kind: Any,
        check: Callable[[Any], bool] = lambda _: True,
        expected: str = "",
        within: Any = None,
    ) -> Any:
        where = self.value if within is None else within
        if not isinstance(where, dict) or name not in where:
            self.faults.append(f"{name!r} is missing")
            return None
        value = where[name]
        wrong_bool = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or wrong_bool or not check(value):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = expected or " or ".join(
                "null" if k is type(None) else k.__name__ for k in kinds
            )
            self.faults.append(f"{name!r} is {_short(value)}, {expected} expected")
            return None
        return value

    def shape(self) -> tuple[int, ...]:
        def fits(v: Any) -> bool:
            return (
                0 < len(v) <= 4
                and all(type(i) is int and 0 < i <= 65536 for i in v)
                and math.prod(v) <= 2**28
            )

        return tuple(
            self.take("shape", list, fits, "1 to 4 positive integers", self.value.get("sample"))
            or ()
        )

    def range(self) -> tuple[float, ...]:
        ok = lambda v: len(v) == 2 and all(_real(i) for i in v) and v[0] < v[1]  # noqa: E731
        return tuple(
            self.take("range", list, ok, "two rising numbers", self.value.get("sample")) or ()
        )

    def schedule(self) -> Schedule | None:
        value = self.take("schedule", dict)
        try:
            return value and Schedule.from_json(value)
        except (
            UnnoiseError,
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            MemoryError,
        ) as error:
            self.faults.append(f"'schedule' is not one ({_short(str(error), 200)})")
            return None

    def labels(self) -> Labels | None:
        value = self.take("labels", (dict, type(None)))
        if value is None:
            return None
        names = self.take(
            "names",
            list,
            lambda v: 0 < len(v) == len(set(map(str, v))) and all(isinstance(n, str) for n in v),
            "different names",
            value,
        )
        return Labels(tuple(names or ()), self.take("null_trained", bool, within=value))

    def defaults(self) -> Defaults:
        value = self.take("defaults", dict)
        T = 1_000_000
        return Defaults(
            self.take("solver", str, within=value),
            self.take("steps", int, lambda v: 1 <= v <= T, "a positive integer", value),
            self.take("grid", str, within=value),
            self.take("guidance", (int, float), _real, "a number", value),
            self.take("options", dict, within=value),
        )

    def tuned(self, schedule: Schedule, prediction: str, clip: float | None) -> Mapping[int, Tuned]:
        """The fitted solvers, where there are any, each put through its program's proof."""
        found, value = {}, self.take("tuned", dict) if "tuned" in self.value else None
        for calls, entry in (value or {}).items():
            try:
                one = Tuned.from_json(calls, entry)
                one.program(schedule, prediction, clip=clip)
                found[len(one)] = one
            except UnnoiseError as error:
                self.faults.append(
                    f"tuned solver {_short(calls)!r} is none ({_short(str(error), 200)})"
                )
        return MappingProxyType(found)

    def files(self) -> dict[str, File]:
        found = {}
        for name, entry in (self.take("files", dict) or {}).items():
            if not _PATH.fullmatch(name):
                self.faults.append(f"file {name!r} is not a plain path inside the bundle")
                continue
            sha256 = self.take(
                "sha256",
                str,
                lambda v: re.fullmatch("[0-9a-f]{64}", v) is not None,
                "64 hexadecimal digits",
                entry,
            )
            found[name] = File(
                sha256, self.take("size", int, lambda v: 0 <= v < 2**40, "a size in bytes", entry)
            )
        if "fp32/step.onnx" not in found:
            self.faults.append("no file 'fp32/step.onnx', which every bundle has")
        return found


def _is_report(value: Mapping[str, Any]) -> bool:
    """Whether this is {precision: {backend: {what: number, or numbers by name}}}."""
    entries = [
        entry
        for backends in value.values()
        for entry in (backends.values() if isinstance(backends, dict) else [None])
    ]
    found = [
        v for entry in entries for v in (entry.values() if isinstance(entry, dict) else [None])
    ]
    return all(
        _real(number) for v in found for number in (v.values() if isinstance(v, dict) else [v])
    )


def _real(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def _short(value: Any, length: int = 60) -> str:
    text = value if isinstance(value, str) and length > 60 else repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
