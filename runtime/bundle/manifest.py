"""bundle.json: its value as a dataclass; reading it checks every field and names every fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..diffusion.program import PREDICTIONS
from ..diffusion.schedule import Schedule
from ..diffusion.tuned import Tuned
from ..errors import BundleError, UnnoiseError
from .conditions import Condition, null_faults, read_conditions
from .distilled import Distilled
from .format import FORMAT, PLAIN, REQUIRED
from .labels import Labels
from .rules import (
    MAX_STEPS,
    are_names,
    is_clip,
    is_finite,
    is_range,
    is_report,
    is_sha256,
    is_shape,
)
from .spec import Defaults, ModelSpec

Figures = Mapping[str, Any]
"""Figures of the proof: numbers, or numbers by name, such as milliseconds by batch size."""
Report = Mapping[str, Mapping[str, Figures]]
"""Figures of the proof, by precision and backend."""
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_AGAIN = "Fetch or export the bundle again."


class File(NamedTuple):
    """The size in bytes and the sha256 of one file, from bundle.json."""

    sha256: str
    size: int


@dataclass(frozen=True, eq=False)
class Manifest:
    """The value of bundle.json.

    Attributes:
        files: By path inside the bundle, with "/" between folders.
        provenance: The model's origin, for the model card.
        same_bytes: Whether a sample has the same bytes in any batch.
    """

    spec: ModelSpec
    files: Mapping[str, File]
    provenance: Mapping[str, object]
    report: Report = field(default_factory=dict)
    same_bytes: bool = True

    def to_json(self) -> dict[str, object]:
        """Return the JSON value."""
        spec = self.spec
        labels = spec.labels
        conditions = [condition.to_json() for condition in spec.conditions]
        tuned = {str(calls): solver.to_json() for calls, solver in sorted(spec.tuned.items())}
        return {
            "format": FORMAT if spec.conditions else PLAIN,
            "name": spec.name,
            "sample": {
                "shape": list(spec.sample_shape),
                "range": list(spec.sample_range),
                "layout": _layout(spec.sample_shape),
            },
            "prediction": spec.prediction,
            "clip": spec.clip,
            "labels": labels and {"names": list(labels.names), "null_trained": labels.null_trained},
            **({"conditions": conditions} if conditions else {}),
            "defaults": {**vars(spec.defaults), "options": dict(spec.defaults.options)},
            **({"tuned": tuned} if tuned else {}),
            **({"distilled": spec.distilled.to_json()} if spec.distilled else {}),
            "same_bytes": self.same_bytes,
            "report": dict(self.report),
            "provenance": dict(self.provenance),
            "files": {name: file._asdict() for name, file in sorted(self.files.items())},
            "schedule": spec.schedule.to_json(),
        }


def read_manifest(path: Path, value: object) -> Manifest:
    """Check the JSON value of a bundle.json.

    Args:
        path: The file, for messages.
        value: What `runtime.files.from_json` returned.

    Raises:
        BundleError: The format is unknown or newer, or fields are missing or invalid. The message
            names every fault.
    """
    return _Reader(path, value).read()


class _Reader:
    """Reads a bundle.json value field by field and collects the faults."""

    def __init__(self, path: Path, value: object) -> None:
        self.path = path
        self.faults: list[str] = []
        self.value: dict[str, object] = value if isinstance(value, dict) else {}
        # Fields of a newer format would be reported as faults, so the version comes first.
        version = self.value.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise BundleError(
                f"{path} has format {version}, newer than {FORMAT}, which this version reads. "
                "Upgrade: pip install -U unnoise."
            )
        if version not in (PLAIN, FORMAT) or type(version) is not int:
            raise BundleError(
                f"{path} is not a bundle's: format is {version!r}, {PLAIN} or {FORMAT} expected."
            )

    def read(self) -> Manifest:
        spec = ModelSpec(
            name=self.take("name", str, bool),
            sample_shape=self.shape(),
            sample_range=self.range(),
            prediction=self.take(
                "prediction", str, PREDICTIONS.__contains__, f"one of {', '.join(PREDICTIONS)}"
            ),
            schedule=self.schedule(),
            clip=self.take("clip", (int, float, type(None)), is_clip, "a number above 0, or null"),
            labels=self.labels(),
            conditions=self.conditions(),
            defaults=self.defaults(),
        )
        manifest = Manifest(
            spec,
            files=self.files(),
            provenance=self.take("provenance", dict),
            report=self.report(),
            same_bytes="same_bytes" not in self.value or self.take("same_bytes", bool),
        )
        sizes = {name: file.size for name, file in manifest.files.items()}
        self.faults += null_faults(spec.conditions, sizes)
        # These are proved on the schedule, so they are read only if all else is sound.
        tuned = {} if self.faults else self.tuned(spec)
        distilled = None if self.faults else self.distilled(spec)
        if self.faults:
            raise BundleError(f"{self.path} is damaged: {'; '.join(self.faults)}. {_AGAIN}")
        spec = replace(spec, tuned=MappingProxyType(tuned), distilled=distilled)
        return replace(manifest, spec=spec)

    def take(
        self,
        name: str,
        kind: type | tuple[type, ...],
        check: Callable[[Any], bool] = lambda _: True,
        expected: str = "",
        within: object = None,
    ) -> Any:
        """Return a field, or None with a fault noted.

        Args:
            kind: The type or types that JSON must have here. A bool is not a number.
            check: What else must hold of the value.
            expected: The rule in words; by default the names of the types.
            within: The object that has the field; by default the whole value.
        """
        where = self.value if within is None else within
        if not isinstance(where, dict) or name not in where:
            self.faults.append(f"{name!r} is missing")
            return None
        value = where[name]
        wrong_bool = isinstance(value, bool) and kind is not bool
        if not isinstance(value, kind) or wrong_bool or not check(value):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = ["null" if k is type(None) else k.__name__ for k in kinds]
            self.faults.append(
                f"{name!r} is {_short(value)}, {expected or ' or '.join(names)} expected"
            )
            return None
        return value

    def report(self) -> Report:
        report = self.take("report", dict, is_report, "figures by precision and backend") or {}
        # fp32 on onnxruntime is what every other pair is compared with.
        if report.get("fp32", {}).get("onnxruntime", {}).get("missed"):
            self.faults.append(
                "'report' says that fp32 missed its bounds on onnxruntime, and no bundle is "
                "written then"
            )
        return report

    def shape(self) -> tuple[int, ...]:
        sizes = self.take(
            "shape", list, is_shape, "1 to 4 positive integers", self.value.get("sample")
        )
        return tuple(sizes or ())

    def range(self) -> tuple[float, float]:
        ends = self.take("range", list, is_range, "two rising numbers", self.value.get("sample"))
        low, high = ends or (0.0, 0.0)
        return low, high

    def schedule(self) -> Schedule:
        value = self.take("schedule", dict)
        try:
            return value and Schedule.from_json(value)
        # A schedule is computed from its parameters, which may be any JSON in a damaged bundle.
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
            return None  # type: ignore[return-value]  # never used: there is a fault

    def labels(self) -> Labels | None:
        value = self.take("labels", (dict, type(None)))
        if value is None:
            return None
        names = self.take("names", list, are_names, "different names", value)
        return Labels(tuple(names or ()), self.take("null_trained", bool, within=value))

    def conditions(self) -> tuple[Condition, ...]:
        """Read the conditions, which format 1 does not have."""
        if self.value["format"] == PLAIN:
            return ()
        found, faults = read_conditions(self.take("conditions", list) or ())
        self.faults += faults
        return found

    def defaults(self) -> Defaults:
        value = self.take("defaults", dict)
        return Defaults(
            self.take("solver", str, within=value),
            self.take("steps", int, lambda v: 1 <= v <= MAX_STEPS, "a positive integer", value),
            self.take("grid", str, within=value),
            self.take("guidance", (int, float), is_finite, "a number", value),
            self.take("options", dict, within=value),
        )

    def tuned(self, spec: ModelSpec) -> dict[int, Tuned]:
        """Read the fitted solvers, if any, and prove each one's program."""
        solvers: dict[int, Tuned] = {}
        value = self.take("tuned", dict) if "tuned" in self.value else None
        for calls, entry in (value or {}).items():
            try:
                solver = Tuned.from_json(calls, entry)
                solver.program(spec.schedule, spec.prediction, clip=spec.clip)
                solvers[len(solver)] = solver
            except UnnoiseError as error:
                self.faults.append(
                    f"tuned solver {_short(calls)!r} is none ({_short(str(error), 200)})"
                )
        return solvers

    def distilled(self, spec: ModelSpec) -> Distilled | None:
        """Read what the network was distilled for, if it was."""
        value = self.take("distilled", dict) if "distilled" in self.value else None
        if value is None:
            return None
        try:
            found = Distilled.from_json(value, spec.schedule)
            found.grid(spec.defaults.steps, spec.name)
            return found
        except UnnoiseError as error:
            self.faults.append(f"'distilled' is not valid ({_short(str(error), 200)})")
            return None

    def files(self) -> dict[str, File]:
        files: dict[str, File] = {}
        # Names are confined before anything is opened: no "..", no absolute path, no hidden file.
        for name, entry in (self.take("files", dict) or {}).items():
            if not _PATH.fullmatch(name):
                self.faults.append(f"file {name!r} is not a plain path inside the bundle")
                continue
            sha256 = self.take("sha256", str, is_sha256, "64 hexadecimal digits", entry)
            size = self.take("size", int, lambda v: 0 <= v < 2**40, "a size in bytes", entry)
            files[name] = File(sha256, size)
        if REQUIRED not in files:
            self.faults.append(f"no file {REQUIRED!r}, which every bundle has")
        return files


def _layout(shape: Sequence[int]) -> str:
    return {1: "L", 2: "CL", 3: "CHW"}.get(len(shape), "")


def _short(value: object, length: int = 60) -> str:
    text = value if isinstance(value, str) and length > 60 else repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
