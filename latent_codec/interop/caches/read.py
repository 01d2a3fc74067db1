"""Read the cache of another program into a folder of latents."""

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.resume.ledger import Ledger
from latent_codec.folders.summary import Summary
from latent_codec.images.buckets import cover, record
from latent_codec.images.geometry import Geometry
from latent_codec.interop.caches.cache import StoredImage
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.registry import CacheName, cache_format
from latent_codec.interop.caches.write import Conversion
from latent_codec.latents.format import (
    INDEX,
    LatentsEntry,
    LatentsHeader,
    LatentsRow,
    StoredDtype,
    latent_size,
    latents_header,
    latents_row,
    read_index,
    stored_shards,
    unplaced_entry,
    write_index,
    write_shard,
)
from latent_codec.model.checks import check_gaussian, check_prefix
from latent_codec.model.codec import Codec
from latent_codec.model.config import DiagonalGaussianConfig
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.storage.files import disk_errors, make_folder
from latent_codec.storage.removal import named, remove

_SHARD_IMAGES = 512
_SHARD = re.compile(r"latents-\d{6}-[0-9a-f]{8}\.safetensors")
_SHARD_BYTES = 2**26  # a shard is in memory while it is made


def read_cache(
    where: Path, folder: Path, name: CacheName, codec: Codec, options: CacheOptions, *, overwrite: bool = False
) -> Conversion:
    """Write the latents of `codec`'s that the named program's cache at `where` holds into `folder`.

    Stored moments come back as they were. A single draw becomes the mean, and the log-variance is then the model's
    lower clamp. An image's name and geometry are its source's if this program wrote the cache; otherwise an image is as
    large as the cache or its latents say. An image that cannot be read fails by name. Raises `UserError` if there is no
    such cache, an option makes no difference, or `folder` holds latents already and `overwrite` is not set.
    """
    cache = cache_format(name)
    options.check(cache.writer.options_used - {"seed", "epoch"} | {"store"}, f"--from {name}")
    if not where.exists():
        raise UserError(f"{where}: no such folder or file")
    if not overwrite and ((folder / INDEX).exists() or Ledger.exists(folder, "latents")):
        raise UserError(f"{folder}: holds latents already; give another folder, or --overwrite to replace them")
    make_folder(folder)
    summary, started = Summary("converted"), time.monotonic()
    writer = _LatentsWriter(folder, codec, options)
    found = cache.read(where, options, cache.writer.scaling_for(options, codec.statistics))
    for image in tqdm(found, desc=f"convert from {name}", unit="image", disable=None):
        summary.found += 1
        try:
            with summary.timing("decode"):
                writer.add(image.path, image.load())
        except FatalError:
            raise
        except Exception as error:  # one damaged image costs no other, whatever its file sets off
            summary.fail(image.path, error)
        else:
            summary.done += 1
        with summary.timing("writing"):
            writer.write_if_full()
    if not summary.found:
        raise UserError(f"{where}: no latents as {name} has them; look at --from, and at --arch if it takes one")
    with summary.timing("writing"):
        writer.finish()
    summary.bytes_out = sum(shard.stat().st_size for shard in stored_shards(folder))
    summary.bytes_in = writer.bytes_in
    summary.seconds = time.monotonic() - started
    return Conversion(summary, writer.notes)


class _LatentsWriter:
    """Write images as shards of latents; keeps those of the next shard in memory."""

    def __init__(self, folder: Path, codec: Codec, options: CacheOptions) -> None:
        check_gaussian(codec)
        assert isinstance(codec.config.bottleneck, DiagonalGaussianConfig)
        self._folder, self._codec = folder, codec
        self._store: StoredDtype = options.store or "float16"
        self._model_id, self._clamp = codec.model_id, codec.config.bottleneck
        self._shard_images = options.shard_images or _SHARD_IMAGES
        self._header: LatentsHeader | None = None
        self._rows: list[LatentsRow] = []
        self._entries: list[LatentsEntry] = []
        self._paths: set[str] = set()
        self._shards = self._bytes = self._draws = self.bytes_in = 0

    def add(self, path: str, stored: StoredImage) -> None:
        """Add an image; raises `ValueError` or `UserError` if it cannot be the model's."""
        origin, flips = stored.origin, stored.mean_flip is not None
        path = path if origin is None else origin.path
        if origin is not None and origin.model_id != self._model_id:
            raise UserError(f"made by model {origin.model_id[:12]}, not {self._model_id[:12]}; give the right --model")
        if path in self._paths:
            raise ValueError(f"there is another {path}")
        if self._header is not None and self._header.flips != flips:
            raise ValueError("not all images come with their mirror images' latents, or without")
        mirrored = None if stored.mean_flip is None else self._posterior(stored.mean_flip, stored.logvar_flip)
        posterior, geometry = self._posterior(stored.mean, stored.logvar), self._geometry(stored)
        if mirrored is not None and mirrored.mean.shape != posterior.mean.shape:
            raise ValueError("the mirror image's latents are of another size")
        entry = unplaced_entry(path, geometry, "" if origin is None else origin.sha256)
        self._rows.append(latents_row(entry, posterior, 0, self._store, mirrored))
        channels = None if len(stored.mean) == self._codec.config.latent_channels else len(stored.mean)
        if self._header is not None and self._header.channels != channels:
            raise ValueError(f"{len(stored.mean)} channels, where others have {self._header.channels or 'all'}")
        self._header = self._header or latents_header(self._codec, self._store, flips, channels)
        self._paths.add(path)
        self._draws += stored.logvar is None
        size = sum(t.nbytes for t in stored[:4] if isinstance(t, torch.Tensor))
        self._bytes += size
        self.bytes_in += size

    def _posterior(self, mean: torch.Tensor, logvar: torch.Tensor | None) -> DiagonalGaussian:
        """Return the posterior (1, z, h, w); where a cache has no log-variance, use the model's lower clamp."""
        channels = len(mean)
        check_prefix(self._codec, channels)
        logvar = torch.full_like(mean, self._clamp.logvar_min) if logvar is None else logvar
        if logvar.shape != mean.shape:
            raise ValueError(f"{len(mean) + len(logvar)} channels of moments, not 2 x {channels}")
        if not bool(mean.isfinite().all() and logvar.isfinite().all()):
            raise ValueError("it holds numbers that are not finite")
        return DiagonalGaussian(mean[None], logvar[None].clamp(self._clamp.logvar_min, self._clamp.logvar_max))

    def _geometry(self, stored: StoredImage) -> Geometry:
        """Return the source's geometry if the cache has it, or else that of an image as large as the cache says."""
        height, width = stored.mean.shape[1:]
        if stored.origin is not None:
            geometry = stored.origin.geometry
        else:
            size = stored.size or (width * self._codec.factor, height * self._codec.factor)
            geometry = Geometry(width=size[0], height=size[1], orientation=1, mode="RGB", background=None)
            if latent_size(geometry, self._codec.factor) != (height, width):  # the program resized it to its bucket
                bucket = width * self._codec.factor, height * self._codec.factor
                resized = record(size, cover(size, bucket))
                geometry = dataclasses.replace(geometry, width=bucket[0], height=bucket[1], resized=resized)
        if latent_size(geometry, self._codec.factor) != (height, width):
            raise ValueError(f"latents of {height}x{width} are not of {geometry.width}x{geometry.height} pixels")
        return geometry

    def write_if_full(self) -> None:
        if len(self._rows) >= self._shard_images or self._bytes >= _SHARD_BYTES:
            self._write()

    def _write(self) -> None:
        assert self._header is not None
        with disk_errors(self._folder, "latents"):
            name = f"{self._shards:06d}-{_digest(self._rows)}"  # other contents never take the place of an old shard
            self._entries += write_shard(self._folder, self._header, name, self._rows)
        self._rows, self._bytes, self._shards = [], 0, self._shards + 1

    def finish(self) -> None:
        """Write the index once all shards are there, then remove shards of earlier latents."""
        if self._rows:
            self._write()
        if self._header is None:  # nothing could be read
            return
        with disk_errors(self._folder / INDEX):
            earlier = self._earlier_shards()
            write_index(self._folder, self._header, self._entries)
            for name in earlier - {entry.shard for entry in self._entries}:
                remove(self._folder / name, named(*earlier))

    def _earlier_shards(self) -> set[str]:
        """Return the shards of the latents that are replaced: those of their index, and of an interrupted call."""
        found = {path.name for path in stored_shards(self._folder) if _SHARD.fullmatch(path.name)}
        with contextlib.suppress(UserError):
            found |= {entry.shard for entry in read_index(self._folder / INDEX).entries}
        return found

    @property
    def notes(self) -> list[str]:
        if not self._draws:
            return []
        return [
            f"{self._draws} images come of single draws: each mean is the draw, and each log-variance the least that "
            f"the model gives, {self._clamp.logvar_min:g}"
        ]


def _digest(rows: Sequence[LatentsRow]) -> str:
    found = hashlib.sha256()
    for row in rows:
        found.update(os.fsencode(row.entry.path))
        for tensor in row[1:]:
            if tensor is not None:
                found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]
