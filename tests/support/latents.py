"""Make small latents whose posteriors and sizes are functions of the images' paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latent_codec.images.geometry import Geometry
from latent_codec.latents import format as latents_format
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import LatentsRow, StoredDtype, latents_header, latents_row, unplaced_entry
from latent_codec.model.codec import Codec
from latent_codec.model.posteriors import DiagonalGaussian
from latent_codec.noise import text_key

PATHS = ("a.jpg", "a.png", "b/ü.png", "b/c/d.png")
"""Images of both sizes; two have no class."""


def geometry(width: int, height: int, **more: Any) -> Geometry:
    """Return the geometry of an upright RGB image without transparency, unless told otherwise."""
    return Geometry(width=width, height=height, **{"orientation": 1, "mode": "RGB", "background": None} | more)


def posterior(seed: int, height: int = 2, width: int = 3) -> DiagonalGaussian:
    mean, logvar = torch.randn(2, 1, 4, height, width, generator=torch.Generator().manual_seed(seed))
    return DiagonalGaussian(mean, logvar)


def seed_of(path: str) -> int:
    return text_key(path) % 1000


def size_of(path: str) -> tuple[int, int]:
    """Return width and height of the image at a path: 17x9 or 16x16 pixels."""
    return (17, 9) if seed_of(path) % 2 else (16, 16)


def stored(path: str, side: int | None = None, mirrored: bool = False) -> DiagonalGaussian:
    """Return the posterior of the image at a path, of a square image if `side` is given, or of its mirror image."""
    width, height = (side, side) if side else size_of(path)
    return posterior(seed_of(path) + mirrored, -(-height // 8), -(-width // 8))


def row_of(path: str, dtype: StoredDtype = "float32", side: int | None = None, flips: bool = False) -> LatentsRow:
    size = (side, side) if side else size_of(path)
    entry = unplaced_entry(path, geometry(*size), f"{seed_of(path):064x}")
    return latents_row(entry, stored(path, side), 0, dtype, stored(path, side, True) if flips else None)


def write(
    folder: Path, codec: Codec, rows: Sequence[LatentsRow], dtype: StoredDtype = "float32", flips: bool = False
) -> Latents:
    """Write rows as one shard and its index."""
    folder.mkdir(exist_ok=True)
    header = latents_header(codec, dtype, flips)
    latents_format.write_index(folder, header, latents_format.write_shard(folder, header, "name", rows))
    return Latents(folder)


def store(folder: Path, codec: Codec, paths: Sequence[str] = PATHS, dtype: StoredDtype = "float32") -> Latents:
    return write(folder, codec, [row_of(path, dtype) for path in paths], dtype)


def damage(latents: Latents, index: int) -> str:
    """Overwrite a value of one image's stored mean, which must be float16, by infinity; returns the image's path."""
    entry, (height, width) = latents.entries[index], latents.shapes[index]
    start = latents.locate(entry.shard, (height, width), False)[0].start + entry.row * 2 * 4 * height * width
    with (latents.folder / entry.shard).open("r+b") as file:
        file.seek(start)
        file.write(b"\x00\x7c")
    return entry.path
