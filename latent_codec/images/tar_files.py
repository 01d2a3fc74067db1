"""List the members of tar files as `tar -i` and WebDataset read them: without unpacking, one archive after another."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from latent_codec.errors import UserError
from latent_codec.storage.files import open_regular
from latent_codec.storage.json_config import loads

SIDECARS = (".cls", ".json", ".txt")
"""Suffixes of WebDataset's members that say something of the image with the same key: its class, facts, a caption."""

_LABEL_KEYS = ("cls", "label", "class", "class_name")
_LARGEST_SIDECAR = 2**16


class Member(NamedTuple):
    """Locate a regular file within a tar file; a hard link is where its target lies."""

    name: str
    """Plain relative path; `tar c .` writes ./a.jpg."""
    offset: int
    size: int


class Contents(NamedTuple):
    """Hold what a tar file has; of members with equal names the last counts, as in unpacking."""

    members: dict[str, Member]
    links: list[str]
    """Names of symbolic links, which lead out of what can be read in place."""
    special: list[str]
    """Names of devices, pipes and sparse files."""


def list_members(path: Path) -> Contents:
    """Return the contents of an uncompressed tar file, or of several that were concatenated.

    Raises `UserError` if it cannot be read to its end.
    """
    contents = Contents({}, [], [])
    try:
        with open_regular(path) as raw:
            while _has_more(raw):
                start = raw.tell()
                with tarfile.open(fileobj=raw, mode="r:") as tar:
                    _add(contents, tar)
                    if tar.offset == start:  # tarfile takes a damaged header for the end
                        raise tarfile.ReadError(f"damaged at byte {start}")
                    raw.seek(tar.offset)
    except (tarfile.TarError, KeyError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a whole, uncompressed tar file ({error}); make it again") from error
    return contents


def _add(contents: Contents, tar: tarfile.TarFile) -> None:
    for member in tar.getmembers():
        name = str(PurePosixPath(member.name.lstrip("/")))
        if member.issparse() or not (member.isfile() or member.islnk() or member.issym() or member.isdir()):
            contents.special.append(name)
        elif member.issym():
            contents.links.append(name)
        elif not member.isdir():
            data = tar.getmember(member.linkname) if member.islnk() else member
            contents.members[name] = Member(name, data.offset_data, data.size)


def _has_more(raw: BinaryIO) -> bool:
    """Move to the next block that is not zero; return False at the end, but True for a file without any bytes."""
    empty = raw.tell() == 0
    while block := raw.read(tarfile.BLOCKSIZE):
        empty = False
        if block.strip(b"\0"):
            raw.seek(-len(block), 1)
            return True
    return empty


def key_of(name: str) -> str:
    """Return WebDataset's key of a member: its path up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def sidecars(contents: Contents) -> dict[str, dict[str, Member]]:
    """Return the members that go with an image, by key and suffix."""
    found: dict[str, dict[str, Member]] = {}
    for name, member in contents.members.items():
        if (suffix := name[len(key_of(name)) :]) in SIDECARS and member.size <= _LARGEST_SIDECAR:
            found.setdefault(key_of(name), {})[suffix] = member
    return found


def label_of(name: str, beside: dict[str, Member], raw: BinaryIO) -> str | None:
    """Return a member's class: what its .cls or its .json says, or else its first folder within the tar file."""
    for label in _told(beside, raw):
        return label
    first, slash, _ = name.partition("/")
    return first if slash else None


def _told(beside: dict[str, Member], raw: BinaryIO) -> Iterator[str]:
    if ".cls" in beside and (text := read_member(beside[".cls"], raw).decode(errors="replace").strip()):
        yield text
    if ".json" in beside:
        try:
            facts = loads(read_member(beside[".json"], raw))
        except ValueError:
            return
        for key in _LABEL_KEYS if isinstance(facts, dict) else ():
            value = facts.get(key)
            if isinstance(value, int | str) and not isinstance(value, bool) and str(value).strip():
                yield str(value).strip()


def read_member(member: Member, raw: BinaryIO) -> bytes:
    """Return the bytes of a member of the open tar file."""
    raw.seek(member.offset)
    return raw.read(member.size)
