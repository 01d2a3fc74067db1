"""Remove and replace files and folders; nothing else in the library or in training does."""

import shutil
from collections.abc import Callable
from pathlib import Path


def remove(path: Path, is_ours: Callable[[Path], bool]) -> bool:
    """Remove a file, or a folder with its content, if `is_ours` says that this program made it or replaces it now.

    `is_ours` goes by an exact name and a record, never by a pattern alone; what it denies stays. Links are removed, not
    what they lead to. A path that is gone already is no error. Returns whether the path was ours.
    """
    if not is_ours(path):
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=not path.exists())
    else:
        path.unlink(missing_ok=True)
    return True


def move(path: Path, target: Path) -> None:
    """Rename a path that this program wrote to a name that its command may take; a file there is replaced."""
    path.replace(target)


def made_now(_: Path) -> bool:
    """Return True: this very call has made the path, under a name that nothing else has."""
    return True


def named(*names: str) -> Callable[[Path], bool]:
    """Return a test for exact names, which a record lists or a format reserves."""
    return lambda path: path.name in names
