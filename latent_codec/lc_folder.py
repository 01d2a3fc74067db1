"""Folders of images -> folders of `.lc` files, and back. One bad file never ends the work of the others."""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from latent_codec import bitstream
from latent_codec.bitstream import SUFFIX, Stream
from latent_codec.codec import Codec
from latent_codec.compression import parse_image
from latent_codec.errors import UserError
from latent_codec.images import DEFAULT_MAX_PIXELS, Image, ImageFormat, crop, image_bytes
from latent_codec.inputs import Source, find_files, find_images
from latent_codec.latents import INDEX, stored_files
from latent_codec.noise import fold, text_key
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
from latent_codec.prior import PriorKind
from latent_codec.quantizer import DEAD_ZONE, Quantized
from latent_codec.rate import Rate, choose
from latent_codec.streams import Coded, StreamCodec, StreamReader

PRIORS = get_args(PriorKind)


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
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Compress every image found at `where`; `a/b.jpg` becomes `folder/a/b.jpg.lc`.

    The posterior's mean is rounded, or with `sample` dithered by (sample, name) alone: what is decoded is then a draw
    around it. `prior` is the kind to code under, by default the best the model has. Raises `UserError` before any work
    if nothing is found, an option makes no sense, the model has no such prior or is none of RGB images, or `folder`
    holds latents; and as `pipeline.run` does.
    """
    check_rgb(codec)
    check_options(background, max_pixels)
    if sample is not None and not 0 <= sample < 2**64:
        raise UserError(f"--sample {sample} is no seed of 64 bits; give one from 0 to {2**64 - 1}")
    networks = Networks(codec, compute)
    coder = StreamCodec(codec, compute.device, prior)
    sources = find_images(where)
    if stored_files(folder):
        raise UserError(f"{folder}: holds latents for training on; give another folder for .lc files")
    settings = {
        "stream_id": coder.stream_id.hex(),
        "rate": dataclasses.asdict(rate),
        "sample": sample,
        "dead_zone": DEAD_ZONE,
        "background": background,
        "dtype": compute.dtype,
        "tile": networks.changing_tile,
    }
    parse = partial(parse_image, factor=codec.factor, background=background, max_pixels=max_pixels)

    def make(jobs: Iterable[Job], work: Work) -> Iterator[Output]:
        for batch in in_batches(
            jobs,
            Source.read_bytes,
            parse,
            batch_size=compute.batch_size,
            resume=resume,
            work=work,
            is_large=networks.cuts_pixels,
        ):
            means = networks.encode([i.content.pixels for i in batch]).mean
            for item, coded in _coded(coder, batch, means, rate, sample, compute.tile, work):
                geometry = item.content.geometry
                yield Output(item, lambda data=coded.data: data, geometry.width * geometry.height)

    outputs = [f"{s.name}{SUFFIX}" for s in sources]

    def process(jobs: Iterable[Job], work: Work) -> None:
        write_outputs(make(jobs, work), folder, work)

    return run(
        "encode", "streams", sources, outputs, folder, settings, resume, process, workers=compute.workers, quiet=quiet
    )


def _coded(
    coder: StreamCodec,
    batch: list[Input[Image]],
    means: torch.Tensor,
    rate: Rate,
    sample: int | None,
    tile: int | None,
    work: Work,
) -> Iterator[tuple[Input[Image], Coded]]:
    """Streams of a batch from its posterior means (b, z, h, w): together where all take one step, else one by one."""
    quantized: list[tuple[Input[Image], Quantized]] = []
    for item, mean in zip(batch, means, strict=True):
        name, (pixels, geometry) = item.job.name, item.content
        seed = None if sample is None else dither_seed(sample, name)
        try:
            if not bool(torch.isfinite(mean).all()):
                raise UserError("the model's latents are not finite; try --dtype float32")
            if rate.fixed_step is not None:
                quantized.append((item, coder.quantize(mean, rate.fixed_step, seed)))
            else:
                yield item, choose(coder, mean, geometry, crop(pixels, geometry), seed, rate, tile)
        except UserError as error:
            work.fail(item.job, error)
    if quantized:
        coded = coder.compress([(q, item.content.geometry) for item, q in quantized])
        yield from zip((item for item, _ in quantized), coded, strict=True)


def decode_streams(
    codec: Codec,
    where: Path,
    folder: Path,
    compute: Compute,
    *,
    image_format: ImageFormat = "png",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    resume: Resume = RESUME,
    quiet: bool = False,
) -> Summary:
    """Decode one `.lc` file or a folder's; `a/b.jpg.lc` becomes `folder/a/b.jpg.png`.

    Damaged files and those of another model fail, the others go on. Raises `UserError` before any work if there are
    none or the model has no prior, and as `pipeline.run` does.
    """
    check_rgb(codec)
    check_options("#ffffff", max_pixels)
    networks = Networks(codec, compute)
    sources = find_streams(where)
    if not sources:
        raise UserError(f"{where}: no {SUFFIX} files there; make them with `latent-codec encode`")
    reader = StreamReader(codec, compute.device)
    settings = {
        "model_id": codec.model_id,
        "format": image_format,
        "dtype": compute.dtype,
        "tile": networks.changing_tile,
    }

    def load(source: Source) -> bytes:
        return bitstream.read_bytes(source.path)

    def parse(source: Source, data: bytes) -> tuple[tuple[int, ...], Stream]:
        stream = bitstream.unpack(data, max_pixels=max_pixels)
        prior, shape = reader.check(stream)
        return (PRIORS.index(prior), *shape), stream

    def make(jobs: Iterable[Job], work: Work) -> Iterator[Output]:
        for batch in in_batches(
            jobs, load, parse, batch_size=compute.batch_size, resume=resume, work=work, is_large=networks.cuts_latents
        ):
            latents: list[tuple[Input[Stream], torch.Tensor]] = []
            for item, z in zip(batch, reader.decompress([i.content for i in batch]), strict=True):
                if isinstance(z, UserError):
                    work.fail(item.job, z)
                else:
                    latents.append((item, z))
            if not latents:
                continue
            pixels = networks.decode_uint8([z for _, z in latents])
            for (item, _), image in zip(latents, pixels, strict=True):
                geometry = item.content.header.geometry
                yield Output(item, partial(image_bytes, crop(image, geometry), geometry, image_format))

    outputs = [f"{s.name.removesuffix(SUFFIX)}.{image_format}" for s in sources]

    def process(jobs: Iterable[Job], work: Work) -> None:
        write_outputs(make(jobs, work), folder, work)

    return run(
        "decode", "images", sources, outputs, folder, settings, resume, process, workers=compute.workers, quiet=quiet
    )


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
