"""Tar shards: the same files as in a folder, whole whenever they are there, and made again by the unit."""

import itertools
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_codec.errors import UserError
from latent_codec.folders.jobs import OVERWRITE, RESUME
from latent_codec.folders.resume import units as plan
from latent_codec.folders.resume.ledger import FAILURES
from tests.conftest import Draw, files_of
from tests.support.folder import UNIT, Kind, Task, die, finish, start, temporary_files, work

KINDS: tuple[Kind, ...] = ("tars of streams", "tars of images")
SIZES = {"a.png": (24, 16), "b.png": (9, 17), "c.jpg": (24, 16), "sub/é.png": (9, 17), "sub/e.png": (24, 16)}
"""In units of three and two; and zbad.png, which is no image and takes no part in any."""


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MEAN_IMAGES", 2**63)
    monkeypatch.setattr(plan, "_MOST_IMAGES", UNIT)


@pytest.fixture
def places(tmp_path: Path, model_file: Path) -> dict[Kind, tuple[Task, dict[str, bytes]]]:
    """For each kind a task and what it makes when nothing interrupts it; single files first."""
    src = tmp_path / "photos"
    for i, (name, (width, height)) in enumerate(SIZES.items()):
        (src / name).parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(values).save(src / name)
    (src / "zbad.png").write_text("no image")
    found: dict[Kind, tuple[Task, dict[str, bytes]]] = {}
    sources = {"streams": src, "images of streams": tmp_path / "streams", "tars of streams": src}
    sources["tars of images"] = tmp_path / "tars of streams"
    for kind, where in sources.items():
        task = Task(kind, model_file, where)  # pyright: ignore[reportArgumentType]
        task.do(tmp_path / kind)
        found[task.kind] = task, files_of(tmp_path / kind)
    return found


def members(folder: Path) -> dict[str, bytes]:
    """Of all tar files, each of which has those of one unit."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            own = {m.name: tar.extractfile(m).read() for m in tar}  # pyright: ignore[reportOptionalMemberAccess]
        assert own and len(own) <= UNIT and not own.keys() & found.keys()
        found |= own
    return found


def test_members_are_the_files_of_a_folder(places: dict[Kind, Any], tmp_path: Path) -> None:
    for single, tars in (("streams", "tars of streams"), ("images of streams", "tars of images")):
        expected = {name: data for name, data in places[single][1].items() if name != FAILURES}
        assert len(expected) == 5
        assert members(tmp_path / tars) == expected
        made = {name for name in places[tars][1] if name != FAILURES}
        assert len(made) == 2 and all(name.endswith(".tar") and "/" not in name for name in made)


def test_the_same_command_again_makes_nothing(places: dict[Kind, Any], tmp_path: Path) -> None:
    for kind in KINDS:
        task, expected = places[kind]
        for check in ("hash", "mtime"):
            summary = task.do(tmp_path / kind, RESUME._replace(check=check))
            assert (summary.done, summary.skipped) == (0, 5)
        assert files_of(tmp_path / kind) == expected
        assert task.do(tmp_path / kind, OVERWRITE).done == 5
        assert files_of(tmp_path / kind) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["deleted", "cut", "changed"])
def test_a_shard_that_is_not_whole_is_made_again_and_no_other(
    places: dict[Kind, Any], tmp_path: Path, kind: Kind, damage: str
) -> None:
    task, expected = places[kind]
    first, second = sorted((tmp_path / kind).glob("*.tar"))
    before = second.stat().st_ino
    match damage:
        case "deleted":
            first.unlink()
        case "cut":
            first.write_bytes(first.read_bytes()[:-3])
        case _:
            first.write_bytes(b"?" + first.read_bytes()[1:])
    assert task.do(tmp_path / kind).done in (2, 3)
    assert files_of(tmp_path / kind) == expected
    assert second.stat().st_ino == before


def test_shards_hold_the_sources_that_are_there(places: dict[Kind, Any], tmp_path: Path, draw: Draw) -> None:
    task, _ = places["tars of streams"]
    folder = tmp_path / "tars of streams"
    (folder / "streams-holiday.tar").write_text("a stranger's")
    (task.src / "a.png").unlink()
    draw(task.src / "b.png", 8, 8)
    draw(task.src / "sub" / "f.png", 8, 8)
    assert not task.do(folder).failures.keys() - {"zbad.png"}
    assert (folder / "streams-holiday.tar").read_text() == "a stranger's"
    (folder / "streams-holiday.tar").unlink()
    assert members(folder).keys() == {"b.png.lc", "c.jpg.lc", "sub/e.png.lc", "sub/é.png.lc", "sub/f.png.lc"}
    task.do(tmp_path / "fresh")
    assert files_of(folder) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_it_ends_with_the_same_bytes(places: dict[Kind, Any], tmp_path: Path, kind: Kind) -> None:
    task, expected = places[kind]
    for at in itertools.count(1, 2):
        folder = tmp_path / f"{at}"
        code = finish(start(die, task, folder, at))
        assert all(expected.get(name, data) == data for name, data in files_of(folder).items())
        task.do(folder)
        assert files_of(folder) == expected
        assert temporary_files(folder) == []
        if code == 0:
            break
        assert code == -signal.SIGKILL
        shutil.rmtree(folder)
    assert at > 20


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_make_the_same_files(places: dict[Kind, Any], tmp_path: Path, kind: Kind) -> None:
    task, expected = places[kind]
    ranks = [{"RANK": f"{rank}", "WORLD_SIZE": "2"} for rank in range(2)]
    assert [finish(p) for p in [start(work, task, tmp_path / "z", environment) for environment in ranks]] == [0, 0]
    assert files_of(tmp_path / "z") == expected


def test_tars_and_single_files_are_not_mixed(places: dict[Kind, Any], tmp_path: Path) -> None:
    for one, other in (("streams", "tars of streams"), ("images of streams", "tars of images")):
        for kind, folder in ((one, other), (other, one)):
            with pytest.raises(UserError, match=r"holds (streams|images) in .* give another folder"):
                places[kind][0].do(tmp_path / folder)
            assert files_of(tmp_path / folder) == places[folder][1]


def test_one_tar_file_is_decoded_alone(places: dict[Kind, Any], tmp_path: Path) -> None:
    task, _ = places["tars of images"]
    shard = min((tmp_path / "tars of streams").glob("*.tar"))
    summary = task._replace(kind="images of streams", src=shard).do(tmp_path / "one")
    assert 2 <= summary.done == summary.found <= UNIT
    assert files_of(tmp_path / "one").items() <= places["images of streams"][1].items()


def test_one_name_in_two_tar_files_is_refused(places: dict[Kind, Any], tmp_path: Path) -> None:
    shard = min((tmp_path / "tars of streams").glob("*.tar"))
    shutil.copy(shard, shard.with_name("copy.tar"))
    with pytest.raises(UserError, match="both hold"):
        places["tars of images"][0].do(tmp_path / "z")


def test_files_have_the_users_umask(places: dict[Kind, Any], tmp_path: Path, umask_027: None) -> None:
    places["tars of streams"][0].do(tmp_path / "z")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "z").glob("*.tar")} == {0o640}
