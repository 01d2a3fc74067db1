"""Test that tar shards hold the files of a folder, a unit in each; `resume/test_resume.py` resumes them, too."""

import dataclasses
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from latent_codec.folders.resume.ledger import FAILURES
from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.write import write_cache
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.folders.conftest import Places
from tests.images.test_sources import tar
from tests.support.errors import refused
from tests.support.folder import CPU, SOURCES, UNIT, Kind, black_and_grey, make, temporary_files
from tests.support.networks import overflow_float16
from tests.test_cli import Do
from tests.test_cli import do as do  # the fixtures
from tests.test_cli import run as run

PAIRS: list[tuple[Kind, Kind]] = [("streams", "tars of streams"), ("images of streams", "tars of images")]


@pytest.mark.parametrize("decoded", [*SOURCES])
def test_an_image_beyond_float16_fails_alone_with_the_remedy(codec: Codec, tmp_path: Path, decoded: Kind) -> None:
    overflow_float16(codec)
    make(SOURCES[decoded], codec, black_and_grey(tmp_path / "src"), tmp_path / "z")
    for dtype in ("bfloat16", "float32"):
        compute = dataclasses.replace(CPU, dtype=dtype)
        assert make(decoded, codec, tmp_path / "z", tmp_path / dtype, compute).done == 2
    half = make(decoded, codec, tmp_path / "z", tmp_path / "half", dataclasses.replace(CPU, dtype="float16"))
    (name, reason), *others = half.failures.items()
    assert (half.done, name.split(".")[0], others) == (1, "black", []) and "try --dtype float32 or bfloat16" in reason
    assert len(files_of(tmp_path / "half").keys() - {FAILURES}) == 1 and temporary_files(tmp_path / "half") == []


@pytest.mark.parametrize(("single", "tars"), PAIRS)
def test_members_are_a_folders_files_which_are_not_mixed_with_tars(places: Places, single: Kind, tars: Kind) -> None:
    shards = places[tars].files.keys() - {FAILURES}
    assert len(shards) == 2 and all(name.endswith(".tar") and "/" not in name for name in shards)
    found: dict[str, bytes] = {}
    for name in shards:
        with tarfile.open(places[tars].folder / name) as tar:
            own = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore[reportOptionalMemberAccess]
        assert own and len(own) <= UNIT and not own.keys() & found.keys()
        found |= own
    alone = {name: data for name, data in places[single].files.items() if name != FAILURES}
    if "images" in single:  # in a tar file the key of a.jpg is a
        alone = {re.sub(r"\.(png|jpg)\.png$", ".png", name): data for name, data in alone.items()}
    assert found == alone
    for kind, there in ((single, tars), (tars, single)):
        refused(r"holds (streams|images) in .* give another folder", places[kind].task.do, places[there].folder)
        assert files_of(places[there].folder) == places[there].files


def test_a_name_that_leaves_no_room_for_the_decoded_images_is_refused_at_encoding(do: Do) -> None:
    """A file system takes 255 bytes, and a name of 251 becomes one of 255 by .png."""
    for name in ("a" * 247 + ".png", "b" * 247 + "é.png"):
        shutil.copyfile("photos/a.png", f"photos/{name}")
    encoded = do("encode photos files")
    assert encoded.code == 1 and "its name of 253 bytes leaves no room" in encoded.err
    assert do("decode files images").code == 0 and (Path("images") / ("a" * 247 + ".png.png")).is_file()
    assert do("encode photos shards --tar").code == do("decode shards tars --tar").code == 0


@pytest.mark.parametrize("options", ["", "--format safetensors"])
def test_images_of_one_key_keep_their_whole_names_in_a_tar_file(do: Do, options: str) -> None:
    """There are a.jpg, a.png and sub/b.png."""
    assert do(f"encode photos made {options}").code == do("decode made tars --tar").code == 0
    (shard,) = Path("tars").glob("*.tar")
    with tarfile.open(shard) as tar:
        assert sorted(tar.getnames()) == ["a.jpg.png", "a.png.png", "sub/b.png"]


def test_one_tar_file_is_decoded_alone_and_one_name_in_two_is_refused(places: Places, tmp_path: Path) -> None:
    tar = min(places["tars of streams"].folder.glob("*.tar"))
    summary = places["images of streams"].task._replace(src=tar).do(tmp_path / "one")
    assert 2 <= summary.done == summary.found <= UNIT
    assert files_of(tmp_path / "one").items() <= places["images of streams"].files.items()
    (tmp_path / "src").mkdir()
    for name in ("one.tar", "copy.tar"):
        shutil.copy(tar, tmp_path / "src" / name)
    refused("both hold", places["tars of images"].task._replace(src=tmp_path / "src").do, tmp_path / "z")


@pytest.mark.parametrize(("kind", "suffix"), [("streams", "lc"), ("tars of streams", "tar")])
def test_files_have_the_users_umask(places: Places, tmp_path: Path, umask_027: None, kind: Kind, suffix: str) -> None:
    places[kind].task.do(tmp_path / "z")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "z").glob(f"*.{suffix}")} == {0o640}


def test_classes_and_captions_go_with_their_images(codec: Codec, draw: Draw, tmp_path: Path) -> None:
    """Keep them in tar shards of streams, in latents, in WebDataset's cache and in tar shards of images."""
    draw(tmp_path / "a.png", 16, 8)
    told = {"000.cls": b"11", "000.txt": "a caption, ünï".encode()}
    pixels = {"000.png": (tmp_path / "a.png").read_bytes(), "001.png": (tmp_path / "a.png").read_bytes()}
    tar(tmp_path / "in" / "shard-7.tar", pixels | told | {"001.cls": b"2"})

    def members(folder: str) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for path in (tmp_path / folder).glob("*.tar"):
            with tarfile.open(path) as archive:
                found |= {m.name: archive.extractfile(m).read() for m in archive}  # pyright: ignore
        return found

    make("tars of streams", codec, tmp_path / "in", tmp_path / "lc")
    make("tars of images", codec, tmp_path / "lc", tmp_path / "images of lc")
    make("latents", codec, tmp_path / "in", tmp_path / "latents")
    make("images of latents", codec, tmp_path / "latents", tmp_path / "images of latents", tar=True)
    for folder in ("lc", "images of lc", "images of latents"):
        found = members(folder)
        assert {name: found[f"shard-7/{name}"] for name in told} == told and found["shard-7/001.cls"] == b"2"
    latents = Latents(tmp_path / "latents")
    assert latents.classes == ("2", "11") and latents.labels.tolist() == [1, 0]  # numbers in their order
    write_cache(tmp_path / "latents", tmp_path / "cache", "webdataset", CacheOptions(scale="raw"))
    found = members("cache")
    assert {name: found[name] for name in told} == told  # with the shard's own keys and class numbers
