"""Rows of tensors in safetensors shards, at the speed of the disk: files stay open and a header is parsed once.

Rows are read by offset and not mapped: a damaged disk, or a file that was cut short, makes an error with a name, where
under a memory map the system kills the process; and a row comes in one request.
"""

import functools
import json
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MOST_OPEN = 128
"""Of a thousand that a process usually may have."""
_MOST_HEADERS = 4096
_MOST_HEADER_BYTES = 10**8  # safetensors' own limit
_BYTES = {"F16": 2, "BF16": 2, "F32": 4}


class Span(NamedTuple):
    """Where a tensor is in its file."""

    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    start: int
    """In bytes, from the beginning of the file."""


class ShardReader:
    """Reads rows of the shards of one folder; any number of threads and forked processes may use it at once.

    A pickled one opens its files anew. A shard never changes in place; one that takes its name is seen when that is
    opened next.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers = functools.lru_cache(_MOST_HEADERS)(self._read_header)
        self._files = functools.lru_cache(_MOST_OPEN)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.folder,)

    def span(self, shard: str, name: str) -> Span:
        """Of a tensor, which lies within the file; raises `OSError`, or `ValueError` if the file does not hold it."""
        spans = self._headers(shard)[1]
        if name not in spans:
            raise ValueError(f"it holds no tensor {name}")
        return spans[name]

    def read(self, shard: str, spans: Sequence[Span], row: int, outs: Sequence[np.ndarray]) -> None:
        """Row `row` of each of some tensors of two or more dimensions into its `out`, uint8 of the row's size.

        Raises as `span` does.
        """
        file = self._files(shard)
        if file.size != self._headers(shard)[0]:
            self._headers.cache_clear()
            raise ValueError("it is another one than before")
        for span, out in zip(spans, outs, strict=True):
            if row >= span.shape[0]:
                raise ValueError(f"row {row} of {span.shape[0]}")
            size = out.nbytes
            if os.preadv(file.handle, (out.data,), span.start + row * size) != size:
                raise ValueError("it ends within a row")

    def _open(self, shard: str) -> "_File":
        return _File(self.folder / shard)

    def _read_header(self, shard: str) -> tuple[int, dict[str, Span]]:
        """The file's size, and its tensors of floating-point numbers."""
        file = self._files(shard)
        (length,) = np.frombuffer(_exactly(file, 8, 0), "<u8").tolist()
        if length > min(file.size - 8, _MOST_HEADER_BYTES):
            raise ValueError("it is cut off in its header")
        header = json.loads(_exactly(file, length, 8))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        return file.size, {name: _span(name, about, 8 + length, file.size) for name, about in tensors.items()}


class _File:
    """Closed when nobody uses it any more: another thread may still read one that has been given up."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.handle)
        self.size = os.fstat(self.handle).st_size


def _exactly(file: _File, size: int, start: int) -> bytes:
    data = os.pread(file.handle, size, start)
    if len(data) != size:
        raise ValueError("it is cut off in its header")
    return data


def _span(name: str, about: Any, data: int, size: int) -> Span:
    """From a header's entry; raises `ValueError` unless the tensor lies within its file."""
    try:
        dtype, shape, (start, end) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
        whole = all(type(value) is int and value >= 0 for value in (*shape, start, end)) and dtype in _BYTES
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole or end - start != math.prod(shape) * _BYTES[dtype] or data + end > size:  # pyright: ignore
        raise ValueError(f"tensor {name} does not lie within the file")
    return Span(dtype, shape, data + start)  # pyright: ignore
