"""Read the sources of units that are not up to date, and group them into batches of one shape."""

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.jobs import Input, Job, Maker, Resume, Work
from latent_codec.folders.resume.ledger import Record, mtime_ns
from latent_codec.folders.shards import are_whole
from latent_codec.storage.files import sha256

T = TypeVar("T")


def in_batches(jobs: Iterable[list[Job]], maker: Maker[T, Any], resume: Resume, work: Work) -> Iterator[list[Input[T]]]:
    """Yield the inputs of units' jobs in batches of one unit and one shape, read ahead in threads.

    A unit whose outputs are all up to date is skipped, one that another process has done is left, and of any other
    unit all inputs come, so that batches are the same however often the work was interrupted.
    """
    read, size = partial(_read, maker=maker, work=work), maker.runner.options.batch_size
    read_ahead = work.readers.map(read, _jobs_to_make(jobs, maker, resume, work))
    found = (item for _, item in work.results(read_ahead, lambda job: [job]))
    for _, unit in groupby(found, lambda item: item.job.claim):
        yield from batches(unit, size, lambda item: item.shape, alone=lambda item: maker.is_large(item.shape))


def _read(job: Job, maker: Maker[T, Any], work: Work) -> Input[T]:
    try:
        changed = mtime_ns(job.source)
        data = maker.load(job.source)
    except OSError as error:
        raise UserError(f"{job.name}: cannot be read: {error.strerror or error}") from error
    with work.summary.timing("decode"):
        return Input(job, changed, sha256(data), *maker.parse(job.source, data, work.decoders))


def _jobs_to_make(units: Iterable[list[Job]], maker: Maker[Any, Any], resume: Resume, work: Work) -> Iterator[Job]:
    for jobs in units:
        if jobs[0].claim.settled:
            for job in jobs:
                work.leave(job)
        elif resume.overwrite or not _skip_if_up_to_date(jobs, maker, resume, work):
            yield from jobs


def _skip_if_up_to_date(jobs: list[Job], maker: Maker[Any, Any], resume: Resume, work: Work) -> bool:
    """End a unit's jobs, and return True, if its outputs are up to date and what failed before fails again."""
    claim = jobs[0].claim
    if not all(job.name in claim.records or job.name in claim.failures for job in jobs):
        return False

    def end(job: Job) -> Record | Exception | None:
        if job.name not in claim.records:
            try:
                _read(job, maker, work)
            except Exception as error:
                return error
        with contextlib.suppress(OSError):
            changed = mtime_ns(job.source)  # before it is read
            if claim.is_up_to_date(job.source, job.output, resume.check, maker.load):
                return dataclasses.replace(claim.records[job.name], mtime_ns=changed)
        return None

    ends: list[tuple[Job, Record | Exception]] = []
    for job, future in work.readers.map(end, jobs):
        if future.exception() is not None or (found := future.result()) is None or isinstance(found, FatalError):
            return False  # it is to be made, or reading it again raises what ends the run
        ends.append((job, found))
    if jobs[0].output is None and not are_whole([found for _, found in ends if isinstance(found, Record)]):
        return False
    for job, found in ends:
        if isinstance(found, Record):
            work.skip(job, found)
        else:
            work.fail(job, found)
    return True


def batches(
    items: Iterable[T], size: int, shape: Callable[[T], Hashable], *, alone: Callable[[T], bool]
) -> Iterator[list[T]]:
    """Group items of equal shape into lists of up to `size`; at most 4 * size wait, none of those that go `alone`."""
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
