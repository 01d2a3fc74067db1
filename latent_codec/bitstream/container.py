"""Pack one image's payload into a checked `.lc` file, and read it; docs/bitstream.md describes the format."""

import dataclasses
import math
import struct
import zlib
from pathlib import Path

from latent_codec.errors import UserError
from latent_codec.images.geometry import Geometry, check_size
from latent_codec.images.read import DEFAULT_MAX_PIXELS
from latent_codec.model.config import CodecConfig
from latent_codec.prior.priors import PriorKind
from latent_codec.prior.quantizer import MIN_STEP, STEP_ONE, QuantizerSettings
from latent_codec.prior.tables import MIN_SYMBOL_BITS
from latent_codec.storage.files import open_regular

SUFFIX = ".lc"
VERSIONS = (1, 2, 3, 4)
"""Format versions: 2 is that of a centred context prior, 3 that of one with levels, 4 that of a nested one, 1 that of
all others."""
_MAGIC = b"\x89LC\r\n\x1a\n"
_CHECKSUM = struct.Struct("<I")
_FIELDS = struct.Struct("<7sB8sIIBB3sHQI")
"""Magic, version, stream id, width, height, orientation, flags, background, step, dither seed, bytes of the payload."""
_HEADER_SIZE = _FIELDS.size + _CHECKSUM.size
OVERHEAD = _HEADER_SIZE + _CHECKSUM.size
"""Bytes of a file beside its payload: the header, its CRC-32 and the payload's."""

_GREY, _BACKGROUND, _DITHER, _CONTEXT = 1, 2, 4, 8  # flags; in version 4 the four bits above hold the groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """Hold what the header of a `.lc` file says, and the coded latents."""

    version: int
    """Format version, which is the prior's."""
    stream_id: bytes
    """8 bytes that identify the model, its quantiser and the prior (`Priors.stream_id`)."""
    geometry: Geometry
    prior: PriorKind
    step: int
    """Quantiser step in 1 / 1024."""
    seed: int | None
    """64-bit seed of the dither; None: the mean was rounded."""
    payload: bytes
    groups: int | None = None
    """Number of the first groups of channels that a stream of version 4 holds; None in others: all."""


def pack(stream: Stream) -> bytes:
    """Return the bytes of a file."""
    geometry, background = stream.geometry, stream.geometry.background
    flags = _GREY * (geometry.mode == "L") | _BACKGROUND * (background is not None)
    flags |= _DITHER * (stream.seed is not None) | _CONTEXT * (stream.prior == "context") | (stream.groups or 0) << 4
    fields = _FIELDS.pack(
        _MAGIC,
        stream.version,
        stream.stream_id,
        geometry.width,
        geometry.height,
        geometry.orientation,
        flags,
        bytes.fromhex(background[1:]) if background is not None else bytes(3),
        stream.step,
        stream.seed or 0,
        len(stream.payload),
    )
    return b"".join((fields, _checksum(fields), stream.payload, _checksum(stream.payload)))


def _checksum(data: bytes) -> bytes:
    return _CHECKSUM.pack(zlib.crc32(data))


def unpack(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Stream:
    """Read exactly one sound stream, or raise `UserError`; nothing larger than the file is allocated."""
    if data[: len(_MAGIC)] != _MAGIC[: len(data)] or not data:
        raise UserError("not a .lc stream: it does not start like one")
    if len(data) < _HEADER_SIZE:
        raise UserError(f"damaged: cut off within its header, after {len(data)} bytes")
    fields, payload = data[: _FIELDS.size], data[_HEADER_SIZE : -_CHECKSUM.size]
    if data[_FIELDS.size : _HEADER_SIZE] != _checksum(fields):
        raise UserError("damaged: its header does not match its checksum")
    _, version, _, width, height, *_, length = _FIELDS.unpack(fields)
    if version not in VERSIONS:
        raise UserError(f"format version {version}; this program reads up to {max(VERSIONS)}: update latent-codec")
    check_size(height, width, max_pixels)
    if (found := len(data) - OVERHEAD) != length:
        raise UserError(f"damaged: its header promises {length} bytes of coded data, the file has {max(found, 0)}")
    if data[-_CHECKSUM.size :] != _checksum(payload):
        raise UserError("damaged: its coded data do not match their checksum")
    return _parse(fields, payload)


def _parse(fields: bytes, payload: bytes) -> Stream:
    """Return the stream of intact fields; raise `UserError` for values that no encoder writes."""
    _, version, stream_id, width, height, orientation, flags, background, step, seed, _ = _FIELDS.unpack(fields)
    groups = flags >> 4 if version == 4 else None
    with_seed, with_background = bool(flags & _DITHER), bool(flags & _BACKGROUND)
    unused = (flags >> 4 and groups is None) or (seed and not with_seed) or (any(background) and not with_background)
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
    return Stream(
        version=version,
        stream_id=stream_id,
        geometry=geometry,
        prior="context" if flags & _CONTEXT else "factorized",
        step=step,
        seed=seed if with_seed else None,
        payload=payload,
        groups=groups,
    )


def read(path: Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Stream:
    """Read a file as `unpack` does; raise `OSError` if it cannot be read."""
    return unpack(read_bytes(path), max_pixels=max_pixels)


def maker_of(path: Path, offset: int = 0) -> tuple[PriorKind, bytes]:
    """Return the kind of prior and the stream id that a file's header names; raises `UserError` if it is not sound."""
    with open_regular(path) as file:
        file.seek(offset)
        data = file.read(_HEADER_SIZE)
    fields = data[: _FIELDS.size]
    if data[: len(_MAGIC)] != _MAGIC or data[_FIELDS.size :] != _checksum(fields):
        raise UserError(f"{path}: no sound header of a {SUFFIX} file")
    _, _, stream_id, _, _, _, flags, *_ = _FIELDS.unpack(fields)
    return "context" if flags & _CONTEXT else "factorized", stream_id


def is_stream(path: Path) -> bool:
    """Return whether a file has the sound header of a stream."""
    try:
        maker_of(path)
    except (OSError, UserError):
        return False
    return True


def read_bytes(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """Return up to `size` bytes at `offset` of a file: at most one more than the stream's header promises."""
    with open_regular(path) as file:
        file.seek(offset)
        whole = path.stat().st_size - offset if size is None else size
        data = file.read(min(whole, _HEADER_SIZE))
        # Of a file without a sound header, a few bytes more are enough for the error message.
        sound = len(data) == _HEADER_SIZE and data[_FIELDS.size :] == _checksum(data[: _FIELDS.size])
        promised = _FIELDS.unpack(data[: _FIELDS.size])[-1] if sound else 0
        return data + file.read(min(whole - len(data), promised + _CHECKSUM.size + 1))


def quantizer_settings(stream: Stream, config: CodecConfig, factor: int, channels: int) -> QuantizerSettings:
    """Return what decoding the payload of so many channels needs, for latents at 1 / `factor` of each side.

    Raises `UserError` for a payload too short for so many latents, and for a codebook's indices with a step or dither.
    """
    geometry = stream.geometry
    if config.codes is not None and (stream.step, stream.seed) != (STEP_ONE, None):
        raise UserError("damaged: its header gives a codebook's indices a step or dither")
    shape = (channels, -(-geometry.height // factor), -(-geometry.width // factor))
    if math.prod(shape) * MIN_SYMBOL_BITS > 8 * len(stream.payload):
        raise UserError(
            f"damaged: {len(stream.payload)} bytes of coded data cannot hold {geometry.width}x{geometry.height} pixels"
        )
    return QuantizerSettings(shape, stream.step, stream.seed)
