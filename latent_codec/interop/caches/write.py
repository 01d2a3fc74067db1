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

    def write(index: int) -> tuple[bool, int, int]:
        name = entries[index].path
        with summary.timing("decode"):
            item = read_entry(writer.latents, index, writer.options.epoch or 0)
        with summary.timing("writing"), disk_errors(folder / names[index], name):
            data = writer.data(item)
            return _put(data, folder / names[index], name, overwrite), item.bytes_in, len(data)

    with Threads(workers) as threads:
        for index, future in threads.map(write, range(len(entries))):
            try:
                _count(summary, 1, *future.result())
            except FatalError:
                raise
            except Exception as error:  # one damaged image costs no other
                summary.fail(entries[index].path, error)
            bar.update()


def _count(summary: Summary, images: int, new: bool, bytes_in: int, bytes_out: int) -> None:
    if new:
        summary.done += images
        summary.bytes_in += bytes_in
        summary.bytes_out += bytes_out
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
        sizes: list[int] = []
        path = folder / shard.name
        with summary.timing("writing"), disk_errors(path), temporary_path(folder, shard.name) as temporary:
            mode = temporary.stat().st_mode
            writer.write(temporary, _read_shard(writer, shard, sizes, summary, bar))
            new = overwrite or not path.exists()
            if not new and sha256_of(path) != sha256_of(temporary):
                raise _differs(path, shard.name)
            bytes_out = temporary.stat().st_size
            if new:
                put(temporary, path, mode)
        _count(summary, len(sizes), new, sum(sizes), bytes_out)
    for name, data in writer.last():
        with disk_errors(folder / name):
            _put(data, folder / name, name, overwrite)


def _read_shard(
    writer: ShardCacheWriter, shard: Shard, sizes: list[int], summary: Summary, bar: Any
) -> Iterator[CacheEntry]:
    """Read a shard's images, append their sizes to `sizes`, and leave out damaged ones if it may lack images."""
    for index in shard.indices:
        try:
            item = read_entry(writer.latents, index, writer.options.epoch or 0)
        except UserError as error:
            if not writer.may_lack_images:
                raise UserError(f"{error}; {shard.name} cannot lack an image and is not written") from error
            summary.fail(writer.latents.entries[index].path, error)
        else:
            sizes.append(item.bytes_in)
            yield item
        bar.update()
