"""What every command over many images shares: reading ahead in threads, batches of one shape, and who failed why."""

import contextlib
import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar

import torch
from tqdm import tqdm

from latent_codec import tiling
from latent_codec.bottlenecks import DiagonalGaussian
from latent_codec.codec import Codec
from latent_codec.colour import parse_colour
from latent_codec.errors import UserError
from latent_codec.files import DiskError, atomic_path, disk_errors, make_folder
from latent_codec.inputs import Source
from latent_codec.ledger import FAILURES, Claim, Kind, Ledger, Record, SourceCheck, mtime_ns, sha256
from latent_codec.plan import WHOLE, Share, Unit, check_absent, check_names, check_outputs, folding, units

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass
class Summary:
    """What became of the images: done + skipped + elsewhere + failed = found."""

    verb: str
    found: int = 0
    done: int = 0
    skipped: int = 0
    """Their outputs were there, of the same source, model and settings."""
    elsewhere: int = 0
    """Other processes did them in the meantime."""
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    pixels: int = 0
    """Of the images done, where bytes per pixel are of interest."""
    seconds: float = 0.0

    def fail(self, name: str, reason: object) -> None:
        text = str(reason) if isinstance(reason, (UserError, str)) else f"{type(reason).__name__}: {reason}"
        self.failures[name] = text
        tqdm.write(text if text.startswith(name) else f"{name}: {text}", file=sys.stderr)

    def __str__(self) -> str:
        others = {"skipped": self.skipped, "by other processes": self.elsewhere, "failed": len(self.failures)}
        counts = "".join(f", {count} {what}" for what, count in others.items() if count)
        text = f"{self.verb} {self.done} of {self.found} images{counts} in {self.seconds:.1f} s"
        if self.done:
            text += f" ({self.done / max(self.seconds, 1e-9):.1f} images/s); {self.bytes_in / 1e6:.2f} MB in, "
            text += f"{self.bytes_out / 1e6:.2f} MB out"
        return text + (f", {8 * self.bytes_out / self.pixels:.3f} bits per pixel" if self.pixels else "")


class Compute(NamedTuple):
    """Where and how the networks run."""

    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    batch_size: int
    workers: int
    """Threads that read and write image files."""
    tile: int | None = None
    """Side in pixels of the tiles that larger images are cut into (`latent_codec.tiling`); None leaves all whole."""

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.dtype)
        return torch.autocast(self.device.split(":")[0], dtype=dtype, enabled=self.dtype != "float32")


class Networks:
    """A codec's networks, run as `compute` says. Where tiles change results, the first image shows by how much."""

    def __init__(self, codec: Codec, compute: Compute) -> None:
        """Raises `UserError` for a tile that the model cannot have."""
        if compute.tile is not None:
            tiling.check_tile(codec, compute.tile)
        self.codec, self.compute = codec, compute
        self._silent = tiling.is_exact(codec)

    def encode(self, images: Sequence[torch.Tensor]) -> DiagonalGaussian:
        """The posterior, on the CPU, of images (3, h, w) uint8 of one shape."""
        pixels = torch.stack(list(images)) if len(images) > 1 else images[0][None]
        with torch.inference_mode(), self.compute.autocast():
            posterior = tiling.encode(self.codec, pixels, self.compute.tile)
            self._report(pixels, self.codec.factor, tiling.encode_error)
        return posterior

    def decode_uint8(self, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """Pixels (b, 3, h, w) uint8, on the CPU, of latents (z, h/f, w/f) of one shape."""
        z = torch.stack(list(latents)) if len(latents) > 1 else latents[0][None]
        with torch.inference_mode(), self.compute.autocast():
            pixels = tiling.decode_uint8(self.codec, z, self.compute.tile)
            self._report(z, 1, tiling.decode_error)
        return pixels

    def _report(self, x: torch.Tensor, scale: int, measure: Callable[[Codec, torch.Tensor, int], object]) -> None:
        """Say on stderr, once, what tiles change of x, which has `scale` elements along a side for each latent one."""
        height, width = (size // scale for size in x.shape[2:])
        tile = self.compute.tile
        if self._silent or tile is None or not self.cuts(height, width):
            return
        self._silent = True
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in tiling.seam(self.codec, height, width, tile))
        error = measure(self.codec, x[:1, :, rows, columns], tile)
        tqdm.write(
            f"tiles of {tile} pixels change what this model gives; in a part of the first such image {error}; "
            "a larger --tile changes less",
            file=sys.stderr,
        )

    def cuts_pixels(self, shape: tuple[int, ...]) -> bool:
        """Whether an image (..., h, w) goes in tiles."""
        return tiling.cuts(shape[-2] * shape[-1], self.compute.tile)

    def cuts_latents(self, shape: tuple[int, ...]) -> bool:
        """Whether the image of latents (..., h/f, w/f) goes in tiles."""
        return self.cuts(*shape[-2:])

    def cuts(self, height: int, width: int) -> bool:
        """Whether an image with latents (height, width) goes in tiles."""
        return tiling.cuts(height * width * self.codec.factor**2, self.compute.tile)

    @property
    def changing_tile(self) -> int | None:
        """The tile, if what is computed depends on it."""
        return None if tiling.is_exact(self.codec) else self.compute.tile


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


class Threads:
    """A context's worker threads: they end with it, not with a generator, which may end in any thread at any time."""

    def __init__(self, workers: int) -> None:
        self._pool, self._ahead = ThreadPoolExecutor(workers), 2 * workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(
        self, work: Callable[[T], R], items: Iterable[T], ahead: int | None = None
    ) -> Iterator[tuple[T, "Future[R]"]]:
        """(item, finished future) in order, a bounded number `ahead`.

        What `items` raises, an interruption too, is raised after what was begun before has come out.
        """
        waiting: deque[tuple[T, Future[R]]] = deque()
        iterator, raised = iter(items), None  # by which the iterator ended
        while True:
            try:
                while raised is None and len(waiting) < (ahead or self._ahead):
                    item = next(iterator)
                    waiting.append((item, self._pool.submit(work, item)))
            except BaseException as error:
                raised = error
            if not waiting:
                break
            item, future = waiting.popleft()
            future.exception()  # wait; the caller asks for the result
            yield item, future
        if raised is not None and not isinstance(raised, StopIteration):
            raise raised


class Work(NamedTuple):
    """What is counted while jobs come to their ends, each by exactly one of these; and who works on them."""

    summary: Summary
    bar: Any
    readers: Threads
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


def check_rgb(codec: Codec) -> None:
    if codec.config.image_channels != 3:
        raise UserError(f"a model of images with {codec.config.image_channels} channels; image files need one with 3")


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
    workers: int,
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
        with conclude, Threads(workers) as readers, Threads(workers) as writers:
            work = Work(summary, bar, readers, writers)
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
        except Exception as error:
            work.fail(job, error)
        else:
            yield result


class Output(NamedTuple):
    """What is to be written for one input."""

    input: Input[Any]
    data: Callable[[], bytes]
    """Called in a thread."""
    pixels: int = 0
    """To count once it is written."""


def write_outputs(outputs: Iterable[Output], folder: Path, work: Work) -> None:
    """Write and count them; raises `UserError` if the disk cannot take any more."""

    def write(output: Output) -> Record:
        name = output.input.job.output
        assert name is not None
        data = output.data()
        with disk_errors(folder / name, output.input.job.name), atomic_path(folder / name) as temporary:
            temporary.write_bytes(data)
        return output.input.record(name, len(data), sha256(data))

    for output, future in work.writers.map(write, outputs):
        try:
            record = future.result()
        except DiskError:
            raise
        except Exception as error:
            work.fail(output.input.job, error)
        else:
            work.summary.bytes_out += record.bytes_out
            work.done(output.input.job, record, output.pixels)


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
