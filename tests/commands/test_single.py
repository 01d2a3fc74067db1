"""Test `encode a.png a.lc` and `decode a.lc a.png`: one file of one source, and nothing beside it."""

from pathlib import Path

import pytest

from latent_codec.images.read import read_image
from tests.conftest import files_of
from tests.test_cli import Do
from tests.test_cli import do as do  # the fixtures
from tests.test_cli import run as run


def names(folder: str) -> list[str]:
    """List all files, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg", ".jpeg", ".PNG"])
def test_one_image_becomes_one_file_there_and_back(do: Do, suffix: str) -> None:
    assert do("encode photos folder --step 0.5").code == do("decode folder images").code == 0
    assert do("encode photos/a.png one/a.lc --step 0.5").code == do(f"decode one/a.lc one/a{suffix}").code == 0
    assert Path("one/a.lc").read_bytes() == files_of(Path("folder"))["a.png.lc"]
    assert names("one") == sorted(["a.lc", f"a{suffix}"])
    assert read_image(f"one/a{suffix}")[1].width == 9
    if suffix == ".png":
        assert Path("one/a.png").read_bytes() == files_of(Path("images"))["a.png.png"]


def test_a_repeated_command_replaces_what_it_made_and_nothing_else(do: Do) -> None:
    assert do("encode photos/a.png a.lc").code == 0
    first = Path("a.lc").read_bytes()
    assert do("encode photos/a.png a.lc --step 0.1").code == 0 and Path("a.lc").read_bytes() != first
    for line, path in (("encode photos/a.png note.lc", "note.lc"), ("decode a.lc mine.png", "mine.png")):
        Path(path).write_text("mine")
        refused = do(line)
        assert refused.code == 2 and f"{path}: exists already; give --overwrite" in refused.err
        assert Path(path).read_text() == "mine"
        assert do(f"{line} --overwrite").code == 0 and Path(path).read_bytes() != b"mine"


def test_an_image_that_cannot_be_written_is_refused_by_its_suffix(do: Do) -> None:
    assert do("encode photos/a.png a.lc").code == 0
    refused = do("decode a.lc a.gif")
    assert refused.code == 2 and "a.gif: images are written as .png, .webp, .jpg, .jpeg, not as .gif" in refused.err
    assert not Path("a.gif").exists()
    Path("a.gif").mkdir()
    assert do("decode a.lc a.gif").code == 0 and "a.png" in files_of(Path("a.gif"))


def test_what_may_be_several_files_needs_a_folder(do: Do) -> None:
    assert do("encode photos shards --tar").code == do("encode photos files").code == 0
    for line in ("encode photos a.lc", "encode photos/*.png a.lc", "decode files a.png", "decode shards a.png"):
        refused = do(line)
        assert refused.code == 2 and "may hold several; give a folder" in refused.err
    assert not Path("a.lc").exists() and not Path("a.png").exists()


def test_a_failure_is_named_and_leaves_nothing(do: Do) -> None:
    Path("photos/bad.png").write_text("no image")
    Path("bad.lc").write_text("no stream")
    for line, name in (("encode photos/bad.png new/a.lc", "bad.png"), ("decode bad.lc new/a.png", "bad.lc")):
        failed = do(line)
        assert failed.code == 1 and name in failed.err and names("new") == []
    Path("kept.lc").mkdir()
    assert do("encode photos/a.png kept.lc").code == 0 and "a.png.lc" in files_of(Path("kept.lc"))
