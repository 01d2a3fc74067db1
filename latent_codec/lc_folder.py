"""Folders of images -> folders of `.lc` files, and back. One bad file never ends the work of the others."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from latent_codec import bitstream
from latent_codec.bitstream import SUFFIX, Stream
from latent_codec.codec import Codec
from latent_codec.errors import UserError
from latent_codec.files import atomic_path, check_name, make_folder
from latent_codec.images import DEFAULT_MAX_PIXELS, crop
from latent_codec.inputs import Source, find_files, find_images
from latent_codec.latents import INDEX, stored_files
from latent_codec.noise import fold, text_key
from latent_codec.pipeline import (
    Compute,
    Decoded,
    ImageFormat,
    Networks,
    Read,
    Summary,
    batches,
    check_absent,
    check_options,
    check_rgb,
    image_batches,
    in_threads,
    successes,
    write_images,
)
from latent_codec.prior import PriorKind
from latent_codec.quantizer import Quantized
from latent_codec.rate import Rate, choose
from latent_codec.streams import Coded, StreamCodec, StreamReader


def dither_seed(seed: int, name: str) -> int:
    """64 bits, of the dither of one image, from those a user gave for all and the image's name."""
    return int(fold(seed, text_key(name))) % 2**64


def encode_streams(
    codec: Codec,
    where: str | Path,
    folder: Path,
    compute: Compute,
    *,
    rate: Rate,
    sample: int | None = None,
    prior: PriorKind | None = None,
    background: str = "#ffffff",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Compress every image found at `where`; `a/b.jpg` becomes `folder/a/b.jpg.lc`.

    The posterior's mean is rounded, or with `sample` dithered by (sample, name) alone: what is decoded is then a draw
    around it. `prior` is the kind to code under, by default the best the model has. Raises `UserError` before any work
    if nothing is found, an option makes no sense, the model has no such prior or is none of RGB images, or `folder`
    cannot be written into, holds latents, or holds outputs already that `overwrite` does not let go.
    """
    started = time.monotonic()
    check_rgb(codec)
    check_options(background, max_pixels)
    if sample is not None and not 0 <= sample < 2**64:
        raise UserError(f"--sample {sample} is no seed of 64 bits; give one from 0 to {2**64 - 1}")
    networks = Networks(codec, compute)
    coder = StreamCodec(codec, compute.device, prior)
    sources = find_images(where)
    if stored_files(folder):
        raise UserError(f"{folder}: holds latents for training on; give another folder for .lc files")
    check_absent((_output(folder, s.name) for s in sources), overwrite=overwrite)
    make_folder(folder)
    summary = Summary("encoded", found=len(sources))
    bar = tqdm(total=len(sources), desc="encode", unit="image", disable=quiet or None)

    def files() -> Iterator[_File]:
        for batch in image_batches(networks, sources, summary, bar, background=background, max_pixels=max_pixels):
            means = networks.encode([r.pixels for r in batch]).mean
            yield from _coded(coder, batch, means, rate, sample, compute.tile, summary, bar)

    def write(file: _File) -> None:
        path = _output(folder, file.read.source.name)
        try:
            check_name(file.read.source.name)
            with atomic_path(path) as temporary:
                temporary.write_bytes(file.coded.data)
        except OSError as error:
            raise UserError(f"{file.read.source.name}: {path} cannot be written: {error.strerror or error}") from error

    with bar:
        for (image, coded), future in in_threads(write, files(), compute.workers):
            try:
                future.result()
            except Exception as error:
                summary.fail(image.source.name, error)
            else:
                summary.done += 1
                summary.bytes_in += len(image.data)
                summary.bytes_out += len(coded.data)
                summary.pixels += image.geometry.width * image.geometry.height
            bar.update()
    summary.seconds = time.monotonic() - started
    return summary


class _File(NamedTuple):
    read: Read
    coded: Coded


def _output(folder: Path, name: str) -> Path:
    return folder / f"{name}{SUFFIX}"


def _coded(
    coder: StreamCodec,
    batch: list[Read],
    means: torch.Tensor,
    rate: Rate,
    sample: int | None,
    tile: int | None,
    summary: Summary,
    bar: Any,
) -> Iterator[_File]:
    """Streams of a batch from its posterior means (b, z, h, w): together where all take one step, else one by one."""
    quantized: list[tuple[Read, Quantized]] = []
    for image, mean in zip(batch, means, strict=True):
        name = image.source.name
        seed = None if sample is None else dither_seed(sample, name)
        try:
            if not bool(torch.isfinite(mean).all()):
                raise UserError("the model's latents are not finite; try --dtype float32")
            if rate.fixed_step is not None:
                quantized.append((image, coder.quantize(mean, rate.fixed_step, seed)))
            else:
                pixels = crop(image.pixels, image.geometry)
                yield _File(image, choose(coder, mean, image.geometry, pixels, seed, rate, tile))
        except UserError as error:
            summary.fail(name, error)
            bar.update()
    if quantized:
        coded = coder.compress([(q, image.geometry) for image, q in quantized])
        yield from (_File(image, c) for (image, _), c in zip(quantized, coded, strict=True))


def decode_streams(
    codec: Codec,
    where: Path,
    folder: Path,
    compute: Compute,
    *,
    image_format: ImageFormat = "png",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Decode one `.lc` file or a folder's; `a/b.jpg.lc` becomes `folder/a/b.jpg.png`.

    Damaged files and those of another model fail, the others go on. Raises `UserError` before any work if there are
    none, if the model has no prior, if `folder` cannot be written into, or if outputs exist and `overwrite` is not set.
    """
    started = time.monotonic()
    check_rgb(codec)
    check_options("#ffffff", max_pixels)
    networks = Networks(codec, compute)
    sources = find_streams(where)
    if not sources:
        raise UserError(f"{where}: no {SUFFIX} files there; make them with `latent-codec encode`")
    reader = StreamReader(codec, compute.device)
    outputs = {s.name: folder / f"{s.name.removesuffix(SUFFIX)}.{image_format}" for s in sources}
    check_absent(outputs.values(), overwrite=overwrite)
    make_folder(folder)
    summary = Summary("decoded", found=len(sources))
    bar = tqdm(total=len(sources), desc="decode", unit="image", disable=quiet or None)

    def read(source: Source) -> _Found:
        try:
            stream = bitstream.read(source.path, max_pixels=max_pixels)
            return _Found(source, stream, *reader.check(stream))
        except OSError as error:
            raise UserError(f"{source.name}: cannot be read: {error.strerror or error}") from error

    def decoded() -> Iterator[Decoded]:
        found = successes(in_threads(read, sources, compute.workers), summary, bar)
        for batch in batches(
            found, compute.batch_size, lambda f: (f.prior, f.shape), alone=lambda f: networks.cuts(*f.shape[1:])
        ):
            latents: list[tuple[_Found, torch.Tensor]] = []
            for item, z in zip(batch, reader.decompress([f.stream for f in batch]), strict=True):
                if isinstance(z, UserError):
                    summary.fail(item.source.name, z)
                    bar.update()
                else:
                    latents.append((item, z))
            if not latents:
                continue
            pixels = networks.decode_uint8([z for _, z in latents])
            for (item, _), image in zip(latents, pixels, strict=True):
                name = item.source.name
                yield Decoded(name, image, item.stream.header.geometry, outputs[name])

    with bar:
        write_images(decoded(), image_format, compute.workers, summary, bar)
    summary.bytes_in = sum(s.size for s in sources)
    summary.seconds = time.monotonic() - started
    return summary


class _Found(NamedTuple):
    source: Source
    stream: Stream
    prior: PriorKind
    shape: tuple[int, int, int]  # of the latents (z, h, w)


def is_streams(where: Path) -> bool:
    """Whether a place is for `decode_streams` rather than for latents: a `.lc` file, or a folder that has some."""
    return bool(find_streams(where)) or (where.suffix == SUFFIX and not where.is_dir())


def find_streams(where: Path) -> list[Source]:
    """`.lc` files at a place; raises `UserError` if latents lie beside them."""
    sources = find_files(where, SUFFIX)
    if sources and where.is_dir() and (where / INDEX).is_file():
        raise UserError(
            f"{where}: holds both latents ({INDEX}) and {len(sources)} {SUFFIX} files, which could decode to the same "
            "names; move one kind into a folder of its own"
        )
    return sources
