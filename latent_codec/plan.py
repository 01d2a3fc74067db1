"""What a command will do, settled before it does anything: where each output goes, and the work cut into units.

A unit is what one process does at a time: neighbours in the sorted list of sources. Batches are made within a unit, so
what an image is computed with, and to the last bit what comes of it, depends on the sources alone: not on the number
of processes, nor on interruptions.
"""

import contextlib
import dataclasses
import hashlib
import os
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.files import check_name
from latent_codec.inputs import Source

_MEAN_IMAGES = 128
_MOST_IMAGES = 512
_MOST_BYTES = 2**26


class Unit(NamedTuple):
    name: str
    """Of its first source's name; other units have others."""
    sources: tuple[Source, ...]


def units(sources: Sequence[Source]) -> list[Unit]:
    """Sorted sources in units.

    A unit begins where a name's hash says so, or where the one before has become large: a new file among many changes
    the unit that it falls into and leaves the others as they are.
    """
    found: list[list[Source]] = []
    size = 0
    for source in sources:
        begins = _digest(source.name) % _MEAN_IMAGES == 0
        if not found or begins or len(found[-1]) >= _MOST_IMAGES or size >= _MOST_BYTES:
            found.append([])
            size = 0
        found[-1].append(source)
        size += source.size
    return [Unit(f"{_digest(unit[0].name):016x}", tuple(unit)) for unit in found]


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest())


@dataclasses.dataclass(frozen=True)
class Share:
    """One of several processes, and whether it takes up what others leave undone."""

    index: int
    count: int
    alone: bool
    """Do own units only: the other processes may write elsewhere."""

    @classmethod
    def parse(cls, text: str) -> "Share":
        """From `i/n`, i from 0 to n - 1; raises `UserError` for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise UserError(f"--shard {text}: give i/n with i from 0 to n - 1, such as 0/4 to 3/4 for four processes")
        return cls(int(index), int(count), alone=True)

    @classmethod
    def of_launcher(cls) -> "Share":
        """By the rank that `accelerate launch` or torchrun gave this process; the whole without one."""
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise UserError(f"RANK {rank} of WORLD_SIZE {size} in the environment makes no sense; unset both")
        return cls(int(rank), int(size), alone=False)

    def of(self, everything: Sequence[Unit]) -> list[Unit]:
        """The units that are this process' to do, its own first."""
        own = list(everything[self.index :: self.count])
        others = [] if self.alone else [u for i, u in enumerate(everything) if i % self.count != self.index]
        return own + others


WHOLE = Share(0, 1, alone=True)


def check_outputs(outputs: Sequence[str], folder: Path, fold: Callable[[str], str] = str) -> None:
    """Raise `UserError` unless every output has a place of its own inside `folder`.

    outputs: relative, with "/" between their parts. Refused are names that are not plain relative paths, a file where
    another output needs a folder, links that lead out of `folder`, and two names for one place: those that differ only
    in what `fold` leaves out, or that a link leads there.
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
    """Where a folder really is; raises `UserError` if that is not below `root`."""
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
    """What maps names that a file system takes for one to one; None if it tells all apart. Found by trying it out.

    Names may differ in case only, or in how Unicode spells a letter.
    """
    stem = uuid.uuid4().hex
    steps: list[Callable[[str], str]] = []
    for suffix, variant, step in (
        ("\u00e9", "e\u0301", lambda s: unicodedata.normalize("NFC", s)),
        ("case", "CASE", str.casefold),
    ):
        probe = folder / f"{stem}{suffix}"
        try:
            probe.touch()
            if (folder / f"{stem}{variant}").exists():
                steps.append(step)
        except (OSError, UnicodeError):  # a name that cannot be written cannot be mistaken either
            continue
        finally:
            with contextlib.suppress(OSError, UnicodeError):
                probe.unlink()

    def fold(name: str) -> str:
        for step in steps:
            name = step(name)
        return name

    return fold if steps else None
