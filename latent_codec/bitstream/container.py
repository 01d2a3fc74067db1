"""One image as a `.lc` file: a fixed header, the entropy-coded latents, checksums. docs/bitstream.md is the format."""

import dataclasses
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.model.config import CodecConfig
from latent_codec.prior.passes import PayloadSettings
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import MIN_STEP, STEP_ONE
from latent_codec.prior.tables import MIN_SYMBOL_BITS

SUFFIX = ".lc"
VERSIONS = (1, 2, 3)
"""In 2, rounded latents are coded around what the context prior expects."""
_MAGIC = b"\x89LC\r\n\x1a\n"
_HEADER = struct.Struct("<7sB8sIIBB3sHQII")
"""Magic, version, stream id, width, height, orientation, flags, background, step, dither seed, payload bytes, CRC-32 of
all that stands before it."""
_CHECKSUM = struct.Struct("<I")
OVERHEAD = _HEADER.size + _CHECKSUM.size

_GREY, _BACKGROUND, _DITHER, _CONTEXT = 1, 2, 4, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamHeader:
    """What a stream says of itself."""

    version: int
    """Of the format: the prior's."""
    stream_id: bytes
    """8 bytes that name the model, its quantiser and the prior (`Priors.stream_id`)."""
    geometry: Geometry
    prior: PriorKind
    step: int
    """Quantiser step in 1 / 1024."""
    seed: int | None
    """Of the dither, 64 bits; None where the mean was rounded."""


class Stream(NamedTuple):
    header: StreamHeader
    payload: bytes


def pack(stream: Stream) -> bytes:
    """The file's bytes."""
    header, geometry = stream.header, stream.header.geometry
    background = geometry.background
    flags = _GREY * (geometry.mode == "L") | _BACKGROUND * (background is not None)
    flags |= _DITHER * (header.seed is not None) | _CONTEXT * (header.prior == "context")
    fields = _HEADER.pack(
        _MAGIC,
        header.version,
        header.stream_id,
        geometry.width,
        geometry.height,
        geometry.orientation,
        flags,
        bytes.fromhex(background[1:]) if background is not None else bytes(3),
        header.step,
        header.seed or 0,
        len(stream.payload),
        0,
    )[: -_CHECKSUM.size]
    crc, checksum = (_CHECKSUM.pack(zlib.crc32(part)) for part in (fields, stream.payload))
    return b"".join((fields, crc, stream.payload, checksum))


def unpack(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Stream:
    """Read a file's bytes; raises `UserError` for whatever is not exactly one sound stream.

    Nothing larger than the file is allocated.
    """
    if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
        raise UserError("not a .lc stream: it does not start like one")
    if len(data) < _HEADER.size:
        raise UserError(f"damaged: cut off within its header, after {len(data)} bytes")
    _, version, stream_id, width, height, orientation, flags, background, step, seed, length, crc = _HEADER.unpack_from(
        data
    )
    if zlib.crc32(data[: _HEADER.size - _CHECKSUM.size]) != crc:
        raise UserError("damaged: its header does not match its checksum")
    if version not in VERSIONS:
        raise UserError(f"format version {version}; this program reads up to {max(VERSIONS)}: update latent-codec")
    if width * height > max_pixels:
        raise UserError(
            f"{width}x{height} = {width * height} pixels exceed the limit of {max_pixels}; raise --max-pixels if you "
            "trust the file"
        )
    rest = len(data) - _HEADER.size - _CHECKSUM.size
    if rest != length:
        raise UserError(f"damaged: its header promises {length} bytes of coded data, the file has {max(rest, 0)}")
    payload = data[_HEADER.size : -_CHECKSUM.size]
    if zlib.crc32(payload) != _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0]:
        raise UserError("damaged: its coded data do not match their checksum")
    with_seed, with_background = bool(flags & _DITHER), bool(flags & _BACKGROUND)
    unused = flags >> 4 or (seed and not with_seed) or (any(background) and not with_background)
    if unused or step < MIN_STEP * STEP_ONE:
        raise UserError("damaged: its header has values that no encoder writes")
    try:
        geometry = Geometry(
            width=width,
            height=height,
            orientation=orientation,
            mode="L" if flags & _GREY else "RGB",
            background="#" + background.hex() if with_background else None,
        )
    except ValueError as error:
        raise UserError(f"damaged: {error}") from error
    header = StreamHeader(
        version=version,
        stream_id=stream_id,
        geometry=geometry,
        prior="context" if flags & _CONTEXT else "factorized",
        step=step,
        seed=seed if with_seed else None,
    )
    return Stream(header, payload)


def read(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Stream:
    """`unpack` a file; raises `OSError` if reading it fails."""
    return unpack(read_bytes(path), max_pixels=max_pixels)


def read_bytes(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """A file's bytes, or those of a part of one (a tar file's member).

    No more is read than the stream's header says it has, and one to show that there are more.
    """
    with path.open("rb") as file:
        file.seek(offset)
        whole = path.stat().st_size - offset if size is None else size
        data = file.read(min(whole, _HEADER.size))
        left = whole - len(data)
        # Of what does not start like a stream, or has a broken header, a few bytes are enough to say so.
        sound = len(data) == _HEADER.size and zlib.crc32(data[: -_CHECKSUM.size]) == _HEADER.unpack(data)[-1]
        promised = _HEADER.unpack(data)[-2] if sound else 0
        return data + file.read(min(left, promised + _CHECKSUM.size + 1))


def settings(stream: Stream, config: CodecConfig, factor: int) -> PayloadSettings:
    """What decoding the payload takes, for a model with latents at 1/`factor` of each side.

    Raises `UserError` if the payload cannot hold that many integers: each costs at least `MIN_SYMBOL_BITS`. So it does
    if a codebook's indices are said to be anything but plain.
    """
    header, geometry = stream.header, stream.header.geometry
    if config.codes is not None and (header.step, header.seed) != (STEP_ONE, None):
        raise UserError("damaged: its header gives a codebook's indices a step or dither")
    shape = (config.coded_channels, -(-geometry.height // factor), -(-geometry.width // factor))
    latents = shape[0] * shape[1] * shape[2]
    if latents * MIN_SYMBOL_BITS > 8 * len(stream.payload):
        raise UserError(
            f"damaged: {len(stream.payload)} bytes of coded data cannot hold {geometry.width}x{geometry.height} pixels"
        )
    return PayloadSettings(shape, header.step, header.seed)
