"""Files of JSON lines that are only ever added to; what a crash cuts short costs that line and no other."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

from latent_codec.storage.files import disk_errors, fsync


class Journal:
    """A file to add lines to, by one process at a time; raises `DiskError` if that is not possible."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            self._file = path.open("ab", buffering=0)
        if self._file.tell():
            self._append(b"\n")  # ends a line that a crash cut short

    def write(self, *values: Any) -> None:
        """JSON values, each in a line of ASCII: a name that is not valid UTF-8 survives as escaped surrogates."""
        self._append("".join(f"{json.dumps(value, sort_keys=True)}\n" for value in values).encode())

    def _append(self, data: bytes) -> None:
        with disk_errors(self._path):
            while data:
                data = data[self._file.write(data) :]  # a full disk takes a part first and only then complains

    def sync(self) -> None:
        """Until now on the disk."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())
            fsync(self._path.parent)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Line(NamedTuple):
    offset: int
    """In bytes, of its beginning."""
    value: Any


def lines(path: Path, only: bytes = b"") -> Iterator[Line]:
    """A journal's whole lines, as far as there are any; nothing of a file that does not have `only` in it."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    offset = 0
    for line in data.splitlines(keepends=True) if only in data else ():
        with contextlib.suppress(ValueError):
            yield Line(offset, json.loads(line))
        offset += len(line)
