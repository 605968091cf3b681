"""The manifest of a folder of shards: what is made, with what, and in the end every shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import RequestError
from ..errors.messages import shown_path
from ..files import from_json, to_json
from .drafts import write_text
from .environment import Environment, differences
from .plan import Series
from .records import Record
from .settings import Settings

VERSION = 1
"""The version of the manifest that is written and read."""


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        bundle: Its name and the sha256 of its content.
        plan: As JSON.
        sampling: How the first sample is made, with the bundle's defaults filled in.
        environment: That in which the samples were begun.
    """

    bundle: Mapping[str, str]
    plan: Mapping[str, object]
    sampling: Mapping[str, object]
    n: int
    shard: int
    format: str
    environment: Environment

    @classmethod
    def of(cls, settings: Settings, series: Series, environment: Environment) -> Manifest:
        """Return the manifest of a run."""
        try:
            plan = from_json(to_json(settings.plan.to_json()))
            # As read back from JSON, which has no tuples.
            sampling = from_json(to_json(series.resolved[0].options.to_json()))
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"the plan cannot be written as JSON ({error}). Use finite Python numbers, strings "
                "and tuples."
            ) from error
        return cls(
            bundle={"name": settings.bundle.name, "sha256": settings.bundle.sha256},
            plan=plan,
            sampling=sampling,
            n=settings.n,
            shard=settings.shard,
            format=settings.format,
            environment=environment,
        )

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """Read a manifest; None if there is none.

        Raises:
            RequestError: It is damaged, or of another version.
        """
        try:
            value = from_json(path.read_bytes())
            if value.pop("version") != VERSION:
                raise ValueError("its version is unknown")
            for name in ("complete", "bytes", "environments", "shards"):
                value.pop(name, None)
            found = cls(**value)
            if type(found.n) is not int or not isinstance(found.environment, Mapping):
                raise ValueError("a field has another type")
            return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(
                f"{shown_path(path)} is not a manifest of generate ({error}). "
                "Choose another folder, or remove it."
            ) from error

    def write(self, path: Path, records: Sequence[Record] | None = None) -> None:
        """Write the manifest, or replace it.

        Args:
            records: Of all shards in order, if everything is complete.
        """
        value: dict[str, object] = {"version": VERSION, **asdict(self)}
        value["complete"] = records is not None
        if records is not None:
            value.update(_listed(records))
        write_text(path, to_json(value))

    def check(self, now: Manifest, other_versions: bool) -> None:
        """Check that a run continues what this manifest describes.

        Raises:
            RequestError: It would make other samples, fewer, or the same in another environment.
        """
        for name in ("bundle", "plan", "sampling", "shard", "format"):
            before = getattr(self, name)
            if before != getattr(now, name):
                raise RequestError(
                    f"the folder holds samples with another {name}: {to_json(before).strip()}. "
                    "Choose another folder, or pass what it was begun with."
                )
        if now.n < self.n:
            raise RequestError(
                f"the folder holds {self.n} samples, and a run can only add to them, got n = "
                f"{now.n}. Pass at least {self.n}, or choose another folder."
            )
        different = differences(now.environment, self.environment)
        if different and not other_versions:
            raise RequestError(
                f"the samples of the folder were begun with {', '.join(different)}: the bytes of "
                "a sample may depend on it. Use the same, or pass --other-versions."
            )


def _listed(records: Sequence[Record]) -> dict[str, object]:
    """Return the shards as JSON, with every environment once."""
    environments: list[Environment] = []
    shards: list[dict[str, object]] = []
    for record in records:
        if record.environment not in environments:
            environments.append(record.environment)
        value = asdict(record)
        value["environment"] = environments.index(record.environment)
        shards.append(value)
    total = sum(record.bytes for record in records)
    return {"bytes": total, "environments": environments, "shards": shards}
