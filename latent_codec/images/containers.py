"""Look into image files before Pillow does: drop metadata that it stumbles over, find colour that it does not tell."""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg

from latent_codec.errors import UserError
from latent_codec.images.primaries import ColourTags, by_chromaticities, by_code_points

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"})
_MOST_PROFILE = 2**24
_DAMAGE = re.compile(r"premature end of data segment|bad Huffman code|Unsupported marker|before marker 0xd[0-7]")


class Content(NamedTuple):
    """Hold a file for Pillow, and the colour that its container tells beside Pillow."""

    stream: BinaryIO
    profile: bytes | None = None
    """ICC profile."""
    tags: ColourTags | None = None


def prepare(stream: BinaryIO) -> Content:
    """Return the content of an image file of any kind; a PNG or JPEG without metadata that are broken or not needed."""
    stream.seek(0)
    start = stream.read(16)
    stream.seek(0)
    if start.startswith(_PNG):
        return _prepare_png(stream.read())
    if start.startswith(b"\xff\xd8\xff"):
        return Content(io.BytesIO(_without_short_segments(stream.read())))
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis", b"mif1"):
        tags = _nclx(stream.read(2**16))
        stream.seek(0)
        return Content(stream, tags=tags)
    return Content(stream)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield (type, content, whole chunk); the last one may be cut off."""
    position = len(_PNG)
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8].ljust(8, b"\0"))
        whole = data[position : position + 12 + length]
        yield kind, whole[8 : 8 + length], whole
        position += 12 + length


def _prepare_png(data: bytes) -> Content:
    """Keep the chunks that pixels depend on; others may be of any length and have any checksum."""
    kept, found = [_PNG], dict[bytes, bytes]()
    for kind, content, whole in _chunks(data):
        if kind in _PNG_KEPT or not kind[:1].islower():
            if kind == b"IDAT" and zlib.crc32(kind + content).to_bytes(4, "big") != whole[-4:]:
                raise UserError("cannot be decoded, the file may be damaged or cut off: wrong checksum of pixels")
            kept.append(whole)
        elif zlib.crc32(kind + content).to_bytes(4, "big") == whole[-4:]:
            found.setdefault(kind, content)
    profile, tags = None, None
    if len(cicp := found.get(b"cICP", b"")) == 4:
        tags = by_code_points(cicp[0], cicp[1])
    elif (profile := _png_profile(found.get(b"iCCP", b""))) is None and b"sRGB" not in found:
        gamma, white = found.get(b"gAMA", b""), found.get(b"cHRM", b"")
        exponent = struct.unpack(">I", gamma)[0] / 1e5 if len(gamma) == 4 else None
        tags = by_chromaticities(struct.unpack(">8I", white) if len(white) == 32 else None, exponent)
    return Content(io.BytesIO(b"".join(kept)), profile, tags)


def _png_profile(content: bytes) -> bytes | None:
    name, _, rest = content.partition(b"\0")
    if not name or rest[:1] != b"\0":
        return None
    try:
        unpack = zlib.decompressobj()
        profile = unpack.decompress(rest[1:], _MOST_PROFILE)
    except zlib.error:
        return None
    return profile if unpack.eof else None


def _without_short_segments(data: bytes) -> bytes:
    """Drop APP0 and APP14 segments that are too short for what they are, which decoders pass over."""
    least = {0xE0: 16, 0xEE: 14}
    position, parts, begin = 2, list[bytes](), 0
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        kind = data[position + 1]
        if kind == 0xFF:  # a fill byte
            position += 1
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if end - position < least.get(kind, 0):
            parts.append(data[begin:position])
            begin = end
        position = end
    return b"".join((*parts, data[begin:])) if parts else data


def _nclx(start: bytes) -> ColourTags | None:
    """Return the colour of an AVIF's nclx box, unless an ICC profile says more."""
    place = start.find(b"colrnclx")
    if place < 0 or b"colrprof" in start or b"colrrICC" in start:
        return None
    primaries, transfer = struct.unpack(">HH", start[place + 8 : place + 12].ljust(4, b"\0"))
    return by_code_points(primaries, transfer)


def jpeg_damage(stream: BinaryIO) -> str | None:
    """Return what a JPEG's entropy-coded data lack, None if they are whole: libjpeg fills holes with grey.

    The data are decoded once more, to an eighth of the size, by a decoder that tells libjpeg's warnings.
    """
    stream.seek(0)
    data = stream.read()
    for colours in ("GRAY", "CMYK"):
        try:
            _: np.ndarray = simplejpeg.decode_jpeg(
                data, colours, fastdct=True, fastupsample=True, min_height=1, min_width=1, min_factor=8
            )
        except ValueError as error:
            if _DAMAGE.search(str(error)):
                return str(error)
            continue  # other colours, or a remark on metadata
        return None
    return None
