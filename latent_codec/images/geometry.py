"""Describe how an image became a model's input, pad it, and crop what comes back."""

import dataclasses
from typing import Literal, NamedTuple

import torch

from latent_codec.errors import UserError
from latent_codec.images.colour import parse_colour


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resized:
    """Record how an image was resized and cropped when it was read; decoding does not undo it."""

    original_size: tuple[int, ...]
    """Width and height of the upright image before."""
    crop_ltrb: tuple[int, ...]
    """Left, top, right and bottom of what was kept of the resized image."""

    def __post_init__(self) -> None:
        if len(self.original_size) != 2 or min(self.original_size) < 1:
            raise ValueError(f"original_size {list(self.original_size)} is no width and height")
        if len(self.crop_ltrb) != 4 or min(self.crop_ltrb) < 0:
            raise ValueError(f"crop_ltrb {list(self.crop_ltrb)} is no box")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Record how a file's pixels became the model's input, so that decoding can undo it; stored as JSON."""

    width: int
    """Width of the upright image in pixels."""
    height: int
    """Height of the upright image in pixels."""
    orientation: int
    """EXIF orientation of the file, 1 to 8. It has been applied already: the pixels are upright."""
    mode: Literal["L", "RGB"]
    """Colour mode of the image, grey or colour; the decoded image has the same."""
    background: str | None
    """Colour `#rrggbb` under transparent pixels; None if the file had neither alpha nor a transparent colour."""
    resized: Resized | None = None
    """The resizing and cropping before the image was encoded; None if it kept its size."""

    @property
    def original_size(self) -> tuple[int, int]:
        """Return width and height of the upright image in its file."""
        width, height = (self.width, self.height) if self.resized is None else self.resized.original_size
        return width, height

    @property
    def stored_size(self) -> tuple[int, int]:
        """Return width and height as the file's header has them, which programs see that do not turn by EXIF."""
        width, height = self.original_size
        return (height, width) if self.orientation >= 5 else (width, height)

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"an image of {self.width}x{self.height} pixels is empty; the least size is 1x1")
        if not 1 <= self.orientation <= 8:
            raise ValueError(f"orientation {self.orientation} is outside EXIF's 1 to 8")
        if self.background is not None:
            parse_colour(self.background)


class Image(NamedTuple):
    """Hold an image's pixels and geometry."""

    pixels: torch.Tensor
    """sRGB pixels, (3, h, w) uint8; grey is repeated three times."""
    geometry: Geometry


def as_shown(pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Return pixels (3, h, w) uint8 as they will be written: the planes of a grey image become their rounded mean."""
    if geometry.mode == "RGB":
        return pixels
    return ((pixels.sum(0, dtype=torch.int32) + 1) // 3).to(torch.uint8).expand(3, -1, -1)


def in_channels(pixels: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert pixels (..., 3, h, w) uint8 to a model's 1 or 3 channels; pixels that have them are returned as they are.

    One channel is the rounded luma of Rec. 601; if the three planes are equal, it is any of them.
    """
    if pixels.shape[-3] == channels:
        return pixels
    weight = torch.tensor([299, 587, 114], dtype=torch.int32, device=pixels.device)[:, None, None]
    luma = (pixels.int() * weight).sum(-3, keepdim=True)
    return ((luma + 500) // 1000).to(torch.uint8)  # (..., 1, h, w)


def in_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """Return a view (..., 3, h, w) of pixels with 1 or 3 channels; undoes `in_channels` for grey images."""
    return pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])


def pad(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Pad (..., h, w) of any dtype to multiples of `factor` by repeating the last row and column.

    `torch.nn.functional.pad` does not take integers.
    """
    height, width = x.shape[-2:]
    if bottom := -height % factor:
        x = torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], bottom, width)], dim=-2)
    if right := -width % factor:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], right)], dim=-1)
    return x


def check_size(height: int, width: int, max_pixels: int, factor: int = 1) -> None:
    """Raise `UserError` if an image has more than `max_pixels` pixels, or twice as many once padded to `factor`.

    A row of one pixel's height is `factor` times as large for the networks as its file claims.
    """
    remedy = f"exceed the limit of {max_pixels}; raise --max-pixels if you trust the file"
    if width * height > max_pixels:
        raise UserError(f"{width}x{height} = {width * height} pixels {remedy}")
    tall, wide = (-(-side // factor) * factor for side in (height, width))
    if tall * wide > 2 * max_pixels:
        raise UserError(f"{width}x{height}, padded to {wide}x{tall} = {wide * tall} pixels, would far {remedy}")


def mirrored(image: Image, factor: int) -> torch.Tensor:
    """Return the padded mirror image (3, h', w'), left to right, of an image that has been padded.

    Padding comes last, because the right edge of the mirror image is another one.
    """
    return pad(crop(image.pixels, image.geometry).flip(-1), factor)


def crop(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """Undo `pad`: return a view (..., height, width) of (..., h', w')."""
    return x[..., : geometry.height, : geometry.width]
