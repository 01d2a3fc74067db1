"""Write a folder of latents as the cache of another program."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.resume.names import check_outputs, folding
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Threads
from latent_codec.interop.caches.cache import CacheEntry, ImageCacheWriter, Shard, ShardCacheWriter, read_entry
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.registry import CacheName, cache_format
from latent_codec.latents.dataset import Latents
from latent_codec.storage.files import atomic_path, disk_errors, make_folder, put, sha256_of, temporary_path


class Conversion(NamedTuple):
    """Report what was converted."""

    summary: Summary
    notes: list[str]
    """Sentences for the user about what was lost or has to be set."""


def write_cache(
    where: Path, folder: Path, name: CacheName, options: CacheOptions, *, overwrite: bool = False, workers: int = 4
) -> Conversion:
    """Write the latents at `where` into `folder` as the named program reads them.

    Equal latents and options make equal files. A file that is there already is skipped if it is equal; if it differs it
    is left and its image counts as failed, or it is replaced with `overwrite`. Every file is whole at all times. Raises
    `UserError` before any work if the program cannot take these latents, an option makes no difference to it, or two
    images would share a file; and later if a file of many images would lack one of them.
    """
    writer_class = cache_format(name).writer
    options.check(writer_class.options_used, f"--to {name}")
    latents = Latents(where, seed=options.seed or 0)
    if not latents.entries:
        raise UserError(f"{where}: no latents in it; encode images first")
    writer = writer_class(latents, options)
    make_folder(folder)
    summary, started = Summary("converted", found=len(latents)), time.monotonic()
    with tqdm(total=len(latents), desc=f"convert to {name}", unit="image", disable=None) as bar:
        if isinstance(writer, ImageCacheWriter):
            _write_images(writer, folder, overwrite, workers, summary, bar)
        elif isinstance(writer, ShardCacheWriter):
            _write_shards(writer, folder, overwrite, summary, bar)
    summary.seconds = time.monotonic() - started
    return Conversion(summary, writer.notes)


def _write_images(
    writer: ImageCacheWriter, folder: Path, overwrite: bool, workers: int, summary: Summary, bar: Any
) -> None:
    entries = writer.latents.entries
    names = [writer.name(entry) for entry in entries]
    _check_names(names, [entry.path for entry in entries], folder)

    def write(index: int) -> _Written:
        name = entries[index].path
        with summary.timing("decode"):
            item = read_entry(writer.latents, index, writer.options.epoch or 0)
        with summary.timing("writing"), disk_errors(folder / names[index], name):
            data = writer.data(item)
            return _Written(_put(data, folder / names[index], name, overwrite), item.bytes_in, len(data))

    with Threads(workers) as threads:
        for index, future in threads.map(write, range(len(entries))):
            try:
                written = future.result()
            except FatalError:
                raise
            except Exception as error:  # one damaged image costs no other
                summary.fail(entries[index].path, error)
            else:
                _count(written, summary)
            bar.update()


class _Written(NamedTuple):
    new: bool
    bytes_in: int
    bytes_out: int


def _count(written: _Written, summary: Summary, images: int = 1) -> None:
    if written.new:
        summary.done += images
        summary.bytes_in += written.bytes_in
        summary.bytes_out += written.bytes_out
    else:
        summary.skipped += images


def _check_names(names: list[str], paths: list[str], folder: Path) -> None:
    """Raise `UserError` unless every image has a file of its own inside `folder`."""
    of_name: dict[str, str] = {}
    for name, path in zip(names, paths, strict=True):
        if (other := of_name.setdefault(name, path)) != path:
            raise UserError(f"{other} and {path} would both become {name}; rename one of them and encode again")
    check_outputs(names, folder)
    if (fold := folding(folder)) is not None:
        check_outputs(names, folder, fold)


def _put(data: bytes, path: Path, who: str, overwrite: bool) -> bool:
    """Write a file and return True, or False if it is there already; raises `UserError` if another one is there."""
    if path.exists() and not overwrite:
        if path.read_bytes() == data:
            return False
        raise _differs(path, who)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return True


def _differs(path: Path, who: str) -> UserError:
    return UserError(f"{who}: {path} is there already and is another one; give --overwrite to replace it")


def _write_shards(writer: ShardCacheWriter, folder: Path, overwrite: bool, summary: Summary, bar: Any) -> None:
    shards = writer.shards()
    if others := sorted({path.name for path in folder.glob(writer.shard_pattern)} - {shard.name for shard in shards}):
        raise UserError(f"{folder}: {others[0]} would be taken for a part of this; remove it, or give another folder")
    for shard in shards:
        items = _ShardItems(writer, shard, summary, bar)
        path = folder / shard.name
        with summary.timing("writing"), disk_errors(path), temporary_path(folder, shard.name) as temporary:
            mode = temporary.stat().st_mode
            writer.write(temporary, iter(items))
            new = overwrite or not path.exists()
            if not new and sha256_of(path) != sha256_of(temporary):
                raise _differs(path, shard.name)
            written = _Written(new, items.bytes_in, temporary.stat().st_size)
            if new:
                put(temporary, path, mode)
        _count(written, summary, items.images)
    for name, data in writer.last():
        with disk_errors(folder / name):
            _put(data, folder / name, name, overwrite)


class _ShardItems:
    """Read a shard's images one by one, leaving out damaged ones if the shard may lack images."""

    def __init__(self, writer: ShardCacheWriter, shard: Shard, summary: Summary, bar: Any) -> None:
        self._writer, self._shard, self._summary, self._bar = writer, shard, summary, bar
        self.images = self.bytes_in = 0

    def __iter__(self) -> Iterator[CacheEntry]:
        latents = self._writer.latents
        for index in self._shard.indices:
            try:
                item = read_entry(latents, index, self._writer.options.epoch or 0)
            except UserError as error:
                if not self._writer.may_lack_images:
                    raise UserError(f"{error}; {self._shard.name} cannot lack an image and is not written") from error
                self._summary.fail(latents.entries[index].path, error)
            else:
                self.images += 1
                self.bytes_in += item.bytes_in
                yield item
            self._bar.update()
