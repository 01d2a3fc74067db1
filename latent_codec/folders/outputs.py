"""Write outputs as files of their own, or as members of tar shards."""

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from latent_codec.errors import UserError
from latent_codec.folders.jobs import Input, Maker, Resume, Work
from latent_codec.folders.resume.ledger import Claim, Kind, Ledger, Record
from latent_codec.folders.resume.units import Unit
from latent_codec.folders.run import run
from latent_codec.folders.shards import earlier_shards, remove_needless, shard_name
from latent_codec.folders.summary import Summary
from latent_codec.images.sources import Listing
from latent_codec.images.tar_files import key_of, list_members, read_member
from latent_codec.storage.files import atomic_path, disk_errors, open_regular, put, sha256, sha256_of, temporary_path

T = TypeVar("T")


class Output(NamedTuple):
    """Hold what is to be stored for one input."""

    input: Input[Any]
    name: str
    """Relative path, with "/" between its parts."""
    data: Callable[[], bytes]
    """Called in a thread."""
    pixels: int = 0
    """Pixels to count once it is written."""


def make_outputs(
    listing: Listing, folder: Path, maker: Maker[T, Output], *, tar: bool, resume: Resume, quiet: bool
) -> Summary:
    """Make an `Output` of each source, perhaps in tar shards; raises as `run`, and for a folder of the other kind."""
    files, tars = _FileWriter(folder, maker.kind), _TarWriter(folder, maker.kind)
    if Ledger.exists(folder, files.kind if tar else tars.kind):
        there, remedy = ("in files of their own", "for") if tar else ("in tar files", "without")
        raise UserError(f"{folder}: holds {maker.kind} {there}; give another folder {remedy} --tar")
    return run(listing, maker, tars if tar else files, resume=resume, quiet=quiet)


class _FileWriter:
    """Write a file for each output."""

    is_shared = has_index = False

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder = folder
        self.kind: Kind = kind

    def write(self, products: Iterable[Output], work: Work) -> None:
        written = work.writers.map(partial(self._write, work=work), products)
        for output, record in work.results(written, lambda output: [output.input.job]):
            work.summary.bytes_out += record.bytes_out
            work.done(output.input.job, record, output.pixels)

    def _write(self, output: Output, work: Work) -> Record:
        path = self.folder / output.name
        with work.summary.timing("writing"):
            data = output.data()
            with disk_errors(path, output.input.job.name), atomic_path(path) as temporary:
                temporary.write_bytes(data)
            return output.input.record(output.name, len(data), sha256(data))

    def gather(self, ledger: Ledger, units: Sequence[Unit]) -> None:
        pass


class _TarWriter:
    """Write a tar shard `KIND-UNIT-DIGEST.tar` for each unit, as WebDataset reads it; members are in order."""

    is_shared, has_index = True, False

    def __init__(self, folder: Path, members: Kind) -> None:
        self.folder, self._members = folder, members
        self.kind: Kind = "streams.tar" if members == "streams" else "images.tar"

    def write(self, products: Iterable[Output], work: Work) -> None:
        def make(output: Output) -> bytes:
            with work.summary.timing("writing"):
                return output.data()

        made = work.results(work.writers.map(make, products), lambda output: [output.input.job])
        for claim, outputs in groupby(made, lambda one: one[0].input.job.claim):
            with contextlib.ExitStack() as stack:
                with disk_errors(self.folder):  # not around what follows: other errors pass there
                    name = f"{self._members}-{claim.unit.name}"
                    temporary = stack.enter_context(temporary_path(self.folder, name))
                    members = _add_members(outputs, temporary, work, earlier_shards(claim, self.folder))
                self._finish(list(members), claim, temporary, work)

    def _finish(self, members: Sequence[Input[int]], claim: Claim, temporary: Path, work: Work) -> None:
        images = [(one.job.name, one.sha256) for one in members]
        path = self.folder / f"{self._members}-{shard_name(claim.unit.name, claim.settings, images)}.tar"
        with disk_errors(path), work.summary.timing("writing"):
            size, digest = temporary.stat().st_size, sha256_of(temporary)
            put(temporary, path)
        work.summary.bytes_out += size
        for one in members:
            work.done(one.job, one.record(path.name, size, digest), one.content)

    def gather(self, ledger: Ledger, units: Sequence[Unit]) -> None:
        with disk_errors(self.folder):
            remove_needless(self.folder.glob(f"{self._members}-*.tar"), ledger, units)


def _add_members(
    outputs: Iterable[tuple[Output, bytes]], path: Path, work: Work, earlier: Sequence[Path]
) -> Iterator[Input[int]]:
    """Write a tar file of the outputs, and yield the input of each with its pixels to count.

    Members of earlier shards whose images fail now, damaged since, are taken over as they are.
    """
    with disk_errors(path):
        tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed below: other errors pass here)
    there: set[str] = set()

    def add(name: str, data: bytes) -> None:
        if name in there:  # two images of one key share their class and caption
            return
        there.add(name)
        member = tarfile.TarInfo(name)
        member.size = len(data)
        with disk_errors(path), work.summary.timing("writing"):
            tar.addfile(member, io.BytesIO(data))

    try:
        done: set[str] = set()
        claim: Claim | None = None
        for output, data in outputs:
            claim = output.input.job.claim
            done.add(output.input.job.name)
            add(output.name, data)
            for suffix, beside in output.input.job.source.read_sidecars().items():  # as WebDataset has them
                add(f"{key_of(output.name)}{suffix}", beside)
            yield output.input.holding(output.pixels)
        if claim is not None and len(done) < len(claim.unit.sources):
            failed = {key_of(source.name) for source in claim.unit.sources if source.name not in done}
            for name, data in _members_of(earlier, failed):
                add(name, data)
    except BaseException:
        with contextlib.suppress(OSError):  # what is not written yet will not be
            tar.close()
        raise
    with disk_errors(path):
        tar.close()


def _members_of(shards: Sequence[Path], keys: set[str]) -> Iterator[tuple[str, bytes]]:
    for shard in shards:
        with contextlib.suppress(UserError, OSError), open_regular(shard) as raw:  # a damaged shard holds no more
            for name, member in list_members(shard).members.items():
                if key_of(name) in keys:
                    yield name, read_member(member, raw)
