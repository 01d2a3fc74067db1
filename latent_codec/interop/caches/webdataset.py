"""Write and read WebDataset's tar shards: one draw `{key}.npy` for each image, with `.flip.npy`, `.cls`, `.json`.
Its own decoders know these suffixes, but none of safetensors. The user chooses the scale."""

import functools
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from latent_codec.errors import UserError
from latent_codec.interop.caches import cache, numpy_files
from latent_codec.interop.caches.numpy_files import ORIGIN_KEY
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.scaling import Scaling
from latent_codec.latents.dataset import Latents
from latent_codec.storage.json_config import loads, to_json

_SHARD_IMAGES = 1000


class WebDataset(cache.ShardCacheWriter):
    """Write tar files of 1000 images each."""

    program = "WebDataset"
    options_used = frozenset({"scale", "scaling_factor", "shift_factor", "seed", "epoch"})
    flips = "kept"
    either_scale = "WebDataset's shards"
    may_lack_images, shard_pattern = True, "latents-*.tar"

    def __init__(self, latents: Latents, options: CacheOptions) -> None:
        super().__init__(latents, options)
        keys = {entry.path: entry.key for entry in latents.entries if entry.key is not None}
        told = len(set(keys.values())) == len(latents.entries)  # else the shards' names tell equal keys apart
        self._keys = keys if told else {entry.path: _key(entry.path) for entry in latents.entries}
        paths: dict[str, str] = {}
        for path, key in self._keys.items():
            if (other := paths.setdefault(key, path)) != path:
                raise UserError(f"{other} and {path} would both have the key {key}; rename one of them")

    def shards(self) -> list[cache.Shard]:
        return self.shards_of("latents-{:06d}.tar", _SHARD_IMAGES)

    def write(self, path: Path, items: Iterator[cache.CacheEntry]) -> None:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for item in items:
                key = self._keys[item.entry.path]
                _add(tar, f"{key}.npy", numpy_files.npy(self.scaling.scale(item.z).numpy()))  # (z, h, w) float32
                if (flipped := item.z_flip) is not None:
                    _add(tar, f"{key}.flip.npy", numpy_files.npy(self.scaling.scale(flipped).numpy()))
                if item.label >= 0:
                    _add(tar, f"{key}.cls", str(item.label).encode())
                if (caption := item.entry.caption) is not None:
                    _add(tar, f"{key}.txt", caption.encode())
                _add(tar, f"{key}.json", self._facts(item))

    def _facts(self, item: cache.CacheEntry) -> bytes:
        geometry = item.entry.geometry
        facts = {
            "class": item.entry.label,
            "width": geometry.width,
            "height": geometry.height,
            "scale": self.options.scale,
            ORIGIN_KEY: to_json(item.origin),
        }
        return json.dumps(facts, sort_keys=True).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time is that of 1970, so that equal contents give equal bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _key(path: str) -> str:
    """Return an image's key; it may have no dot after the last slash, because WebDataset would end it there."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{PurePosixPath(name).stem.replace('.', '_')}"


def read(where: Path, options: CacheOptions, scaling: Scaling) -> Iterator[cache.FoundImage]:
    """Find images in a tar file or a folder of them; consecutive members with one key are one image."""

    def load(parts: dict[str, bytes]) -> cache.StoredImage:
        mean, flip = (
            scaling.unscale(numpy_files.latents_in(numpy_files.load_npy(parts[part]))) if part in parts else None
            for part in ("npy", "flip.npy")
        )
        if mean is None:
            raise ValueError("it has no .npy")
        facts: dict[str, Any] = loads(parts.get("json", b"{}"))
        origin = cache.Origin.parse(json.dumps(facts[ORIGIN_KEY])) if ORIGIN_KEY in facts else None
        return cache.StoredImage(mean, mean_flip=flip, origin=origin)

    for shard in sorted(where.glob("*.tar")) if where.is_dir() else [where]:
        for key, parts in _samples(shard):
            yield cache.FoundImage(key, functools.partial(load, parts))


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Group a tar file's members by key; yields the parts of each by suffix."""
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
                parts[suffix] = (
                    b"" if file is None or member.issparse() else file.read()
                )  # a sparse one may be any size
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{shard}: not a whole, uncompressed tar file ({error})") from error
    if parts:
        yield key, parts


FORMAT = cache.CacheFormat(WebDataset, read)
