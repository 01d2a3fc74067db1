"""Read an image file as upright sRGB pixels in uint8 without alpha, and refuse what is not one still image.

A file is refused with a `UserError` that names it, the reason and the remedy, in this order:

1. It cannot be opened or is empty, or its content is of none of `FORMATS` (`_identify`).
2. Its header claims more than `ReadOptions.max_pixels`; no pixel has been decoded then (`_check_size`).
3. It has several frames, as animations and multi-page TIFF have (of a camera's multi-picture JPEG, MPO, the main
   picture is read), or its pixels cannot be decoded because it is damaged or cut off (`_load`).
4. Its pixels are floating-point, 12-bit grey, or integers beyond 16 bits (`colour.in_8_bits`).
"""

import dataclasses
import importlib
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, ImageFile, features
from PIL import Image as PilImage

from latent_codec.errors import UserError
from latent_codec.images.buckets import ResizeOptions
from latent_codec.images.colour import by_tags, composite, in_8_bits, in_srgb, opacity, parse_colour
from latent_codec.images.containers import jpeg_damage, prepare
from latent_codec.images.geometry import Geometry, Image
from latent_codec.images.resize import resized
from latent_codec.storage.files import open_regular

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
# Pillow registers a plugin even if the library that it needs was not compiled in.
_LIBRARIES = {"JPEG": "jpg", "PNG": "zlib", "WEBP": "webp", "AVIF": "avif"}

for _plugin, _register in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", "")):
    with suppress(ImportError):  # extras
        _module = importlib.import_module(_plugin)
        _SUFFIXES |= {"HEIF": (".heic", ".heif", ".hif")} if _register else {"JXL": (".jxl",)}
        if _register:
            getattr(_module, _register)()

FORMATS: tuple[str, ...] = tuple(f for f in _SUFFIXES if f not in _LIBRARIES or features.check(_LIBRARIES[f]))
"""Pillow's names of the formats that are read. An allow-list keeps untrusted files away from rarely used parsers."""

EXTENSIONS: frozenset[str] = frozenset(suffix for f in FORMATS for suffix in _SUFFIXES[f])
"""Lower-case suffixes of `FORMATS`, for listing folders. Reading goes by a file's content and ignores its name."""

# 134 million pixels are more than any single-shot camera has (a 100-megapixel back: 11648 x 8736 = 102 million), and
# limit what a small malicious file can make this process allocate to 0.5 GiB (Pillow keeps 4 bytes per pixel).
DEFAULT_MAX_PIXELS = 2**27


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """Choose how image files become pixels; raises `UserError` for a value out of range."""

    background: str = "#ffffff"
    """Colour `#rrggbb` that transparent pixels are composited on."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """Largest width x height that is read, at least 1. The size in the header decides, before pixels are decoded."""
    resize: ResizeOptions | None = None
    """The size that upright images are brought to; None keeps their own."""

    def __post_init__(self) -> None:
        parse_colour(self.background)
        if self.max_pixels < 1:
            raise UserError(f"a limit of {self.max_pixels} pixels refuses every image; it must be at least 1")


def read_image(
    source: Path | str | BinaryIO | bytes, options: ReadOptions = ReadOptions(), *, name: str | None = None
) -> Image:
    """Read one still image as upright sRGB pixels, (3, h, w) uint8.

    - Alpha, and the one colour that a PNG or GIF declares transparent, is composited on `options.background`.
    - 16-bit grey is divided by 257 with rounding; other 16-bit images are reduced to their upper 8 bits by Pillow.
    - An embedded ICC profile is applied; one that is broken or made for other channels is ignored, as in browsers.
    - At last the image is resized, where `options.resize` says how.

    `name` names the source in messages; a path names itself. A stream is read from its start and stays open. Raises
    `UserError` with the name and the reason for whatever the module refuses.
    """
    backdrop = parse_colour(options.background)
    name = name or (str(source) if isinstance(source, Path | str) else "image")
    with _opened(source, name) as opened, _any_size():
        try:
            stream, profile, tags = prepare(opened)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        pil = _identify(stream, name)
        _check_size(pil, name, options.max_pixels)
        orientation, remaining, rawmode = _load(pil, name)
        if pil.format in ("JPEG", "MPO") and (damage := jpeg_damage(stream)) is not None:
            raise UserError(f"{name}: cannot be decoded, the file may be damaged or cut off: {damage}")
    alpha = opacity(pil, rawmode)
    colour = in_8_bits(pil, rawmode, name)
    colour = by_tags(colour, tags) if tags is not None else in_srgb(colour, profile or pil.info.get("icc_profile"))
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
    image = Image(torch.from_numpy(pixels), geometry)
    if options.resize is None:
        return image
    try:
        return resized(image, options.resize, options.max_pixels)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


_limit = threading.Lock()
_readers, _kept_limit = 0, PilImage.MAX_IMAGE_PIXELS


@contextmanager
def _any_size() -> Iterator[None]:
    """Suspend Pillow's own limit of pixels, which is the whole process's, while any thread reads: ours decides."""
    global _readers, _kept_limit
    with _limit:
        if _readers == 0:
            _kept_limit, PilImage.MAX_IMAGE_PIXELS = PilImage.MAX_IMAGE_PIXELS, None
        _readers += 1
    try:
        yield
    finally:
        with _limit:
            _readers -= 1
            if _readers == 0:
                PilImage.MAX_IMAGE_PIXELS = _kept_limit


@contextmanager
def _opened(source: Path | str | BinaryIO | bytes, name: str) -> Iterator[BinaryIO]:
    """Open the source as a seekable stream; a stream of the caller's stays open."""
    try:
        if isinstance(source, Path | str):
            with open_regular(Path(source)) as stream:
                yield stream
        elif isinstance(source, bytes):
            yield io.BytesIO(source)
        else:
            yield source if source.seekable() else io.BytesIO(source.read())
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from error


def _identify(stream: BinaryIO, name: str) -> ImageFile.ImageFile:
    """Open an image as `PIL.Image.open(stream, formats=FORMATS)` does, which would warn of large images."""
    PilImage.init()
    stream.seek(0)
    prefix = stream.read(16)
    if not prefix:
        raise UserError(f"{name}: the file is empty")
    reason = "its first bytes match none of them"
    for image_format in FORMATS:
        factory, accept = PilImage.OPEN[image_format]
        if accept is None or accept(prefix) is True:
            stream.seek(0)
            try:
                return factory(stream, "")
            except Exception as error:  # damaged files make plugins raise anything
                reason = f"it begins like {image_format}, but: {error or type(error).__name__}"
    raise UserError(f"{name}: not a readable image of the formats {', '.join(FORMATS)}: {reason}")


def _check_size(pil: ImageFile.ImageFile, name: str, max_pixels: int) -> None:
    width, height = pil.size
    if width * height > max_pixels:
        raise UserError(
            f"{name}: {width}x{height} = {width * height} pixels exceed the limit of {max_pixels}; "
            "raise --max-pixels if you trust the file"
        )


def _load(pil: ImageFile.ImageFile, name: str) -> tuple[int, int, str]:
    """Decode the pixels.

    Returns the file's EXIF orientation, the one that remains to be applied, and Pillow's name of the stored layout.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # a setting of the whole process, so it cannot be switched off here
        raise UserError(f"{name}: PIL.ImageFile.LOAD_TRUNCATED_IMAGES hides damage; set it to False")
    args = pil.tile[0][3] if pil.tile else ""
    rawmode = str(args[0]) if isinstance(args, tuple) else str(args)
    try:
        if pil.format != "MPO" and getattr(pil, "is_animated", False):
            raise UserError(f"{name}: it has more than one frame; only still images are read, so split it first")
        before = _orientation(pil) if pil.format == "TIFF" else 1
        pil.load()
        if pil.format == "TIFF":  # Pillow applies a TIFF's orientation while loading it
            return before, 1, rawmode
        orientation = _orientation(pil)  # after loading, because a PNG's EXIF may follow its pixels
        return orientation, orientation, rawmode
    except UserError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{name}: cannot be decoded, the file may be damaged or cut off: {reason}") from error


def _orientation(pil: PilImage.Image) -> int:
    try:
        value = pil.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata does not prevent reading the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


_STRIP_PIXELS = 2**18  # fit in a processor's cache


def _pixels(
    colour: PilImage.Image, alpha: np.ndarray | None, backdrop: tuple[int, int, int], orientation: int
) -> np.ndarray:
    """Convert an L or RGB image and its opacity (h, w) to upright pixels (3, h, w) uint8.

    Strips of rows are three times faster than whole planes, and need no second copy of the image.
    """
    width, height = colour.size
    pixels = np.empty((3, width, height) if orientation >= 5 else (3, height, width), np.uint8)
    stored = _turn(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # a view with the file's layout
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = np.atleast_3d(np.asarray(colour.crop((0, top, width, bottom))))  # (rows, w, 1 or 3)
        if alpha is not None:
            strip = composite(strip, alpha[top:bottom, :, None], np.array(backdrop[: strip.shape[2]], np.uint16))
        stored[:, top:bottom] = strip.transpose(2, 0, 1)
    return pixels


def _turn(planes: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of stored planes (..., h, w) turned by EXIF's `orientation`."""
    if orientation >= 5:
        planes = planes.swapaxes(-2, -1)
    if orientation in (3, 4, 7, 8):
        planes = planes[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        planes = planes[..., ::-1]
    return planes
