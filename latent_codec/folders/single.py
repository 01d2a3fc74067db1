"""Make one file of one source, as `encode a.png a.lc` and `decode a.lc a.png` do."""

from collections.abc import Callable, Collection
from pathlib import Path

from latent_codec.errors import UserError
from latent_codec.folders.summary import Summary
from latent_codec.storage.files import disk_errors, put, temporary_folder
from latent_codec.storage.removal import IsOurs


def is_single(src: str | Path, dst: Path, suffixes: Collection[str]) -> bool:
    """Return whether DST names one output file by its suffix, rather than a folder.
    Raises `UserError` if it does and SRC is a folder, a tar file or several files."""
    if dst.suffix.lower() not in suffixes or dst.is_dir():
        return False
    path = Path(src)
    if path.is_dir() or path.suffix.lower() == ".tar" or (not path.exists() and any(c in str(src) for c in "*?[")):
        raise UserError(f"{dst}: is the name of one file, and {src} may hold several; give a folder")
    return True


def make_single(
    make: Callable[[Path], Summary], dst: Path, suffix: str, *, overwrite: bool, is_ours: IsOurs
) -> Summary:
    """Have `make` write into a temporary folder beside DST, and move its one output, by its suffix, to DST.

    Raises `UserError` before any work if something else is at DST, unless `is_ours` or `overwrite` says that it may be
    replaced, and afterwards if there are several outputs.
    """
    if (dst.exists() or dst.is_symlink()) and not (overwrite or is_ours(dst)):
        raise UserError(f"{dst}: exists already; give --overwrite to replace it, or another name")
    with disk_errors(dst), temporary_folder(dst) as folder:
        summary = make(folder)
        made = [path for path in folder.rglob(f"*{suffix}") if path.is_file()]
        if len(made) > 1:
            raise UserError(f"{dst}: is the name of one file, and there are {len(made)} images; give a folder")
        for path in made:
            put(path, dst)
    return summary
