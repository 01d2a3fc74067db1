"""Run a command over a folder of images: read ahead, batch, record failures, resume."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from latent_codec.errors import UserError
from latent_codec.folders.batching import in_batches
from latent_codec.folders.jobs import Job, Maker, Resume, Work, Writer
from latent_codec.folders.resume.ledger import FAILURES, LEFT_OUT, Ledger
from latent_codec.folders.resume.names import check_absent, check_names, check_outputs, folding
from latent_codec.folders.resume.units import Unit, units
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes, Threads
from latent_codec.images.sources import Listing
from latent_codec.inference.runner import ResolvedOptions
from latent_codec.storage.files import make_folder

T = TypeVar("T")
P = TypeVar("P")


def run(listing: Listing, maker: Maker[T, P], writer: Writer[P], *, resume: Resume, quiet: bool) -> Summary:
    """Make the outputs of sources that are not up to date, and return what became of each image.

    Raises `UserError` before any work if outputs collide, the folder cannot be written into, or it holds files of these
    names that this program did not make and may not overwrite; later if the disk takes no more: run it again to go on.
    """
    started, folder, sources = time.monotonic(), writer.folder, listing.sources
    make_folder(folder)
    outputs = None if writer.is_shared else {source.name: maker.name(source.name) for source in sources}
    own = [*(outputs or {}).values(), FAILURES, LEFT_OUT]
    if outputs is None:
        check_names(source.name for source in sources)
    else:
        check_outputs(own[:-2], folder)
    if not (resume.overwrite or Ledger.exists(folder)):  # of our own folder `Ledger.reserve` knows the names
        check_absent(folder / name for name in own)
    everything = units(sources, resume.unit_sizes)
    asked = resume.share.of(everything)
    done = {"encode": "encoded", "decode": "decoded", "trim": "trimmed"}[maker.verb]
    summary, images = Summary(done), sum(len(unit.sources) for unit in asked)
    summary.begin(listing, images)
    bar = tqdm(total=images, desc=maker.verb, unit="image", disable=quiet or None)
    with bar, Ledger(folder, writer.kind, maker.settings, everything if writer.has_index else ()) as ledger:
        if outputs and (fold := folding(ledger.root)):
            check_outputs(own[:-2], folder, fold)
        if writer.is_shared and not resume.overwrite:
            ledger.check_other_sets(everything, maker.load, together=writer.has_index)
        ledger.reserve(own, overwrite=resume.overwrite)
        conclude = _finally(lambda: _conclude(ledger, everything, listing, writer))
        with conclude, _working(maker.runner.options, summary, bar) as work:
            for claims in ledger.rounds(asked):
                jobs = ([Job(c, s, outputs[s.name] if outputs else None) for s in c.unit.sources] for c in claims)
                writer.write(maker.make(in_batches(jobs, maker, resume, work), work), work)
    summary.seconds = time.monotonic() - started
    return summary


@contextlib.contextmanager
def _working(compute: ResolvedOptions, summary: Summary, bar: Any) -> Iterator[Work]:
    decoders = Processes(compute.workers if compute.decode_in == "processes" else 0)
    with Threads(compute.workers) as readers, decoders, Threads(1) as coder, Threads(compute.workers) as writers:
        yield Work(summary, bar, readers, decoders, coder, writers)


def _conclude(ledger: Ledger, everything: Sequence[Unit], listing: Listing, writer: Writer[Any]) -> None:
    ledger.let_go()
    with ledger.gathering():
        writer.gather(ledger, everything)
        ledger.write_failures(everything, listing)


@contextlib.contextmanager
def _finally(last: Callable[[], None]) -> Iterator[None]:
    """Call `last` in any case; after an error, that error is raised and not the one of a second attempt to write."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(UserError, OSError):
            last()
        raise
    last()
