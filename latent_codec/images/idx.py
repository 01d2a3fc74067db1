"""Read IDX files, the format of MNIST: grey images in one file and their labels in another beside it.

A file holds, in big-endian order, two zero bytes, the type of the values (8: uint8), the number of dimensions, each
dimension as 4 bytes, then the values. It may be compressed by gzip.
"""

import contextlib
import functools
import gzip
import math
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from latent_codec.errors import UserError
from latent_codec.storage.files import open_regular

_IMAGES = re.compile(r"(.*?)[-.]?images[-.]idx3-ubyte(\.gz)?")
_UINT8 = 8
_MOST_BYTES = 2**30  # the largest published set, EMNIST, has 640 MB


class IdxImage(NamedTuple):
    """Locate one image in an IDX file."""

    name: str
    """`7/train-00003`, as in a folder of classes, if there are labels; else `train-00003`."""
    offset: int
    """Byte offset of its height * width bytes in the unpacked file."""
    height: int
    width: int


def is_idx(path: Path) -> bool:
    """Return True if a file has the name of IDX images, such as `train-images-idx3-ubyte.gz`."""
    return _IMAGES.fullmatch(path.name) is not None


def find(path: Path) -> list[IdxImage]:
    """List the images of an IDX file; raises `UserError` if it or its labels are damaged, or their numbers differ."""
    match = _IMAGES.fullmatch(path.name)
    stem = match[1] if match and match[1] else "image"
    start, (count, height, width) = _layout(path, 3)
    labels = _labels(path, count)
    folders = [f"{label}/" for label in labels] or [""] * count
    size, digits = height * width, max(5, len(str(count - 1)))
    return [
        IdxImage(f"{folder}{stem}-{i:0{digits}d}", start + i * size, height, width) for i, folder in enumerate(folders)
    ]


def content(path: Path) -> bytes:
    """Return the whole file, unpacked, and cache the last few. Raises `OSError`."""
    about = path.stat()
    return _content(path, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=4)
def _content(path: Path, mtime_ns: int, size: int) -> bytes:
    with _opened(path) as file:
        return file.read(_MOST_BYTES)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked; damage to a packed one becomes an `OSError`."""
    try:
        with open_regular(path) as raw:
            yield cast(IO[bytes], gzip.open(raw)) if path.suffix == ".gz" else raw  # noqa: SIM115
    except (EOFError, zlib.error) as error:
        raise OSError(f"damaged: {error}") from error


def _layout(path: Path, dimensions: int) -> tuple[int, tuple[int, ...]]:
    """Return the offset of the values and their shape, once the file is known to have as many as its header says.

    A few packed megabytes can unpack to any size, so it is read in small parts and no further than that.
    """
    start, size = 4 + 4 * dimensions, 0
    try:
        with _opened(path) as file:
            data = file.read(start)
            if len(data) < start or data[:4] != bytes((0, 0, _UINT8, dimensions)):
                raise UserError(f"{path}: no IDX file of uint8 values in {dimensions} dimensions; download it again")
            shape = struct.unpack_from(f">{dimensions}I", data, 4)
            if (promised := start + math.prod(shape)) > _MOST_BYTES:
                raise UserError(f"{path}: its header promises {promised} bytes, more than {_MOST_BYTES}; split it")
            size = start
            while size <= promised and (part := file.read(2**20)):
                size += len(part)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if size != promised or not math.prod(shape):
        raise UserError(f"{path}: its shape {shape} does not fit its {size} bytes; download it again")
    return start, shape


def _labels(path: Path, count: int) -> bytes:
    """Return one byte for each image, or nothing if there is no file of labels."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [p for p in (path.with_name(name), path.with_name(name + ".gz")) if p.is_file()]
    if not beside:
        return b""
    start, (found,) = _layout(beside[0], 1)
    if found != count:
        raise UserError(f"{beside[0]}: {found} labels for {count} images; download both files again")
    return content(beside[0])[start:]
