"""The cache of another program -> a folder of latents."""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.resume.ledger import Ledger
from latent_codec.folders.summary import Summary
from latent_codec.images.geometry import Geometry
from latent_codec.interop.caches.cache import Stored
from latent_codec.interop.caches.options import CacheName, Options
from latent_codec.interop.caches.registry import CONSUMERS
from latent_codec.interop.caches.write import Converted
from latent_codec.latents.format import (
    INDEX,
    LatentsEntry,
    LatentsHeader,
    LatentsRow,
    StoredDtype,
    latent_size,
    latents_header,
    latents_row,
    stored_shards,
    unplaced_entry,
    write_index,
    write_shard,
)
from latent_codec.model.checks import check_gaussian
from latent_codec.model.codec import Codec
from latent_codec.model.config import DiagonalGaussianConfig
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.storage.files import disk_errors, make_folder

_MOST_IMAGES = 512  # in a shard, which is in memory while it is made
_MOST_BYTES = 2**26


def recover(
    where: Path,
    folder: Path,
    source: CacheName,
    codec: Codec,
    options: Options,
    *,
    store: StoredDtype,
    overwrite: bool,
    quiet: bool = False,
) -> Converted:
    """Make a folder of latents of a cache that holds latents of this model.

    Moments come back as they were. Of a single draw the mean is the draw and the log-variance the least that the model
    gives. Geometry and name of an image are those of its source if this program wrote the cache; otherwise an image is
    as large as the cache says, or as its latents are. Raises `UserError` if there is no such cache, an option is not
    for it, or `folder` holds latents already and not to `overwrite`; what cannot be read fails by name.
    """
    consumer = CONSUMERS[source]
    options.check(consumer.cache.takes - {"seed", "epoch"}, f"--from {source}")
    _check(where, folder, overwrite)
    summary, started = Summary("converted"), time.monotonic()
    gathered = _Gathered(folder, codec, store)
    found = consumer.read(where, options, codec.statistics)
    for one in tqdm(found, desc=f"convert from {source}", unit="image", disable=quiet or None):
        summary.found += 1
        try:
            with summary.timing("decode"):
                gathered.add(one.path, one.load())
        except FatalError:
            raise
        except Exception as error:  # whatever a stranger's file sets off, the others go on
            summary.fail(one.path, error)
        else:
            summary.done += 1
        with summary.timing("writing"):
            gathered.write_if_full()
    if not summary.found:
        raise UserError(f"{where}: no latents as {source} has them; look at --from, and at --arch if it takes one")
    with summary.timing("writing"):
        gathered.finish()
    summary.bytes_out = sum(shard.stat().st_size for shard in stored_shards(folder))
    summary.bytes_in = gathered.bytes_in
    summary.seconds = time.monotonic() - started
    return Converted(summary, gathered.notes)


def _check(where: Path, folder: Path, overwrite: bool) -> None:
    if not where.exists():
        raise UserError(f"{where}: no such folder or file")
    if not overwrite and ((folder / INDEX).exists() or Ledger.exists(folder, "latents")):
        raise UserError(f"{folder}: holds latents already; give another folder, or --overwrite to replace them")
    make_folder(folder)


class _Gathered:
    """The images read so far: in shards, and those of the next one in memory."""

    def __init__(self, folder: Path, codec: Codec, store: StoredDtype) -> None:
        self._folder, self._codec = folder, codec
        self._store: StoredDtype = store
        check_gaussian(codec)
        assert isinstance(codec.config.bottleneck, DiagonalGaussianConfig)
        self._model_id, self._clamp = codec.model_id, codec.config.bottleneck
        self._header: LatentsHeader | None = None
        self._rows: list[LatentsRow] = []
        self._entries: list[LatentsEntry] = []
        self._paths: set[str] = set()
        self._shards = self._bytes = self._draws = self.bytes_in = 0

    def add(self, path: str, stored: Stored) -> None:
        """Raises `ValueError` or `UserError` for what are no latents of the model."""
        about, flips = stored.about, stored.mean_flip is not None
        path = path if about is None else about.path
        if about is not None and about.model_id != self._model_id:
            raise UserError(f"made by model {about.model_id[:12]}, not {self._model_id[:12]}; give the right --model")
        if path in self._paths:
            raise ValueError(f"there is another {path}")
        if self._header is not None and self._header.flips != flips:
            raise ValueError("not all images come with their mirror images' latents, or without")
        mirrored = None if stored.mean_flip is None else self._posterior(stored.mean_flip, stored.logvar_flip)
        posterior, geometry = self._posterior(stored.mean, stored.logvar), self._geometry(stored)
        if mirrored is not None and mirrored.mean.shape != posterior.mean.shape:
            raise ValueError("the mirror image's latents are of another size")
        sha256 = "" if about is None else about.sha256
        self._rows.append(latents_row(unplaced_entry(path, geometry, sha256), posterior, 0, self._store, mirrored))
        self._header = self._header or latents_header(self._codec, self._store, flips)
        self._paths.add(path)
        self._draws += stored.logvar is None
        size = sum(t.nbytes for t in stored[:4] if isinstance(t, torch.Tensor))
        self._bytes += size
        self.bytes_in += size

    def _posterior(self, mean: torch.Tensor, logvar: torch.Tensor | None) -> DiagonalGaussian:
        """Of (1, z, h, w); without log-variances as narrow as the model's get."""
        channels = self._codec.config.latent_channels
        if len(mean) != channels:
            raise ValueError(f"{len(mean)} channels, and the model has {channels}")
        logvar = torch.full_like(mean, self._clamp.logvar_min) if logvar is None else logvar
        if logvar.shape != mean.shape:
            raise ValueError(f"{len(mean) + len(logvar)} channels of moments, and the model has 2 x {channels}")
        if not bool(mean.isfinite().all() and logvar.isfinite().all()):
            raise ValueError("it holds numbers that are not finite")
        return DiagonalGaussian(mean[None], logvar[None].clamp(self._clamp.logvar_min, self._clamp.logvar_max))

    def _geometry(self, stored: Stored) -> Geometry:
        """Of the source if the cache says it; otherwise of an image as large, or as its latents can be of."""
        height, width = stored.mean.shape[1:]
        if stored.about is not None:
            geometry = stored.about.geometry
        else:
            size = stored.size or (width * self._codec.factor, height * self._codec.factor)
            geometry = Geometry(width=size[0], height=size[1], orientation=1, mode="RGB", background=None)
        if latent_size(geometry, self._codec.factor) != (height, width):
            raise ValueError(f"latents of {height}x{width} are not of {geometry.width}x{geometry.height} pixels")
        return geometry

    def write_if_full(self) -> None:
        if len(self._rows) >= _MOST_IMAGES or self._bytes >= _MOST_BYTES:
            self._write()

    def _write(self) -> None:
        assert self._header is not None
        with disk_errors(self._folder, "latents"):
            name = f"{self._shards:06d}-{_digest(self._rows)}"  # other contents never take the place of an old shard
            self._entries += write_shard(self._folder, self._header, name, self._rows)
        self._rows, self._bytes, self._shards = [], 0, self._shards + 1

    def finish(self) -> None:
        """The index, once all shards are there; those of before go after that."""
        if self._rows:
            self._write()
        if self._header is None:  # nothing could be read
            return
        with disk_errors(self._folder / INDEX):
            write_index(self._folder, self._header, self._entries)
            kept = {entry.shard for entry in self._entries}
            for shard in stored_shards(self._folder):
                if shard.name not in kept:
                    shard.unlink()

    @property
    def notes(self) -> list[str]:
        if not self._draws:
            return []
        return [
            f"{self._draws} images come of single draws: each mean is the draw, and each log-variance the least that "
            f"the model gives, {self._clamp.logvar_min:g}"
        ]


def _digest(rows: Sequence[LatentsRow]) -> str:
    """Of what a shard holds."""
    found = hashlib.sha256()
    for one in rows:
        found.update(os.fsencode(one.entry.path))
        for part in (one.mean, one.logvar, one.mean_flip, one.logvar_flip):
            if part is not None:
                found.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]
