"""Read IDX files, the format of MNIST: grey images in one file and their labels in another beside it.

A file holds, in big-endian order, two zero bytes, the type of the values (8: uint8), the number of dimensions, each
dimension as 4 bytes, then the values. It may be compressed by gzip.
"""

import functools
import gzip
import math
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from latent_codec.errors import UserError

_IMAGES = re.compile(r"(.*?)[-.]?images[-.]idx3-ubyte(\.gz)?")
_UINT8 = 8


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
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read()
    except (EOFError, zlib.error) as error:
        raise OSError(f"damaged: {error}") from error


def _layout(path: Path, dimensions: int) -> tuple[int, tuple[int, ...]]:
    """Return the offset of the values and their shape."""
    try:
        data = content(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, _UINT8, dimensions)):
        raise UserError(f"{path}: not an IDX file of uint8 values in {dimensions} dimensions; download it again")
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    if len(data) != start + math.prod(shape) or not math.prod(shape):
        raise UserError(f"{path}: its shape {shape} does not fit its {len(data)} bytes; download it again")
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
