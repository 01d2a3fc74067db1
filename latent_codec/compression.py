"""Folders of images -> folders of latents, and back. One bad image never ends the work of the others."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from latent_codec.bottlenecks import DiagonalGaussian
from latent_codec.codec import Codec
from latent_codec.config import to_json
from latent_codec.errors import UserError
from latent_codec.files import DiskError, disk_errors
from latent_codec.images import DEFAULT_MAX_PIXELS, Image, ImageFormat, crop, image_bytes, pad, read_image
from latent_codec.inputs import Source, find_images
from latent_codec.latents import (
    INDEX,
    Entry,
    Header,
    Latents,
    Row,
    StoredDtype,
    header_of,
    read_index,
    row,
    stored_files,
    stored_shards,
    write_index,
    write_shards,
)
from latent_codec.ledger import Ledger, Record, digest, sha256_of
from latent_codec.noise import fold, normal, text_key
from latent_codec.pipeline import (
    RESUME,
    Compute,
    Input,
    Job,
    Networks,
    Output,
    Resume,
    Summary,
    Work,
    check_options,
    check_rgb,
    in_batches,
    run,
    write_outputs,
)
from latent_codec.plan import Unit


def parse_image(
    source: Source, data: bytes, *, factor: int, background: str, max_pixels: int
) -> tuple[tuple[int, ...], Image]:
    """An image padded to multiples of the factor, after its shape; raises `UserError` as `read_image` does."""
    image = read_image(data, max_pixels=max_pixels, background=background, name=source.name)
    pixels = pad(image.pixels, factor)
    return tuple(pixels.shape), Image(pixels, image.geometry)


def encode_folder(
    codec: Codec,
    where: str | Path,
    folder: Path,
    compute: Compute,
    *,
    store: StoredDtype = "float16",
    background: str = "#ffffff",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Store the posterior of every image found at `where` in `folder` (see `latent_codec.latents`).

    The images of a unit share shards: all are encoded anew if one of them is. Raises `UserError` before any work if
    nothing is found, an option makes no sense, the model is none of RGB images, or `folder` holds latents of other
    images; and as `pipeline.run` does.
    """
    check_rgb(codec)
    check_options(background, max_pixels)
    networks = Networks(codec, compute)
    sources = find_images(where)
    header = header_of(codec, store)
    if not resume.overwrite:
        _check_folder(folder, sources)
    parse = partial(parse_image, factor=codec.factor, background=background, max_pixels=max_pixels)
    settings = {
        "header": to_json(header),
        "background": background,
        "dtype": compute.dtype,
        "tile": networks.changing_tile,
    }

    def make(jobs: Iterable[Job], work: Work) -> Iterator[_UnitRows]:
        found = in_batches(
            jobs,
            Source.read_bytes,
            parse,
            batch_size=compute.batch_size,
            resume=resume,
            work=work,
            is_large=networks.cuts_pixels,
            is_whole=_is_whole,
        )
        for unit, inputs in groupby(found, lambda batch: batch[0].job.claim.unit.name):
            rows: list[tuple[Input[Image], Row]] = []
            for batch in inputs:
                posterior = networks.encode([i.content.pixels for i in batch])
                rows.extend(_rows(posterior, batch, store, work))
            if rows:
                yield _UnitRows(unit, rows)

    def write(unit: _UnitRows) -> list[Record]:
        ordered = sorted((one for _, one in unit.rows), key=lambda one: one.entry.path)
        settings = unit.rows[0][0].job.claim.settings
        name = _shard_name(unit.name, settings, [(one.entry.path, one.entry.sha256) for one in ordered])
        with disk_errors(folder, "latents"):
            shards = {entry.path: entry.shard for entry in write_shards(folder, header, name, ordered)}
            sizes = {shard: (folder / shard).stat().st_size for shard in shards.values()}
            hashes = {shard: sha256_of(folder / shard) for shard in sizes}
        return [i.record(shard := shards[i.job.name], sizes[shard], hashes[shard]) for i, _ in unit.rows]

    def process(jobs: Iterable[Job], work: Work) -> None:
        for unit, future in work.writers.map(write, make(jobs, work), ahead=2):
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
        workers=compute.workers,
        quiet=quiet,
    )


class _UnitRows(NamedTuple):
    name: str
    rows: list[tuple[Input[Image], Row]]


def _rows(
    posterior: DiagonalGaussian, batch: list[Input[Image]], store: StoredDtype, work: Work
) -> Iterator[tuple[Input[Image], Row]]:
    for index, item in enumerate(batch):
        try:
            yield item, row(item.job.name, posterior, index, item.content.geometry, item.sha256, store)
        except UserError as error:
            work.fail(item.job, error)


def _finish(unit: _UnitRows, future: "Future[list[Record]]", work: Work) -> None:
    try:
        records = future.result()
    except DiskError:
        raise
    except UserError as error:
        for item, _ in unit.rows:
            work.fail(item.job, error)
    else:
        work.summary.bytes_out += sum({record.output: record.bytes_out for record in records}.values())
        for (item, _), record in zip(unit.rows, records, strict=True):
            work.done(item.job, record)


def _shard_name(unit: str, settings: str, images: Iterable[tuple[str, str]]) -> str:
    """What a unit's shards are called, by the (path, SHA-256) of all that is in them.

    Other contents have another name, so that an index stays true until the next one is written, whatever happens
    between.
    """
    return f"{unit}-{digest([settings, sorted(images)])[:8]}"


def _unit_of(shard: str) -> str:
    return shard.split("-")[1]


def _is_whole(records: Sequence[Record]) -> bool:
    """Whether the shards of these images of a unit hold all of them and no others."""
    if not records:
        return True
    images = [(record.path, record.sha256) for record in records]
    name = _shard_name(_unit_of(records[0].output), records[0].settings, images)
    return all(record.output.startswith(f"latents-{name}-") for record in records)


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
        _remove_needless([path for path in stored_shards(folder) if path.name not in shards], ledger, units)


def _remove_needless(shards: Sequence[Path], ledger: Ledger, units: Sequence[Unit]) -> None:
    """Shards that no record names; what another process works on it may be about to record."""
    of_name = {unit.name: unit for unit in units}
    for path in shards:
        unit = of_name.get(_unit_of(path.name))
        if unit is None:
            path.unlink(missing_ok=True)
            continue
        with ledger.idle(unit.name) as idle:
            if idle and path.name not in {record.output for record in ledger.records(unit)}:
                path.unlink(missing_ok=True)


def decode_folder(
    codec: Codec,
    where: Path,
    folder: Path,
    compute: Compute,
    *,
    image_format: ImageFormat = "png",
    sample: int | None = None,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Decode a folder of latents; `a/b.jpg` becomes `folder/a/b.jpg.png`.

    The posterior's mode is decoded, or with `sample` a draw that depends on (sample, path) alone. Raises `UserError`
    before any work if the latents are another model's, and as `pipeline.run` does.
    """
    check_rgb(codec)
    networks = Networks(codec, compute)
    latents = Latents(where, model_id=codec.model_id)
    rows = {entry.path: index for index, entry in enumerate(latents.entries)}
    z = codec.config.latent_channels
    settings = {
        "model_id": codec.model_id,
        "sample": sample,
        "format": image_format,
        "dtype": compute.dtype,
        "tile": networks.changing_tile,
    }

    def sides(entry: Entry) -> tuple[int, int]:
        return -(-entry.geometry.height // codec.factor), -(-entry.geometry.width // codec.factor)

    def source(entry: Entry) -> Source:
        h, w = sides(entry)
        return Source(entry.path, where / entry.shard, entry.row, 2 * 4 * z * h * w)

    def load(source: Source) -> bytes:
        posterior = latents.posterior(rows[source.name])
        return torch.stack([posterior.mean, posterior.logvar]).numpy().tobytes()

    def parse(source: Source, data: bytes) -> tuple[tuple[int, ...], DiagonalGaussian]:
        h, w = sides(latents.entries[rows[source.name]])
        both = torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(2, 1, -1, h, w)
        if both.shape[2] != z:
            raise UserError(f"{source.name}: {source.path.name} holds {both.shape[2]} latent channels, not {z}")
        return tuple(both.shape[2:]), DiagonalGaussian(both[0], both[1])

    def make(jobs: Iterable[Job], work: Work) -> Iterator[Output]:
        for batch in in_batches(
            jobs, load, parse, batch_size=compute.batch_size, resume=resume, work=work, is_large=networks.cuts_latents
        ):
            pixels = networks.decode_uint8([_drawn(i.job.name, i.content, sample)[0] for i in batch])
            for item, image in zip(batch, pixels, strict=True):
                geometry = latents.entries[rows[item.job.name]].geometry
                yield Output(item, partial(image_bytes, crop(image, geometry), geometry, image_format))

    def process(jobs: Iterable[Job], work: Work) -> None:
        write_outputs(make(jobs, work), folder, work)

    sources = sorted(source(entry) for entry in latents.entries)
    outputs = [f"{s.name}.{image_format}" for s in sources]
    return run(
        "decode", "images", sources, outputs, folder, settings, resume, process, workers=compute.workers, quiet=quiet
    )


def _drawn(path: str, posterior: DiagonalGaussian, sample: int | None) -> torch.Tensor:
    """The latent (1, z, h, w) to decode."""
    if sample is None:
        return posterior.mode()
    key = fold(sample, text_key(path))
    return posterior.sample(normal(key[None], tuple(posterior.mean.shape[1:])))
