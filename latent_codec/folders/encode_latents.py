"""Encode folders of images to latents in safetensors. One bad image never ends the work of the others."""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from latent_codec.errors import UserError
from latent_codec.folders.jobs import Input, Resume, Work
from latent_codec.folders.read_images import ImageReader
from latent_codec.folders.resume.ledger import Kind, Ledger, Record
from latent_codec.folders.resume.units import Unit
from latent_codec.folders.run import run
from latent_codec.folders.shards import earlier_shards, is_shard_of, remove_needless, shard_name
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Image, mirrored
from latent_codec.images.read import ReadOptions
from latent_codec.images.sources import ListOptions, Source, list_images
from latent_codec.inference.out_of_memory import OutOfMemoryBackoff
from latent_codec.inference.runner import Runner
from latent_codec.latents import format as stored
from latent_codec.model.checks import check_channels, check_gaussian, check_prefix
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.storage.files import disk_errors, sha256_of
from latent_codec.storage.json_config import to_json
from latent_codec.storage.tensors import open_tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentsOptions:
    """Choose how images become latents."""

    store: stored.StoredDtype = "float16"
    """Number type on disk."""
    flips: bool = False
    """Store the posterior of the image mirrored left to right as well."""
    channels: int | None = None
    """Store this prefix of the channels, one of the model's; None stores all."""
    read: ReadOptions = ReadOptions()
    search: ListOptions = ListOptions()


def encode_latents(
    runner: Runner,
    where: str | Path,
    folder: Path,
    options: LatentsOptions = LatentsOptions(),
    *,
    resume: Resume = Resume(),
    quiet: bool = False,
) -> Summary:
    """Store the posterior of every image found at `where` in `folder` (see `latent_codec.latents.format`).

    The images of a unit share a shard. Raises `UserError` before any work if nothing is found, the model is none of
    grey or RGB images, has no Gaussian posterior or no such prefix, or `folder` holds latents of other images; and as
    `run` does.
    """
    check_channels(runner.codec)
    check_gaussian(runner.codec)
    if options.channels is not None:
        check_prefix(runner.codec, options.channels)
    encoder = _LatentsEncoder(runner, options)
    listing = list_images(where, options.search.without(folder))
    if not resume.overwrite:
        _check_folder(folder, listing.sources)
    return run(listing, encoder, _ShardWriter(folder, encoder.header), resume=resume, quiet=quiet)


class _EncodedImage(NamedTuple):
    posterior: DiagonalGaussian
    mirrored: DiagonalGaussian | None
    place: int
    """Index of the image in both posteriors, which are a batch's."""


class _LatentsEncoder(ImageReader):
    """Make a row of a shard of each image."""

    kind: Kind = "latents"

    def __init__(self, runner: Runner, options: LatentsOptions) -> None:
        super().__init__(runner, options.read)
        self._codec, self._options, self._backoff = runner.codec, options, OutOfMemoryBackoff()
        self.header = stored.latents_header(runner.codec, options.store, options.flips, options.channels)

    @property
    def settings(self) -> dict[str, Any]:
        """Return what latents depend on beside their images, as JSON."""
        read = self._options.read
        resize = {} if read.resize is None else {"resize": to_json(read.resize)}
        return {"header": to_json(self.header), "background": read.background} | resize | self.runner.settings

    def name(self, source: str) -> str:
        return source

    def make(self, batches: Iterable[list[Input[Image]]], work: Work) -> Iterator[Input[stored.LatentsRow]]:
        for batch in batches:
            rows: list[Input[stored.LatentsRow]] = []
            with work.summary.timing("network"):
                encoded = self._backoff.map(self._encode, batch, math.prod(batch[0].shape))
                for item, (found, flipped, place) in work.sound(encoded):
                    try:
                        entry = _entry(item)
                        rows.append(item.holding(stored.latents_row(entry, found, place, self._options.store, flipped)))
                    except (UserError, OSError) as error:
                        work.fail(item.job, error)
            yield from rows

    def _encode(self, batch: list[Input[Image]]) -> list[_EncodedImage]:
        labels = self._codec.class_numbers([item.job.source.label for item in batch])
        images = [item.content for item in batch]
        found, flipped = self._posterior([image.pixels for image in images], labels), None
        if self._options.flips:  # a batch of their own: memory is that of one
            flipped = self._posterior([mirrored(image, self._codec.factor) for image in images], labels)
        return [_EncodedImage(found, flipped, place) for place in range(len(batch))]

    def _posterior(self, pixels: list[torch.Tensor], labels: torch.Tensor) -> DiagonalGaussian:
        found = self.runner.encode(pixels, labels)
        assert isinstance(found, DiagonalGaussian)
        return found if self._options.channels is None else found.prefix(self._options.channels)


def _entry(item: Input[Image]) -> stored.LatentsEntry:
    """Return an image's entry, with the class, the key and the caption that a tar file gives it."""
    source, entry = item.job.source, stored.unplaced_entry(item.job.name, item.content.geometry, item.sha256)
    text = source.read_sidecars().get(".txt")
    caption = None if text is None else text.decode(errors="replace")
    return dataclasses.replace(entry, label=source.label, key=source.key, caption=caption)


class _ShardWriter:
    """Write a shard for each unit, and an index over all shards."""

    kind: Kind = "latents"
    is_shared = has_index = True

    def __init__(self, folder: Path, header: stored.LatentsHeader) -> None:
        self.folder, self._header = folder, header
        self._written: set[str] = set()
        """Images whose latents this process has written, which the index must have."""

    def write(self, products: Iterable[Input[stored.LatentsRow]], work: Work) -> None:
        units = (list(rows) for _, rows in groupby(products, lambda row: row.job.claim))
        written = work.writers.map(partial(self._write, work=work), units, ahead=2)
        for rows, records in work.results(written, lambda rows: [row.job for row in rows]):
            work.summary.bytes_out += records[0].bytes_out
            for row, record in zip(rows, records, strict=True):
                work.done(row.job, record)

    def _write(self, rows: list[Input[stored.LatentsRow]], work: Work) -> list[Record]:
        ordered = sorted((row.content for row in rows), key=lambda row: row.entry.path)
        claim, images = rows[0].job.claim, [(row.entry.path, row.entry.sha256) for row in ordered]
        name = shard_name(claim.unit.name, claim.settings, images)
        done = {row.entry.path for row in ordered}
        failed = {source.name for source in claim.unit.sources} - done
        if failed:  # what was good before and is damaged now keeps its row
            ordered = [*ordered, *_rows_of(earlier_shards(claim, self.folder), failed)]
        with work.summary.timing("writing"), disk_errors(self.folder, "latents"):
            shard = stored.write_shard(self.folder, self._header, name, ordered)[0].shard
            size, digest = (self.folder / shard).stat().st_size, sha256_of(self.folder / shard)
        self._written |= done
        return [row.record(shard, size, digest) for row in rows]

    def gather(self, ledger: Ledger, units: Sequence[Unit]) -> None:
        """Write the index over all that is done so far, by any process; then remove shards that nobody needs."""
        shards: set[str] = set()
        entries: list[stored.LatentsEntry] = []
        for unit in units:
            places = {record.path: record.output for record in ledger.records(unit)}
            there = {shard for shard in places.values() if (self.folder / shard).is_file()}
            there = there or self._kept(unit)
            names = {source.name for source in unit.sources}
            for shard in sorted(there):
                # A row without a record is of an image that fails now and was good before.
                found = stored.read_index(self.folder / shard).entries
                entries += [e for e in found if e.path in names and places.get(e.path, shard) == shard]
            shards |= there
        with disk_errors(self.folder / stored.INDEX):
            stored.write_index(self.folder, self._header, entries)
        if lost := self._written - {entry.path for entry in entries}:
            raise UserError(
                f"{self.folder}: latents of {len(lost)} images, such as {min(lost)}, were written and are gone again; "
                "something else changes this folder; end it and repeat the same command"
            )
        with disk_errors(self.folder):
            needless = [path for path in stored.stored_shards(self.folder) if path.name not in shards]
            remove_needless(needless, ledger, units, others_too=ledger.replaces_all)

    def _kept(self, unit: Unit) -> set[str]:
        """Return the newest shard of a unit whose images all fail now, and were good before."""
        found = [path for path in stored.stored_shards(self.folder) if is_shard_of(path, unit)]
        same = [path for path in found if stored.read_index(path).header == self._header]
        return {max(same, key=lambda path: path.stat().st_mtime_ns).name} if same else set()


def _rows_of(shards: Sequence[Path], names: set[str]) -> Iterator[stored.LatentsRow]:
    """Yield the rows of images in shards, as they are."""
    for path in shards:
        with contextlib.suppress(UserError, OSError, SafetensorError), open_tensors(path) as file:
            header, entries = stored.read_index(path)
            moments = stored.moment_names(flip=False) + (stored.moment_names(flip=True) if header.flips else ())
            for entry in entries:
                if entry.path in names:
                    size = stored.latent_size(entry.geometry, header.factor)
                    found = (file.get_slice(stored.tensor_name(moment, size))[entry.row] for moment in moments)
                    yield stored.LatentsRow(entry, *found)


def _check_folder(folder: Path, sources: Sequence[Source]) -> None:
    """Raise `UserError` if a folder holds latents, except those that this program made of some of these sources."""
    if not stored.stored_files(folder):
        return
    if not Ledger.exists(folder, "latents"):
        raise UserError(f"{folder}: holds latents already; give another folder, or --overwrite to replace them")
    there: set[str] = set()
    for path in [folder / stored.INDEX] if (folder / stored.INDEX).is_file() else stored.stored_shards(folder):
        with contextlib.suppress(UserError):  # a damaged one is made again
            there |= {entry.path for entry in stored.read_index(path).entries}
    if there and not there & {source.name for source in sources}:
        raise UserError(
            f"{folder}: holds latents of other images, such as {min(there)}; give another folder, or --overwrite "
            "to replace them"
        )
