"""What is generated and how: the arguments of one run, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..bundle.bundle import Bundle
from ..errors import RequestError
from ..errors.arguments import choice, elements, file_path, flag, instance, integer
from ..errors.messages import refused
from ..images import is_image
from .formats import FORMATS
from .layout import MAX_SAMPLES, Layout
from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `generate` makes, and how. It can be pickled, for workers.

    Attributes:
        bundle: See `Bundle.load`.
        out: The folder. Only a folder that a run has made may hold files already.
        n: Samples of all shards; a later run may ask for more.
        shard: Samples of a shard.
        format: A name of `FORMATS`: webdataset, parquet, folder or npy.
        backend, precision, max_batch: See `Sampler.load`. They are part of the environment.
        threads: Of the inference library in each worker; None for the library's choice.
        part: (k, parts): make only each `parts`-th shard, beginning with the k-th.
        other_versions: Continue in another environment. The manifest names both.
    """

    bundle: Bundle
    plan: Plan
    out: Path
    n: int
    shard: int = 10_000
    format: str = "webdataset"
    backend: str = "auto"
    precision: str = "auto"
    threads: int | None = 1
    max_batch: int = 16
    part: tuple[int, int] = (1, 1)
    other_versions: bool = False

    def __post_init__(self) -> None:
        """Check what the sampler and the plan do not. Raises RequestError."""
        instance("bundle", self.bundle, Bundle, "Bundle.load opens a folder.")
        instance("plan", self.plan, Plan, "Plan.from_json takes a JSON value.")
        # A worker may have another current folder.
        object.__setattr__(self, "out", file_path("out", self.out).absolute())
        # numpy's integers overflow, and JSON has none.
        for name in ("n", "shard"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1, MAX_SAMPLES))
        flag("other_versions", self.other_versions)
        instance("backend", self.backend, str, "Pass a name.")
        choice("format", self.format, FORMATS)
        rule = "two integers (k, parts)"
        part = elements("part", self.part, rule)
        if len(part) != 2:
            raise refused("part", rule, self.part)
        integer("part", part[0], 1, integer("parts", part[1], 1, 1_000_000))
        shape = self.bundle.sample_shape
        if FORMATS[self.format].images and not is_image(shape):
            raise RequestError(
                f"the format {self.format} holds images with 1 or 3 channels, and the samples of "
                f"{self.bundle.name} are {'×'.join(map(str, shape))}. Use the format npy."
            )

    @property
    def layout(self) -> Layout:
        """The shards and their places. Raises RequestError for numbers that cannot be used."""
        return Layout(self.out, self.n, self.shard, FORMATS[self.format].suffix)
