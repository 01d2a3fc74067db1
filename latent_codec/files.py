"""Writing that a crash cannot leave half done."""

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from latent_codec.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; on success it is fsynced and renamed to `path`, else removed.

    It is there already, empty, with the permissions of the user's umask, and keeps these whatever the writer does: a
    library that puts its own file in its place (safetensors) would leave one for the owner only. Parent folders are
    created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = os.fsencode(path.name)[:200].decode(errors="ignore")  # names are limited in bytes, to 255
    temporary = path.with_name(f".{stem}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(stat.S_IMODE(mode))
        fsync(temporary)
        os.replace(temporary, path)  # noqa: PTH105 (tests stop the process here by name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_name(name: str) -> None:
    """Raise `UserError` unless it is a plain relative path, with "/" between its parts, that stays in its folder."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != name or "\\" in name or "\0" in name:
        raise UserError(f"unsafe name {name!r}: not a plain path inside its folder")


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
