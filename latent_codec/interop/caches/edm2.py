"""EDM2's latents: a zip file of `00000/img-mean-std-00000000.npy` ..., raw means before standard deviations.

EDM2 feeds its autoencoder pixels in [0, 1] and scales what it draws by constants of its own, measured on such latents.
"""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from latent_codec.errors import UserError
from latent_codec.interop.caches import numpy_files
from latent_codec.interop.caches.cache import About, Found, Item, Shard, ShardCache, Stored
from latent_codec.interop.caches.options import Options
from latent_codec.interop.caches.requirements import need_one_size
from latent_codec.latents.dataset import Latents
from latent_codec.model.file import LatentStatistics

NAME = "latents.zip"
_INDEX = "dataset.json"
_PIXELS = (0.0, 1.0)


class Edm2(ShardCache):
    takes = frozenset()
    tolerant, mistaken = False, NAME

    def __init__(self, latents: Latents, options: Options) -> None:
        super().__init__(latents, options)
        height, width = need_one_size(latents, "EDM2")
        if height != width:
            raise UserError(f"{latents.folder}: EDM2 takes square images, and latents are {height}x{width}")
        self._labelled = all(entry.label is not None for entry in latents.entries)
        if not self._labelled:
            self.notes.append("not every image has a class, so there are no labels")
        self.leave_out_flips("EDM2")
        self.tell_range(_PIXELS, "EDM2")
        if (found := latents.header.statistics) is not None:
            mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (found.mean, found.std))
            self.notes.append(
                f"EDM2 scales latents by its own constants; of this model raw_mean=[{mean}], raw_std=[{std}]"
            )

    def shards(self) -> list[Shard]:
        return [Shard(NAME, range(len(self.latents)))]

    def write(self, path: Path, items: Iterator[Item]) -> None:
        labels: list[tuple[str, int]] = []
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
            for number, item in enumerate(items):
                name = f"{number // 1000:05d}/img-mean-std-{number:08d}"
                both = torch.cat([item.posterior.mean, item.posterior.std], dim=1)[0]  # (2z, h, w)
                _add(file, f"{name}.npy", numpy_files.npy(both.numpy()))
                _add(file, f"{name}.json", item.about.text().encode())  # EDM2 passes it over
                labels.append((f"{name}.npy", item.label))
            _add(file, _INDEX, json.dumps({"labels": labels if self._labelled else None}).encode())


def _add(file: zipfile.ZipFile, name: str, data: bytes) -> None:
    member = zipfile.ZipInfo(name)  # of 1980, whenever it is
    member.external_attr = 0o644 << 16
    file.writestr(member, data)


def read(where: Path, options: Options, statistics: LatentStatistics | None) -> Iterator[Found]:
    """A zip file, or a folder with what it would hold or with `latents.zip`; a label becomes a path's first folder."""
    if (where / NAME).is_file():
        where = where / NAME
    names, get = _in_folder(where) if where.is_dir() else _in_zip(where)
    labels = _labels(get, where) if _INDEX in names else {}

    def load(name: str) -> Stored:
        mean, std = numpy_files.tensor(numpy_files.load(get(name))).chunk(2)
        beside = name.removesuffix(".npy") + ".json"
        about = About.parse(get(beside).decode()) if beside in names else None
        return Stored(mean, 2 * std.log(), None, None, about, None)

    for name in sorted(name for name in names if name.endswith(".npy")):
        folder = f"{labels[name]:05d}/" if name in labels else ""  # others' folders are no classes
        yield Found(folder + name.removesuffix(".npy").replace("/", "-"), lambda name=name: load(name))


def _in_zip(path: Path) -> tuple[set[str], Callable[[str], bytes]]:
    try:
        file = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no zip file that can be read ({error})") from error
    return set(file.namelist()), file.read


def _in_folder(folder: Path) -> tuple[set[str], Callable[[str], bytes]]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names, lambda name: (folder / name).read_bytes()


def _labels(get: Callable[[str], bytes], where: Path) -> dict[str, int]:
    try:
        return {name: int(label) for name, label in json.loads(get(_INDEX))["labels"] or ()}
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{where}: {_INDEX} has no list of names and class numbers ({error})") from error
