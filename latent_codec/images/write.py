"""Write pixels as image files."""

import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image as PilImage
from PIL.PngImagePlugin import PngInfo

from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry, as_shown
from latent_codec.storage.files import atomic_path, open_regular
from latent_codec.storage.removal import check_replaceable

_MAKER = ("Software", "latent-codec")
"""Keyword and text of a PNG's tEXt chunk."""
_HEAD = 2**10
"""Bytes of a PNG that hold the texts that its writer puts before the pixels."""


def to_pil(pixels: torch.Tensor, geometry: Geometry) -> PilImage.Image:
    """Convert pixels (3, h, w) uint8 of the geometry's size to a Pillow image of the geometry's mode."""
    if pixels.dtype != torch.uint8 or pixels.shape != (3, geometry.height, geometry.width):
        raise ValueError(
            f"expected uint8 (3, {geometry.height}, {geometry.width}), found {pixels.dtype} {pixels.shape}"
        )
    planes = as_shown(pixels.cpu(), geometry).numpy()
    if geometry.mode == "L":
        return PilImage.fromarray(np.ascontiguousarray(planes[0]))
    return PilImage.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 3},  # Pillow's 6 takes 2.6 times as long for 2% less
    "webp": {"format": "WEBP", "lossless": True},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
}

ImageFormat = Literal["png", "webp", "jpg"]


def write_image(path: Path | str, pixels: torch.Tensor, geometry: Geometry, image_format: ImageFormat) -> None:
    """Write an image file atomically; raises `UserError` if the format cannot hold it or it cannot be written."""
    try:
        data = image_bytes(pixels, geometry, image_format)
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def image_bytes(pixels: torch.Tensor, geometry: Geometry, image_format: ImageFormat) -> bytes:
    """Encode pixels (3, h, w) uint8 as PNG, lossless WebP, or JPEG of quality 95 without chroma subsampling.

    Raises `UserError` if the format cannot hold the size.
    """
    pil = to_pil(pixels, geometry)
    buffer = io.BytesIO()
    try:
        pil.save(buffer, **_SAVE_OPTIONS[image_format])
    except (OSError, ValueError) as error:
        raise UserError(f"{pil.width}x{pil.height} pixels cannot be written as {image_format}: {error}") from error
    return buffer.getvalue()


def rgb_pixels(image: PilImage.Image) -> torch.Tensor:
    """Convert a Pillow image to pixels (3, h, w) uint8; grey is repeated three times."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def write_grid(path: Path, pixels: torch.Tensor, columns: int) -> None:
    """Write images (n, 3, h, w) uint8 as one PNG, row by row; n is a multiple of `columns`.

    The PNG says that this program made it, for `check_grid`.
    """
    picture = rearrange(pixels.cpu(), "(r n) c h w -> (r h) (n w) c", n=columns).numpy()
    about = PngInfo()
    about.add_text(*_MAKER)
    with atomic_path(path) as temporary:
        PilImage.fromarray(picture).save(temporary, format="PNG", pnginfo=about)


def check_grid(path: Path) -> None:
    """Raise `UserError` unless a grid may be written to a path: only another grid is replaced."""
    check_replaceable(path, _is_grid, "a grid of images")


def _is_grid(path: Path) -> bool:
    keyword, text = (part.encode("latin-1") for part in _MAKER)
    try:
        with open_regular(path) as file:
            return keyword + b"\0" + text in file.read(_HEAD)
    except OSError:
        return False
