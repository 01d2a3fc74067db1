"""What every command over many images shares: reading ahead, batches of one shape, and who failed why."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.folders.jobs import Job, Resume, Work
from latent_codec.folders.resume.ledger import FAILURES, Claim, Kind, Ledger
from latent_codec.folders.resume.names import check_absent, check_names, check_outputs, folding
from latent_codec.folders.resume.units import Unit, units
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes, Threads
from latent_codec.images.colour import parse_colour
from latent_codec.images.sources import Source
from latent_codec.inference.runner import ResolvedOptions
from latent_codec.storage.files import make_folder


def check_options(background: str, max_pixels: int) -> None:
    """Raise `UserError`, once and not for each image, if these are no options to read images with."""
    parse_colour(background)
    if max_pixels < 1:
        raise UserError(f"a limit of {max_pixels} pixels refuses every image; it must be at least 1")


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
    compute: ResolvedOptions,
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
