"""Write and read EDM2's latents: a zip file of `00000/img-mean-std-00000000.npy` ..., raw means before deviations.
Its autoencoder takes pixels in [0, 1], and EDM2 scales draws by its own constants, measured on such latents."""

import functools
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from latent_codec.errors import UserError
from latent_codec.interop.caches import cache, numpy_files
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.scaling import Scaling
from latent_codec.latents.dataset import Latents
from latent_codec.storage.json_config import loads

NAME = "latents.zip"
_INDEX = "dataset.json"


class Edm2(cache.ShardCacheWriter):
    """Write one zip file with all images and their class numbers."""

    program = "EDM2"
    options_used = frozenset()
    flips = "left out"
    needs_one_size = True
    pixel_range = (0.0, 1.0)
    may_lack_images, shard_pattern = False, NAME

    def __init__(self, latents: Latents, options: CacheOptions) -> None:
        super().__init__(latents, options)
        height, width = latents.shapes[0]
        if height != width:
            raise UserError(
                f"{latents.folder}: EDM2 takes square images, and latents are {height}x{width}; encode with "
                "--resize N --crop"
            )
        self._labelled = all(entry.label is not None for entry in latents.entries)
        if not self._labelled:
            self.notes.append("not every image has a class, so there are no labels")
        if (found := latents.header.statistics) is not None:
            mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (found.mean, found.std))
            self.notes.append(
                f"EDM2 scales latents by its own constants; for this model set raw_mean=[{mean}], raw_std=[{std}]"
            )

    def shards(self) -> list[cache.Shard]:
        return [cache.Shard(NAME, range(len(self.latents)))]

    def write(self, path: Path, items: Iterator[cache.CacheEntry]) -> None:
        labels: list[tuple[str, int]] = []
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
            for number, item in enumerate(items):
                name = f"{number // 1000:05d}/img-mean-std-{number:08d}"
                both = torch.cat([item.posterior.mean, item.posterior.std], dim=1)[0]  # (2z, h, w)
                _add(file, f"{name}.npy", numpy_files.npy(both.numpy()))
                _add(file, f"{name}.json", item.origin.text().encode())  # EDM2 ignores it
                labels.append((f"{name}.npy", item.label))
            _add(file, _INDEX, json.dumps({"labels": labels if self._labelled else None}).encode())


def _add(file: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name)  # its time is that of 1980, so that equal contents give equal bytes
    member.external_attr = 0o644 << 16
    file.writestr(member, data)


def read(where: Path, options: CacheOptions, scaling: Scaling) -> Iterator[cache.FoundImage]:
    """Find images in a zip file, or in a folder with its members or with `latents.zip`; a label becomes a folder."""
    if (where / NAME).is_file():
        where = where / NAME
    names, get = _in_folder(where) if where.is_dir() else _in_zip(where)
    labels = _labels(get, where) if _INDEX in names else {}

    def load(name: str) -> cache.StoredImage:
        mean, std = numpy_files.latents_in(numpy_files.load_npy(get(name))).chunk(2)
        beside = name.removesuffix(".npy") + ".json"
        origin = cache.Origin.parse(get(beside).decode()) if beside in names else None
        return cache.StoredImage(mean, 2 * std.log(), origin=origin)

    for name in sorted(name for name in names if name.endswith(".npy")):
        folder = f"{labels[name]:05d}/" if name in labels else ""  # the members' own folders are no classes
        yield cache.FoundImage(folder + name.removesuffix(".npy").replace("/", "-"), functools.partial(load, name))


def _in_zip(path: Path) -> tuple[set[str], Callable[[str], bytes]]:
    try:
        file = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no zip file that can be read ({error})") from error
    return set(file.namelist()), functools.partial(numpy_files.unzip, file)


def _in_folder(folder: Path) -> tuple[set[str], Callable[[str], bytes]]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names, lambda name: numpy_files.content(folder / name)


def _labels(get: Callable[[str], bytes], where: Path) -> dict[str, int]:
    try:
        return {name: int(label) for name, label in loads(get(_INDEX))["labels"] or ()}
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{where}: {_INDEX} has no list of names and class numbers ({error})") from error


FORMAT = cache.CacheFormat(Edm2, read)
