"""Locks between processes; the system lets go of one when the process that has it dies."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from latent_codec.errors import UserError
from latent_codec.storage.files import disk_errors

_UNKNOWN_THERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def lock(path: Path) -> FileLock:
    """Held, once no other process has it; to be released. Raises `UserError` as `try_lock` does."""
    held = _acquire(path, timeout=-1)
    assert held is not None
    return held


def try_lock(path: Path) -> FileLock | None:
    """Held, or None if another process has it; raises `UserError` if files cannot be made or locked there."""
    return _acquire(path, timeout=0)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While no other process has it; raises `UserError` as `try_lock` does."""
    held = lock(path)
    try:
        yield
    finally:
        held.release()


def _acquire(path: Path, timeout: float) -> FileLock | None:
    found = FileLock(path)
    try:
        found.acquire(timeout=timeout)
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in _UNKNOWN_THERE:
            raise UserError(
                f"{path.parent}: files there cannot be locked ({error}), and locks keep processes apart; "
                "give a folder on another file system"
            ) from error
        with disk_errors(path):
            raise
    return found
