"""Find images in a file, a folder, a glob's matches, tar shards or IDX files."""

import glob
import os
import tarfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from latent_codec.errors import UserError
from latent_codec.images import idx
from latent_codec.images.geometry import Image
from latent_codec.images.read import EXTENSIONS, ReadOptions, read_image


class Source(NamedTuple):
    """Locate one image: a whole file, a tar shard's member, or pixels in an IDX file."""

    name: str
    """Path relative to the place that was searched, with "/" between its parts; unique within one search."""
    path: Path
    offset: int
    size: int
    bare: tuple[int, int] | None = None
    """Height and width if the bytes are grey pixels without a header, in an IDX file's content."""

    @property
    def label(self) -> str | None:
        """Return the class: the first folder of the name; None at the top level."""
        first, slash, _ = self.name.partition("/")
        return first if slash else None

    def read_bytes(self) -> bytes:
        """Return the image's file; pixels of an IDX file become a PGM file. Raises `OSError`."""
        if self.bare is not None:
            height, width = self.bare
            pixels = idx.content(self.path)[self.offset : self.offset + self.size]
            return b"P5 %d %d 255\n" % (width, height) + pixels
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def read(self, options: ReadOptions = ReadOptions()) -> Image:
        """Decode the image (`read_image`); raises `UserError` with the name and the reason."""
        try:
            data = self.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        return read_image(data, options, name=self.name)


def find_images(where: Path | str) -> list[Source]:
    """List images, sorted by name: a file, those of a folder (recursively, by suffix), a tar or IDX file, or a glob.

    IDX files are recognised by their names (`train-images-idx3-ubyte`, also with `.gz`); with labels beside them their
    images are named as in folders of classes. Tar files directly in a folder, and those that a glob matches, are
    searched too. Links to folders are not followed. Raises `UserError` if nothing is found, a folder, tar or IDX file
    cannot be read to its end, or two images would have the same name.
    """
    path = Path(where)
    if path.is_dir():
        sources = _in_folder(path)
    elif path.is_file():
        sources = _in_file(path)
    elif glob.has_magic(str(where)):
        sources = _matching(str(where))
    else:
        raise UserError(f"{where}: no such image, folder or tar file")
    if not sources:
        raise UserError(f"{where}: no images there; looked for {', '.join(sorted(EXTENSIONS))}")
    return _in_order(sources, where)


def find_all(places: Sequence[Path]) -> list[Source]:
    """List the images of several places in turn; where names would collide, each gets its place as prefix."""
    found = [find_images(place) for place in places]
    names = [s.name for sources in found for s in sources]
    if len(set(names)) == len(names):
        return [s for sources in found for s in sources]
    return [
        s._replace(name=f"{i}:{place.name}/{s.name}")
        for i, (place, sources) in enumerate(zip(places, found, strict=True))
        for s in sources
    ]


def _in_file(path: Path) -> list[Source]:
    if _is_tar(path):
        return _in_tar(path, path.stem)
    return _in_idx(path, "") if idx.is_idx(path) else [_whole(path, path.name)]


def _whole(path: Path, name: str) -> Source:
    try:
        size = path.stat().st_size
    except OSError:  # a broken link or just deleted; reading it will fail and be counted
        size = 0
    return Source(name, path, 0, size)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS


def _is_tar(path: Path) -> bool:
    return path.suffix.lower() == ".tar"


def find_files(where: Path, suffix: str) -> list[Source]:
    """List files with a suffix, sorted by name, in a folder (recursively) or a tar file, or the file `where` itself.

    Tar files directly in a folder are searched too; their members' names do not contain the tar file's. The suffix's
    case counts. Links to folders are not followed. Raises `UserError` if a folder or tar file cannot be read, or two
    files would have the same name.
    """
    if where.is_dir():
        files = [f for f in _tree(where) if f.is_file() or f.is_symlink()]
        sources = [_whole(f, f.relative_to(where).as_posix()) for f in files if f.suffix == suffix]
        shards = [f for f in files if _is_tar(f) and f.parent == where]
    else:
        sources = [_whole(where, where.name)] if where.suffix == suffix and where.is_file() else []
        shards = [where] if _is_tar(where) and where.is_file() else []
    for shard in shards:
        sources += _in_tar(shard, "", lambda name: Path(name).suffix == suffix)
    return _in_order(sources, where)


def _in_order(sources: list[Source], where: Path | str) -> list[Source]:
    sources.sort()
    for one, other in pairwise(sources):
        if one.name == other.name:
            raise UserError(f"{where}: {one.path} and {other.path} both hold {one.name}; rename one of them")
    return sources


def _in_folder(folder: Path) -> list[Source]:
    return _in_files([f for f in _tree(folder) if not _is_tar(f) or f.parent == folder], folder)


def _tree(folder: Path) -> list[Path]:
    """List everything below a folder but folders."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable or move it away")

    return [Path(top, name) for top, _, names in os.walk(folder, onerror=refuse) for name in names]


def _matching(pattern: str) -> list[Source]:
    fixed = Path(pattern).parts
    depth = next(i for i, part in enumerate(fixed) if glob.has_magic(part))
    root = Path(*fixed[:depth]) if depth else Path()
    try:
        return _in_files([f for f in root.glob(str(Path(*fixed[depth:]))) if not f.is_dir()], root)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{pattern}: not a valid glob pattern: {error}") from error


def _in_files(files: list[Path], root: Path) -> list[Source]:
    """List images among `files` and in tar and IDX files among them, named relative to `root`."""
    # Opening a pipe or a device would block; a broken link is kept, to be counted as failed.
    files = [f for f in files if f.is_file() or f.is_symlink()]
    sources = [_whole(f, f.relative_to(root).as_posix()) for f in files if _is_image(f.name)]
    for shard in (f for f in files if _is_tar(f)):
        sources += _in_tar(shard, shard.relative_to(root).with_suffix("").as_posix())
    packed = {f for f in files if f.suffix == ".gz" and f.with_suffix("") in files}  # the unpacked file is beside it
    for file in (f for f in files if idx.is_idx(f) and f not in packed):
        sources += _in_idx(file, file.parent.relative_to(root).as_posix())
    return sources


def _in_idx(path: Path, prefix: str) -> list[Source]:
    return [
        Source(str(PurePosixPath(prefix, name)), path, offset, height * width, (height, width))
        for name, offset, height, width in idx.find(path)
    ]


def _in_tar(shard: Path, prefix: str, wanted: Callable[[str], bool] = _is_image) -> list[Source]:
    """List the wanted members of an uncompressed tar file; of equal names the last counts, as in unpacking."""
    found: dict[str, Source] = {}
    try:
        with tarfile.open(shard, "r:") as tar, shard.open("rb") as raw:
            for member in tar.getmembers():
                if wanted(member.name) and (member.isfile() or member.islnk()):
                    data = tar.getmember(member.linkname) if member.islnk() else member
                    name = str(PurePosixPath(prefix, member.name.lstrip("/")))  # `tar c .` writes ./a.jpg
                    found[name] = Source(name, shard, data.offset_data, data.size)
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except (tarfile.TarError, KeyError, OSError) as error:
        raise UserError(f"{shard}: not a whole, uncompressed tar file ({error}); make it again") from error
    return list(found.values())
