"""Encode and decode with the anchors JPEG, WebP and AVIF by Pillow; each saves a grey image as grey."""

import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from PIL import Image, features

from latent_codec.errors import UserError


class Anchor(NamedTuple):
    """Define a codec to compare with, and the qualities of its curve."""

    name: str
    format: str
    """Name of the format in Pillow."""
    library: str
    """Name of the codec's library in `PIL.features`."""
    qualities: tuple[int, ...]
    options: dict[str, Any]
    """Arguments of `PIL.Image.Image.save`."""
    grey_options: dict[str, Any]
    """Arguments for a grey image."""

    def settings(self) -> str:
        """Return the options and the library's version in words."""
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"Pillow {self.format}: {shown}; {self.library} {features.version(self.library)}"


JPEG, WEBP, AVIF = ANCHORS = (
    Anchor(
        name="JPEG",
        format="JPEG",
        library="jpg",
        qualities=(5, 10, 15, 20, 30, 40, 50, 60, 75, 85, 90),
        options={"subsampling": "4:2:0", "optimize": True},
        grey_options={"optimize": True},
    ),
    Anchor(
        name="WebP",
        format="WEBP",
        library="webp",
        qualities=(1, 5, 10, 20, 30, 40, 50, 60, 75, 85, 90),
        options={"method": 6},
        grey_options={"method": 6},
    ),
    Anchor(
        name="AVIF",
        format="AVIF",
        library="avif",
        qualities=(10, 20, 30, 40, 45, 50, 55, 60, 70, 80),
        # Tiles and threads would change the bytes with the machine and never for the better.
        options={"subsampling": "4:2:0", "speed": 6, "autotiling": False, "max_threads": 1},
        grey_options={"subsampling": "4:0:0", "speed": 6, "autotiling": False, "max_threads": 1},
    ),
)


def available(anchors: Sequence[Anchor] = ANCHORS) -> list[Anchor]:
    """Return the anchors that this Pillow was built with."""
    return [anchor for anchor in anchors if features.check(anchor.library)]


def encode(anchor: Anchor, image: Image.Image, quality: int) -> bytes:
    """Return the whole file of an image of mode L or RGB; raises `UserError` if the codec refuses it."""
    file = io.BytesIO()
    options = anchor.grey_options if image.mode == "L" else anchor.options
    try:
        image.save(file, format=anchor.format, quality=quality, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{image.width}x{image.height} pixels cannot be saved as {anchor.name}: {error}") from error
    return file.getvalue()


def largest_within(
    anchor: Anchor, image: Image.Image, limit: int, qualities: Iterable[int]
) -> tuple[int, bytes] | None:
    """Return quality and bytes of the largest file within `limit`, if any, trying ascending qualities to twice it."""
    best: tuple[int, bytes] | None = None
    for quality in qualities:
        data = encode(anchor, image, quality)
        if len(data) > 2 * limit:
            break
        if len(data) <= limit and (best is None or len(data) >= len(best[1])):
            best = quality, data
    return best


def decode(anchor: Anchor, data: bytes, mode: str) -> Image.Image:
    """Return the image of a file in `mode`, L or RGB."""
    with Image.open(io.BytesIO(data), formats=[anchor.format]) as image:
        return image.convert(mode)
