"""Check the names of outputs before anything is written."""

import contextlib
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from latent_codec.errors import UserError
from latent_codec.storage.files import check_name
from latent_codec.storage.removal import made_now, remove


def check_outputs(outputs: Sequence[str], folder: Path, fold: Callable[[str], str] = str) -> None:
    """Raise `UserError` unless every output, a relative path with "/", has a place of its own inside `folder`.

    Refused are other names, a file where another output needs a folder, links that lead out of `folder`, and two names
    for one place, to which a link leads or which differ only in what `fold` leaves out.
    """
    check_names(outputs)
    root = folder.resolve()
    parents = {parent.as_posix() for name in outputs for parent in PurePosixPath(name).parents}
    places = {parent: _place(folder / parent, root) for parent in sorted(parents)}
    taken: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    for name in outputs:
        parent, _, last = name.rpartition("/")
        other = taken.setdefault(fold(str(places[parent or "."] / last)), name)
        if other != name:
            pairs.append((other, name))
    if pairs:
        raise UserError(
            f"{pairs[0][0]} and {pairs[0][1]} are one name to the file system of {folder} ({len(pairs)} such pairs); "
            "rename one of each, or give a folder elsewhere"
        )
    if clash := sorted(taken[f] for f in {fold(str(place)) for place in places.values()} & taken.keys()):
        raise UserError(f"{clash[0]} would be both a file and a folder of {folder}; rename the source of one of them")


def check_names(names: Iterable[str]) -> None:
    """Raise `UserError` if one is not a plain relative path."""
    for name in names:
        try:
            check_name(name)
        except UserError as error:
            raise UserError(f"{error}; rename it") from error


def _place(path: Path, root: Path) -> Path:
    """Resolve links in a path; raises `UserError` if it is not below `root`."""
    with contextlib.suppress(OSError, RuntimeError):  # a link to itself
        place = path.resolve()
        if place.is_relative_to(root):
            return place
    raise UserError(f"{path} is a link that leads out of {root}; remove it or give another folder")


def check_absent(outputs: Iterable[Path]) -> None:
    """Raise `UserError` if any of the outputs exists."""
    existing = [path for path in outputs if _exists(path)]
    if existing:
        others = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise UserError(f"exists already: {existing[0]}{others}; give another folder, or --overwrite to replace them")


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # a name too long: writing it will fail, and that is counted
        return False


def folding(folder: Path) -> Callable[[str], str] | None:
    """Return a map from names to what a file system tells apart, found by making files; None if it tells all apart."""
    stem = uuid.uuid4().hex

    def are_one(name: str, variant: str) -> bool:
        probe = folder / f"{stem}{name}"
        try:
            probe.touch()
            return (folder / f"{stem}{variant}").exists()
        except (OSError, UnicodeError):  # a name that cannot be written cannot be mistaken either
            return False
        finally:
            with contextlib.suppress(OSError, UnicodeError):
                remove(probe, made_now)

    normalizes, folds_case = are_one("\u00e9", "e\u0301"), are_one("case", "CASE")

    def fold(name: str) -> str:
        name = unicodedata.normalize("NFC", name) if normalizes else name
        return name.casefold() if folds_case else name

    return fold if normalizes or folds_case else None
