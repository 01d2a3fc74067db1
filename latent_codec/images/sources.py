"""Find images in a file, a folder, a glob's matches, tar shards or IDX files, and tell what was left out."""

import dataclasses
import glob
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.images import idx, tar_files
from latent_codec.images.geometry import Image
from latent_codec.images.read import EXTENSIONS, ReadOptions, read_image
from latent_codec.images.tar_files import Member
from latent_codec.storage.files import open_regular

OWN = ".latent_codec"
"""Folder in which this program keeps its records beside its outputs."""

_SYSTEM = frozenset(
    {"lost+found", "@eaDir", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "System Volume Information"}
)
"""Folders that file systems, network drives and archivers make."""
_EXAMPLES = 100
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".zip")


class Source(NamedTuple):
    """Locate one image: a whole file, a tar shard's member, or pixels in an IDX file."""

    name: str
    """Path relative to the place that was searched, with "/" between its parts; unique within one search."""
    path: Path
    offset: int
    size: int
    bare: tuple[int, int] | None = None
    """Height and width if the bytes are grey pixels without a header, in an IDX file's content."""
    label: str | None = None
    """Class: the first folder of the name, None at the top level; in a tar file what `tar_files.label_of` says."""
    key: str | None = None
    """WebDataset's key of a tar file's member."""
    sidecars: tuple[tuple[str, Member | bytes], ...] = ()
    """Members of the tar file with the same key, or their contents, by suffix: a class, facts, a caption."""

    def read_bytes(self) -> bytes:
        """Return the image's file; pixels of an IDX file become a PGM file. Raises `OSError`."""
        if self.bare is not None:
            height, width = self.bare
            pixels = idx.content(self.path)[self.offset : self.offset + self.size]
            return b"P5 %d %d 255\n" % (width, height) + pixels
        with open_regular(self.path) as file:
            file.seek(self.offset)
            return file.read(self.size)

    def read_sidecars(self) -> dict[str, bytes]:
        """Return the contents of the members with the same key, by suffix. Raises `OSError`."""
        if not any(isinstance(found, Member) for _, found in self.sidecars):
            return {suffix: found for suffix, found in self.sidecars if isinstance(found, bytes)}
        with open_regular(self.path) as file:
            return {
                suffix: found if isinstance(found, bytes) else tar_files.read_member(found, file)
                for suffix, found in self.sidecars
            }

    def read(self, options: ReadOptions = ReadOptions()) -> Image:
        """Decode the image (`read_image`); raises `UserError` with the name and the reason."""
        try:
            data = self.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        return read_image(data, options, name=self.name)


@dataclasses.dataclass
class LeftOut:
    """Count what a search did not take, by reason, with the names of some."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count files of one reason, which completes "3 ..." in a summary."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        if len(examples := self.examples.setdefault(reason, [])) < _EXAMPLES:
            examples.append(name)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.counts.items()))


class Listing(NamedTuple):
    """Hold what a search found: images, files that were left out, and folders and shards that cannot be read."""

    sources: list[Source]
    left_out: LeftOut
    failures: dict[str, str]
    """Reason by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Choose what a search takes."""

    follow_links: bool = False
    """Search linked folders too; each folder once."""
    exclude: tuple[Path, ...] = ()
    """Files and folders that are left out, because the command itself writes there."""

    def without(self, *places: Path) -> "ListOptions":
        """Return the same search, which leaves out these files and folders too."""
        return dataclasses.replace(self, exclude=(*self.exclude, *places))


def find_images(where: Path | str, options: ListOptions = ListOptions()) -> list[Source]:
    """Return the images that `list_images` finds; raises `UserError` also for a folder or shard that cannot be read."""
    listing = list_images(where, options)
    for reason in listing.failures.values():
        raise UserError(reason)
    return listing.sources


def list_images(where: Path | str, options: ListOptions = ListOptions()) -> Listing:
    """List images, sorted by name: a file, those of a folder (recursively, by suffix), a tar or IDX file, or a glob.

    IDX files are recognised by their names (`train-images-idx3-ubyte`, also with `.gz`); with labels beside them their
    images are named as in folders of classes. Tar files directly in a folder, and those that a glob matches, are
    searched too. Hidden files, those of operating systems and linked folders are left out. Raises `UserError` if
    nothing is found, or two images would have the same name.
    """
    return _list(where, options, EXTENSIONS, nested=True)


def list_files(where: Path, suffix: str, options: ListOptions = ListOptions()) -> Listing:
    """List files with a suffix, as `list_images` does; the names of tar files' members do not contain the tar file's.

    Finding nothing is no error.
    """
    return _list(where, options, {suffix}, nested=False)


def _list(where: Path | str, options: ListOptions, suffixes: "frozenset[str] | set[str]", *, nested: bool) -> Listing:
    path, search = Path(where), _Search(options, frozenset(suffixes), nested)
    if path.is_dir():
        search.folder(path)
    elif path.is_file():
        search.file(path)
    elif nested and glob.has_magic(str(where)):
        search.glob(str(where))
    elif nested:
        raise UserError(f"{where}: no such image, folder or tar file")
    found = search.listing
    if nested and not found.sources:
        for reason in found.failures.values():
            raise UserError(reason)
        left_out = f"; left out: {found.left_out}" if found.left_out.total else ""
        raise UserError(f"{where}: no images there; looked for {', '.join(sorted(EXTENSIONS))}{left_out}")
    found.sources.sort(key=lambda source: source.name)
    for one, other in pairwise(found.sources):
        if one.name == other.name:
            raise UserError(f"{where}: {one.path} and {other.path} both hold {one.name}; rename one of them")
    return found


def find_all(places: Sequence[Path], options: ListOptions = ListOptions()) -> list[Source]:
    """Return the images that `list_all` finds; raises `UserError` also for a folder or shard that cannot be read."""
    listing = list_all(places, options)
    for reason in listing.failures.values():
        raise UserError(reason)
    return listing.sources


def list_all(places: Sequence[Path], options: ListOptions = ListOptions()) -> Listing:
    """List the images of several places in turn, each once; where names would collide, they begin with their place."""
    found, seen, merged = [], set[tuple[Path, int]](), Listing([], LeftOut(), {})
    for place in places:
        sources, left_out, failures = list_images(place, options)
        own = [source for source in sources if identity(source) not in seen]
        if len(own) < len(sources):
            merged.left_out.add("given twice", str(place), len(sources) - len(own))
        seen |= set(map(identity, own))
        found.append(own)
        for reason, count in left_out.counts.items():
            merged.left_out.add(reason, str(place), count)
        merged.failures.update(failures)
    names = [s.name for sources in found for s in sources]
    if len(set(names)) == len(names):
        merged.sources.extend(s for sources in found for s in sources)
    else:
        merged.sources.extend(
            s._replace(name=f"{i}:{place.name}/{s.name}")
            for i, (place, sources) in enumerate(zip(places, found, strict=True))
            for s in sources
        )
    return merged


def identity(source: Source) -> tuple[Path, int]:
    """Return where an image lies, whatever links and names lead there."""
    return Path(os.path.realpath(source.path)), source.offset


class _Search:
    """Sort files into those that are taken and those that are not."""

    def __init__(self, options: ListOptions, suffixes: frozenset[str], nested: bool) -> None:
        self.suffixes, self.nested, self.follow_links = suffixes, nested, options.follow_links
        self.exclude = {os.path.realpath(path) for path in options.exclude}
        self.listing = Listing([], LeftOut(), {})

    def file(self, path: Path) -> None:
        if _is_tar(path):
            self._tar(path, path.stem if self.nested else "")
        elif self.nested and idx.is_idx(path):
            self._idx(path, "")
        elif self.nested or path.suffix in self.suffixes:
            self.listing.sources.append(_whole(path, path.name))

    def folder(self, folder: Path) -> None:
        root = os.path.realpath(folder)
        self.exclude = {place for place in self.exclude if not _contains(place, root)}  # writing there is no reason
        files = self._tree(folder)
        self._files([f for f in files if not _is_tar(f) or f.parent == folder], folder)
        for path in (f for f in files if _is_tar(f) and f.parent != folder):
            self.listing.left_out.add("tar file in a folder below (give its own folder)", _relative(path, folder))

    def glob(self, pattern: str) -> None:
        fixed = Path(pattern).parts
        depth = next(i for i, part in enumerate(fixed) if glob.has_magic(part))
        root, parts = Path(*fixed[:depth]) if depth else Path(), fixed[depth:]
        try:
            matches = [path for path in root.glob(str(Path(*parts))) if not path.is_dir()]
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{pattern}: not a valid glob pattern: {error}") from error
        taken: list[Path] = []
        for path in matches:
            if any(_is_hidden(part) for part in path.relative_to(root).parts if part not in parts):
                self.listing.left_out.add("hidden or system files", _relative(path, root))
            elif self._is_excluded(path):
                self.listing.left_out.add("where this command writes", _relative(path, root))
            else:
                taken.append(path)
        self._files(taken, root)

    def _tree(self, folder: Path) -> list[Path]:
        """List the files below a folder, and count the folders that are left out."""
        found: list[Path] = []
        seen = {os.path.realpath(folder)}

        def fail(error: OSError) -> None:
            path = Path(error.filename or folder)
            reason = f"{path}: cannot be listed ({error.strerror}); make it readable or move it away"
            self.listing.failures[_relative(path, folder)] = reason

        for top, folders, names in os.walk(folder, onerror=fail, followlinks=self.follow_links):
            folders[:] = [name for name in sorted(folders) if self._enters(Path(top, name), folder, seen)]
            place = os.path.realpath(top)
            for name in names:
                path = Path(top, name)
                if _is_hidden(name):
                    self.listing.left_out.add("hidden or system files", _relative(path, folder))
                elif os.path.join(place, name) in self.exclude:  # noqa: PTH118 (a million times)
                    self.listing.left_out.add("where this command writes", _relative(path, folder))
                else:
                    found.append(path)
        return found

    def _enters(self, path: Path, root: Path, seen: set[str]) -> bool:
        if path.name == OWN:
            return False
        reason = None
        if _is_hidden(path.name):
            reason = "hidden or system files"
        elif path.is_symlink() and not self.follow_links:
            reason = "linked folder (--follow-links takes it)"
        elif self._is_excluded(path):
            reason = "where this command writes"
        elif self.follow_links:
            if (place := os.path.realpath(path)) in seen:
                reason = "linked folder that is searched already"
            seen.add(place)
        if reason is not None:
            self.listing.left_out.add(reason, _relative(path, root))
        return reason is None

    def _is_excluded(self, path: Path) -> bool:
        place = os.path.realpath(path)
        return any(_contains(other, place) for other in self.exclude)

    def _files(self, files: Iterable[Path], root: Path) -> None:
        """Take images among `files`, and those in tar and IDX files among them, named relative to `root`."""
        files = [path for path in files if self._is_file(path, root)]
        there = set(files) if self.nested else set()
        for path in files:
            name = _relative(path, root)
            if _is_tar(path):
                self._tar(path, str(PurePosixPath(name).with_suffix("")) if self.nested else "")
            elif self.nested and idx.is_idx(path):
                if path.suffix != ".gz" or path.with_suffix("") not in there:  # else the unpacked file is beside it
                    self._idx(path, str(PurePosixPath(name).parent))
            elif _suffix(path, self.nested) in self.suffixes:
                self.listing.sources.append(_whole(path, name))
            elif not self._is_ours(path):
                self.listing.left_out.add(_reason(name), name)

    def _is_file(self, path: Path, root: Path) -> bool:
        try:
            mode = path.stat().st_mode
        except OSError:  # a broken link, or just deleted: reading it fails and is counted
            return True
        if not stat.S_ISREG(mode):  # a link to a folder where globs match, a pipe, a device
            what = "linked folder (--follow-links takes it)" if stat.S_ISDIR(mode) else "pipe or device"
            self.listing.left_out.add(what, _relative(path, root))
        return stat.S_ISREG(mode)

    def _is_ours(self, path: Path) -> bool:
        return path.name in ("failures.jsonl", "left_out.jsonl") and (path.parent / OWN).is_dir()

    def _idx(self, path: Path, prefix: str) -> None:
        try:
            images = idx.find(path)
        except UserError as error:
            self.listing.failures[path.name] = str(error)
            return
        for name, offset, height, width in images:
            name = str(PurePosixPath(prefix, name))
            self.listing.sources.append(Source(name, path, offset, height * width, (height, width), _folder_of(name)))

    def _tar(self, path: Path, prefix: str) -> None:
        try:
            contents = tar_files.list_members(path)
        except UserError as error:
            self.listing.failures[path.name] = str(error)
            return
        left_out = self.listing.left_out
        for name in contents.links:
            left_out.add("link in a tar file", f"{path.name}: {name}")
        for name in contents.special:
            left_out.add("sparse file, pipe or device in a tar file", f"{path.name}: {name}")
        wanted: list[Member] = []
        for name, member in contents.members.items():
            if any(map(_is_hidden, PurePosixPath(name).parts)):
                left_out.add("hidden or system files", f"{path.name}: {name}")
            elif _suffix(Path(name), self.nested) in self.suffixes:
                wanted.append(member)
        self._members(path, prefix, wanted, tar_files.sidecars(contents))
        keys = {tar_files.key_of(member.name) for member in wanted}
        for name in contents.members.keys() - {member.name for member in wanted}:
            key = tar_files.key_of(name)
            if not ((key in keys and name[len(key) :] in tar_files.SIDECARS) or any(map(_is_hidden, Path(name).parts))):
                left_out.add(_reason(name), f"{path.name}: {name}")

    def _members(
        self, path: Path, prefix: str, wanted: Iterable[Member], sidecars: dict[str, dict[str, Member]]
    ) -> None:
        with open_regular(path) as raw:
            for name, offset, size in wanted:
                beside = sidecars.get(key := tar_files.key_of(name), {})
                label = tar_files.label_of(name, beside, raw)
                source = Source(str(PurePosixPath(prefix, name)), path, offset, size)
                label = None if label is None else sys.intern(label)
                self.listing.sources.append(source._replace(label=label, key=key, sidecars=tuple(beside.items())))


def _contains(folder: str, place: str) -> bool:
    return place == folder or place.startswith(folder.rstrip(os.sep) + os.sep)


def _whole(path: Path, name: str) -> Source:
    try:
        size = path.stat().st_size
    except OSError:  # a broken link or just deleted; reading it will fail and be counted
        size = 0
    return Source(name, path, 0, size, label=_folder_of(name))


def _folder_of(name: str) -> str | None:
    first, slash, _ = name.partition("/")
    return sys.intern(first) if slash else None


def _suffix(path: Path, fold_case: bool) -> str:
    return path.suffix.lower() if fold_case else path.suffix


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def _is_hidden(name: str) -> bool:
    return name in _SYSTEM or (name.startswith(".") and name not in (".", ".."))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


_UNREAD = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC (pip install pillow-heif)"),
    ".jxl": "JPEG XL (pip install pillow-jxl-plugin)",
}


def _reason(name: str) -> str:
    """Return why a file is none of those that are looked for, as the end of "3 ..."."""
    lower = name.lower()
    if lower.endswith(_COMPRESSED):
        return "compressed archive (unpack it)"
    suffix = PurePosixPath(lower).suffix
    return _UNREAD.get(suffix, suffix or "without a suffix")
