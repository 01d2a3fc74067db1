"""Image files <-> pixels: what is read, what is refused, and what must be remembered to undo the reading.

Pixels are sRGB, uint8, upright, without alpha. Everything else a file can hold is turned into that, once, here.
"""

import dataclasses
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, ImageCms, ImageFile, features
from PIL import Image as PilImage

from latent_codec.errors import UserError
from latent_codec.files import atomic_path

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
            _parse_colour(self.background)


class Image(NamedTuple):
    pixels: torch.Tensor
    """(3, h, w) uint8, sRGB; grey is repeated three times."""
    geometry: Geometry


def read_image(
    source: Path | BinaryIO | bytes,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    background: str = "#ffffff",
    name: str | None = None,
) -> Image:
    """Reads one still image as upright sRGB pixels, (3, h, w) uint8.

    - Alpha, and the one colour that a PNG or GIF calls transparent, is composited on `background` ("#rrggbb").
    - 16-bit grey is divided by 257 with rounding; other 16-bit images come from Pillow as their upper 8 bits.
    - An embedded ICC profile is followed; one that is broken or made for other channels is ignored, as browsers do.
    - Of a camera's multi-picture JPEG (MPO) the main picture is read; any other file of several frames is refused.

    `name` stands for the source in messages; a path names itself. A stream is read from its start and stays open.
    `max_pixels` bounds width x height. Raises `UserError`, one sentence with the name and the reason, for whatever
    cannot be read as one such image.
    """
    backdrop = _parse_colour(background)
    name = name or (str(source) if isinstance(source, Path) else "image")
    with _opened(source, name) as stream:
        pil = _identify(stream, name)
        _check_header(pil, name, max_pixels)
        orientation, remaining, rawmode = _load(pil, name)
    alpha = _alpha(pil, rawmode)
    colour = _in_srgb(_in_8_bits(pil, rawmode, name), pil.info.get("icc_profile"))
    if colour.mode == "L" and alpha is not None and len(set(backdrop)) > 1:
        colour = colour.convert("RGB")  # grey on a coloured background is no longer grey
    pixels = _pixels(colour, alpha, backdrop, remaining)
    _, height, width = pixels.shape
    geometry = Geometry(
        width=width,
        height=height,
        orientation=orientation,
        mode="L" if colour.mode == "L" else "RGB",
        background=None if alpha is None else background.lower(),
    )
    return Image(torch.from_numpy(pixels), geometry)


@contextmanager
def _opened(source: Path | BinaryIO | bytes, name: str) -> Iterator[BinaryIO]:
    """The source as a seekable stream; a stream of the caller's stays open."""
    try:
        if isinstance(source, Path):
            with source.open("rb") as stream:
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
    instead. For WebP, TIFF and GIF Pillow's own limit holds as well, because their plugins ask for it themselves.
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


def _alpha(pil: PilImage.Image, rawmode: str) -> np.ndarray | None:
    """(h, w) uint8 opacity: an alpha channel, a palette's, or 0 for the one colour that is called transparent."""
    if pil.mode in ("La", "RGBa"):
        pil = pil.convert(pil.mode.upper())
    if "A" in pil.getbands():
        return np.asarray(pil.getchannel("A"))
    key = pil.info.get("transparency")
    if key is None:
        return None
    if pil.mode == "P":
        opacity = np.full(256, 255, np.uint8)
        if isinstance(key, bytes):
            opacity[: len(key)] = np.frombuffer(key, np.uint8)
        else:
            opacity[key] = 0
        return opacity[np.asarray(pil)]
    if isinstance(key, tuple):
        shift = 8 if rawmode == "RGB;16B" else 0  # the key has the file's 16 bits, Pillow's pixels only the upper 8
        transparent = np.all([np.asarray(pil.getchannel(c)) == key[c] >> shift for c in range(3)], axis=0)
    else:
        scale = {"L;2": 255 // 3, "L;4": 255 // 15}.get(rawmode, 1)  # Pillow scales such pixels but not the key
        transparent = np.asarray(pil.convert("L") if pil.mode == "1" else pil) == key * scale
    return np.where(transparent, np.uint8(0), np.uint8(255))


_8_BITS_OF_16 = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # rounds v * 255 / 65535; 257 is odd: no ties


def _in_8_bits(pil: PilImage.Image, rawmode: str, name: str) -> PilImage.Image:
    """The colours without the alpha: mode L, RGB or CMYK."""
    if pil.mode == "F":
        raise UserError(f"{name}: floating-point pixels have no agreed white; save it with 8 or 16 bits per channel")
    if rawmode == "I;12":
        raise UserError(f"{name}: 12-bit grey is not supported; save it with 8 or 16 bits per channel")
    if pil.mode.startswith("I"):
        values = np.asarray(pil)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise UserError(f"{name}: grey values {low}..{high} exceed 16 bits (0..65535); save it with 16 bits")
        grey = _8_BITS_OF_16[values]
        if pil.format == "TIFF" and pil.getexif().get(ExifTags.Base.PhotometricInterpretation) == 0:
            grey = 255 - grey  # WhiteIsZero, which Pillow honours up to 8 bits only
        return PilImage.fromarray(grey)
    if pil.mode in ("L", "RGB", "CMYK"):
        return pil
    if pil.mode == "LA" or rawmode == "LA;16B":  # the latter is handed out as RGBA
        return pil.getchannel(0)
    if pil.mode in ("1", "La") or (pil.mode == "P" and _is_grey(pil.getpalette("RGB") or [])):
        return (pil.convert("LA") if pil.mode == "La" else pil).convert("L")
    return (pil.convert("RGBA") if pil.mode == "RGBa" else pil).convert("RGB")


def _is_grey(palette: list[int]) -> bool:
    return palette[0::3] == palette[1::3] == palette[2::3]


def _in_srgb(colour: PilImage.Image, profile: bytes | None) -> PilImage.Image:
    """Mode L or RGB, in sRGB. May work in place."""
    transform = _srgb_transform(profile, colour.mode) if profile else None
    if transform is None:
        return colour.convert("RGB") if colour.mode == "CMYK" else colour
    if colour.mode == "RGB":
        return transform.apply_in_place(colour)
    converted = transform.apply(colour)
    return converted.getchannel("G") if colour.mode == "L" else converted


@lru_cache(maxsize=32)  # a camera writes the same profile into all its files
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From the profile to sRGB (perceptual intent); None if the profile is broken, does not fit, or changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), mode, "RGB"
        )
        if mode == "CMYK":
            return transform
        ramp = np.arange(0, 256, 15, dtype=np.uint8)
        lattice = np.stack(np.meshgrid(ramp, ramp, ramp), axis=-1).reshape(18, -1, 3)
        probe = PilImage.fromarray(lattice if mode == "RGB" else lattice[..., 0])
        change = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return transform if np.abs(change).max() > 1 else None  # within 1: one of the many versions of sRGB itself


_STRIP_ROWS = 64


def _pixels(
    colour: PilImage.Image, alpha: np.ndarray | None, backdrop: tuple[int, int, int], orientation: int
) -> np.ndarray:
    """(3, h, w) uint8, upright, from an L or RGB image and its opacity (h, w).

    Goes by strips of rows: three times faster than whole planes, and no second copy lies beside Pillow's.
    """
    width, height = colour.size
    pixels = np.empty((3, width, height) if orientation >= 5 else (3, height, width), np.uint8)
    stored = _turn(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # a view laid out as the file is
    for top in range(0, height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, height)
        strip = np.atleast_3d(np.asarray(colour.crop((0, top, width, bottom))))  # (rows, w, 1 or 3)
        if alpha is not None:
            strip = _composite(strip, alpha[top:bottom, :, None], np.array(backdrop[: strip.shape[2]], np.uint16))
        stored[:, top:bottom] = strip.transpose(2, 0, 1)
    return pixels


def _composite(colour: np.ndarray, alpha: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
    """uint8: (colour * alpha + backdrop * (255 - alpha)) / 255 in one rounding (Porter & Duff 1984, "over")."""
    opacity = alpha.astype(np.uint16)
    # The sum is at most 255 * 255 + 127 < 2**16, and 255 is odd, so there are no ties.
    return ((colour * opacity + backdrop * (255 - opacity) + 127) // 255).astype(np.uint8)


def _turn(planes: np.ndarray, orientation: int) -> np.ndarray:
    """A view of stored planes (..., h, w) as EXIF's `orientation` says they are to be seen."""
    if orientation >= 5:
        planes = planes.swapaxes(-2, -1)
    if orientation in (3, 4, 7, 8):
        planes = planes[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        planes = planes[..., ::-1]
    return planes


def _parse_colour(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise UserError(f"background {text!r} is no colour; write it as #rrggbb, for example #ffffff")
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def to_pil(pixels: torch.Tensor, geometry: Geometry) -> PilImage.Image:
    """(3, h, w) uint8 of the geometry's size as a Pillow image of the geometry's mode.

    Grey is the rounded mean of the three planes, which undoes `read_image`'s repeat exactly where they are equal.
    """
    if pixels.dtype != torch.uint8 or pixels.shape != (3, geometry.height, geometry.width):
        raise ValueError(
            f"expected uint8 (3, {geometry.height}, {geometry.width}), found {pixels.dtype} {pixels.shape}"
        )
    planes = pixels.cpu().numpy()
    if geometry.mode == "L":
        return PilImage.fromarray(((planes.sum(axis=0, dtype=np.uint16) + 1) // 3).astype(np.uint8))
    return PilImage.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))


_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"},
}


def write_image(
    path: Path, pixels: torch.Tensor, geometry: Geometry, image_format: Literal["png", "webp", "jpg"]
) -> None:
    """Writes (3, h, w) uint8 atomically: PNG, lossless WebP, or JPEG of quality 95 without chroma subsampling.

    Raises `UserError` if the format cannot hold the size or the file cannot be written.
    """
    pil = to_pil(pixels, geometry)
    try:
        with atomic_path(path) as temporary:
            pil.save(temporary, **_SAVE_OPTIONS[image_format])
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: {pil.width}x{pil.height} pixels cannot be written as {image_format}: {error}"
        ) from error


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


def crop(x: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """(..., h', w') -> (..., height, width): undoes `pad`. A view."""
    return x[..., : geometry.height, : geometry.width]
