"""Small latents, and what the programs that read caches do with them."""

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latent_codec.interop.caches.options import CacheName, Options
from latent_codec.interop.caches.write import Converted, convert
from latent_codec.latents.batches import BatchIndices
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import (
    LatentsRow,
    latents_header,
    latents_row,
    unplaced_entry,
    write_index,
    write_shard,
)
from latent_codec.model.codec import Codec
from tests.support.latents import geometry, posterior

PATHS = ("cat/a.jpg", "cat/b.c.png", "dog/ü/a.png", "dog/d.png")


def options(**given: Any) -> Options:
    nothing = dict.fromkeys(("arch", "scale", "scaling_factor", "shift_factor", "seed", "epoch"))
    return Options(**{**nothing, **given})


def store(
    folder: Path, codec: Codec, paths: tuple[str, ...] = PATHS, side: int | None = 16, flips: bool = True
) -> Latents:
    """Float16 latents of square images, or for None of several sizes; each image's own."""
    rows = [_row(path, side, flips) for path in paths]
    folder.mkdir(exist_ok=True)
    header = latents_header(codec, "float16", flips)
    write_index(folder, header, write_shard(folder, header, "name", rows))
    return Latents(folder)


def _row(path: str, side: int | None, flips: bool) -> LatentsRow:
    seed = sum(path.encode())
    width, height = (17 + 8 * (seed % 2), 9) if side is None else (side, side)
    sides = -(-height // 8), -(-width // 8)
    mirrored = posterior(seed + 1, *sides) if flips else None
    entry = unplaced_entry(path, geometry(width, height), f"{seed:064x}")
    return latents_row(entry, posterior(seed, *sides), 0, "float16", mirrored)


def draws(latents: Latents, seed: int = 0, epoch: int = 0) -> dict[str, torch.Tensor]:
    """What `Latents` itself draws, by path."""
    drawn = Latents(latents.folder, seed=seed)
    drawn.set_epoch(epoch)
    return {sample.path: sample.z for sample in (drawn[i] for i in range(len(drawn)))}


def flipped_draws(latents: Latents, seed: int = 0) -> dict[str, torch.Tensor]:
    """Of the mirrored images, by the noise of the images themselves in epoch 0."""
    found: dict[str, torch.Tensor] = {}
    drawn = Latents(latents.folder, seed=seed)
    for i, entry in enumerate(latents.entries):
        moments, mirrored = drawn.moments(BatchIndices((i,), 0)), drawn.posterior(i, flip=True)
        found[entry.path] = drawn.draw(moments._replace(mean=mirrored.mean, logvar=mirrored.logvar))[0]
    return found


def scaled(codec: Codec, z: torch.Tensor) -> torch.Tensor:
    assert codec.statistics is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (codec.statistics.mean, codec.statistics.std))
    return (z - mean) / std


def made(latents: Latents, to: CacheName, folder: Path, overwrite: bool = False, **given: Any) -> Converted:
    converted = convert(latents.folder, folder, to, options(**given), overwrite=overwrite, quiet=True)
    summary = converted.summary
    assert summary.done + summary.skipped + len(summary.failures) == summary.found == len(latents)
    return converted


def close(a: Any, b: torch.Tensor) -> bool:
    return torch.allclose(torch.as_tensor(a), b, atol=1e-6)


def samples(shard: Path) -> list[dict[str, Any]]:
    """As WebDataset groups a tar file's members and decodes them, by the last part of the suffix."""
    found: list[dict[str, Any]] = []
    with tarfile.open(shard) as tar:
        for member in tar:
            match = re.match(r"^((?:.*/|)[^.]+)[.]([^/]*)$", member.name)
            assert match is not None
            if not found or found[-1]["__key__"] != match[1]:
                found.append({"__key__": match[1]})
            file = tar.extractfile(member)
            assert file is not None and match[2] not in found[-1]
            decode = {"npy": lambda data: np.load(io.BytesIO(data)), "cls": int, "json": json.loads}
            found[-1][match[2]] = decode[match[2].rpartition(".")[2]](file.read())
    return found


EVERY: dict[CacheName, dict[str, Any]] = {
    "kohya": {"arch": "flux"},
    "musubi": {"arch": "qi"},
    "comfyui": {},
    "lightningdit": {},
    "mar": {},
    "edm2": {},
    "webdataset": {"scale": "normalized"},
    "npy": {"scale": "raw"},
}
"""Options of each."""
DISTINCT = ("cat/a.jpg", "cat/b.c.png", "dog/ü/e.png", "dog/d.png")
