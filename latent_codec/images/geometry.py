"""Describe how an image became a model's input, pad it, and crop what comes back."""

import dataclasses
from typing import Literal, NamedTuple

import torch

from latent_codec.images.colour import parse_colour


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a file's pixels became the model's input, and how to undo it. Travels as JSON (`config.to_json`)."""

    width: int
    """Pixels of the upright image."""
    height: int
    orientation: int
    """EXIF orientation found in the file, 1 to 8. It has been applied: the pixels are upright."""
    mode: Literal["L", "RGB"]
    """Colour mode of the decoded image: grey stays grey."""
    background: str | None
    """`#rrggbb` that the alpha was composited on; None if the file had neither alpha nor a transparent colour."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"an image of {self.width}x{self.height} pixels is empty; sizes are at least 1x1")
        if not 1 <= self.orientation <= 8:
            raise ValueError(f"orientation {self.orientation} is none of EXIF's 1 to 8")
        if self.background is not None:
            parse_colour(self.background)


class Image(NamedTuple):
    pixels: torch.Tensor
    """(3, h, w) uint8, sRGB; grey is repeated three times."""
    geometry: Geometry


def as_shown(pixels: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """(3, h, w) uint8 as they will be written and read again: of a grey image the three planes become one.

    Grey is their rounded mean, which undoes `read_image`'s repeat exactly where they are equal.
    """
    if geometry.mode == "RGB":
        return pixels
    return ((pixels.sum(0, dtype=torch.int32) + 1) // 3).to(torch.uint8).expand(3, -1, -1)


def in_channels(pixels: torch.Tensor, channels: int) -> torch.Tensor:
    """(..., 3, h, w) uint8 as a model of 1 or 3 channels takes them; what has its number of channels stays as it is.

    One channel is the luma of Rec. 601, rounded: of a grey image, whose three planes are equal, any of them.
    """
    if pixels.shape[-3] == channels:
        return pixels
    weight = torch.tensor([299, 587, 114], dtype=torch.int32, device=pixels.device)[:, None, None]
    luma = (pixels.int() * weight).sum(-3, keepdim=True)
    return ((luma + 500) // 1000).to(torch.uint8)  # (..., 1, h, w)


def in_rgb(pixels: torch.Tensor) -> torch.Tensor:
    """(..., 1 or 3, h, w) -> (..., 3, h, w): undoes `in_channels` for grey images. A view."""
    return pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])


def pad(x: torch.Tensor, factor: int) -> torch.Tensor:
    """(..., h, w) -> (..., h', w'): repeats the last row and column up to multiples of `factor`. Any dtype.

    Unlike `torch.nn.functional.pad` it takes integers.
    """
    height, width = x.shape[-2:]
    if bottom := -height % factor:
        x = torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], bottom, width)], dim=-2)
    if right := -width % factor:
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], right)], dim=-1)
    return x


def mirrored(image: Image, factor: int) -> torch.Tensor:
    """(3, h', w') of an image that has been padded: its mirror image, left to right, padded.

    Mirrored first: what is padded is the right edge, which then is another one.
    """
    return pad(crop(image.pixels, image.geometry).flip(-1), factor)


def crop(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """(..., h', w') -> (..., height, width): undoes `pad`. A view."""
    return x[..., : geometry.height, : geometry.width]
