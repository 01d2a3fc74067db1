"""Append JSON lines to files; a crash costs the line that it cuts short, and no other."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from latent_codec.storage.files import disk_errors, fsync
from latent_codec.storage.json_config import loads


class Journal:
    """Append lines to a file, one process at a time; raises `DiskError` where the disk does not take them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            self._file = path.open("ab", buffering=0)
        if self._file.tell():
            self._append(b"\n")  # ends a line that a crash cut short

    def write(self, *values: Any) -> None:
        """Append JSON values, a line of ASCII each: a name that is not valid UTF-8 survives as escaped surrogates."""
        self._append("".join(f"{json.dumps(value, sort_keys=True)}\n" for value in values).encode())

    def _append(self, data: bytes) -> None:
        with disk_errors(self._path):
            while data:
                data = data[self._file.write(data) :]  # a full disk takes a part first and only then complains

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())
            fsync(self._path.parent)

    def close(self) -> None:
        self._file.close()


def last_line(path: Path, holding: bytes) -> Any:
    """Return the value of a journal's last line that contains some bytes; None if there is none, or it is damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        data = path.read_bytes()
        if (found := data.rfind(holding)) >= 0:
            return loads(data[data.rfind(b"\n", 0, found) + 1 :].partition(b"\n")[0])
    return None


class Line(NamedTuple):
    """Hold the value of a line and the offset of its beginning in bytes."""

    offset: int
    value: Any


def lines(path: Path, only: bytes = b"") -> Iterator[Line]:
    """Yield a journal's whole lines; nothing if there is no file, or none that contains `only`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    offset = 0
    for line in data.splitlines(keepends=True) if only in data else ():
        with contextlib.suppress(ValueError):
            yield Line(offset, loads(line))
        offset += len(line)
