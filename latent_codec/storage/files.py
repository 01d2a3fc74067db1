"""Write files and folders so that a crash leaves the old one or the whole new one, never a half."""

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from latent_codec.errors import FatalError, UserError
from latent_codec.storage.removal import made_now, move, remove

_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{16})-[0-9a-f]{8}\.tmp", re.DOTALL)
_FATAL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class DiskError(FatalError):
    """The disk takes no more files."""


@contextmanager
def disk_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """Turn an `OSError` while writing `path` into a `DiskError`, or into a `UserError` about `name`.

    The latter is raised if a name is given and other files may still be written.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if name is None or error.errno in _FATAL_ERRORS:
            raise DiskError(f"{path} cannot be written: {reason}; solve that and repeat the same command") from error
        raise UserError(f"{name}: {path} cannot be written: {reason}") from error


def process_name() -> str:
    """Return this process's part of its temporary files' names, by which other processes recognise abandoned ones."""
    return _process_name(os.getpid())


@functools.cache
def _process_name(_: int) -> str:
    return secrets.token_hex(8)


def temporary_of(name: str) -> str | None:
    """Return the `process_name` in the name of a temporary file or folder; None for any other name."""
    found = _TEMPORARY.fullmatch(name)
    return found and found[1]


@contextmanager
def temporary_path(folder: Path, name: str) -> Iterator[Path]:
    """Create an empty file in `folder`, named after `name`, and remove it at the end unless `put` has moved it.

    It has the permissions of the user's umask. The folder and its parents are created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder / name)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
    finally:
        remove(temporary, made_now)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Create a folder beside `path`, named as temporary files are, and remove it with its content at the end.

    Libraries that make temporary files of their own make them here, so that those of a killed process are recognised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _temporary(path)
    try:
        folder.mkdir()
        yield folder
    finally:
        with contextlib.suppress(OSError):
            remove(folder, made_now)


def put(temporary: Path, path: Path, mode: int | None = None) -> None:
    """Rename a written temporary file to `path` after it has reached the disk, with permissions `mode` if given."""
    if mode is not None and temporary.stat().st_mode != mode:
        temporary.chmod(stat.S_IMODE(mode))
    fsync(temporary)
    move(temporary, path)
    fsync(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it is fsynced and renamed to `path`, else removed.

    The file gets the permissions of the user's umask even if the writer replaces it by a file of its own, as
    safetensors does. Parent folders are created. An `OSError` names the file.
    """
    try:
        with temporary_path(path.parent, path.name) as temporary:
            mode = temporary.stat().st_mode
            yield temporary
            put(temporary, path, mode)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # as a full disk's
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder in the same place; on success it is renamed to `path` with its content, else removed.

    Write its files by `atomic_path`. A folder that was at `path` before is removed once the new one is complete. Parent
    folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, before = _temporary(path), _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            move(path, before)
        try:
            move(temporary, path)
        except BaseException:
            if before.exists():
                move(before, path)
            raise
    except BaseException:
        with contextlib.suppress(OSError):
            remove(temporary, made_now)
        raise
    fsync(path.parent)
    with contextlib.suppress(OSError):
        remove(before, made_now)


def _temporary(path: Path) -> Path:
    stem = os.fsencode(path.name)[:200].decode(errors="ignore")  # names are limited to 255 bytes
    return path.with_name(f".{stem}.{process_name()}-{secrets.token_hex(4)}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_name(name: str) -> None:
    """Raise `UserError` unless `name` is a plain relative path, with "/" between its parts, inside its folder."""
    pure = PurePosixPath(name)
    plain = pure.parts and not pure.is_absolute() and ".." not in pure.parts and str(pure) == name
    if not plain or {"\\", "\0"} & set(name) or not _is_encodable(name):
        raise UserError(f"unsafe name {name!r}: not a plain path inside its folder")


def _is_encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half of a UTF-16 pair, for example
        return False
    return True


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; raises `OSError` for a pipe or a device too, which could block for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_mode(os.fstat(handle).st_mode, path)
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def check_regular(path: Path) -> None:
    """Raise `OSError` unless a path leads to a regular file, before a library opens it."""
    _check_mode(path.stat().st_mode, path)


def _check_mode(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def make_folder(path: Path) -> None:
    """Create a folder and its parents; raises `UserError` if that is impossible, or no file can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written into as a folder ({reason}); give another destination") from error


def fsync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
