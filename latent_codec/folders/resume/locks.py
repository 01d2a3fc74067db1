"""Lock files between processes; the system releases a lock when the process that holds it dies."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from latent_codec.errors import UserError
from latent_codec.storage.files import disk_errors

_UNKNOWN_THERE = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock within a context; raises `UserError` as `lock` does."""
    with contextlib.ExitStack() as stack:
        stack.callback(lock(path).release)
        yield


def try_lock(path: Path) -> FileLock | None:
    """Return the lock held, or None if another process holds it; raises `UserError` as `lock` does."""
    with contextlib.suppress(Timeout):
        return lock(path, timeout=0)
    return None


def lock(path: Path, timeout: float = -1) -> FileLock:
    """Return the lock held within `timeout` seconds, -1 for ever; raise `Timeout`, or `UserError` if none can be."""
    found = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a holder that is killed
    try:
        found.acquire(timeout=timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        if isinstance(error, NotImplementedError) or error.errno in _UNKNOWN_THERE:
            raise UserError(
                f"{path.parent}: files there cannot be locked ({error}), and locks keep processes apart; "
                "give a folder on another file system"
            ) from error
        with disk_errors(path):
            raise
    return found
