"""Folders of images -> folders of latents, and back. One bad image never ends the work of the others."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.batching import in_batches
from latent_codec.folders.jobs import RESUME, Input, Job, Resume, Work
from latent_codec.folders.read_images import parse_image_in
from latent_codec.folders.resume.ledger import Claim, Ledger, Record
from latent_codec.folders.resume.units import Unit
from latent_codec.folders.run import check_options, run
from latent_codec.folders.shards import are_whole, remove_needless, shard_name
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Processes
from latent_codec.images.geometry import Image, mirrored
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.images.sources import Source, find_images
from latent_codec.inference.out_of_memory import Halving
from latent_codec.inference.runner import Runner
from latent_codec.latents.format import (
    INDEX,
    LatentsEntry,
    LatentsHeader,
    LatentsRow,
    StoredDtype,
    latents_header,
    latents_row,
    read_index,
    stored_files,
    stored_shards,
    unplaced_entry,
    write_index,
    write_shard,
)
from latent_codec.model.checks import check_channels, check_gaussian
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.storage.files import disk_errors, sha256_of
from latent_codec.storage.json_config import to_json


def encode_folder(
    runner: Runner,
    where: str | Path,
    folder: Path,
    *,
    store: StoredDtype = "float16",
    flips: bool = False,
    background: str = "#ffffff",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Store the posterior of every image found at `where` in `folder` (see `latent_codec.latents.format`), with `flips`
    that of the mirrored image as well.

    The images of a unit share a shard: all are encoded anew if one of them is. Raises `UserError` before any work if
    nothing is found, an option makes no sense, the model is none of grey or RGB images or has no Gaussian posterior, or
    `folder` holds latents of other images; and as `pipeline.run` does.
    """
    codec = runner.codec
    check_channels(codec)
    check_gaussian(codec)
    check_options(background, max_pixels)
    sources = find_images(where)
    header = latents_header(codec, store, flips)
    if not resume.overwrite:
        _check_folder(folder, sources)
    options = {"factor": codec.factor, "background": background, "max_pixels": max_pixels}
    settings = {"header": to_json(header), "background": background} | runner.settings
    fitting = Halving()

    def make(jobs: Iterable[Job], work: Work) -> Iterator[_UnitRows]:
        read = in_batches(
            jobs,
            Source.read_bytes,
            partial(parse, work.decoders),
            batch_size=runner.options.batch_size,
            resume=resume,
            work=work,
            is_large=runner.cuts_pixels,
            is_whole=are_whole,
        )
        for claim, inputs in groupby(read, lambda batch: batch[0].job.claim):
            rows: list[tuple[Input[None], LatentsRow]] = []
            for batch in inputs:
                with work.summary.timing("network"):
                    for item, found in fitting(encode, batch, math.prod(batch[0].shape)):
                        rows.extend(_rows(found, item, store, work))
            if rows:
                yield _UnitRows(claim, rows)

    def parse(processes: Processes, source: Source, data: bytes) -> tuple[tuple[int, ...], Image]:
        codec.class_numbers([source.label])  # here it fails for this image alone
        return parse_image_in(processes, source, data, **options)

    def posterior(pixels: list[torch.Tensor], labels: torch.Tensor) -> DiagonalGaussian:
        found = runner.encode(pixels, labels)
        assert isinstance(found, DiagonalGaussian)
        return found

    def encode(batch: list[Input[Image]]) -> list[_Encoded]:
        labels = codec.class_numbers([i.job.source.label for i in batch])
        found, flipped = posterior([i.content.pixels for i in batch], labels), None
        if flips:  # a batch of their own: memory is that of one
            flipped = posterior([mirrored(i.content, codec.factor) for i in batch], labels)
        return [_Encoded(found, flipped, place) for place in range(len(batch))]

    def write(unit: _UnitRows) -> list[Record]:
        ordered = sorted((one for _, one in unit.rows), key=lambda one: one.entry.path)
        images = [(one.entry.path, one.entry.sha256) for one in ordered]
        name = shard_name(unit.claim.unit.name, unit.claim.settings, images)
        with disk_errors(folder, "latents"):
            shard = write_shard(folder, header, name, ordered)[0].shard
            size, digest = (folder / shard).stat().st_size, sha256_of(folder / shard)
        return [i.record(shard, size, digest) for i, _ in unit.rows]

    def process(jobs: Iterable[Job], work: Work) -> None:
        def timed(unit: _UnitRows) -> list[Record]:
            with work.summary.timing("writing"):
                return write(unit)

        for unit, future in work.writers.map(timed, make(jobs, work), ahead=2):
            _finish(unit, future, work)

    return run(
        "encode",
        "latents",
        sources,
        None,
        folder,
        settings,
        resume,
        process,
        gather=lambda ledger, units: _gather(folder, header, ledger, units),
        compute=runner.options,
        quiet=quiet,
    )


class _Encoded(NamedTuple):
    """One of a batch's images."""

    posterior: DiagonalGaussian
    mirrored: DiagonalGaussian | None
    place: int
    """In both."""


class _UnitRows(NamedTuple):
    claim: Claim
    rows: list[tuple[Input[None], LatentsRow]]


def _rows(
    found: _Encoded | UserError, item: Input[Image], store: StoredDtype, work: Work
) -> Iterator[tuple[Input[None], LatentsRow]]:
    try:
        if isinstance(found, UserError):
            raise found
        entry = unplaced_entry(item.job.name, item.content.geometry, item.sha256)
        yield (
            item.emptied(),
            latents_row(entry, found.posterior, found.place, store, found.mirrored),
        )
    except UserError as error:
        work.fail(item.job, error)


def _finish(unit: _UnitRows, future: "Future[list[Record]]", work: Work) -> None:
    try:
        records = future.result()
    except FatalError:
        raise
    except UserError as error:
        for item, _ in unit.rows:
            work.fail(item.job, error)
    else:
        work.summary.bytes_out += records[0].bytes_out
        for (item, _), record in zip(unit.rows, records, strict=True):
            work.done(item.job, record)


def _check_folder(folder: Path, sources: Sequence[Source]) -> None:
    """Raise `UserError` if a folder holds latents, but for those that this program made of some of these sources."""
    if not stored_files(folder):
        return
    if not Ledger.exists(folder, "latents"):
        raise UserError(f"{folder}: holds latents already; give another folder, or --overwrite to replace them")
    there: set[str] = set()
    for path in [folder / INDEX] if (folder / INDEX).is_file() else stored_shards(folder):
        with contextlib.suppress(UserError):  # a damaged one is made again
            there |= {entry.path for entry in read_index(path).entries}
    if there and not there & {source.name for source in sources}:
        raise UserError(
            f"{folder}: holds latents of other images, such as {min(there)}; give another folder, or --overwrite "
            "to replace them"
        )


def _gather(folder: Path, header: LatentsHeader, ledger: Ledger, units: Sequence[Unit]) -> None:
    """The index over all that is done so far, by any process; then the shards go that nobody needs any more."""
    shards: set[str] = set()
    entries: list[LatentsEntry] = []
    for unit in units:
        wanted = {(r.output, r.path) for r in ledger.records(unit)}
        there = {shard for shard, _ in wanted if (folder / shard).is_file()}
        entries += [e for shard in there for e in read_index(folder / shard).entries if (shard, e.path) in wanted]
        shards |= there
    with disk_errors(folder / INDEX):
        write_index(folder, header, entries)
    with disk_errors(folder):
        remove_needless([path for path in stored_shards(folder) if path.name not in shards], ledger, units)
