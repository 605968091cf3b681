"""Jobs: runs that outlive the connection that started them."""

from __future__ import annotations

import secrets
import time

from .events import Last, status_json
from .problems import Problem, problem_of
from .runs import Run
from .settings import Settings

MOST_JOBS = 10_000


class Job:
    """A run that somebody will ask for again.

    Attributes:
        id: Random, so that nobody can guess it.
        owner: Whose it is; to others it does not exist.
        kind: The format of its result, if the reader does not choose another.
        last: Makes the data of the last event, see `events.run_events`.
        path: Its path, with the prefix that clients use.
        ended: In seconds of time.monotonic; None while it runs.
    """

    def __init__(
        self,
        owner: str,
        run: Run,
        kind: str,
        columns: int | None,
        last: Last,
        prefix: str = "",
    ) -> None:
        self.id = secrets.token_urlsafe(16)
        self.owner = owner
        self.run = run
        self.kind = kind
        self.columns = columns
        self.last = last
        self.path = f"{prefix}/v1/jobs/{self.id}"
        self.created = time.time()
        self.ended: float | None = None
        self.cancelled = False

    @property
    def bytes(self) -> int:
        """Bytes that its result holds."""
        future = self.run.future
        kept = future.done() and not future.cancelled() and future.exception() is None
        return future.result().nbytes if kept else 0

    def to_json(self) -> dict[str, object]:
        """Return where it stands, as JSON. From any thread: predicting its end takes long."""
        found = {
            "id": self.id,
            "model": self.run.model.name,
            "created": round(self.created, 3),
            **status_json(self.run),
            "self": self.path,
            "events": f"{self.path}/events",
            "result": f"{self.path}/result",
        }
        # The run may continue for others; this job does not.
        if self.cancelled:
            return {**found, "state": "cancelled"}
        error = self.run.future.exception() if self.run.done else None
        return {**found, "error": problem_of(error).to_json()} if error else found

    def check_result(self) -> None:
        """Raises Problem (409) unless its result is there."""
        if self.cancelled:
            raise Problem(409, "the job was cancelled. Submit it again.")
        if not self.run.done:
            raise Problem(409, f"the job is not done. Wait for it at {self.path}/events.", 1.0)


class Jobs:
    """The jobs by id. For the event loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._jobs: dict[str, Job] = {}
        self._ended: dict[str, int] = {}
        """The bytes that their results hold, in the order in which they ended."""
        self._held = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Keep a job. It uses its run until that has ended, or it is cancelled."""
        self._sweep()
        # The oldest results make room: only jobs that run can be too many.
        while self._ended and len(self._jobs) >= MOST_JOBS:
            self.forget(self._jobs[next(iter(self._ended))])
        if len(self._jobs) >= MOST_JOBS:
            raise Problem(429, "too many jobs are kept. Try again later.", 10.0)
        self._jobs[job.id] = job

        # The job leaves its run when that ends, unless it has left before.
        def end(_: object) -> None:
            if not job.cancelled:
                job.run.leave()
            self._end(job)

        job.run.future.add_done_callback(end)

    def get(self, name: str, owner: str) -> Job:
        """Return a job. Raises Problem (404) if there is none, or it is somebody else's."""
        self._sweep()
        job = self._jobs.get(name)
        # A stranger learns nothing, not even that there is such a job.
        if job is None or job.owner != owner:
            raise Problem(
                404,
                "there is no such job. Results are kept for "
                f"{self._settings.job_s:g} s, and fewer if there are many.",
            )
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job. Others who wait for the same run keep it."""
        if not job.run.done and not job.cancelled:
            job.cancelled = True
            self._end(job)
            job.run.leave()

    def forget(self, job: Job) -> None:
        """Drop a job."""
        self._jobs.pop(job.id, None)
        self._held -= self._ended.pop(job.id, 0)

    def _end(self, job: Job) -> None:
        """Note when it ended, and what its result holds."""
        job.ended = job.ended or time.monotonic()
        if job.id in self._jobs:
            # A run may continue for others after the job was cancelled, and hold a result later.
            self._held += job.bytes - self._ended.get(job.id, 0)
            self._ended[job.id] = job.bytes

    def _sweep(self) -> None:
        """Drop jobs that ended too long ago; and the oldest results, if they hold too much."""
        oldest = time.monotonic() - self._settings.job_s
        while self._ended:
            job = self._jobs[next(iter(self._ended))]
            if (job.ended or 0.0) >= oldest and self._held <= self._settings.job_bytes:
                return
            self.forget(job)
