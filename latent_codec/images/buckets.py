"""Choose the size that an image is resized and cropped to, by the rules of the programs that train on its latents.

kohya's sd-scripts and musubi-tuner sort images into buckets, which are sizes of about one area. An image goes to the
bucket with the nearest aspect ratio, is scaled until it covers the bucket, and loses what is outside the centre.
"""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.images.geometry import Resized

Size = tuple[int, int]
"""Width and height in pixels."""

BUCKETS = ("kohya-sdxl", "kohya-sd", "flux", "musubi")
KOHYA_STEPS = {"sd": 64, "sdxl": 32, "sd3": 32, "flux": 32}
"""Steps of bucket sides that each of kohya's trainers demands at least; --bucket_reso_steps is 64 by default."""
MUSUBI_STEP = 16
_SIDES = 64, 8192
_SIZE = re.compile(r"([0-9]{1,6})(?:x([0-9]{1,6}))?")


class Placement(NamedTuple):
    """Say to what size an image is resized, and which box of that is kept."""

    resized: Size
    crop: tuple[int, int, int, int]
    """Left, top, right and bottom."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResizeOptions:
    """Choose how images are resized when they are read; raises `UserError` for a value out of range."""

    size: Size | None = None
    """Scale each image until it just covers this size, and keep its aspect ratio."""
    crop: bool = False
    """Cut the centre of `size` out of the scaled image."""
    buckets: str | None = None
    """Scale and crop each image to the nearest of these buckets: a name of `BUCKETS`, or a side in pixels."""

    def __post_init__(self) -> None:
        if self.size is not None and self.buckets is not None:
            raise UserError("--resize and --buckets both choose the size; give one of them")
        if self.buckets is not None and self.crop:
            raise UserError("--buckets crops by itself; leave out --crop")
        if self.buckets is not None:
            bucket_sizes(self.buckets)
        elif self.size is None:
            raise UserError("--crop needs the size to crop to; give --resize N or WxH too")
        elif min(self.size) < 1:
            raise UserError(f"--resize {self.size[0]}x{self.size[1]}: both sides must be at least 1")

    def placement(self, size: Size) -> Placement:
        """Return how an image of `size` is resized and cropped."""
        if self.buckets is not None:
            return cover(size, nearest(bucket_sizes(self.buckets), size))
        assert self.size is not None
        found = cover(size, self.size)
        return found if self.crop else Placement(found.resized, (0, 0, *found.resized))


def resize_options(resize: str | None, crop: bool, buckets: str | None) -> ResizeOptions | None:
    """Return the options that a command's flags mean, None without any; raises `UserError` for what is none."""
    if resize is None and not crop and buckets is None:
        return None
    size = None
    if resize is not None:
        if (match := _SIZE.fullmatch(resize)) is None:
            raise UserError(f"--resize {resize} is no size; give the shorter side, such as 512, or WxH: 768x512")
        size = int(match[1]), int(match[2] or match[1])
    return ResizeOptions(size=size, crop=crop, buckets=buckets)


@functools.cache
def bucket_sizes(name: str) -> tuple[Size, ...]:
    """Return the sizes of the named buckets in order; raises `UserError` for an unknown name."""
    if name in ("kohya-sdxl", "flux"):
        return kohya_buckets(1024, least=256, most=2048)
    if name == "kohya-sd":
        return kohya_buckets(512, least=256, most=1024)
    side = 1024 if name == "musubi" else int(name) if name.isascii() and name.isdecimal() else 0
    if not _SIDES[0] <= side <= _SIDES[1]:
        raise UserError(
            f"--buckets {name} is none of {', '.join(BUCKETS)}, or of the sides {_SIDES[0]} to {_SIDES[1]} of a square"
        )
    return musubi_buckets(side)


def kohya_buckets(side: int, *, least: int, most: int, step: int = 64) -> tuple[Size, ...]:
    """Return kohya's buckets of at most `side` squared pixels, whose sides are multiples of `step` in a range."""
    square = side // step * step
    found = {(square, square)}
    for width in range(least, most + 1, step):
        height = min(most, side * side // width // step * step)
        if height >= least:
            found |= {(width, height), (height, width)}
    return tuple(sorted(found))


def musubi_buckets(side: int, step: int = MUSUBI_STEP) -> tuple[Size, ...]:
    """Return musubi-tuner's buckets for `resolution = [side, side]`: the shorter side is at least half of it."""
    widths = range(side // 2 // step * step, side + step, step)
    found = {(width, side * side // width // step * step) for width in widths}
    return tuple(sorted(found | {(height, width) for width, height in found}))


def nearest(buckets: tuple[Size, ...], size: Size) -> Size:
    """Return the first of the buckets whose width / height differs least from the image's."""
    ratio = size[0] / size[1]
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def cover(size: Size, target: Size) -> Placement:
    """Scale an image until it covers `target`, and keep the centre; sides are rounded as both trainers do."""
    scale = max(target[0] / size[0], target[1] / size[1])
    width, height = (int(side * scale + 0.5) for side in size)
    left, top = (width - target[0]) // 2, (height - target[1]) // 2
    return Placement((width, height), (left, top, left + target[0], top + target[1]))


def record(size: Size, placement: Placement) -> Resized:
    """Return what is kept of an image of `size` that was resized."""
    return Resized(original_size=size, crop_ltrb=placement.crop)


def kohya_crop_ltrb(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """Return the `crop_ltrb` that kohya conditions SDXL on.

    It is the box of the original image scaled to fit within its bucket, and not the box that was cropped.
    """
    ratio = size[0] / size[1]
    wide = bucket[0] / bucket[1] > ratio
    width = bucket[1] * ratio if wide else bucket[0]
    height = bucket[1] if wide else bucket[0] / ratio
    left, top = math.floor((bucket[0] - width) / 2), math.floor((bucket[1] - height) / 2)
    return left, top, left + width, top + height
