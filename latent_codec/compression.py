"""Folders of images -> folders of latents, and back. One bad image never ends the work of the others."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from latent_codec.bottlenecks import DiagonalGaussian
from latent_codec.codec import Codec
from latent_codec.compute import Compute, Halving, Networks
from latent_codec.config import to_json
from latent_codec.errors import FatalError, UserError
from latent_codec.files import disk_errors
from latent_codec.images import DEFAULT_MAX_PIXELS, Geometry, Image, ImageFormat, mirrored, pad, read_image
from latent_codec.inputs import Source, find_images
from latent_codec.latent_files import (
    INDEX,
    Entry,
    Header,
    Row,
    StoredDtype,
    header_of,
    latent_size,
    read_index,
    row,
    stored_files,
    stored_shards,
    write_index,
    write_shard,
)
from latent_codec.latents import Latents
from latent_codec.ledger import Claim, Ledger, Record, sha256_of
from latent_codec.noise import fold, normal, text_key
from latent_codec.outputs import Output, image_output, make_outputs
from latent_codec.pipeline import (
    RESUME,
    Input,
    Job,
    Resume,
    Work,
    check_channels,
    check_gaussian,
    check_options,
    in_batches,
    run,
)
from latent_codec.plan import Unit
from latent_codec.shards import are_whole, remove_needless, shard_name
from latent_codec.summary import Summary
from latent_codec.workers import Processes


def parse_image(
    source: Source, data: bytes, *, factor: int, background: str, max_pixels: int
) -> tuple[tuple[int, ...], Image]:
    """An image padded to multiples of the factor, after its shape; raises `UserError` as `read_image` does."""
    image = read_image(data, max_pixels=max_pixels, background=background, name=source.name)
    pixels = pad(image.pixels, factor)
    return tuple(pixels.shape), Image(pixels, image.geometry)


def parse_image_in(processes: Processes, source: Source, data: bytes, **options: Any) -> tuple[tuple[int, ...], Image]:
    """`parse_image` with its options, in one of the processes; raises as it and `Processes.call` do."""
    pixels, geometry = processes.call(_parse_array, source, data, options)
    return pixels.shape, Image(torch.from_numpy(pixels), geometry)


def _parse_array(source: Source, data: bytes, options: dict[str, Any]) -> tuple[np.ndarray, Geometry]:
    """An array: between processes a tensor would take a file handle and shared memory, of which there may be little."""
    pixels, geometry = parse_image(source, data, **options)[1]
    return pixels.numpy(), geometry


def encode_folder(
    codec: Codec,
    where: str | Path,
    folder: Path,
    compute: Compute,
    *,
    store: StoredDtype = "float16",
    flips: bool = False,
    background: str = "#ffffff",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Store the posterior of every image found at `where` in `folder` (see `latent_codec.latent_files`), with `flips`
    that of the mirrored image as well.

    The images of a unit share a shard: all are encoded anew if one of them is. Raises `UserError` before any work if
    nothing is found, an option makes no sense, the model is none of grey or RGB images or has no Gaussian posterior, or
    `folder` holds latents of other images; and as `pipeline.run` does.
    """
    check_channels(codec)
    check_gaussian(codec)
    check_options(background, max_pixels)
    networks = Networks(codec, compute)
    sources = find_images(where)
    header = header_of(codec, store, flips)
    if not resume.overwrite:
        _check_folder(folder, sources)
    options = {"factor": codec.factor, "background": background, "max_pixels": max_pixels}
    settings = {"header": to_json(header), "background": background} | networks.settings
    fitting = Halving()

    def make(jobs: Iterable[Job], work: Work) -> Iterator[_UnitRows]:
        read = in_batches(
            jobs,
            Source.read_bytes,
            partial(parse, work.decoders),
            batch_size=compute.batch_size,
            resume=resume,
            work=work,
            is_large=networks.cuts_pixels,
            is_whole=are_whole,
        )
        for claim, inputs in groupby(read, lambda batch: batch[0].job.claim):
            rows: list[tuple[Input[None], Row]] = []
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
        found = networks.encode(pixels, labels)
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
        compute=compute,
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
    rows: list[tuple[Input[None], Row]]


def _rows(
    found: _Encoded | UserError, item: Input[Image], store: StoredDtype, work: Work
) -> Iterator[tuple[Input[None], Row]]:
    try:
        if isinstance(found, UserError):
            raise found
        geometry = item.content.geometry
        yield (
            item.emptied(),
            row(item.job.name, found.posterior, found.place, geometry, item.sha256, store, found.mirrored),
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


def _gather(folder: Path, header: Header, ledger: Ledger, units: Sequence[Unit]) -> None:
    """The index over all that is done so far, by any process; then the shards go that nobody needs any more."""
    shards: set[str] = set()
    entries: list[Entry] = []
    for unit in units:
        wanted = {(r.output, r.path) for r in ledger.records(unit)}
        there = {shard for shard, _ in wanted if (folder / shard).is_file()}
        entries += [e for shard in there for e in read_index(folder / shard).entries if (shard, e.path) in wanted]
        shards |= there
    with disk_errors(folder / INDEX):
        write_index(folder, header, entries)
    with disk_errors(folder):
        remove_needless([path for path in stored_shards(folder) if path.name not in shards], ledger, units)


def decode_folder(
    codec: Codec,
    where: Path,
    folder: Path,
    compute: Compute,
    *,
    image_format: ImageFormat = "png",
    sample: int | None = None,
    tar: bool = False,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Decode a folder of latents; `a/b.jpg` becomes `folder/a/b.jpg.png`, or with `tar` a member of a tar shard.

    The posterior's mode is decoded, or with `sample` a draw that depends on (sample, path) alone. Raises `UserError`
    before any work if the latents are another model's, and as `outputs.make_outputs` does.
    """
    check_channels(codec)
    networks = Networks(codec, compute)
    latents = Latents(where, model_id=codec.model_id)
    rows = {entry.path: index for index, entry in enumerate(latents.entries)}
    z = codec.config.latent_channels
    settings = {
        "model_id": codec.model_id,
        "sample": sample,
        "format": image_format,
    } | networks.settings
    fitting = Halving()

    def sides(entry: Entry) -> tuple[int, int]:
        return latent_size(entry.geometry, codec.factor)

    def source(entry: Entry) -> Source:
        h, w = sides(entry)
        return Source(entry.path, where / entry.shard, entry.row, 2 * 4 * z * h * w)

    def load(source: Source) -> bytes:
        posterior = latents.posterior(rows[source.name])
        return torch.stack([posterior.mean, posterior.logvar]).numpy().tobytes()

    def parse(source: Source, data: bytes) -> tuple[tuple[int, ...], DiagonalGaussian]:
        codec.class_numbers([source.label])
        h, w = sides(latents.entries[rows[source.name]])
        both = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(2, 1, -1, h, w)
        if both.shape[2] != z:
            raise UserError(f"{source.name}: {source.path.name} holds {both.shape[2]} latent channels, not {z}")
        return tuple(both.shape[2:]), DiagonalGaussian(both[0], both[1])

    def decode(batch: list[Input[DiagonalGaussian]]) -> Sequence[torch.Tensor]:
        labels = codec.class_numbers([i.job.source.label for i in batch])
        return networks.decode_uint8([_drawn(i.job.name, i.content, sample)[0] for i in batch], labels).unbind()

    def make(jobs: Iterable[Job], work: Work) -> Iterator[Output]:
        for batch in in_batches(
            jobs,
            load,
            parse,
            batch_size=compute.batch_size,
            resume=resume,
            work=work,
            is_large=networks.cuts_latents,
            is_whole=are_whole if tar else None,
        ):
            with work.summary.timing("network"):
                decoded = list(fitting(decode, batch, math.prod(batch[0].shape)))
            for item, pixels in decoded:
                geometry = latents.entries[rows[item.job.name]].geometry
                yield from image_output(item, f"{item.job.name}.{image_format}", pixels, geometry, image_format, work)

    sources = sorted(source(entry) for entry in latents.entries)
    names = [f"{s.name}.{image_format}" for s in sources]
    return make_outputs(
        "decode", "images", sources, names, folder, settings, resume, make, tar=tar, compute=compute, quiet=quiet
    )


def _drawn(path: str, posterior: DiagonalGaussian, sample: int | None) -> torch.Tensor:
    """The latent (1, z, h, w) to decode."""
    if sample is None:
        return posterior.mode()
    key = fold(sample, text_key(path))
    return posterior.sample(normal(key[None], tuple(posterior.mean.shape[1:])))
