"""Define what a run consists of: its jobs and their ends, and who makes and writes outputs."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.resume.ledger import Claim, Kind, Ledger, Record, SourceCheck
from latent_codec.folders.resume.units import DEFAULT_SIZES, WHOLE, Share, Unit, UnitSizes
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes, Threads
from latent_codec.images.sources import Source
from latent_codec.inference.runner import Runner

T = TypeVar("T")
R = TypeVar("R")
P_co = TypeVar("P_co", covariant=True)
P_contra = TypeVar("P_contra", contravariant=True)
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resume:
    """Choose what is done again of what a command was asked for."""

    check: SourceCheck = "hash"
    """Tell whether an output is up to date by the bytes of it and its source, or by sizes and times of change."""
    overwrite: bool = False
    """Make all outputs again, and replace files that this program knows nothing of."""
    share: Share = WHOLE
    unit_sizes: UnitSizes = DEFAULT_SIZES


OVERWRITE = Resume(overwrite=True)


class Job(NamedTuple):
    """Pair a source with the claimed unit it belongs to."""

    claim: Claim
    source: Source
    output: str | None
    """Output file, relative to the folder; None if it shares one with others."""

    @property
    def name(self) -> str:
        return self.source.name


class Input(NamedTuple, Generic[T]):
    """Hold a source that has been read, and its `shape`, which the inputs of a batch have in common."""

    job: Job
    mtime_ns: int
    sha256: str
    shape: Shape
    content: T

    def holding(self, content: R) -> "Input[R]":
        """Return it with other content: what waits for the rest of its unit must not keep an image in memory."""
        return Input(self.job, self.mtime_ns, self.sha256, self.shape, content)

    def record(self, output: str, bytes_out: int, sha256_out: str) -> Record:
        """Return the ledger's line for an output made of this input."""
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


class Work(NamedTuple):
    """Count how jobs end, each as done, skipped, left to others or failed; and hold the pools that work on them."""

    summary: Summary
    bar: Any
    readers: Threads
    decoders: Processes
    coder: Threads
    writers: Threads

    def done(self, job: Job, record: Record, pixels: int = 0) -> None:
        """End a job whose output is in place."""
        job.claim.add(record)
        self.summary.done += 1
        self.summary.bytes_in += record.size
        self.summary.pixels += pixels
        self._settle(job)

    def skip(self, job: Job, record: Record) -> None:
        """End a job whose output was up to date."""
        if record != job.claim.records[job.name]:
            job.claim.add(record)
        self.summary.skipped += 1
        self._settle(job)

    def leave(self, job: Job) -> None:
        """End a job that another process has done."""
        self.summary.elsewhere += 1
        self._settle(job)

    def fail(self, job: Job, reason: object) -> None:
        """End a job that has no output."""
        self.summary.fail(job.name, reason)
        job.claim.fail(job.name, self.summary.failures[job.name])
        self._settle(job)

    def sound(self, outcomes: Iterable[tuple[Input[T], R | UserError]]) -> Iterator[tuple[Input[T], R]]:
        """Yield the inputs that have a result; the others fail."""
        for item, result in outcomes:
            if isinstance(result, UserError):
                self.fail(item.job, result)
            else:
                yield item, result

    def results(
        self, outcomes: Iterable[tuple[T, "Future[R]"]], jobs: Callable[[T], Iterable[Job]]
    ) -> Iterator[tuple[T, R]]:
        """Yield the items that have a result; the jobs of the others fail. Raises what is a `FatalError`."""
        for item, future in outcomes:
            try:
                result = future.result()
            except FatalError:
                raise
            except Exception as error:  # whatever a stranger's file sets off, the others go on
                for job in jobs(item):
                    self.fail(job, error)
            else:
                yield item, result

    def _settle(self, job: Job) -> None:
        job.claim.settle()
        self.bar.update()


class Maker(Protocol[T, P_co]):
    """Read sources, and make products of them in batches."""

    verb: Literal["encode", "decode", "trim"]
    kind: Kind
    runner: Runner

    @property
    def settings(self) -> dict[str, Any]:
        """Return all that a product depends on beside its source, as JSON."""
        ...

    def name(self, source: str) -> str:
        """Return the name of a source's output, where it is a file of its own."""
        ...

    def load(self, source: Source) -> bytes:
        """Return a source's bytes; raises `OSError` or `UserError`."""
        ...

    def parse(self, source: Source, data: bytes, decoders: Processes) -> tuple[Shape, T]:
        """Return a source's shape and content; raises `UserError` if it cannot be used."""
        ...

    def is_large(self, shape: Shape) -> bool:
        """Return whether an input of that shape makes a batch of its own."""
        ...

    def make(self, batches: Iterable[list[Input[T]]], work: Work) -> Iterator[P_co]:
        """Yield the products of batches in their order; inputs that have none fail in `work`."""
        ...


class Writer(Protocol[P_contra]):
    """Write products into a folder."""

    folder: Path
    kind: Kind
    is_shared: bool
    """True if the products of a unit share files, whose names depend on them."""
    has_index: bool
    """True if `gather` writes one file about all products, so that the folder holds those of one set of images."""

    def write(self, products: Iterable[P_contra], work: Work) -> None:
        """End every product's job as done or failed; raises `DiskError` if the disk takes no more."""

    def gather(self, ledger: Ledger, units: Sequence[Unit]) -> None:
        """Make what follows from the records of all units, and remove files that no record names."""
