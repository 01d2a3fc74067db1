"""Laws 8 and 10: run again, a command makes what is not there as it should be, all of it, and nothing else."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latent_codec import cli
from latent_codec.bitstream.rate_control import Rate
from latent_codec.errors import UserError
from latent_codec.folders import run as run_module
from latent_codec.folders.jobs import OVERWRITE, RESUME
from latent_codec.folders.resume import units as plan
from latent_codec.folders.resume.ledger import FAILURES
from latent_codec.folders.resume.units import Share
from latent_codec.folders.summary import Summary
from latent_codec.inference.options import ComputeOptions
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import INDEX, stored_shards
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.support.folder import COMPUTE, UNIT, Kind, Task, die, finish, posteriors, start, temporary_files, watch, work

KINDS: tuple[Kind, ...] = ("streams", "latents", "images of streams", "images of latents")
SIZES = {"a.png": (24, 16), "b.png": (24, 16), "c.jpg": (24, 16), "sub/d.png": (9, 17), "sub/e.png": (24, 16)}
"""In units of three and two; and bad.png, which is no image and takes no part in any."""
EXACT = ComputeOptions(batch_size=1, workers=1)
"""Batches of one: no image is made again for another's sake."""


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MEAN_IMAGES", 2**63)
    monkeypatch.setattr(plan, "_MOST_IMAGES", UNIT)


def photos(folder: Path) -> Path:
    for i, (name, (width, height)) in enumerate(SIZES.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(values).save(folder / name)
    (folder / "zbad.png").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> dict[Kind, tuple[Task, dict[str, bytes]]]:
    """For each kind a task and what it makes when nothing interrupts it; neither is to be changed."""
    found: dict[Kind, tuple[Task, dict[str, bytes]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_MEAN_IMAGES", 2**63)
        patch.setattr(plan, "_MOST_IMAGES", UNIT)
        root = tmp_path_factory.mktemp("places")
        src = photos(root / "photos")
        for kind in KINDS:
            of = kind.removeprefix("images of ")
            task = Task(kind, model_file, src if of == kind else root / of)
            task.do(root / kind)
            found[kind] = (task, files_of(root / kind))
    return found


@pytest.fixture
def own(places: dict[Kind, Any], tmp_path: Path) -> Callable[[Kind], Task]:
    """own(kind): a task over a copy of its sources, to change."""

    def copy(kind: Kind) -> Task:
        task, _ = places[kind]
        shutil.copytree(task.src, tmp_path / "src")
        return task._replace(src=tmp_path / "src")

    return copy


def made_again(folder: Path, do: Callable[[], Summary]) -> set[str]:
    """The outputs that a second run has written, by the names of their sources' files."""
    before = {name: (folder / name).stat() for name in files_of(folder)}
    summary = do()
    after = {name: (folder / name).stat() for name in files_of(folder) if name != FAILURES}
    changed = {name for name, stat in after.items() if name not in before or stat.st_ino != before[name].st_ino}
    assert summary.done == len(changed)
    return changed


# What is made again: exactly what is not there as it should be.


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_again_makes_nothing(places: dict[Kind, Any], tmp_path: Path, kind: Kind) -> None:
    task, expected = places[kind]
    assert task.do(tmp_path / "z").done == 5
    assert files_of(tmp_path / "z") == expected
    stats = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "z").glob("**/*.*g*")}
    for check in ("hash", "mtime"):
        summary = task.do(tmp_path / "z", RESUME._replace(check=check))
        assert (summary.done, summary.skipped, summary.elsewhere) == (0, 5, 0)
        assert "0 of" in str(summary) and ", 5 skipped" in str(summary)
        assert (summary.bytes_in, summary.bytes_out, summary.pixels) == (0, 0, 0)
        assert files_of(tmp_path / "z") == expected
    assert stats == {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in stats}
    assert task.do(tmp_path / "z", OVERWRITE).done == 5
    assert files_of(tmp_path / "z") == expected


def edit(path: Path) -> None:
    """Another image of the same size in bytes and the same time of change."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    image = np.asarray(Image.open(path))[::-1]
    Image.fromarray(image).save(path, format="PNG", compress_level=0)
    assert bytes(data) != path.read_bytes()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_edit_is_seen_by_its_hash_or_its_time(own: Callable[[Kind], Task], tmp_path: Path) -> None:
    task, folder = own("streams"), tmp_path / "z"
    mtime = RESUME._replace(check="mtime")
    for name in SIZES:
        Image.open(task.src / name).save(task.src / name, format="PNG", compress_level=0)
    task.do(folder, compute=EXACT)
    edit(task.src / "b.png")
    assert made_again(folder, lambda: task.do(folder, mtime, EXACT)) == set()  # it was asked not to look
    assert made_again(folder, lambda: task.do(folder, compute=EXACT)) == {"b.png.lc"}
    os.utime(task.src / "sub/d.png", ns=(1, 1))
    assert made_again(folder, lambda: task.do(folder, compute=EXACT)) == set()  # touched, but the same
    assert made_again(folder, lambda: task.do(folder, mtime, EXACT)) == set()  # as the hash has shown
    os.utime(task.src / "sub/d.png", ns=(2, 2))
    assert made_again(folder, lambda: task.do(folder, mtime, EXACT)) == {"sub/d.png.lc"}
    with (task.src / "a.png").open("ab") as file:
        file.write(b"longer")
    os.utime(task.src / "a.png", ns=(3, 3))
    assert made_again(folder, lambda: task.do(folder, mtime, EXACT)) == {"a.png.lc"}
    assert made_again(folder, lambda: task.do(folder, compute=EXACT)) == set()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "emptied": lambda path: path.write_bytes(b""),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"?"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "latents"])
def test_an_output_that_is_not_whole_is_made_again(
    places: dict[Kind, Any], tmp_path: Path, kind: Kind, damage: str
) -> None:
    task, _ = places[kind]
    task.do(tmp_path / "z", compute=EXACT)
    expected = files_of(tmp_path / "z")
    (name,) = (name for name in expected if name.startswith("sub/d.png"))
    DAMAGE[damage](tmp_path / "z" / name)
    assert made_again(tmp_path / "z", lambda: task.do(tmp_path / "z", compute=EXACT)) == {name}
    assert files_of(tmp_path / "z") == expected


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_shard_that_is_not_whole_is_made_again_and_no_other(
    places: dict[Kind, Any], tmp_path: Path, damage: str
) -> None:
    task, expected = places["latents"]
    task.do(tmp_path / "z")
    entries = Latents(tmp_path / "z").entries
    shard = entries[0].shard
    unit = {entry.shard for entry in entries[:3]}
    DAMAGE[damage](tmp_path / "z" / shard)
    before = {path.name: path.stat().st_ino for path in stored_shards(tmp_path / "z")}
    assert task.do(tmp_path / "z").done == 3
    after = {path.name: path.stat().st_ino for path in stored_shards(tmp_path / "z")}
    assert {name for name in after if after[name] != before.get(name)} == unit
    assert files_of(tmp_path / "z") == expected


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_is_not_whole_is_written_again(places: dict[Kind, Any], tmp_path: Path, damage: str) -> None:
    task, expected = places["latents"]
    task.do(tmp_path / "z")
    DAMAGE[damage](tmp_path / "z" / INDEX)
    assert task.do(tmp_path / "z").skipped == 5
    assert files_of(tmp_path / "z") == expected


OTHER: dict[Kind, list[dict[str, Any]]] = {
    "streams": [
        {"sample": 6},
        {"rate": Rate(step=0.5)},
        {"rate": Rate(max_bytes=300)},
        {"prior": "factorized"},
        {"background": "#102030"},
        {"compute": dataclasses.replace(COMPUTE, dtype="bfloat16")},
    ],
    "latents": [
        {"store": "float32"},
        {"background": "#102030"},
        {"compute": dataclasses.replace(COMPUTE, dtype="bfloat16")},
    ],
    "images of streams": [{"image_format": "webp"}, {"compute": dataclasses.replace(COMPUTE, dtype="bfloat16")}],
    "images of latents": [
        {"image_format": "webp"},
        {"sample": 1},
        {"compute": dataclasses.replace(COMPUTE, dtype="bfloat16")},
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_settings_make_all_again_and_the_old_ones_too(
    places: dict[Kind, Any], tmp_path: Path, kind: Kind
) -> None:
    task, expected = places[kind]
    task.do(tmp_path / "z")
    for options in OTHER[kind]:
        assert task.do(tmp_path / "z", **options).done == 5
        fresh = tmp_path / f"fresh {OTHER[kind].index(options)}"
        task.do(fresh, **options)
        assert files_of(fresh).items() <= files_of(tmp_path / "z").items()
    assert task.do(tmp_path / "z").done == 5
    assert expected.items() <= files_of(tmp_path / "z").items()


def test_what_an_output_does_not_depend_on_makes_nothing_again(places: dict[Kind, Any], tmp_path: Path) -> None:
    for kind in KINDS:
        task, _ = places[kind]
        task.do(tmp_path / kind)
        others: list[dict[str, Any]] = [{"compute": ComputeOptions(batch_size=3, workers=2)}]
        others += [{"max_pixels": 10**6}] if kind != "images of latents" else []
        assert [task.do(tmp_path / kind, **options).skipped for options in others] == [5] * len(others)


@pytest.mark.parametrize("change", ["weights", "priors", "statistics"])
def test_another_model_makes_all_again(places: dict[Kind, Any], tmp_path: Path, codec: Codec, change: str) -> None:
    match change:
        case "weights":
            codec.state_dict()["backbone.linear.encoder.bias"][0] += 1
        case "priors":
            assert codec.priors is not None
            codec.priors = codec.priors._replace(context=None)
        case "statistics":
            assert codec.statistics is not None
            codec.statistics = codec.statistics.__class__(**{**vars(codec.statistics), "mean": (0.0,) * 4})
    codec.save(tmp_path / "other.safetensors")
    for kind in ("streams", "latents"):
        task, _ = places[kind]
        task.do(tmp_path / kind)
        summary = task._replace(model=tmp_path / "other.safetensors").do(tmp_path / kind)
        depends = change == "weights" or change == {"streams": "priors", "latents": "statistics"}[kind]
        assert (summary.done, summary.skipped) == ((5, 0) if depends else (0, 5))
        if kind == "latents":
            assert Latents(tmp_path / kind).header.statistics == (codec.statistics if depends else None) or not depends


def test_images_of_one_batch_are_made_again_together(own: Callable[[Kind], Task], tmp_path: Path) -> None:
    task, folder = own("streams"), tmp_path / "z"
    task.do(folder)
    (folder / "b.png.lc").unlink()
    assert made_again(folder, lambda: task.do(folder)) == {"a.png.lc", "b.png.lc"}


# Sources that come and go.


def test_new_sources_are_made_and_the_others_kept(own: Callable[[Kind], Task], tmp_path: Path, draw: Draw) -> None:
    task, folder = own("streams"), tmp_path / "z"
    task.do(folder, compute=EXACT)
    draw(task.src / "sub" / "zz.png", 8, 8)
    assert made_again(folder, lambda: task.do(folder, compute=EXACT)) == {"sub/zz.png.lc"}
    draw(task.src / "aa.png", 8, 8)  # which moves all others to other units
    before = files_of(folder)
    again = made_again(folder, lambda: task.do(folder, compute=EXACT))
    assert "aa.png.lc" in again
    assert before.items() < files_of(folder).items()


@pytest.mark.parametrize("gone", ["a.png", "b.png", "sub/d.png", "sub/e.png"])
def test_latents_are_those_of_the_sources_that_are_there(
    own: Callable[[Kind], Task], tmp_path: Path, gone: str
) -> None:
    task = own("latents")
    task.do(tmp_path / "z")
    (task.src / gone).unlink()
    task.do(tmp_path / "z")
    task.do(tmp_path / "fresh")
    assert files_of(tmp_path / "z") == files_of(tmp_path / "fresh")
    assert task.do(tmp_path / "z").skipped == 4


def test_streams_of_sources_that_are_gone_stay(own: Callable[[Kind], Task], tmp_path: Path) -> None:
    task = own("streams")
    task.do(tmp_path / "z")
    before = files_of(tmp_path / "z")
    (task.src / "a.png").unlink()
    (task.src / "zbad.png").unlink()
    assert not task.do(tmp_path / "z").failures
    del before[FAILURES]
    assert files_of(tmp_path / "z") == before


def test_two_folders_of_sources_share_one_of_streams(own: Callable[[Kind], Task], tmp_path: Path, draw: Draw) -> None:
    task, folder = own("streams"), tmp_path / "z"
    for name in ("a.png", "q.png", "r.png"):
        draw(tmp_path / "other" / name, 8, 8, seed=9)
    task.do(folder, compute=EXACT)
    one = files_of(folder)
    other = task._replace(src=tmp_path / "other")
    other.do(folder, compute=EXACT)
    two = files_of(folder)
    assert {name for name in one if one[name] != two.get(name)} == {"a.png.lc", FAILURES}  # of one name: the last
    assert two.keys() == one.keys() - {FAILURES} | {"q.png.lc", "r.png.lc"}
    assert made_again(folder, lambda: task.do(folder, compute=EXACT)) == {"a.png.lc"}
    assert one.items() < files_of(folder).items()


def test_commands_of_two_kinds_in_one_folder_leave_each_other_alone(places: dict[Kind, Any], tmp_path: Path) -> None:
    folder = tmp_path / "z"
    places["streams"][0].do(folder)
    decode = places["images of streams"][0]._replace(src=folder)
    assert (folder / FAILURES).exists() and decode.do(folder).done == 5
    for task in (places["streams"][0], decode, places["streams"][0]):
        assert task.do(folder).skipped == 5
    expected = places["streams"][1] | places["images of streams"][1]
    assert files_of(folder) == expected


def test_latents_of_other_sources_are_not_mixed_with_these(
    own: Callable[[Kind], Task], tmp_path: Path, draw: Draw
) -> None:
    task, folder = own("latents"), tmp_path / "z"
    draw(tmp_path / "other" / "q.png", 8, 8)
    task.do(folder)
    before = files_of(folder)
    other = task._replace(src=tmp_path / "other")
    for _ in range(2):
        with pytest.raises(UserError, match=r"holds latents of other images, such as a\.png; .*--overwrite"):
            other.do(folder)
        assert files_of(folder) == before
        (folder / INDEX).unlink(missing_ok=True)  # as a first run leaves it that was killed
        before.pop(INDEX, None)
    shutil.copy(task.src / "a.png", tmp_path / "other")
    other.do(folder)
    assert [entry.path for entry in Latents(folder).entries] == ["a.png", "q.png"]


@pytest.mark.parametrize("kind", ["streams", "latents"])
def test_a_unit_of_bad_images_alone_is_no_obstacle(own: Callable[[Kind], Task], tmp_path: Path, kind: Kind) -> None:
    task, folder = own(kind), tmp_path / "z"
    task.do(folder)
    good = {name: (task.src / name).read_bytes() for name in ("a.png", "b.png", "c.jpg")}
    for name in good:
        (task.src / name).write_text("no image any more")
    summary = task.do(folder)
    assert summary.failures.keys() == {*good, "zbad.png"}
    failures = [json.loads(line) for line in (folder / FAILURES).read_text().splitlines()]
    assert {f["path"]: f["reason"] for f in failures} == summary.failures
    if kind == "latents":
        assert [entry.path for entry in Latents(folder).entries] == ["sub/d.png", "sub/e.png"]
        assert {path.name for path in stored_shards(folder)} == {e.shard for e in Latents(folder).entries}
    for name, data in good.items():
        (task.src / name).write_bytes(data)
    (task.src / "zbad.png").unlink()
    assert not task.do(folder).failures and not (folder / FAILURES).exists()
    for path in task.src.rglob("*.*"):
        path.write_text("no image any more")
    assert len(task.do(folder).failures) == 5
    assert kind == "streams" or (Latents(folder).entries == [] and stored_shards(folder) == [])


@pytest.mark.parametrize("kind", ["streams", "images of latents"])
def test_names_of_one_place_are_refused_before_any_work(
    places: dict[Kind, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Draw, kind: Kind
) -> None:
    for name in ("a.png", "A.png"):
        draw(tmp_path / "src" / name, 8, 8)
    task = places[kind][0]._replace(src=tmp_path / "src")
    if kind != "streams":
        places["latents"][0]._replace(src=task.src).do(tmp_path / "latents")
        task = task._replace(src=tmp_path / "latents")
    monkeypatch.setattr(run_module, "folding", lambda folder: str.casefold)
    with pytest.raises(UserError, match=r"A\.png\.\w+ and a\.png\.\w+ are one name"):
        task.do(tmp_path / "z")
    assert files_of(tmp_path / "z") == {}


# Whatever stops the process.


@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_it_ends_with_the_same_bytes(places: dict[Kind, Any], tmp_path: Path, kind: Kind) -> None:
    task, expected = places[kind]
    for at in itertools.count(1):
        folder = tmp_path / f"{at}"
        code = finish(start(die, task, folder, at))
        for name, data in files_of(folder).items():
            assert expected.get(name, data) == data or name == INDEX
        summary = task.do(folder)
        assert (summary.found, len(summary.failures)) == (6 - kind.startswith("images"), int(kind in KINDS[:2]))
        assert files_of(folder) == expected
        assert list((folder / ".latent_codec" / "processes").iterdir()) == []
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert at > 20


def test_killed_anywhere_while_sources_changed_it_leaves_an_index_of_the_old_or_the_new(
    own: Callable[[Kind], Task], tmp_path: Path, draw: Draw
) -> None:
    task = own("latents")
    task.do(tmp_path / "old")
    draw(task.src / "b.png", 24, 16, seed=77)
    draw(task.src / "aa.png", 24, 16, seed=78)
    (task.src / "sub" / "e.png").unlink()
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    task.do(tmp_path / "new")
    expected, known = files_of(tmp_path / "new"), [posteriors(tmp_path / name) for name in ("old", "new")]
    for at in itertools.count(1):
        folder = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "old", folder)
        code = finish(start(die, task, folder, at))
        assert posteriors(folder) in known
        task.do(folder)
        assert files_of(folder) == expected
        if code == 0:
            break
    assert at > 20


@pytest.mark.parametrize("kind", ["streams", "latents"])
def test_interrupted_anywhere_it_leaves_no_half_files_and_goes_on(
    places: dict[Kind, Any], tmp_path: Path, kind: Kind
) -> None:
    task, expected = places[kind]
    for at in itertools.count(1):
        numbers, before = itertools.count(1), set(threading.enumerate())
        folder = tmp_path / f"{at}"

        def event(_: str) -> None:
            if next(numbers) == at:  # noqa: B023 (used in this round only)
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            watch(patch, event)
            try:
                task.do(folder)
            except KeyboardInterrupt as error:
                interrupted: BaseException | None = error  # and what it holds lives on
            else:
                interrupted = None
        assert temporary_files(folder) == []
        assert not set(threading.enumerate()) - before
        found = posteriors(folder)
        task.do(folder)
        assert found.items() <= posteriors(folder).items()
        assert files_of(folder) == expected
        if interrupted is None and next(numbers) <= at:
            break
    assert at > 20


@pytest.mark.parametrize("kind", ["streams", "latents"])
def test_a_second_process_takes_up_what_a_killed_one_leaves(
    places: dict[Kind, Any], tmp_path: Path, kind: Kind
) -> None:
    task, expected = places[kind]
    for at in range(1, 70, 12):
        folder = tmp_path / f"{at}"
        processes = [start(die, task, folder, at), start(work, task, folder)]
        codes = [finish(process) for process in processes]
        assert codes[0] in (0, -signal.SIGKILL) and codes[1] == 0
        found = {name: data for name, data in files_of(folder).items() if not name.endswith(".tmp")}
        assert found == expected
        assert task.do(folder).skipped == 5
        assert temporary_files(folder) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_as_many_processes_as_you_like_make_the_same_files(
    places: dict[Kind, Any], tmp_path: Path, kind: Kind, size: int
) -> None:
    task, expected = places[kind]
    ranks = [{"RANK": f"{rank}", "WORLD_SIZE": f"{size}"} for rank in range(size)]
    codes = [finish(p) for p in [start(work, task, tmp_path / "z", environment) for environment in ranks]]
    assert codes == [0] * size
    assert files_of(tmp_path / "z") == expected
    assert task.do(tmp_path / "z").skipped == 5
    codes = [finish(p) for p in [start(work, task, tmp_path / "z", e, OVERWRITE) for e in ranks]]
    assert codes == [0] * size
    assert files_of(tmp_path / "z") == expected


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_the_work_are_disjoint_and_together_the_whole(
    places: dict[Kind, Any], tmp_path: Path, kind: Kind
) -> None:
    task, expected = places[kind]
    found = done = 0
    for i in (2, 0, 1):
        summary = task.do(tmp_path / "z", RESUME._replace(share=Share(i, 3, alone=True)))
        found, done = found + summary.found, done + summary.done
        assert summary.skipped == summary.elsewhere == 0
    assert (found, done) == (6 - kind.startswith("images"), 5)
    assert files_of(tmp_path / "z") == expected


# What the disk may say.


@pytest.mark.parametrize("kind", ["streams", "latents"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("what", ["open", "write", "fsync", "rename", "journal"])
def test_trouble_with_the_disk_is_one_clear_error_and_costs_nothing_before_it(
    places: dict[Kind, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: Kind,
    number: int,
    what: str,
) -> None:
    task, expected = places[kind]
    for first in (1, 4, 7):
        numbers = itertools.count(1)
        folder = tmp_path / f"{first}"

        def event(name: str) -> None:
            if name == what and next(numbers) >= first:  # noqa: B023 (used in this round only)
                raise OSError(number, os.strerror(number))

        with pytest.MonkeyPatch.context() as patch:
            watch(patch, event)
            code = run(task, folder)
        told = capsys.readouterr().err.splitlines()
        if code == 2:
            assert len([line for line in told if line.startswith("latent-codec: ")]) == 1
            assert re.search(rf"cannot be written.*{os.strerror(number)}", told[-1])
        else:
            assert (code, number) == (1, errno.EACCES) or next(numbers) <= first
        assert temporary_files(folder) == []
        assert all(data == expected[name] for name, data in files_of(folder).items() if name not in (INDEX, FAILURES))
        task.do(folder)
        assert files_of(folder) == expected


def run(task: Task, folder: Path) -> int:
    """The exit code of the command."""
    options = {"streams": ["--sample", "5"], "latents": ["--format", "safetensors"]}[task.kind]
    compute = ["--device", "cpu", "--batch-size", f"{COMPUTE.batch_size}", "--workers", "1"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["encode", str(task.src), str(folder), "--model", str(task.model), *options, *compute])
    assert isinstance(stop.value.code, int)
    return stop.value.code
