"""Write outputs as files of their own, or as members of tar shards."""

import contextlib
import dataclasses
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.jobs import Input, Maker, Task, Work
from latent_codec.folders.resume.ledger import Claim, Kind, Ledger, Record
from latent_codec.folders.resume.units import Unit
from latent_codec.folders.run import run
from latent_codec.folders.shards import remove_needless, shard_name
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Geometry, crop
from latent_codec.images.write import ImageFormat, image_bytes
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


def image_output(
    item: Input[Any], name: str, pixels: torch.Tensor, geometry: Geometry, image_format: ImageFormat
) -> Output:
    """Return the image file of decoded pixels (3, h', w') uint8, which are still padded."""
    return Output(item, name, partial(image_bytes, crop(pixels, geometry), geometry, image_format))


_IN_TARS: dict[Kind, Kind] = {"streams": "streams.tar", "images": "images.tar"}


def make_outputs(task: Task, maker: Maker[T, Output], *, tar: bool) -> Summary:
    """Run a task of streams or images, whose sources have an `Output` each, in files or with `tar` in tar shards.

    Raises `UserError` as `run` does, and for a folder that has the other of the two.
    """
    kind, in_tars = task.kind, _IN_TARS[task.kind]
    if Ledger.exists(task.folder, kind if tar else in_tars):
        there, remedy = ("in files of their own", "for") if tar else ("in tar files", "without")
        raise UserError(f"{task.folder}: holds {kind} {there}; give another folder {remedy} --tar")
    if tar:
        return run(dataclasses.replace(task, kind=in_tars, outputs=None), maker, _TarWriter(task.folder, kind))
    return run(task, maker, _FileWriter(task.folder))


class _FileWriter:
    """Write a file for each output."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

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

    def __init__(self, folder: Path, kind: Kind) -> None:
        self._folder, self._kind = folder, kind

    def write(self, products: Iterable[Output], work: Work) -> None:
        def make(output: Output) -> bytes:
            with work.summary.timing("writing"):
                return output.data()

        made = work.writers.map(make, products)
        for claim, outputs in groupby(made, lambda one: one[0].input.job.claim):
            with temporary_path(self._folder, f"{self._kind}-{claim.unit.name}") as temporary:
                if members := list(_add_members(outputs, temporary, work)):
                    self._finish(members, claim, temporary, work)

    def _finish(self, members: Sequence[_Member], claim: Claim, temporary: Path, work: Work) -> None:
        images = [(one.input.job.name, one.input.sha256) for one in members]
        path = self._folder / f"{self._kind}-{shard_name(claim.unit.name, claim.settings, images)}.tar"
        with disk_errors(path), work.summary.timing("writing"):
            size, digest = temporary.stat().st_size, sha256_of(temporary)
            put(temporary, path)
        work.summary.bytes_out += size
        for one in members:
            work.done(one.input.job, one.input.record(path.name, size, digest), one.pixels)

    def gather(self, ledger: Ledger, units: Sequence[Unit]) -> None:
        with disk_errors(self._folder):
            remove_needless(self._folder.glob(f"{self._kind}-*.tar"), ledger, units)


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
