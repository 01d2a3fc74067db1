"""WebDataset's tar shards: of each image `{key}.npy`, one draw, with `.flip.npy`, `.cls` and `.json` beside it.

Its decoders know these suffixes; they know none of safetensors. The scale is for the user to say.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from latent_codec.errors import UserError
from latent_codec.interop.caches import numpy_files
from latent_codec.interop.caches.cache import PIXELS, About, Found, Item, Shard, ShardCache, Stored
from latent_codec.interop.caches.numpy_files import ABOUT
from latent_codec.interop.caches.options import Options
from latent_codec.interop.caches.scaling import chosen_scaling
from latent_codec.latents.dataset import Latents
from latent_codec.model.file import LatentStatistics
from latent_codec.storage.json_config import to_json

_IMAGES = 1000


class WebDataset(ShardCache):
    takes = frozenset({"scale", "scaling_factor", "shift_factor", "seed", "epoch"})
    tolerant, mistaken = True, "latents-*.tar"

    def __init__(self, latents: Latents, options: Options) -> None:
        super().__init__(latents, options)
        self._scaling = chosen_scaling(options, latents.header.statistics, "WebDataset's shards")
        self.tell_range(PIXELS, "most programs")
        paths: dict[str, str] = {}
        for entry in latents.entries:
            if (other := paths.setdefault(key := _key(entry.path), entry.path)) != entry.path:
                raise UserError(f"{other} and {entry.path} would both have the key {key}; rename one of them")

    def shards(self) -> list[Shard]:
        everything = range(len(self.latents))
        return [
            Shard(f"latents-{number:06d}.tar", everything[start : start + _IMAGES])
            for number, start in enumerate(everything[::_IMAGES])
        ]

    def write(self, path: Path, items: Iterator[Item]) -> None:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for item in items:
                key = _key(item.entry.path)
                _add(tar, f"{key}.npy", numpy_files.npy(self._scaling.scale(item.z).numpy()))  # (z, h, w) float32
                if (flipped := item.z_flip) is not None:
                    _add(tar, f"{key}.flip.npy", numpy_files.npy(self._scaling.scale(flipped).numpy()))
                if item.label >= 0:
                    _add(tar, f"{key}.cls", str(item.label).encode())
                _add(tar, f"{key}.json", self._facts(item))

    def _facts(self, item: Item) -> bytes:
        geometry = item.entry.geometry
        facts = {
            "class": item.entry.label,
            "width": geometry.width,
            "height": geometry.height,
            "scale": self.options.scale,
            ABOUT: to_json(item.about),
        }
        return json.dumps(facts, sort_keys=True).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of 1970, whenever it is
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _key(path: str) -> str:
    """A key ends at the first dot after the last slash, and would at one that belongs to the name."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{PurePosixPath(name).stem.replace('.', '_')}"


def read(where: Path, options: Options, statistics: LatentStatistics | None) -> Iterator[Found]:
    """The tar files of a folder, or one; whatever follows on each other with one key is one image."""
    scaling = chosen_scaling(options, statistics, "WebDataset's shards")

    def load(parts: dict[str, bytes]) -> Stored:
        mean, flip = (
            scaling.unscale(numpy_files.tensor(numpy_files.load(parts[part]))) if part in parts else None
            for part in ("npy", "flip.npy")
        )
        if mean is None:
            raise ValueError("it has no .npy")
        facts: dict[str, Any] = json.loads(parts.get("json", b"{}"))
        about = About.parse(json.dumps(facts[ABOUT])) if ABOUT in facts else None
        return Stored(mean, None, flip, None, about, None)

    for shard in sorted(where.glob("*.tar")) if where.is_dir() else [where]:
        for key, parts in _samples(shard):
            yield Found(key, lambda parts=parts: load(parts))


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(shard, "r|") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if f"{folder}{slash}{stem}" != key and parts:
                    yield key, parts
                    parts = {}
                key, file = f"{folder}{slash}{stem}", tar.extractfile(member)
                parts[suffix] = b"" if file is None else file.read()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard}: not a whole, uncompressed tar file ({error})") from error
    if parts:
        yield key, parts
