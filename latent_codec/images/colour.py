"""Convert an image file's samples to 8-bit grey or sRGB, and an opacity."""

import io
import re
from functools import lru_cache

import numpy as np
from PIL import ExifTags, ImageCms
from PIL import Image as PilImage

from latent_codec.errors import UserError
from latent_codec.images.primaries import ColourTags


def opacity(pil: PilImage.Image, rawmode: str) -> np.ndarray | None:
    """Return the opacity (h, w) uint8 from an alpha channel, a palette or the transparent colour; None without any."""
    if pil.mode in ("La", "RGBa"):
        pil = pil.convert(pil.mode.upper())
    if pil.mode in ("LA", "PA", "RGBA"):
        return np.asarray(pil.getchannel("A"))
    key = pil.info.pop("transparency", None)  # removed, so that later conversions ignore it
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
        shift = 8 if rawmode == "RGB;16B" else 0  # Pillow keeps the upper 8 bits of pixels, but the key has all 16
        transparent = np.all([np.asarray(pil.getchannel(c)) == key[c] >> shift for c in range(3)], axis=0)
    else:
        scale = {"L;2": 255 // 3, "L;4": 255 // 15}.get(rawmode, 1)  # Pillow scales pixels but not the key
        transparent = np.asarray(pil) == (bool(key) if pil.mode == "1" else key * scale)
    return np.where(transparent, np.uint8(0), np.uint8(255))


_8_BITS_OF_16 = ((np.arange(2**16) + 128) // 257).astype(np.uint8)  # rounds v * 255 / 65535; 257 is odd: no ties


def in_8_bits(pil: PilImage.Image, rawmode: str, name: str) -> PilImage.Image:
    """Return the colours without alpha, in mode L, RGB or CMYK.

    Raises `UserError` for floating-point pixels, 12-bit grey, and grey values outside 16 bits.
    """
    if pil.mode == "F":
        raise UserError(f"{name}: floating-point pixels have no defined white; save it with 8 or 16 bits per channel")
    if rawmode == "I;12":
        raise UserError(f"{name}: 12-bit grey is not supported; save it with 8 or 16 bits per channel")
    if pil.mode.startswith("I"):
        values = np.asarray(pil)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise UserError(f"{name}: grey values {low}..{high} exceed 16 bits (0..65535); save it with 16 bits")
        grey = _8_BITS_OF_16[values]
        if pil.format == "TIFF" and pil.getexif().get(ExifTags.Base.PhotometricInterpretation) == 0:
            grey = 255 - grey  # WhiteIsZero, which Pillow applies up to 8 bits only
        return PilImage.fromarray(grey)
    if pil.mode in ("L", "RGB", "CMYK"):
        return pil
    if pil.mode == "LA" or rawmode == "LA;16B":  # Pillow reads the latter as RGBA
        return pil.getchannel(0)
    if pil.mode in ("1", "La") or (pil.mode == "P" and _is_grey(pil.getpalette("RGB") or [])):
        return (pil.convert("LA") if pil.mode == "La" else pil).convert("L")
    return (pil.convert("RGBA") if pil.mode == "RGBa" else pil).convert("RGB")


def _is_grey(palette: list[int]) -> bool:
    return palette[0::3] == palette[1::3] == palette[2::3]


def in_srgb(colour: PilImage.Image, profile: bytes | None) -> PilImage.Image:
    """Convert to sRGB by an ICC profile, in mode L or RGB. May work in place."""
    transform = _srgb_transform(profile, colour.mode) if profile else None
    if transform is None:
        return colour.convert("RGB") if colour.mode == "CMYK" else colour
    if colour.mode == "L":
        ramp = PilImage.fromarray(np.arange(256, dtype=np.uint8)[None])
        return colour.point(list(transform.apply(ramp).getchannel("G").tobytes()))
    return transform.apply_in_place(colour) if colour.mode == "RGB" else transform.apply(colour)


def by_tags(colour: PilImage.Image, tags: ColourTags) -> PilImage.Image:
    """Convert to sRGB what has these primaries and this curve, in mode L or RGB; grey by the curve alone."""
    if colour.mode == "L":
        ramp = PilImage.fromarray(np.arange(256, dtype=np.uint8)[None]).convert("RGB")
        return colour.point(list(in_srgb(ramp, tags.profile()).getchannel("G").tobytes()))
    return in_srgb(colour.convert("RGB"), tags.profile())


@lru_cache(maxsize=32)  # a camera writes the same profile into all its files
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Make the transform to sRGB (perceptual intent); None if the profile is broken, unsuitable, or changes nothing."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        # With its default optimisation lcms samples a grey curve at 33 points: 10 levels off in a linear one's shadows.
        flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
        transform = ImageCms.ImageCmsTransform(source, srgb, mode, "RGB", flags=flags)
        if mode == "CMYK":
            return transform
        ramp = np.arange(0, 256, 15, dtype=np.uint8)
        lattice = np.stack(np.meshgrid(ramp, ramp, ramp), axis=-1).reshape(18, -1, 3)
        probe = PilImage.fromarray(lattice if mode == "RGB" else lattice[..., 0])
        change = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return transform if np.abs(change).max() > 1 else None  # within 1: one of the many versions of sRGB itself


def composite(colour: np.ndarray, alpha: np.ndarray, backdrop: np.ndarray) -> np.ndarray:
    """Composite uint8 colour over a backdrop (Porter & Duff 1984, "over"), rounded once."""
    opacity = alpha.astype(np.uint16)
    # The sum is at most 255 * 255 + 127 < 2**16; 255 is odd, so there are no ties.
    return ((colour * opacity + backdrop * (255 - opacity) + 127) // 255).astype(np.uint8)


def parse_colour(text: str) -> tuple[int, int, int]:
    """Parse `#rrggbb`; raises `UserError`."""
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise UserError(f"background {text!r} is not a colour; write it as #rrggbb, for example #ffffff")
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
