"""What every command over many images shares: reading ahead, batches of one shape, and who failed why."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from tqdm import tqdm

from latent_codec.codec import Codec
from latent_codec.colour import parse_colour
from latent_codec.compute import Compute
from latent_codec.errors import FatalError, UserError
from latent_codec.files import make_folder
from latent_codec.inputs import Source
from latent_codec.ledger import FAILURES, Claim, Kind, Ledger, Record, SourceCheck, mtime_ns, sha256
from latent_codec.plan import WHOLE, Share, Unit, check_absent, check_names, check_outputs, folding, units
from latent_codec.summary import Summary
from latent_codec.workers import Processes, Threads

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


def check_options(background: str, max_pixels: int) -> None:
    """Raise `UserError`, once and not for each image, if these are no options to read images with."""
    parse_colour(background)
    if max_pixels < 1:
        raise UserError(f"a limit of {max_pixels} pixels refuses every image; it must be at least 1")


def check_channels(codec: Codec) -> None:
    """Raise `UserError` unless the model is one of grey or of RGB images."""
    if (channels := codec.config.image_channels) not in (1, 3):
        raise UserError(f"a model of images with {channels} channels; image files need one with 1 (grey) or 3 (RGB)")


def check_unconditional(codec: Codec, what: str) -> None:
    """Raise `UserError` for a model that is told each image's class where nothing could tell it: `what`."""
    if classes := codec.config.classes:
        raise UserError(f"the model is told which of {len(classes)} classes an image is of; {what} cannot tell it")


def check_gaussian(codec: Codec) -> None:
    """Raise `UserError` for a model whose latents have no mean and log-variance to store."""
    if (kind := codec.config.bottleneck.kind) != "gaussian":
        raise UserError(
            f"latents in safetensors are a Gaussian's mean and log-variance, which a {kind} bottleneck has not; "
            "write .lc files"
        )


class Resume(NamedTuple):
    """What is done of what a command was asked for."""

    check: SourceCheck
    """How an output is found to be current."""
    overwrite: bool
    """Make all outputs again, and replace files that this program knows nothing of."""
    share: Share


RESUME = Resume("hash", False, WHOLE)
OVERWRITE = Resume("hash", True, WHOLE)


def run(
    verb: str,
    kind: Kind,
    sources: Sequence[Source],
    outputs: Sequence[str] | None,
    folder: Path,
    settings: dict[str, Any],
    resume: Resume,
    process: Callable[[Iterable[Job], Work], None],
    *,
    compute: Compute,
    quiet: bool,
    gather: Callable[[Ledger, Sequence[Unit]], None] = lambda ledger, units: None,
) -> Summary:
    """Make each source's output, a name relative to `folder`, by `process`, unless it is there already.

    Without `outputs` sources share files, whose names are for `process` to choose. `settings` are all that an output
    depends on beside its source. `gather` makes what follows from all records. Raises `UserError` before any work if
    outputs collide, `folder` cannot be written into, or holds some that this program did not make and may not
    `overwrite`; and later if the disk takes no more. All that was written until then is whole, and the same call goes
    on from there.
    """
    started = time.monotonic()
    make_folder(folder)
    if outputs is None:
        check_names(source.name for source in sources)
    else:
        check_outputs(outputs, folder)
    own = [*(outputs or ()), FAILURES]
    if not resume.overwrite:
        _check_free(folder, own)
    named = dict(zip((s.name for s in sources), outputs or [None] * len(sources), strict=True))
    everything = units(sources)
    asked = resume.share.of(everything)
    summary = Summary(f"{verb}d", found=sum(len(unit.sources) for unit in asked))
    bar = tqdm(total=summary.found, desc=verb, unit="image", disable=quiet or None)
    with bar, Ledger(folder, kind, settings) as ledger:
        if outputs and (fold := folding(ledger.root)):
            check_outputs(outputs, folder, fold)
        ledger.reserve(own, overwrite=resume.overwrite)
        conclude = _finally(lambda: _conclude(ledger, everything, gather))
        with conclude, contextlib.ExitStack() as stack:
            threads = (stack.enter_context(Threads(n)) for n in (compute.workers, 1, compute.workers))
            processes = Processes(compute.workers if compute.decode_in == "processes" else 0)
            readers, coder, writers = threads
            work = Work(summary, bar, readers, stack.enter_context(processes), coder, writers)
            for claims in ledger.rounds(asked):
                process(_jobs(claims, named, work), work)
    summary.seconds = time.monotonic() - started
    return summary


def _check_free(folder: Path, outputs: Sequence[str]) -> None:
    """Refuse a folder that is none of ours, before anything is made in it; `Ledger.reserve` knows about the others."""
    try:
        check_absent(folder / output for output in outputs)
    except UserError:
        if not Ledger.exists(folder):
            raise


def _conclude(ledger: Ledger, everything: Sequence[Unit], gather: Callable[[Ledger, Sequence[Unit]], None]) -> None:
    ledger.let_go()
    with ledger.gathering():
        gather(ledger, everything)
        ledger.write_failures(everything)


@contextlib.contextmanager
def _finally(last: Callable[[], None]) -> Iterator[None]:
    """Do `last` in any case; after an error it is the error that counts, and not that of a second attempt to write."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError, OSError):
            last()
        raise
    last()


def _jobs(claims: Iterable[Claim], outputs: dict[str, str | None], work: Work) -> Iterator[Job]:
    for claim in claims:
        jobs = [Job(claim, source, outputs[source.name]) for source in claim.unit.sources]
        if claim.settled:
            for job in jobs:
                work.leave(job)
        else:
            yield from jobs


def in_batches(
    jobs: Iterable[Job],
    load: Callable[[Source], bytes],
    parse: Callable[[Source, bytes], tuple[tuple[int, ...], T]],
    *,
    batch_size: int,
    resume: Resume,
    work: Work,
    is_large: Callable[[tuple[int, ...]], bool],
    is_whole: Callable[[Sequence[Record]], bool] | None = None,
) -> Iterator[list[Input[T]]]:
    """Jobs in batches of one unit and one shape, read ahead in threads.

    `parse` gives a source's shape and content; what `is_large` by its shape goes alone. Sources whose output is
    current are skipped, but for those that share a batch with one that is not. Where images share files, all of a unit
    are skipped or none: `is_whole` says of the records of all that can be read whether their files hold these and
    nothing else.
    """

    def read(job: Job) -> Input[T]:
        try:
            changed = mtime_ns(job.source)
            data = load(job.source)
        except OSError as error:
            raise UserError(f"{job.name}: cannot be read: {error.strerror or error}") from error
        with work.summary.timing("decode"):
            return Input(job, changed, sha256(data), *parse(job.source, data))

    def find(job: Job) -> Input[T] | Current:
        if job.name in job.claim.records and not resume.overwrite:
            with contextlib.suppress(OSError):  # reading it will say so
                changed = mtime_ns(job.source)
                if job.claim.is_current(job.source, job.output, resume.check, load):
                    return Current(job, dataclasses.replace(job.claim.records[job.name], mtime_ns=changed))
        return read(job)

    def reread(current: Current) -> Input[T]:
        found = read(current.job)
        if found.shape != current.shape:
            raise UserError(f"{current.job.name}: changed while it was read; the same command makes it again")
        return found

    def redo(batch: list[Input[T] | Current]) -> list[Input[T]]:
        outcomes = work.readers.map(reread, [f for f in batch if isinstance(f, Current)])
        again = {found.job: found for found in _successes(((c.job, future) for c, future in outcomes), work)}
        whole = (found if isinstance(found, Input) else again.get(found.job) for found in batch)
        return [found for found in whole if found is not None]

    found = _successes(work.readers.map(find, jobs), work)

    def together(unit: Iterator[Input[T] | Current]) -> Iterator[Input[T] | Current]:
        if is_whole is None:
            yield from unit
            return
        current: list[Input[T] | Current] = []
        for first in unit:
            if isinstance(first, Input):
                yield from redo([*current, first])
                for later in unit:
                    yield from redo([later])
                return
            current.append(first)
        whole = is_whole([found.record for found in current if isinstance(found, Current)])
        yield from current if whole else redo(current)

    for _, unit in groupby(found, lambda f: f.job.claim):
        for batch in batches(together(unit), batch_size, lambda f: f.shape, alone=lambda f: is_large(f.shape)):
            if all(isinstance(f, Current) for f in batch):
                for f in batch:
                    assert isinstance(f, Current)
                    work.skip(f.job, f.record)
            elif redone := redo(batch):
                yield redone


def _successes(outcomes: Iterable[tuple[Job, "Future[R]"]], work: Work) -> Iterator[R]:
    """Whatever a stranger's file sets off, the others go on."""
    for job, future in outcomes:
        try:
            result = future.result()
        except FatalError:
            raise
        except Exception as error:
            work.fail(job, error)
        else:
            yield result


def batches(
    items: Iterable[T], size: int, shape: Callable[[T], Hashable], *, alone: Callable[[T], bool]
) -> Iterator[list[T]]:
    """Lists of up to `size` items of equal shape: images are never padded to each other's size.

    At most 4 * size items wait for companions; those that go `alone` wait for none.
    """
    waiting: dict[Hashable, list[T]] = {}
    for item in items:
        if alone(item):
            yield [item]
            continue
        group = waiting.setdefault(shape(item), [])
        group.append(item)
        if len(group) == size:
            yield waiting.pop(shape(item))
        elif sum(map(len, waiting.values())) >= 4 * size:
            yield waiting.pop(max(waiting, key=lambda s: len(waiting[s])))
    yield from waiting.values()
