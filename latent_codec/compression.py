"""Folders of images -> folders of latents, and back. One bad image never ends the work of the others."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from latent_codec.codec import Codec
from latent_codec.errors import UserError
from latent_codec.files import make_folder
from latent_codec.images import DEFAULT_MAX_PIXELS
from latent_codec.inputs import find_images
from latent_codec.latents import Entry, Latents, LatentsWriter, StoredDtype, stored_files
from latent_codec.noise import fold, normal, text_key
from latent_codec.pipeline import (
    Compute,
    Decoded,
    ImageFormat,
    Networks,
    Summary,
    batches,
    check_absent,
    check_options,
    check_rgb,
    image_batches,
    write_images,
)


def encode_folder(
    codec: Codec,
    where: str | Path,
    folder: Path,
    compute: Compute,
    *,
    store: StoredDtype = "float16",
    background: str = "#ffffff",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Store the posterior of every image found at `where` in `folder` (see `latent_codec.latents`).

    Raises `UserError` before any work if nothing is found, an option makes no sense, the model is none of RGB images,
    or `folder` cannot be written into or holds latents already (`overwrite` replaces them). Raises `OSError` if the
    disk refuses later; the latents stored before then are readable.
    """
    started = time.monotonic()
    check_rgb(codec)
    check_options(background, max_pixels)
    networks = Networks(codec, compute)
    sources = find_images(where)
    if stored_files(folder) and not overwrite:
        raise UserError(f"{folder}: holds latents already; give another folder, or --overwrite to replace them")
    summary = Summary("encoded", found=len(sources))
    bar = tqdm(total=len(sources), desc="encode", unit="image", disable=quiet or None)
    with LatentsWriter(folder, codec, store) as writer, bar:
        for batch in image_batches(networks, sources, summary, bar, background=background, max_pixels=max_pixels):
            posterior = networks.encode([r.pixels for r in batch])
            for row, item in enumerate(batch):
                try:
                    writer.add(item.source.name, posterior, row, item.geometry, item.data)
                except UserError as error:
                    summary.fail(item.source.name, error)
                else:
                    summary.done += 1
                    summary.bytes_in += len(item.data)
                bar.update()
    summary.bytes_out = sum(f.stat().st_size for f in stored_files(folder))
    summary.seconds = time.monotonic() - started
    return summary


def decode_folder(
    codec: Codec,
    where: Path,
    folder: Path,
    compute: Compute,
    *,
    image_format: ImageFormat = "png",
    sample: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Summary:
    """Decode a folder of latents; `a/b.jpg` becomes `folder/a/b.jpg.png`.

    The posterior's mode is decoded, or with `sample` a draw that depends on (sample, path) alone. Raises `UserError`
    before any work if the latents are another model's, if `folder` cannot be written into, or if outputs exist and
    `overwrite` is not set.
    """
    started = time.monotonic()
    check_rgb(codec)
    networks = Networks(codec, compute)
    latents = Latents(where, model_id=codec.model_id)
    outputs = {e.path: folder / f"{e.path}.{image_format}" for e in latents.entries}
    check_absent(outputs.values(), overwrite=overwrite)
    make_folder(folder)
    summary = Summary("decoded", found=len(latents))
    bar = tqdm(total=len(latents), desc="decode", unit="image", disable=quiet or None)

    def decoded() -> Iterator[Decoded]:
        stored = _stored(latents, codec, sample, summary, bar)
        for batch in batches(
            stored, compute.batch_size, lambda item: item[1].shape, alone=lambda item: networks.cuts(*item[1].shape[1:])
        ):
            pixels = networks.decode_uint8([z for _, z in batch])
            for (entry, _), image in zip(batch, pixels, strict=True):
                yield Decoded(entry.path, image, entry.geometry, outputs[entry.path])

    with bar:
        write_images(decoded(), image_format, compute.workers, summary, bar)
    summary.bytes_in = sum(f.stat().st_size for f in stored_files(where))
    summary.seconds = time.monotonic() - started
    return summary


def _stored(
    latents: Latents, codec: Codec, sample: int | None, summary: Summary, bar: Any
) -> Iterator[tuple[Entry, torch.Tensor]]:
    """Each entry's latent (z, h, w) to decode, shard by shard."""
    order = sorted(range(len(latents)), key=lambda i: (latents.entries[i].shard, latents.entries[i].row))
    for i in order:
        entry = latents.entries[i]
        try:
            posterior = latents.posterior(i)
            if posterior.mean.shape[1] != codec.config.latent_channels:
                raise UserError(f"{entry.path}: shard {entry.shard} holds {posterior.mean.shape[1]} latent channels")
        except UserError as error:
            summary.fail(entry.path, error)
            bar.update()
            continue
        if sample is None:
            yield entry, posterior.mode()[0]
        else:
            key = fold(sample, text_key(entry.path))
            yield entry, posterior.sample(normal(key[None], tuple(posterior.mean.shape[1:])))[0]
