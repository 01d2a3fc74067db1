"""Define the jobs of a run and count how each of them ends."""

from typing import Any, Generic, NamedTuple, TypeVar

from latent_codec.folders.resume.ledger import Claim, Record, SourceCheck
from latent_codec.folders.resume.units import WHOLE, Share
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes, Threads
from latent_codec.images.sources import Source

T = TypeVar("T")


R = TypeVar("R")


class Job(NamedTuple):
    """One source of a unit that this process holds."""

    claim: Claim
    source: Source
    output: str | None
    """Its file, relative to the folder; None if it shares one with others."""

    @property
    def name(self) -> str:
        return self.source.name


class Input(NamedTuple, Generic[T]):
    """A source that has been read, and its `shape`, by which it may share a batch."""

    job: Job
    mtime_ns: int
    sha256: str
    shape: tuple[int, ...]
    content: T

    def emptied(self) -> "Input[None]":
        """Without its content: what waits for the others of its unit may not hold an image in memory meanwhile."""
        return Input(self.job, self.mtime_ns, self.sha256, self.shape, None)

    def record(self, output: str, bytes_out: int, sha256_out: str) -> Record:
        return Record(
            path=self.job.name,
            output=output,
            settings=self.job.claim.settings,
            size=self.job.source.size,
            mtime_ns=self.mtime_ns,
            sha256=self.sha256,
            shape=self.shape,
            bytes_out=bytes_out,
            sha256_out=sha256_out,
        )


class Current(NamedTuple):
    """A source whose output is there.

    It takes part only so that batches are the same however often the work was interrupted: what an image is computed
    with can change the last bits of what comes of it.
    """

    job: Job
    record: Record
    """With the time of change that its source has now."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.record.shape


class Work(NamedTuple):
    """What is counted while jobs come to their ends, each by exactly one of these; and who works on them."""

    summary: Summary
    bar: Any
    readers: Threads
    decoders: Processes
    coder: Threads
    writers: Threads

    def done(self, job: Job, record: Record, pixels: int = 0) -> None:
        job.claim.add(record)
        self.summary.done += 1
        self.summary.bytes_in += record.size
        self.summary.pixels += pixels
        self._settle(job)

    def skip(self, job: Job, record: Record) -> None:
        if record != job.claim.records[job.name]:
            job.claim.add(record)
        self.summary.skipped += 1
        self._settle(job)

    def leave(self, job: Job) -> None:
        self.summary.elsewhere += 1
        self._settle(job)

    def fail(self, job: Job, reason: object) -> None:
        self.summary.fail(job.name, reason)
        job.claim.fail(job.name, self.summary.failures[job.name])
        self._settle(job)

    def _settle(self, job: Job) -> None:
        job.claim.settle()
        self.bar.update()


class Resume(NamedTuple):
    """What is done of what a command was asked for."""

    check: SourceCheck
    """How an output is found to be current."""
    overwrite: bool
    """Make all outputs again, and replace files that this program knows nothing of."""
    share: Share


RESUME = Resume("hash", False, WHOLE)


OVERWRITE = Resume("hash", True, WHOLE)
