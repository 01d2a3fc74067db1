"""Test that a search takes what a user means, and tells what it leaves out."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from latent_codec.images import sources
from latent_codec.images.sources import ListOptions, find_images, list_all, list_files, list_images
from tests.images.test_sources import names, png, put, tar
from tests.support.errors import refused


def left_out(where: Path | str, options: ListOptions = ListOptions()) -> dict[str, int]:
    return list_images(where, options).left_out.counts


def test_hidden_files_and_those_of_systems_are_left_out_in_folders_globs_and_tar_files(tmp_path: Path) -> None:
    hidden = ["._a.png", ".Trash-1000/files/b.png", "@eaDir/a.png/T.png", "cats/.ipynb_checkpoints/a.png"]
    hidden += ["lost+found/a.png", "__MACOSX/cats/._a.png"]
    put(*(tmp_path / "p" / name for name in ["cats/a.png", *hidden]))
    assert names(tmp_path / "p") == ["cats/a.png"] == names(f"{tmp_path}/p/**/*.png")
    assert left_out(tmp_path / "p") == {"hidden or system files": 6} == left_out(f"{tmp_path}/p/**/*.png")
    tar(tmp_path / "p.tar", dict.fromkeys(["cats/a.png", *hidden], png()))
    assert names(tmp_path / "p.tar") == ["p/cats/a.png"]
    assert left_out(tmp_path / "p.tar") == {"hidden or system files": 6}
    assert names(tmp_path / "p" / ".Trash-1000") == ["files/b.png"]  # asked for by name
    assert names(f"{tmp_path}/p/.Trash-1000/*/*.png") == ["files/b.png"]


def test_everything_else_is_counted_by_a_reason_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "p" / "a.png", tmp_path / "other" / "b.png")
    monkeypatch.setattr(sources, "EXTENSIONS", sources.EXTENSIONS - {".heic", ".heif", ".jxl"})  # without the plugins
    for name in ("a.HEIC", "b.heif", "c.jxl", "shard.tar.gz", "noext", "a.jpg_large", "a.txt", "b.txt"):
        (tmp_path / "p" / name).write_bytes(b"x")
    (tmp_path / "p" / "linked").symlink_to(tmp_path / "other")
    os.mkfifo(tmp_path / "p" / "pipe.png")
    (tmp_path / "p" / "linked.png").symlink_to("pipe.png")
    tar(tmp_path / "p" / "below" / "s.tar", {"a.png": png()})
    with tarfile.open(tmp_path / "p" / "links.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("z.npy"), io.BytesIO())
        link = tarfile.TarInfo("l.png")
        link.type, link.linkname = tarfile.SYMTYPE, "z.png"
        archive.addfile(link)
    assert names(tmp_path / "p") == ["a.png"]
    assert left_out(tmp_path / "p") == {
        "HEIC (pip install pillow-heif)": 2,
        "JPEG XL (pip install pillow-jxl-plugin)": 1,
        "compressed archive (unpack it)": 1,
        "without a suffix": 1,
        ".jpg_large": 1,
        ".txt": 2,
        ".npy": 1,
        "linked folder (--follow-links takes it)": 1,
        "pipe or device": 2,
        "tar file in a folder below (give its own folder)": 1,
        "link in a tar file": 1,
    }


def test_linked_folders_are_followed_once_if_asked_for(tmp_path: Path) -> None:
    put(tmp_path / "p" / "a" / "x.png", tmp_path / "other" / "y.png")
    for name, target in (("b", tmp_path / "other"), ("c", tmp_path / "other"), ("a/loop", tmp_path / "p")):
        (tmp_path / "p" / name).symlink_to(target)
    listing = list_images(tmp_path / "p", ListOptions(follow_links=True))
    assert [source.name for source in listing.sources] == ["a/x.png", "b/y.png"]
    assert listing.left_out.counts == {"linked folder that is searched already": 2}


def test_what_a_command_writes_is_not_found_unless_it_is_searched_itself(tmp_path: Path) -> None:
    put(*(tmp_path / name for name in ("a.png", "out/b.png", "out/deep/c.png", "outer/d.png", "plot.png")))
    search = ListOptions().without(tmp_path / "out", tmp_path / "plot.png")
    assert [s.name for s in find_images(tmp_path, search)] == ["a.png", "outer/d.png"]
    assert left_out(tmp_path, search) == {"where this command writes": 2}
    assert [s.name for s in find_images(f"{tmp_path}/**/*.png", search)] == ["a.png", "outer/d.png"]
    assert [s.name for s in find_images(tmp_path / "out", search)] == ["b.png", "deep/c.png"]


def test_one_bad_folder_or_shard_is_named_and_the_others_are_found(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    whole = tar(tmp_path / "good.tar", {"b.png": png()}).read_bytes()
    (tmp_path / "bad.tar").write_bytes(whole[:600])
    listing = list_images(tmp_path)
    assert [source.name for source in listing.sources] == ["a.png", "good/b.png"]
    assert list(listing.failures) == ["bad.tar"] and "not a whole" in listing.failures["bad.tar"]
    for find in (lambda: find_images(tmp_path), lambda: list_images(tmp_path / "bad.tar")):
        refused(r"bad\.tar: not a whole", find)


def test_concatenated_tar_files_are_one_and_damage_between_them_is_not_passed_over(tmp_path: Path) -> None:
    first = tar(tmp_path / "a.tar", {"a.png": png(1), "b.png": png(2)}).read_bytes()
    second = tar(tmp_path / "b.tar", {"c.png": png(3), "a.png": png(4)}).read_bytes()
    path = tmp_path / "c.tar"
    for between in (b"", bytes(512), bytes(99 * 512)):
        path.write_bytes(first + between + second)
        assert {s.name: int(s.read().pixels[0, 0, 0]) for s in find_images(path)} == {
            "c/a.png": 4,
            "c/b.png": 2,
            "c/c.png": 3,
        }
    for data in (first + b"\1" * 512 + second, first + second[:700], first + b"x"):
        path.write_bytes(data)
        refused("not a whole", find_images, path)


def test_sparse_members_are_left_out_by_name(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("sparse.png")
        member.size, member.pax_headers = 5, {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(2**40)}
        archive.addfile(member, io.BytesIO(b"12345"))
        member = tarfile.TarInfo("a.png")
        member.size = len(png())
        archive.addfile(member, io.BytesIO(png()))
    assert names(path) == ["s/a.png"] and left_out(path) == {"sparse file, pipe or device in a tar file": 1}


def test_classes_and_captions_are_what_webdataset_takes_them_for(tmp_path: Path) -> None:
    members = {
        "0.png": png(), "0.cls": b"7\n", "0.txt": b"a caption",
        "1.png": png(), "1.json": b'{"label": 3, "text": "x"}',
        "2.png": png(), "2.json": b"[broken",
        "dogs/3.jpg.png": png(), "dogs/3.cls": b"dog",
        "dogs/deep/4.png": png(),
        "5.npy": b"", "5.txt": b"of no image",
    }  # fmt: skip
    listing = list_images(tar(tmp_path / "shard-000.tar", members))
    found = {s.name.removeprefix("shard-000/"): (s.label, s.key) for s in listing.sources}
    assert found == {
        "0.png": ("7", "0"),
        "1.png": ("3", "1"),
        "2.png": (None, "2"),
        "dogs/3.jpg.png": ("dog", "dogs/3"),
        "dogs/deep/4.png": ("dogs", "dogs/deep/4"),
    }
    assert listing.sources[0].read_sidecars() == {".cls": b"7\n", ".txt": b"a caption"}
    assert listing.left_out.counts == {".npy": 1, ".txt": 1}


def test_an_image_that_is_given_twice_counts_once(tmp_path: Path) -> None:
    put(tmp_path / "p" / "a.png", tmp_path / "p" / "sub" / "b.png")
    (tmp_path / "link").symlink_to("p")
    listing = list_all([tmp_path / "p", tmp_path / "p" / "sub", tmp_path / "link"])
    assert [source.name for source in listing.sources] == ["a.png", "sub/b.png"]
    assert listing.left_out.counts == {"given twice": 3}


def test_other_files_are_listed_in_the_same_way(tmp_path: Path) -> None:
    put(tmp_path / "a.lc", tmp_path / ".b.lc", tmp_path / "c.LC", tmp_path / "sub" / "d.lc")
    tar(tmp_path / "s.tar", {"e.lc": b"x", "e.cls": b"1", "f.txt": b""})
    listing = list_files(tmp_path, ".lc")
    assert [s.name for s in listing.sources] == ["a.lc", "e.lc", "sub/d.lc"]
    assert listing.left_out.counts == {"hidden or system files": 1, ".lc": 1, ".txt": 1}
