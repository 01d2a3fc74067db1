"""Image files <-> pixels: what is read, what is refused, and what must be remembered to undo the reading.

Pixels are sRGB, uint8, upright, without alpha. Everything else a file can hold is turned into that, once, here.
"""

import dataclasses
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, ImageFile, features
from PIL import Image as PilImage

from latent_codec.errors import UserError
from latent_codec.images.colour import composite, in_8_bits, in_srgb, opacity, parse_colour
from latent_codec.images.geometry import Geometry, Image

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
}
# Pillow registers a plugin even where the library below it was not compiled in.
_LIBRARIES = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif"}

FORMATS: tuple[str, ...] = tuple(f for f in _SUFFIXES if f not in _LIBRARIES or features.check(_LIBRARIES[f]))
"""Pillow's names of the formats that are read: an allow-list, so that no rare parser meets a stranger's file."""

EXTENSIONS: frozenset[str] = frozenset(suffix for f in FORMATS for suffix in _SUFFIXES[f])
"""Lower-case suffixes of `FORMATS`, for listing folders. Reading goes by a file's content, not by its name."""

# 134 million pixels: above every single-shot camera (a 100-megapixel back is 11648 x 8736 = 102 million), and the
# most that a few small bytes can make this process allocate stays at 0.5 GiB (Pillow keeps 4 bytes per pixel).
DEFAULT_MAX_PIXELS = 2**27


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Choose how image files become pixels; raises `UserError` for a value out of range."""

    background: str = "#ffffff"
    """Colour `#rrggbb` that transparent pixels are composited on."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Largest width x height that is read, at least 1. The size in the header decides, before pixels are decoded."""

    def __post_init__(self) -> None:
        parse_colour(self.background)
        if self.max_pixels < 1:
            raise UserError(f"a limit of {self.max_pixels} pixels refuses every image; it must be at least 1")


READ_DEFAULTS = ReadOptions()


def read_image(
    source: Path | str | BinaryIO | bytes, options: ReadOptions = READ_DEFAULTS, *, name: str | None = None
) -> Image:
    """Reads one still image as upright sRGB pixels, (3, h, w) uint8.

    - Alpha, and the one colour that a PNG or GIF calls transparent, is composited on `options.background`.
    - 16-bit grey is divided by 257 with rounding; other 16-bit images come from Pillow as their upper 8 bits.
    - An embedded ICC profile is followed; one that is broken or made for other channels is ignored, as browsers do.
    - Of a camera's multi-picture JPEG (MPO) the main picture is read; any other file of several frames is refused.

    `name` stands for the source in messages; a path names itself. A stream is read from its start and stays open.
    Raises `UserError`, one sentence with the name and the reason, for whatever
    cannot be read as one such image.
    """
    backdrop = parse_colour(options.background)
    name = name or (str(source) if isinstance(source, Path | str) else "image")
    with _opened(source, name) as stream:
        pil = _identify(stream, name)
        _check_header(pil, name, options.max_pixels)
        orientation, remaining, rawmode = _load(pil, name)
    alpha = opacity(pil, rawmode)
    colour = in_srgb(in_8_bits(pil, rawmode, name), pil.info.get("icc_profile"))
    if colour.mode == "L" and alpha is not None and len(set(backdrop)) > 1:
        colour = colour.convert("RGB")  # grey on a coloured background is no longer grey
    pixels = _pixels(colour, alpha, backdrop, remaining)
    _, height, width = pixels.shape
    geometry = Geometry(
        width=width,
        height=height,
        orientation=orientation,
        mode="L" if colour.mode == "L" else "RGB",
        background=None if alpha is None else options.background.lower(),
    )
    return Image(torch.from_numpy(pixels), geometry)


@contextmanager
def _opened(source: Path | str | BinaryIO | bytes, name: str) -> Iterator[BinaryIO]:
    """The source as a seekable stream; a stream of the caller's stays open."""
    try:
        if isinstance(source, Path | str):
            with Path(source).open("rb") as stream:
                yield stream
        elif isinstance(source, bytes):
            yield io.BytesIO(source)
        else:
            yield source if source.seekable() else io.BytesIO(source.read())
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error


def _identify(stream: BinaryIO, name: str) -> ImageFile.ImageFile:
    """What `PIL.Image.open(stream, formats=FORMATS)` does, less its look at `PIL.Image.MAX_IMAGE_PIXELS`.

    That limit belongs to the whole process: `Image.open` would warn from 89 million pixels and refuse from 179, and to
    change it, or to silence the warning, for one call is not thread-safe. `_check_header` applies `max_pixels`
    instead. Some plugins (TIFF, GIF, WebP since Pillow 13) ask for Pillow's limit themselves: there it holds too.
    """
    PilImage.init()
    stream.seek(0)
    prefix = stream.read(16)
    if not prefix:
        raise UserError(f"{name}: the file is empty")
    reason = "it starts like none of them"
    for image_format in FORMATS:
        factory, accept = PilImage.OPEN[image_format]
        if accept is None or accept(prefix) is True:
            stream.seek(0)
            try:
                return factory(stream, "")
            except PilImage.DecompressionBombError as error:
                raise UserError(f"{name}: {error}; raise PIL.Image.MAX_IMAGE_PIXELS to read it") from error
            except Exception as error:  # plugins raise whatever a stranger's bytes make them raise
                reason = f"it starts like {image_format}, but: {error or type(error).__name__}"
    raise UserError(f"{name}: not a readable image of the formats {', '.join(FORMATS)}: {reason}")


def _check_header(pil: ImageFile.ImageFile, name: str, max_pixels: int) -> None:
    """Refuses by the size that the file claims, before a single pixel is decoded."""
    width, height = pil.size
    if width * height > max_pixels:
        raise UserError(
            f"{name}: {width}x{height} = {width * height} pixels exceed the limit of {max_pixels}; "
            "raise max_pixels if you trust the file"
        )


def _load(pil: ImageFile.ImageFile, name: str) -> tuple[int, int, str]:
    """Decodes the pixels.

    Returns the EXIF orientation found in the file, the one still to be applied, and Pillow's name of the stored layout.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # the whole process's, so it is not ours to switch off
        raise UserError(f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES hides damage; set it to False")
    args = pil.tile[0][3] if pil.tile else ""
    rawmode = str(args[0]) if isinstance(args, tuple) else str(args)
    try:
        if pil.format != "MPO" and getattr(pil, "is_animated", False):
            raise UserError(f"{name}: it has more than one frame; only still images are read, so split it first")
        before = _orientation(pil) if pil.format == "TIFF" else 1
        pil.load()
        if pil.format == "TIFF":  # Pillow turns a TIFF itself while loading it
            return before, 1, rawmode
        orientation = _orientation(pil)  # now, because a PNG's EXIF may come after its pixels
        return orientation, orientation, rawmode
    except UserError:
        raise
    except PilImage.DecompressionBombError as error:
        raise UserError(f"{name}: {error}; raise PIL.Image.MAX_IMAGE_PIXELS to read it") from error
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: cannot be decoded, the file may be damaged or cut off: {reason}") from error


def _orientation(pil: PilImage.Image) -> int:
    try:
        value = pil.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken metadata is no reason to lose a picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


_STRIP_PIXELS = 2**18


def _pixels(
    colour: PilImage.Image, alpha: np.ndarray | None, backdrop: tuple[int, int, int], orientation: int
) -> np.ndarray:
    """(3, h, w) uint8, upright, from an L or RGB image and its opacity (h, w).

    Goes by strips of rows: three times faster than whole planes, and no second copy lies beside Pillow's.
    """
    width, height = colour.size
    pixels = np.empty((3, width, height) if orientation >= 5 else (3, height, width), np.uint8)
    stored = _turn(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # a view laid out as the file is
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = np.atleast_3d(np.asarray(colour.crop((0, top, width, bottom))))  # (rows, w, 1 or 3)
        if alpha is not None:
            strip = composite(strip, alpha[top:bottom, :, None], np.array(backdrop[: strip.shape[2]], np.uint16))
        stored[:, top:bottom] = strip.transpose(2, 0, 1)
    return pixels


def _turn(planes: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored planes (..., h, w) as EXIF's `orientation` says they are to be seen."""
    if orientation >= 5:
        planes = planes.swapaxes(-2, -1)
    if orientation in (3, 4, 7, 8):
        planes = planes[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        planes = planes[..., ::-1]
    return planes
