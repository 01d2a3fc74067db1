"""Damage copies of `.lc` streams, as a pure function of (streams, seed, number)."""

import random
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple
from zlib import crc32

_HEADER, _CRC = 43, 4
"""Bytes of the header before its checksum, and bytes of a checksum."""

Kind = Literal["bytes", "payload", "header", "both"]
KINDS: tuple[Kind, ...] = ("bytes", "payload", "header", "both")


class Mutant(NamedTuple):
    """Hold a damaged stream."""

    kind: Kind
    """Part that was changed: `bytes` for any, with the old checksums; the others get new checksums."""
    data: bytes


def mutate(streams: Sequence[bytes], seed: int, number: int) -> Mutant:
    """Return a damaged copy of one of the streams."""
    rng = random.Random(seed << 40 | number)
    data, kind = rng.choice(streams), rng.choices(KINDS, (3, 4, 2, 1))[0]
    if kind == "bytes":
        return Mutant(kind, _edited(rng, data, streams))
    header, payload = _parts(data)
    if kind != "header":
        payload = _edited(rng, payload, [_parts(s)[1] for s in streams])
    if kind != "payload":
        header = _edited_header(rng, header)
    return Mutant(kind, sealed(header, payload))


def sealed(header: bytes, payload: bytes) -> bytes:
    """Return a file with the right length and checksums from the header's other 39 bytes or more."""
    header = header[: _HEADER - 4] + len(payload).to_bytes(4, "little")
    return b"".join(part + crc32(part).to_bytes(4, "little") for part in (header, payload))


def _parts(data: bytes) -> tuple[bytes, bytes]:
    return data[:_HEADER], data[_HEADER + _CRC : -_CRC]


def _flip_bit(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    size = min(rng.choice((1, 1, 2, 4, 8, 64)), len(data) - start)
    data[start : start + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def _insert(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.randbytes(rng.choice((1, 2, 4, 4, 8, 64)))


def _delete(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 2, 4, 4, 8, 64))]


def _truncate(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    """Continue with another stream, mostly from the same position."""
    other = rng.choice(others)
    start = rng.randrange(len(data) + 1) // 4 * 4
    data[start:] = other[start if rng.random() < 0.5 else rng.randrange(len(other) + 1) // 4 * 4 :]


def _swap_words(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    if len(data) >= 4:
        a, b = (4 * rng.randrange(len(data) // 4) for _ in range(2))
        data[a : a + 4], data[b : b + 4] = data[b : b + 4], data[a : a + 4]


_Edit = Callable[[random.Random, bytearray, Sequence[bytes]], None]
_EDITS: tuple[_Edit, ...] = (_flip_bit, _overwrite, _insert, _delete, _truncate, _splice, _swap_words)


def _edited(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    edited = bytearray(data)
    for edit in rng.choices(_EDITS, (6, 3, 1, 1, 1, 1, 1), k=rng.choice((1, 1, 1, 2, 3))):
        edit(rng, edited, others)
    return bytes(edited)


def _edited_header(rng: random.Random, header: bytes) -> bytes:
    """Change one field; sizes that a decoder accepts stay small, so that a million mutants do not take days."""
    edited = bytearray(header)
    first, size = rng.choice(((0, 7), (7, 1), (8, 8), (16, 4), (20, 4), (24, 1), (25, 1), (26, 3), (29, 2), (31, 8)))
    value = int.from_bytes(edited[first : first + size], "little")
    if first in (16, 20):
        near, far = value + rng.randint(-17, 17), rng.choice((rng.randrange(512), rng.randrange(2**30, 2**32)))
        value = rng.choices((near, far, 0), (8, 3, 1))[0]
    else:
        anything = int.from_bytes(rng.randbytes(size), "little")
        value = rng.choice((value ^ 1 << rng.randrange(8 * size), value + rng.randint(-3, 3), anything, 0, -1))
    edited[first : first + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(edited)
