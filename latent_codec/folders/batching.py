"""Group the images of a run into batches of one shape."""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import groupby

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.jobs import Current, Input, Job, R, Resume, T, Work
from latent_codec.folders.resume.ledger import Record, mtime_ns
from latent_codec.images.sources import Source
from latent_codec.storage.files import sha256


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
