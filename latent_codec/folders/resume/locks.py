"""Lock files between processes; the system releases a lock when the process that holds it dies."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from latent_codec.errors import UserError
from latent_codec.storage.files import disk_errors

_UNKNOWN_THERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


def lock(path: Path) -> FileLock:
    """Wait until no other process holds the lock, and return it held; raises `UserError` as `try_lock` does."""
    held = _acquire(path, timeout=-1)
    assert held is not None
    return held


def try_lock(path: Path) -> FileLock | None:
    """Return the lock held, or None if another process holds it.

    Raises `UserError` if files cannot be made or locked there.
    """
    return _acquire(path, timeout=0)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock within a context; raises `UserError` as `try_lock` does."""
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
