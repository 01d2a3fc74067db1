"""A folder of latents -> the cache of another program."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from latent_codec.errors import FatalError, UserError
from latent_codec.folders.resume.names import check_outputs, folding
from latent_codec.folders.summary import Summary
from latent_codec.folders.workers import Threads
from latent_codec.interop.caches.cache import ImageCache, Item, Shard, ShardCache, read_item
from latent_codec.interop.caches.options import CacheName, Options
from latent_codec.interop.caches.registry import CONSUMERS
from latent_codec.latents.dataset import Latents
from latent_codec.storage.files import atomic_path, disk_errors, make_folder, put, sha256_of, temporary_path


class Converted(NamedTuple):
    summary: Summary
    notes: list[str]
    """What the user should know, a sentence each."""


def convert(
    where: Path,
    folder: Path,
    to: CacheName,
    options: Options,
    *,
    overwrite: bool,
    workers: int = 4,
    quiet: bool = False,
) -> Converted:
    """Write latents as another program reads them.

    The same latents and options make the same files. One that is there already, equal, is skipped; another one is left
    as it is, and the image counts as failed, or is replaced with `overwrite`. Every file is whole at all times. Raises
    `UserError` before any work if the consumer cannot take these latents, an option is not for it, or two images would
    share a file; and later where a file of many images would lack one of them.
    """
    kind = CONSUMERS[to].cache
    options.check(kind.takes, f"--to {to}")
    latents = Latents(where, seed=options.seed or 0)
    if not latents.entries:
        raise UserError(f"{where}: no latents in it; encode images first")
    cache = kind(latents, options)
    make_folder(folder)
    summary, started = Summary("converted", found=len(latents)), time.monotonic()
    with tqdm(total=len(latents), desc=f"convert to {to}", unit="image", disable=quiet or None) as bar:
        if isinstance(cache, ImageCache):
            _write_images(cache, folder, overwrite, workers, summary, bar)
        elif isinstance(cache, ShardCache):
            _write_shards(cache, folder, overwrite, summary, bar)
    summary.seconds = time.monotonic() - started
    return Converted(summary, cache.notes)


def _write_images(cache: ImageCache, folder: Path, overwrite: bool, workers: int, summary: Summary, bar: Any) -> None:
    """A file for each; an image that cannot be read or written costs no other."""
    entries = cache.latents.entries
    names = [cache.name(entry) for entry in entries]
    _check_names(names, [entry.path for entry in entries], folder)

    def write(index: int) -> _Written:
        name = entries[index].path
        with summary.timing("decode"):
            item = read_item(cache.latents, index, cache.options.epoch or 0)
        with summary.timing("writing"), disk_errors(folder / names[index], name):
            data = cache.data(item)
            return _Written(_put(data, folder / names[index], name, overwrite), item.bytes_in, len(data))

    with Threads(workers) as threads:
        for index, future in threads.map(write, range(len(entries))):
            try:
                written = future.result()
            except FatalError:
                raise
            except Exception as error:
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
    """Whether it was written: not if the same is there already. Raises `UserError` if something else is."""
    if path.exists() and not overwrite:
        if path.read_bytes() == data:
            return False
        raise _differs(path, who)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return True


def _differs(path: Path, who: str) -> UserError:
    return UserError(f"{who}: {path} is there already and is another one; give --overwrite to replace it")


def _write_shards(cache: ShardCache, folder: Path, overwrite: bool, summary: Summary, bar: Any) -> None:
    """Files that images share, each in its place once it is whole."""
    shards = cache.shards()
    if others := sorted({path.name for path in folder.glob(cache.mistaken)} - {shard.name for shard in shards}):
        raise UserError(f"{folder}: {others[0]} would be taken for a part of this; remove it, or give another folder")
    for shard in shards:
        items = _Items(cache, shard, summary, bar)
        path = folder / shard.name
        with summary.timing("writing"), disk_errors(path), temporary_path(folder, shard.name) as temporary:
            mode = temporary.stat().st_mode
            cache.write(temporary, iter(items))
            new = overwrite or not path.exists()
            if not new and sha256_of(path) != sha256_of(temporary):
                raise _differs(path, shard.name)
            written = _Written(new, items.bytes_in, temporary.stat().st_size)
            if new:
                put(temporary, path, mode)
        _count(written, summary, items.images)
    for name, data in cache.last():
        with disk_errors(folder / name):
            _put(data, folder / name, name, overwrite)


class _Items:
    """A shard's images, one after the other; those that are damaged are left out where they may be."""

    def __init__(self, cache: ShardCache, shard: Shard, summary: Summary, bar: Any) -> None:
        self._cache, self._shard, self._summary, self._bar = cache, shard, summary, bar
        self.images = self.bytes_in = 0

    def __iter__(self) -> Iterator[Item]:
        latents = self._cache.latents
        for index in self._shard.indices:
            try:
                item = read_item(latents, index, self._cache.options.epoch or 0)
            except UserError as error:
                if not self._cache.tolerant:
                    raise UserError(f"{error}; {self._shard.name} cannot lack an image and is not written") from error
                self._summary.fail(latents.entries[index].path, error)
            else:
                self.images += 1
                self.bytes_in += item.bytes_in
                yield item
            self._bar.update()
