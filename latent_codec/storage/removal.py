"""Remove and replace files and folders; nothing else in the library or in training does."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from latent_codec.errors import UserError

IsOurs = Callable[[Path], bool]


def remove(path: Path, is_ours: IsOurs) -> bool:
    """Remove a file, or a folder with its content, if `is_ours` says that this program made it or replaces it now.

    `is_ours` goes by an exact name and a record, never by a pattern alone; what it denies stays. A link is removed and
    not what it leads to. A path that is gone already is no error. Returns whether the path was ours.
    """
    if not is_ours(path):
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return True


def move(path: Path, target: Path) -> None:
    """Rename what this program wrote to the name that its command is for; a file there is replaced."""
    path.replace(target)


def check_replaceable(path: Path, is_ours: IsOurs, what: str) -> None:
    """Raise `UserError` if something is at a path, in the place of `what`, and `is_ours` denies it."""
    if (path.exists() or path.is_symlink()) and not is_ours(path):
        raise UserError(
            f"{path}: exists already and is not {what} of latent-codec, so it is not replaced; move it away, or give "
            "another name"
        )


def made_now(_: Path) -> bool:
    """Return True, for a path that this very call has made under a name of its own."""
    return True


def named(*names: str) -> IsOurs:
    """Return a test for exact names, which a record lists or a format reserves."""
    return lambda path: path.name in names


def holding(*patterns: str) -> IsOurs:
    """Return a test for folders whose entries' names all match one of the patterns, and for what does not exist."""
    wanted = re.compile("|".join(patterns))

    def is_ours(path: Path) -> bool:
        return not path.exists() or (path.is_dir() and all(wanted.fullmatch(entry.name) for entry in path.iterdir()))

    return is_ours
