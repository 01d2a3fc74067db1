"""Finding images: one file, a folder's tree, a glob, or tar shards."""

import glob
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from latent_codec.errors import UserError
from latent_codec.images import DEFAULT_MAX_PIXELS, EXTENSIONS, Image, read_image


class Source(NamedTuple):
    """One image: a byte range of a file (the whole file, or a tar shard's member)."""

    name: str
    """Path relative to where the search began, with "/" between its parts; unique within one search."""
    path: Path
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def read(self, *, max_pixels: int = DEFAULT_MAX_PIXELS, background: str = "#ffffff") -> Image:
        """Decode it; raises `UserError` with the name and the reason where that cannot be done."""
        try:
            data = self.read_bytes()
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        return read_image(data, max_pixels=max_pixels, background=background, name=self.name)


def find_images(where: Path | str) -> list[Source]:
    """Images in a file, a folder (recursively; by suffix), a tar file, a folder of tar files, or a glob's matches.

    The order is fixed: sorted by name. Raises `UserError` if there is nothing to be found.
    """
    path = Path(where)
    if path.is_dir():
        sources = _in_folder(path)
    elif path.is_file():
        sources = _in_tar(path) if path.suffix.lower() == ".tar" else [_whole(path, path.name)]
    elif glob.has_magic(str(where)):
        sources = _matching(str(where))
    else:
        raise UserError(f"{where}: no such image, folder or tar file")
    if not sources:
        raise UserError(f"{where}: no images there; looked for {', '.join(sorted(EXTENSIONS))}")
    return sorted(sources)


def find_all(places: Sequence[Path]) -> list[Source]:
    """`find_images` for several places in turn; names get their place as prefix if they would collide."""
    found = [find_images(place) for place in places]
    names = [s.name for sources in found for s in sources]
    if len(set(names)) == len(names):
        return [s for sources in found for s in sources]
    return [
        s._replace(name=f"{i}:{place.name}/{s.name}")
        for i, (place, sources) in enumerate(zip(places, found, strict=True))
        for s in sources
    ]


def _whole(path: Path, name: str) -> Source:
    return Source(name, path, 0, path.stat().st_size)


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS


def _in_folder(folder: Path) -> list[Source]:
    files = [f for f in folder.rglob("*") if _is_image(f.name) and f.is_file()]
    if files:
        return [_whole(f, f.relative_to(folder).as_posix()) for f in files]
    return [source for shard in sorted(folder.glob("*.tar")) for source in _in_tar(shard)]


def _matching(pattern: str) -> list[Source]:
    fixed = Path(pattern).parts
    depth = next(i for i, part in enumerate(fixed) if glob.has_magic(part))
    root = Path(*fixed[:depth]) if depth else Path()
    files = sorted(root.glob(str(Path(*fixed[depth:]))))
    return [_whole(f, f.relative_to(root).as_posix()) for f in files if _is_image(f.name) and f.is_file()]


def _in_tar(shard: Path) -> list[Source]:
    try:
        with tarfile.open(shard, "r:") as tar:
            members = [m for m in tar if m.isfile() and _is_image(m.name)]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard}: not an uncompressed tar file ({error}); give a folder or .tar shards") from error
    return [Source(f"{shard.stem}/{m.name}", shard, m.offset_data, m.size) for m in members]
