"""Write outputs as files of their own, or as members of tar shards."""

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.jobs import Input, Maker, Task, Work
from latent_codec.folders.resume.ledger import Claim, Kind, Ledger, Record
from latent_codec.folders.resume.units import Unit
from latent_codec.folders.run import run
from latent_codec.folders.shards import remove_needless, shard_name
from latent_codec.folders.summary import Summary
from latent_codec.storage.files import atomic_path, disk_errors, put, sha256, sha256_of, temporary_path

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


def make_outputs(task: Task, maker: Maker[T, Output], *, tar: bool) -> Summary:
    """Make streams or images, an `Output` for each source, in files of their own or with `tar` in tar shards.

    Raises `UserError` as `run` does, and for a folder that has the other of the two.
    """
    files, tars = _FileWriter(task.folder, maker.kind), _TarWriter(task.folder, maker.kind)
    if Ledger.exists(task.folder, files.kind if tar else tars.kind):
        there, remedy = ("in files of their own", "for") if tar else ("in tar files", "without")
        raise UserError(f"{task.folder}: holds {maker.kind} {there}; give another folder {remedy} --tar")
    return run(task, maker, tars if tar else files)


class _FileWriter:
    """Write a file for each output."""

    is_shared = False

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder = folder
        self.kind: Kind = kind

    def write(self, products: Iterable[Output], work: Work) -> None:
        for output, future in work.writers.map(partial(self._write, work=work), products):
            try:
                record = future.result()
            except FatalError:
                raise
            except Exception as error:
                work.fail(output.input.job, error)
            else:
                work.summary.bytes_out += record.bytes_out
                work.done(output.input.job, record, output.pixels)

    def _write(self, output: Output, work: Work) -> Record:
        path = self._folder / output.name
        with work.summary.timing("writing"):
            data = output.data()
            with disk_errors(path, output.input.job.name), atomic_path(path) as temporary:
                temporary.write_bytes(data)
            return output.input.record(output.name, len(data), sha256(data))

    def gather(self, ledger: Ledger, units: Sequence[Unit]) -> None:
        pass


class _Member(NamedTuple):
    """Name an output that is in a tar file which is not whole yet."""

    input: Input[None]
    pixels: int


class _TarWriter:
    """Write a tar shard `KIND-UNIT-DIGEST.tar` for each unit, as WebDataset reads it.

    The key of a member `a/b.jpg.lc` is `a/b`. Members are in the order of batches; equal members give equal files.
    """

    is_shared = True

    def __init__(self, folder: Path, members: Kind) -> None:
        self._folder, self._members = folder, members
        self.kind: Kind = "streams.tar" if members == "streams" else "images.tar"

    def write(self, products: Iterable[Output], work: Work) -> None:
        def make(output: Output) -> bytes:
            with work.summary.timing("writing"):
                return output.data()

        made = work.writers.map(make, products)
        for claim, outputs in groupby(made, lambda one: one[0].input.job.claim):
            with contextlib.ExitStack() as stack:
                with disk_errors(self._folder):  # not around what follows: other errors pass there
                    name = f"{self._members}-{claim.unit.name}"
                    temporary = stack.enter_context(temporary_path(self._folder, name))
                if members := list(_add_members(outputs, temporary, work)):
                    self._finish(members, claim, temporary, work)

    def _finish(self, members: Sequence[_Member], claim: Claim, temporary: Path, work: Work) -> None:
        images = [(one.input.job.name, one.input.sha256) for one in members]
        path = self._folder / f"{self._members}-{shard_name(claim.unit.name, claim.settings, images)}.tar"
        with disk_errors(path), work.summary.timing("writing"):
            size, digest = temporary.stat().st_size, sha256_of(temporary)
            put(temporary, path)
        work.summary.bytes_out += size
        for one in members:
            work.done(one.input.job, one.input.record(path.name, size, digest), one.pixels)

    def gather(self, ledger: Ledger, units: Sequence[Unit]) -> None:
        with disk_errors(self._folder):
            remove_needless(self._folder.glob(f"{self._members}-*.tar"), ledger, units)


def _add_members(outputs: Iterable[tuple[Output, "Future[bytes]"]], path: Path, work: Work) -> Iterator[_Member]:
    """Write a tar file of the outputs that could be made."""
    with disk_errors(path):
        tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed below: other errors pass here)
    try:
        for output, future in outputs:
            try:
                data = future.result()
            except FatalError:
                raise
            except Exception as error:
                work.fail(output.input.job, error)
                continue
            member = tarfile.TarInfo(output.name)
            member.size = len(data)
            with disk_errors(path), work.summary.timing("writing"):
                tar.addfile(member, io.BytesIO(data))
            yield _Member(output.input.emptied(), output.pixels)
    except BaseException:
        with contextlib.suppress(OSError):  # what is not written yet will not be
            tar.close()
        raise
    with disk_errors(path):
        tar.close()
