"""Read rows of tensors from safetensors shards by offset; files stay open and a header is parsed once.

Files are not memory-mapped: where one is cut short or its disk fails, reading raises an error with a name, while under
a memory map the system would kill the process. A row takes one read request.
"""

import functools
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from latent_codec.storage.files import open_regular
from latent_codec.storage.json_config import loads

OPEN_FILES = 128
"""Most files that a reader keeps open; a process may usually have 1024."""
_CACHED_HEADERS = 4096
_MAX_HEADER_BYTES = 10**8  # safetensors' own limit
_BYTES = {"F16": 2, "BF16": 2, "F32": 4}


class TensorLocation(NamedTuple):
    """Locate a tensor in its file."""

    dtype: str
    """Name of the type in safetensors, such as F16."""
    shape: tuple[int, ...]
    start: int
    """Byte offset from the beginning of the file."""


class ShardReader:
    """Read rows of the shards of one folder; threads and forked processes may share it, and a pickled copy opens its
    files anew. No shard may change in place; a file that replaces it is seen when the name is opened next."""

    def __init__(self, folder: Path, open_files: int = OPEN_FILES) -> None:
        self.folder, self.open_files = folder, open_files
        self._headers = functools.lru_cache(_CACHED_HEADERS)(self._read_header)
        self._files = functools.lru_cache(open_files)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.folder, self.open_files)

    def locate(self, shard: str, name: str) -> TensorLocation:
        """Locate a tensor within its file; raises `OSError`, or `ValueError` if the file does not hold it."""
        locations = self._headers(shard)[1]
        if name not in locations:
            raise ValueError(f"it holds no tensor {name}")
        return locations[name]

    def read(self, shard: str, locations: Sequence[TensorLocation], row: int, outs: Sequence[np.ndarray]) -> None:
        """Read row `row` of each tensor into its `out`, a uint8 array of the row's size; raises as `locate` does."""
        file = self._files(shard)
        if file.size != self._headers(shard)[0]:
            self._headers.cache_clear()
            raise ValueError("the file was replaced while it was read")
        for location, out in zip(locations, outs, strict=True):
            if row >= location.shape[0]:
                raise ValueError(f"it has no row {row}, only {location.shape[0]} rows")
            size = out.nbytes
            if os.preadv(file.handle, (out.data,), location.start + row * size) != size:
                raise ValueError("it ends within a row")

    def _open(self, shard: str) -> "_File":
        return _File(self.folder / shard)

    def _read_header(self, shard: str) -> tuple[int, dict[str, TensorLocation]]:
        """Return the file's size and the locations of its floating-point tensors."""
        file = self._files(shard)
        (length,) = np.frombuffer(_read_exactly(file, 8, 0), "<u8").tolist()
        if length > min(file.size - 8, _MAX_HEADER_BYTES):
            raise ValueError("it is cut off in its header")
        header = loads(_read_exactly(file, length, 8))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        return file.size, {name: _location(name, about, 8 + length, file.size) for name, about in tensors.items()}


class _File:
    """Keep a file open until nobody uses it: another thread may still read one that the cache has dropped."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        self.handle = self._file.fileno()
        weakref.finalize(self, self._file.close)
        self.size = os.fstat(self.handle).st_size


def _read_exactly(file: _File, size: int, start: int) -> bytes:
    data = os.pread(file.handle, size, start)
    if len(data) != size:
        raise ValueError("it is cut off in its header")
    return data


def _location(name: str, about: Any, data: int, size: int) -> TensorLocation:
    """Check a header's entry; raises `ValueError` unless the tensor lies within its file."""
    try:
        dtype, shape, (start, end) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
        whole = all(type(value) is int and value >= 0 for value in (*shape, start, end)) and dtype in _BYTES
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or end - start != math.prod(shape) * _BYTES[dtype] or data + end > size:  # pyright: ignore
        raise ValueError(f"tensor {name} does not lie within the file")
    return TensorLocation(dtype, shape, data + start)  # pyright: ignore
