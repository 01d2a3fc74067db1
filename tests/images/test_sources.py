"""Check that every image is found once, under a name of its own, in a fixed order."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latent_codec.errors import UserError
from latent_codec.images.read import ReadOptions
from latent_codec.images.sources import find_all, find_images
from tests.conftest import Draw
from tests.support.errors import refused


def png(level: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 1), level).save(stream, "PNG")
    return stream.getvalue()


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())


def tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT, mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tar_format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def names(where: Path | str) -> list[str]:
    return [source.name for source in find_images(where)]


def levels(where: Path | str) -> dict[str, int]:
    """Return each image's name and first pixel."""
    return {s.name: int(s.read().pixels[0, 0, 0]) for s in find_images(where)}


NOT_UTF_8 = os.fsdecode(b"caf\xe9.png")
TREE = ["B.png", "a.JPEG", "a.jpg", "a.png", "ünï/日本.webp", "sub/deep/a.jpg", "z.TIF", NOT_UTF_8]


def test_a_folders_tree_is_found_whole_sorted_and_by_suffix(tmp_path: Path) -> None:
    put(*(tmp_path / name for name in TREE))
    put(tmp_path / "notes.txt", tmp_path / "sub" / "jpg", tmp_path / "a.jpg.part")
    assert names(tmp_path) == names(str(tmp_path)) == sorted(TREE) and levels(tmp_path) == dict.fromkeys(TREE, 0)


def test_one_file_is_one_image_whatever_it_is_called(tmp_path: Path) -> None:
    put(tmp_path / "picture", tmp_path / "a[1].png", tmp_path / "a1.png")
    assert levels(tmp_path / "picture") == {"picture": 0} and names(tmp_path / "a[1].png") == ["a[1].png"]


def test_a_glob_names_matches_below_its_fixed_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(*(tmp_path / name for name in TREE))
    assert names(f"{tmp_path}/*.png") == ["B.png", "a.png", NOT_UTF_8]
    assert names(f"{tmp_path}/**/*.jpg") == ["a.jpg", "sub/deep/a.jpg"]
    assert names(f"{tmp_path}/sub/d*/[a-c].jpg") == ["deep/a.jpg"]
    monkeypatch.chdir(tmp_path)
    assert names("*/*/*.jpg") == ["sub/deep/a.jpg"] and names("a.*") == ["a.JPEG", "a.jpg", "a.png"]
    refused("not a valid glob pattern", find_images, "**a/*.png")


MEMBERS = {"a.png": png(1), "class/b.png": png(2), "class/ü.png": png(3), "readme.txt": b"text"}
IN_TAR = {"s/a.png": 1, "s/class/b.png": 2, "s/class/ü.png": 3}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_files_members_are_read_in_place(tmp_path: Path, tar_format: int) -> None:
    assert levels(tar(tmp_path / "s.tar", MEMBERS, tar_format)) == IN_TAR


def test_tar_files_in_a_folder_are_searched_and_hide_nothing(tmp_path: Path) -> None:
    tar(tmp_path / "s.tar", MEMBERS)
    tar(tmp_path / "t.tar", {"a.png": png(9)})
    assert levels(tmp_path) == levels(f"{tmp_path}/*.tar") == IN_TAR | {"t/a.png": 9}
    put(tmp_path / "preview.png")
    assert levels(tmp_path) == IN_TAR | {"t/a.png": 9, "preview.png": 0}


def test_names_in_different_folders_do_not_collide_and_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    for i, name in enumerate(("x/s.tar", "y/s.tar", "s.tar")):
        tar(tmp_path / name, {"a.png": png(i)})
    assert levels(f"{tmp_path}/*/s.tar") == {"x/s/a.png": 0, "y/s/a.png": 1}
    put(tmp_path / "s" / "a.png")
    refused(r"both hold s/a\.png; rename", find_images, tmp_path)


def test_member_names_are_plain_relative_paths_and_of_equal_ones_the_last_counts(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", {"./a.png": png(1), "/b/.//c.png": png(2), "a.png": png(4)})
    assert levels(path) == {"s/a.png": 4, "s/b/c.png": 2}
    tar(path, {"a.png": png(3)}, mode="a")
    assert levels(path) == {"s/a.png": 3, "s/b/c.png": 2}


def test_a_hard_link_in_a_tar_file_is_an_image(tmp_path: Path) -> None:
    path = tar(tmp_path / "s.tar", {"a.png": png(7)})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    assert levels(path) == {"s/a.png": 7, "s/b.png": 7}


def test_a_tar_file_that_is_cut_off_damaged_or_none_is_refused_not_read_in_part(tmp_path: Path) -> None:
    packed = tar(tmp_path / "packed.tar", MEMBERS, mode="w:gz").read_bytes()
    data = tar(tmp_path / "s.tar", {f"{i}.png": png(i) * 9 for i in range(3)}, tarfile.USTAR_FORMAT).read_bytes()
    member = 512 + 1024  # header and data of one, padded to blocks
    assert data[member : member + 5] == b"1.png"
    sizes = (1, 100, 600, member + 1, member + 511, member + 600, 2 * member + 700)
    header = data[: member + 150] + bytes([data[member + 150] ^ 1]) + data[member + 151 :]  # the second one's checksum
    whole = r"s\.tar: not a whole, uncompressed tar file"
    for bad in (*(data[:size] for size in sizes), header, b"", b"text", b"\x1f\x8b" + bytes(600), packed):
        (tmp_path / "s.tar").write_bytes(bad)
        refused(whole + (f".*damaged at byte {member}" if bad is header else ""), find_images, tmp_path / "s.tar")


def test_nothing_found_is_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tar(tmp_path / "empty.tar", {})
    for where in ("none", "none.png", "no*.png", "empty", "empty.tar"):
        with pytest.raises(UserError, match=r"(no such image|no images there)") as caught:
            find_images(f"{tmp_path}/{where}")
        assert str(caught.value).startswith(f"{tmp_path}/{where}: ")


def test_a_link_to_an_image_is_an_image_and_one_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "tree" / "a.png", tmp_path / "other" / "b.png")
    (tmp_path / "tree" / "link.png").symlink_to("a.png")
    (tmp_path / "tree" / "folder.png").symlink_to(tmp_path / "other")
    (tmp_path / "tree" / "loop").symlink_to(tmp_path / "tree")
    (tmp_path / "tree" / "z.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "tree" / "pipe.png")  # opening it would wait for a writer for ever
    assert names(tmp_path / "tree") == names(f"{tmp_path}/tree/*.png") == ["a.png", "link.png", "z.png"]
    refused(r"^z\.png: cannot be read", find_images(tmp_path / "tree")[2].read)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a.png", tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused("locked: cannot be listed", find_images, tmp_path)


def test_options_and_names_reach_the_reader(tmp_path: Path, draw: Draw) -> None:
    draw(tmp_path / "a.png", 4, 3)
    Image.new("RGBA", (1, 1), (0, 0, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"text")
    a, b, c = find_images(tmp_path)
    refused(r"^a\.png: .* exceed the limit of 11", a.read, ReadOptions(max_pixels=11))
    assert b.read(ReadOptions(background="#102030")).pixels.flatten().tolist() == [16, 32, 48]
    refused(r"^c\.png: not a readable image", c.read)


def test_several_places_keep_their_names_unless_they_collide(tmp_path: Path) -> None:
    put(tmp_path / "x" / "a.png", tmp_path / "y" / "b.png", tmp_path / "z" / "a.png")
    places = [tmp_path / "x", tmp_path / "y"]
    assert [s.name for s in find_all(places)] == ["a.png", "b.png"]
    found = find_all([*places, tmp_path / "z"])
    assert [s.name for s in found] == ["0:x/a.png", "1:y/b.png", "2:z/a.png"]
    assert [s.path.parent.name for s in found] == ["x", "y", "z"]
