"""The bundle: a folder that `export` writes and `runtime` reads. Loading one never executes code.

Every file is read once, compared with the size and sha256 in bundle.json, and passed on as bytes.
No path inside a file is followed. Hashes detect corruption. They do not stop a malicious author,
who can write matching ones.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from ..diffusion.arrays import Array
from ..errors import BundleError, RequestError
from ..errors.arguments import path_of
from ..errors.keywords import named
from ..errors.messages import shown
from ..files import from_json, to_json
from .conditions import Condition
from .format import MANIFEST, STEP, null_file
from .hub import discard, hub_folder, is_hub_name, stores
from .manifest import File, Manifest, Report, read_manifest
from .rules import MAX_MANIFEST
from .sampling import SamplingOptions
from .shipped import bundle_folder
from .spec import ModelSpec

_AGAIN = "Fetch or export the bundle again."


@dataclass(frozen=True, eq=False, kw_only=True)
class Bundle(ModelSpec):
    """A bundle on disk, its bundle.json checked.

    Attributes:
        path: The folder.
        files: By path inside the bundle.
        report: Figures of the proof, by precision and backend.
        same_bytes: Whether a sample has the same bytes in any batch. Only a bundle that was
            exported with --no-same-bytes may say that it has not.
    """

    path: Path
    files: Mapping[str, File]
    provenance: Mapping[str, object]
    report: Report = field(default_factory=dict)
    same_bytes: bool = True

    @classmethod
    @named
    def load(cls, path: str | Path) -> Bundle:
        """Read and check the bundle.json of a folder. Other files are checked when they are read.

        Args:
            path: The folder; the name of a shipped bundle, such as "emoji32"; or
                "hf:USER/NAME@REVISION", a bundle of the Hugging Face Hub.

        Raises:
            RequestError: `path` is not a path.
            BundleError: The folder or bundle.json is missing or not JSON, its format is newer, or
                fields are missing or invalid. The message names every fault. Or it cannot be
                fetched from the Hub.
        """
        given = path_of("path", path)
        path = hub_folder(given) if is_hub_name(given) else bundle_folder(given)
        manifest = path / MANIFEST
        try:
            if (size := _size(path, MANIFEST)) > MAX_MANIFEST:
                raise BundleError(
                    f"{manifest} has {size} bytes, at most {MAX_MANIFEST} expected. {_AGAIN}"
                )
            value = from_json(manifest.read_bytes())
        except FileNotFoundError:
            raise BundleError(
                f"{path} has no {MANIFEST}, so it is not a bundle. "
                "python -m export.build makes one."
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{manifest} cannot be read as JSON ({error}). {_AGAIN}") from error
        # Absolute, because files are read later, when the process may be in another folder.
        bundle = cls.from_json(path.absolute(), value)
        # Defaults that cannot be sampled with would fail in every later call, less clearly.
        try:
            bundle.program_of(bundle.resolve(SamplingOptions()))
        except (RequestError, TypeError) as error:
            raise BundleError(
                f"{manifest}: its 'defaults' cannot be sampled with: {error} {_AGAIN}"
            ) from error
        return bundle

    @classmethod
    def from_json(cls, path: Path, value: object) -> Bundle:
        """Return the bundle that a bundle.json in the folder `path` describes.

        Raises:
            BundleError: Fields are missing or invalid; the message names every fault.
        """
        manifest = read_manifest(path / MANIFEST, value)
        return cls(
            path=path,
            files=manifest.files,
            provenance=manifest.provenance,
            report=manifest.report,
            same_bytes=manifest.same_bytes,
            **manifest.spec.spec_fields(),
        )

    def to_json(self) -> dict[str, object]:
        """Return the value of bundle.json."""
        return Manifest(self, self.files, self.provenance, self.report, self.same_bytes).to_json()

    def learned_null(self, condition: Condition) -> Array:
        """Return the learned null value of a condition, [*shape].

        Raises:
            BundleError: Its file is damaged.
        """
        if condition.name not in self._nulls:
            data = self.read(null_file(condition.name))
            # Little-endian on disk, on any machine.
            values = np.frombuffer(data, np.dtype(condition.kind).newbyteorder("<"))
            if not np.isfinite(values).all():
                raise BundleError(f"{self.path / null_file(condition.name)} holds NaN. {_AGAIN}")
            self._nulls[condition.name] = values.reshape(condition.shape).astype(condition.kind)
        return self._nulls[condition.name]

    @cached_property
    def _nulls(self) -> dict[str, Array]:
        """Learned null values that were read."""
        return {}

    def __reduce__(self) -> tuple[Callable[..., Bundle], tuple[str, str]]:
        """Pickle the absolute path and the text of bundle.json, which unpickling checks again."""
        return _restored, (str(self.path.absolute()), to_json(self.to_json()))

    def __repr__(self) -> str:
        """Return a line: the fields hold the schedule and all figures of the proof."""
        sizes = "×".join(map(str, self.sample_shape))
        return f"<Bundle {self.name}: {sizes}, {', '.join(self.precisions)}, at {self.path}>"

    # Immutable, so a copy is the bundle itself.
    def __copy__(self) -> Bundle:
        return self

    def __deepcopy__(self, _: object) -> Bundle:
        return self

    @property
    def location(self) -> str:
        return str(self.path)

    @cached_property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that have a step graph, fp32 first."""
        names = {name.split("/")[0] for name in self.files if name.endswith(f"/{STEP}")}
        return tuple(sorted(names, key=lambda name: (name != "fp32", name)))

    @cached_property
    def sha256(self) -> str:
        """The hash of bundle.json, which holds the hashes of all files."""
        # Of its content: the same fields with other blanks are the same bundle.
        return hashlib.sha256(to_json(self.to_json()).encode()).hexdigest()

    def read(self, name: str) -> bytes:
        """Return the bytes of a file that bundle.json lists.

        Raises:
            BundleError: The file is not listed, missing, changed, or outside the folder.
        """
        if not isinstance(name, str) or name not in self.files:
            raise BundleError(
                f"{self.path / MANIFEST} lists no file {shown(name)}. It lists: "
                f"{', '.join(sorted(self.files)) or 'none'}."
            )
        path = self.path / name
        expected = self.files[name]
        try:
            # The size is compared first, so that a huge file is never read.
            size = _size(self.path, name)
            if size != expected.size:
                discard(self.path, path)
                raise BundleError(f"{path} has {size} bytes, {expected.size} expected. {_AGAIN}")
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(
                f"{path} cannot be read: {error.strerror or error}. {_AGAIN}"
            ) from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != expected.sha256:
            discard(self.path, path)
            raise BundleError(
                f"{path} has sha256 {digest}, {expected.sha256} expected: it was changed or "
                f"damaged. {_AGAIN}"
            )
        return data


def _size(folder: Path, name: str) -> int:
    """Return the size of a file of a bundle.

    Raises:
        BundleError: It leads out of the folder, or is a pipe, a device or a folder.
        OSError: It is missing, or cannot be reached.
    """
    path = folder / name
    # bundle.json confines names, but a symbolic link in the folder may still lead elsewhere. Links
    # in a circle lead to themselves here, and have no size.
    target = Path(os.path.realpath(path))
    roots = (Path(os.path.realpath(folder)), *stores(folder))
    if not any(target.is_relative_to(root) for root in roots):
        raise BundleError(
            f"{path} leads out of the bundle's folder, which a bundle may not do. Do not use it."
        )
    found = path.stat()
    # Reading anything else might never end.
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path} is not a regular file. {_AGAIN}")
    return found.st_size


def _restored(path: str, text: str) -> Bundle:
    """Return the bundle that `Bundle.__reduce__` pickled."""
    return Bundle.from_json(Path(path), from_json(text))
