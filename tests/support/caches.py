"""Convert small latents, and group WebDataset's samples as its reader does."""

import io
import json
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.registry import CacheName
from latent_codec.interop.caches.write import Conversion, write_cache
from latent_codec.latents.batches import BatchIndices
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.support.latents import row_of, write

PATHS = ("cat/a.jpg", "cat/b.c.png", "dog/ü/e.png", "dog/f.png")
"""Images of two sizes where `side` is None."""
EVERY: dict[CacheName, dict[str, Any]] = {
    **{"kohya": {"arch": "flux"}, "musubi": {"arch": "qi"}, "comfyui": {}, "lightningdit": {}, "mar": {}, "edm2": {}},
    **{"webdataset": {"scale": "normalized"}, "npy": {"scale": "raw"}},
}
"""Options that each format is tested with."""


def store(
    folder: Path, codec: Codec, paths: Sequence[str] = PATHS, side: int | None = 16, flips: bool = True
) -> Latents:
    """Write float16 latents of square images, or of several sizes if `side` is None."""
    return write(folder, codec, [row_of(path, "float16", side, flips) for path in paths], "float16", flips)


def draws(latents: Latents, seed: int = 0, epoch: int = 0) -> dict[str, torch.Tensor]:
    """Return what `Latents` itself draws, by path."""
    drawn = Latents(latents.folder, seed=seed)
    drawn.set_epoch(epoch)
    return {sample.path: sample.z for sample in (drawn[i] for i in range(len(drawn)))}


def flipped_draws(latents: Latents, seed: int = 0, epoch: int = 0) -> dict[str, torch.Tensor]:
    """Draw the mirrored images by the noise of the images themselves."""
    found: dict[str, torch.Tensor] = {}
    drawn = Latents(latents.folder, seed=seed)
    for i, entry in enumerate(latents.entries):
        moments, mirrored = drawn.moments(BatchIndices((i,), epoch)), drawn.posterior(i, flip=True)
        found[entry.path] = drawn.draw(moments._replace(mean=mirrored.mean, logvar=mirrored.logvar))[0]
    return found


def scaled(latents: Latents, z: torch.Tensor) -> torch.Tensor:
    """Normalise by the model's statistics."""
    found = latents.header.statistics
    assert found is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (found.mean, found.std))
    return (z - mean) / std


def made(latents: Latents, to: CacheName, folder: Path, overwrite: bool = False, **given: Any) -> Conversion:
    """Write a cache and check that every image is accounted for."""
    converted = write_cache(latents.folder, folder, to, CacheOptions(**given), overwrite=overwrite)
    summary = converted.summary
    assert summary.done + summary.skipped + len(summary.failures) == summary.found == len(latents)
    return converted


def close(a: Any, b: torch.Tensor) -> bool:
    return torch.allclose(torch.as_tensor(a), b, atol=1e-6)


def samples(shard: Path) -> list[dict[str, Any]]:
    """Group a tar file's members as WebDataset does, and decode them by the last part of the suffix."""
    found: list[dict[str, Any]] = []
    decode = {"npy": lambda data: np.load(io.BytesIO(data)), "cls": int, "json": json.loads}
    with tarfile.open(shard) as tar:
        for member in tar:
            match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
            assert match is not None
            if not found or found[-1]["__key__"] != match[1]:
                found.append({"__key__": match[1]})
            file = tar.extractfile(member)
            assert file is not None and match[2] not in found[-1]
            found[-1][match[2]] = decode[match[2].rpartition(".")[2]](file.read())
    return found
