"""Makes shards, one at a time, on one backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from ..errors import BackendError
from ..sampler import Sampler
from .drafts import draft, flush_all, publish
from .entries import Content, Entries
from .environment import Environment, differences, environment_of
from .formats import FORMATS
from .plan import Series
from .records import Record, digest, is_present
from .settings import Settings

OnSamples = Callable[[int], object]
"""A function that is called with the number of samples that were made since the last call."""


class Maker:
    """A bundle on a backend, ready to make the shards of a run.

    Attributes:
        environment: What the bytes depend on here.
    """

    def __init__(self, settings: Settings) -> None:
        """Open the bundle.

        Raises:
            BundleError: A file of the bundle is damaged.
            BackendError: This machine cannot run the backend.
            RequestError: A setting or the plan cannot be used.
        """
        self.settings = settings
        self.layout = settings.layout
        self.series = Series(settings.bundle, settings.plan, settings.n)
        self._format = FORMATS[settings.format]
        versions = self._format.versions()
        self._sampler = Sampler(
            settings.bundle,
            settings.backend,
            settings.precision,
            settings.threads,
            settings.max_batch,
        )
        self.environment: Environment = environment_of(self._sampler, versions)

    def check(self, expected: Environment) -> None:
        """Check that shards made here have the bytes of a run's others.

        Args:
            expected: The environment that the run has begun with.

        Raises:
            BackendError: This environment is another one, and the settings do not allow that.
        """
        different = differences(expected, self.environment)
        if different and not self.settings.other_versions:
            raise BackendError(
                f"a worker has {', '.join(different)}: the bytes of a sample may depend on it. "
                "Use equal machines, or pass --other-versions."
            )

    def close(self) -> None:
        """Free what the backend holds."""
        self._sampler.close()

    def make(self, shard: int, on_samples: OnSamples) -> None:
        """Make a shard, unless another worker has made it in the meantime.

        Args:
            on_samples: If it raises, nothing remains of the shard.

        Raises:
            BackendError: The samples differ from those of an earlier run in this environment.
            OSError: The shard cannot be written.
        """
        if is_present(self.layout, shard):
            on_samples(len(self.layout.samples(shard)))
            return
        self._make(shard, on_samples)

    def _make(self, shard: int, on_samples: OnSamples) -> None:
        path = self.layout.path(shard)
        with draft(path) as temporary:
            self._write(shard, temporary, on_samples)
            flush_all(temporary)
            record = self._record(shard, temporary)
            self._check(shard, record)
            # First the record: a shard that exists then always has one, even after a kill.
            record.write(self.layout, shard)
            made = record.sha256, record.bytes
            publish(temporary, path, lambda other: digest(other) == made)

    def _write(self, shard: int, path: Path, on_samples: OnSamples) -> None:
        """Write a shard's samples. While a batch is encoded, the next one is sampled."""
        samples = self.layout.samples(shard)
        size = self.settings.max_batch
        bundle = self.settings.bundle
        names = bundle.labels.names if bundle.labels else ()
        content = Content(len(samples), bundle.sample_shape, bundle.sample_range, names)
        written: Future[None] | None = None
        with (
            closing(self._format.open(path, content)) as writer,
            ThreadPoolExecutor(1, "unnoise-write") as thread,
        ):
            for first in range(samples.start, samples.stop, size):
                part = range(first, min(first + size, samples.stop))
                entries = self._sample(part)
                # One batch at a time waits to be written, so memory does not grow.
                if written is not None:
                    written.result()
                written = thread.submit(writer.add, entries)
                on_samples(len(part))
            if written is not None:
                written.result()

    def _sample(self, indices: range) -> Entries:
        return Entries(
            first=indices.start,
            seeds=[self.series.seed(i) for i in indices],
            labels=[self.series.label(i) for i in indices],
            samples=self._sampler.sample_requests([self.series.request(i) for i in indices]),
        )

    def _record(self, shard: int, path: Path) -> Record:
        samples = self.layout.samples(shard)
        sha256, size = digest(path)
        name = self.layout.name(shard)
        return Record(name, samples.start, len(samples), size, sha256, self.environment)

    def _check(self, shard: int, record: Record) -> None:
        """Raises BackendError if an earlier record of the same environment has another hash."""
        before = Record.read(self.layout, shard)
        if before is None or differences(before.environment, record.environment):
            return
        if dataclasses.astuple(before)[:5] != dataclasses.astuple(record)[:5]:
            raise BackendError(
                f"{record.name} was made again with the same settings and versions, and its bytes "
                f"differ: sha256 {record.sha256}, {before.sha256} before. Something that unnoise "
                f"does not record has changed, or a machine computes wrongly. To accept the new "
                f"bytes, remove {self.layout.record(shard)}."
            )
