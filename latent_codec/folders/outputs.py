"""What was made of images, one by one, on its way to the disk: a file each, or members of tar shards."""

import contextlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.jobs import Input, Job, Resume, Work
from latent_codec.folders.resume.ledger import Claim, Kind, Ledger, Record
from latent_codec.folders.resume.units import Unit
from latent_codec.folders.run import run
from latent_codec.folders.shards import remove_needless, shard_name
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Geometry, crop
from latent_codec.images.sources import Source
from latent_codec.images.write import ImageFormat, image_bytes
from latent_codec.inference.runner import ResolvedOptions
from latent_codec.storage.files import atomic_path, disk_errors, put, sha256, sha256_of, temporary_path


class Output(NamedTuple):
    """What is to be stored for one input."""

    input: Input[Any]
    name: str
    """Relative, with "/" between its parts."""
    data: Callable[[], bytes]
    """Called in a thread."""
    pixels: int = 0
    """To count once it is written."""


def image_output(
    item: Input[Any],
    name: str,
    pixels: torch.Tensor | UserError,
    geometry: Geometry,
    image_format: ImageFormat,
    work: Work,
) -> Iterator[Output]:
    """Of decoded pixels (3, h', w') uint8, still padded; nothing, and a failure counted, of a reason."""
    if isinstance(pixels, UserError):
        work.fail(item.job, pixels)
    else:
        yield Output(item, name, partial(image_bytes, crop(pixels, geometry), geometry, image_format))


Prefix = Literal["streams", "images"]
_KINDS: dict[tuple[Prefix, bool], Kind] = {
    ("streams", False): "streams",
    ("streams", True): "streams.tar",
    ("images", False): "images",
    ("images", True): "images.tar",
}


def make_outputs(
    verb: str,
    prefix: Prefix,
    sources: Sequence[Source],
    names: Sequence[str],
    folder: Path,
    settings: dict[str, Any],
    resume: Resume,
    make: Callable[[Iterable[Job], Work], Iterator[Output]],
    *,
    tar: bool,
    compute: ResolvedOptions,
    quiet: bool,
) -> Summary:
    """`pipeline.run` where each source becomes an `Output` of its own: a file called by `names`, or a tar's member.

    Raises `UserError` as it does, and for a folder that has the other of the two.
    """
    kind, other = _KINDS[prefix, tar], _KINDS[prefix, not tar]
    if Ledger.exists(folder, other):
        there, remedy = ("in files of their own", "for") if tar else ("in tar files", "without")
        raise UserError(f"{folder}: holds {prefix} {there}; give another folder {remedy} --tar")

    def process(jobs: Iterable[Job], work: Work) -> None:
        if tar:
            _write_tars(make(jobs, work), folder, work, prefix)
        else:
            _write_files(make(jobs, work), folder, work)

    def gather(ledger: Ledger, units: Sequence[Unit]) -> None:
        with disk_errors(folder):
            remove_needless(folder.glob(f"{prefix}-*.tar") if tar else [], ledger, units)

    outputs = None if tar else names
    return run(
        verb, kind, sources, outputs, folder, settings, resume, process, gather=gather, compute=compute, quiet=quiet
    )


def _write_files(outputs: Iterable[Output], folder: Path, work: Work) -> None:
    """A file for each; raises `DiskError` if the disk cannot take any more."""

    def write(output: Output) -> Record:
        path = folder / output.name
        with work.summary.timing("writing"):
            data = output.data()
            with disk_errors(path, output.input.job.name), atomic_path(path) as temporary:
                temporary.write_bytes(data)
            return output.input.record(output.name, len(data), sha256(data))

    for output, future in work.writers.map(write, outputs):
        try:
            record = future.result()
        except FatalError:
            raise
        except Exception as error:
            work.fail(output.input.job, error)
        else:
            work.summary.bytes_out += record.bytes_out
            work.done(output.input.job, record, output.pixels)


def _write_tars(outputs: Iterable[Output], folder: Path, work: Work, prefix: Prefix) -> None:
    """A tar shard for each unit, `PREFIX-UNIT-DIGEST.tar`; raises `DiskError` if the disk cannot take any more.

    It is what WebDataset reads: of members `a/b.jpg.lc` the key is `a/b`. Equal members give equal files. Batches give
    the order.
    """

    def make(output: Output) -> bytes:
        with work.summary.timing("writing"):
            return output.data()

    made = work.writers.map(make, outputs)
    for claim, members in groupby(made, lambda one: one[0].input.job.claim):
        with temporary_path(folder, f"{prefix}-{claim.unit.name}") as temporary:
            stored = _store(members, temporary, work)
            if stored:
                _finish(stored, claim, temporary, folder, work, prefix)


class _Stored(NamedTuple):
    """What has become a member of a tar file that is not whole yet."""

    input: Input[None]
    pixels: int


def _store(members: Iterable[tuple[Output, "Future[bytes]"]], path: Path, work: Work) -> list[_Stored]:
    """Write a tar file of those that could be made."""
    stored: list[_Stored] = []
    with disk_errors(path):
        tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed below: other errors pass here)
    try:
        for output, future in members:
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
            stored.append(_Stored(output.input.emptied(), output.pixels))
    except BaseException:
        with contextlib.suppress(OSError):  # what is not written yet will not be
            tar.close()
        raise
    with disk_errors(path):
        tar.close()
    return stored


def _finish(stored: Sequence[_Stored], claim: Claim, temporary: Path, folder: Path, work: Work, prefix: str) -> None:
    images = [(one.input.job.name, one.input.sha256) for one in stored]
    path = folder / f"{prefix}-{shard_name(claim.unit.name, claim.settings, images)}.tar"
    with disk_errors(path), work.summary.timing("writing"):
        size, digest = temporary.stat().st_size, sha256_of(temporary)
        put(temporary, path)
    work.summary.bytes_out += size
    for one in stored:
        work.done(one.input.job, one.input.record(path.name, size, digest), one.pixels)
