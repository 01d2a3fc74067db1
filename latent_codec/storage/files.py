"""Writing that a crash cannot leave half done."""

import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from latent_codec.errors import FatalError, UserError

_TEMPORARY = re.compile(r"\..*\.([0-9a-f]{16})-[0-9a-f]{8}\.tmp", re.DOTALL)
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}


class DiskError(FatalError):
    """Nothing more can be written."""


@contextmanager
def disk_errors(path: Path, name: str | None = None) -> Iterator[None]:
    """`OSError` while writing `path` as `DiskError`, or as `UserError` about `name` if other files may fare better."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if name is None or error.errno in _HOPELESS:
            raise DiskError(
                f"{path} cannot be written: {reason}; once that is mended, the same command goes on"
            ) from error
        raise UserError(f"{name}: {path} cannot be written: {reason}") from error


def process_name() -> str:
    """Names this process in the names of its temporary files, so that others can tell whose are left over."""
    return _process_name(os.getpid())


@functools.cache
def _process_name(_: int) -> str:
    return secrets.token_hex(8)


def temporary_of(name: str) -> str | None:
    """The `process_name` in a name that a temporary file or folder was given here; None for any other."""
    found = _TEMPORARY.fullmatch(name)
    return found and found[1]


@contextmanager
def temporary_path(folder: Path, name: str) -> Iterator[Path]:
    """An empty file in a folder, with the permissions of the user's umask, for `name` or the like; removed at the end.

    Unless `put` took it away before. The folder and its parents are created.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(folder / name)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, named as temporary files are and removed with all that is in it at the end.

    For libraries that make temporary files of their own: killed, they leave nothing that is not known to be left over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _temporary(path)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put(temporary: Path, path: Path, mode: int | None = None) -> None:
    """A written temporary file in its place, after it has reached the disk; `mode` are the permissions it gets."""
    if mode is not None and temporary.stat().st_mode != mode:
        temporary.chmod(stat.S_IMODE(mode))
    fsync(temporary)
    os.replace(temporary, path)  # noqa: PTH105 (tests stop the process here by name)
    fsync(path.parent)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; on success it is fsynced and renamed to `path`, else removed.

    It keeps the permissions of the user's umask whatever the writer does: a library that puts its own file in its
    place (safetensors) would leave one for the owner only. Parent folders are created.
    """
    with temporary_path(path.parent, path.name) as temporary:
        mode = temporary.stat().st_mode
        yield temporary
        put(temporary, path, mode)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder in the same place; on success it is renamed to `path` with all that is in it, else removed.

    What is written into it is to be written by `atomic_path`. A folder that `path` was before goes when the new one is
    complete. Parent folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, before = _temporary(path), _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(before)
        try:
            temporary.rename(path)
        except BaseException:
            if before.exists():
                before.rename(path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def _temporary(path: Path) -> Path:
    stem = os.fsencode(path.name)[:200].decode(errors="ignore")  # names are limited in bytes, to 255
    return path.with_name(f".{stem}.{process_name()}-{secrets.token_hex(4)}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_name(name: str) -> None:
    """Raise `UserError` unless it is a plain relative path, with "/" between its parts, that stays in its folder."""
    pure = PurePosixPath(name)
    plain = pure.parts and not pure.is_absolute() and ".." not in pure.parts and str(pure) == name
    if not plain or {"\\", "\0"} & set(name) or not _is_encodable(name):
        raise UserError(f"unsafe name {name!r}: not a plain path inside its folder")


def _is_encodable(name: str) -> bool:
    """Whether any file can have this name; half of a UTF-16 pair in JSON cannot be written in UTF-8."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def make_folder(path: Path) -> None:
    """Create a folder and its parents; raises `UserError` if that, or writing a file into it, is not possible."""
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
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
