"""Test that a command run again makes the units that are not up to date, all of them, and nothing else."""

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

from latent_codec.errors import UserError
from latent_codec.folders.jobs import Resume
from latent_codec.folders.resume.ledger import FAILURES
from latent_codec.folders.summary import Summary
from latent_codec.inference.options import ComputeOptions
from latent_codec.latents.dataset import Latents
from latent_codec.latents.format import INDEX, stored_shards
from latent_codec.model.codec import Codec
from tests.conftest import Draw, files_of
from tests.folders.conftest import Copy, Place, Places
from tests.support.errors import refused
from tests.support.folder import (
    BY_TIME,
    COMPUTE,
    KINDS,
    OVERWRITE,
    RESUME,
    WRITERS,
    Kind,
    Task,
    die,
    finish,
    ignore_case,
    posteriors,
    start,
    temporary_files,
    watch,
    work,
)

ENCODED: tuple[Kind, ...] = ("streams", "latents")
FIRST_UNIT = {"a.png.lc", "b.png.lc", "c.jpg.lc"}
SECOND_UNIT = {"sub/d.png.lc", "sub/é.png.lc"}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what changes if a file is written anew, by its name."""
    return {name: ((stat := (folder / name).stat()).st_ino, stat.st_mtime_ns) for name in files_of(folder)}


def made_again(task: Task, folder: Path, resume: Resume = RESUME) -> set[str]:
    """Return the names of the files that a second run has written; each is of one image."""
    before, done = stamps(folder), task.do(folder, resume).done
    found = dict(stamps(folder).items() - before.items()).keys() - {FAILURES}
    assert done == len(found)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_command_again_makes_nothing(made: Copy, kind: Kind) -> None:
    task, folder, expected = made(kind)
    before = stamps(folder)
    for resume in (RESUME, BY_TIME):
        summary = task.do(folder, resume)
        assert summary.skipped == 5
        assert summary.done == summary.elsewhere == summary.bytes_in == summary.bytes_out == summary.pixels == 0
    assert task.do(folder, compute=ComputeOptions(batch_size=3, workers=2)).skipped == 5
    if kind == "images of streams":
        assert task.do(folder, max_pixels=10**6).skipped == 5
    assert dict(stamps(folder).items() - before.items()).keys() <= {FAILURES, INDEX}
    assert task.do(folder, OVERWRITE).done == 5 and files_of(folder) == expected


def edit(path: Path) -> None:
    """Replace an image by another of the same size in bytes and the same time of change."""
    stat, data = path.stat(), path.read_bytes()
    Image.fromarray(np.asarray(Image.open(path))[::-1]).save(path, format="PNG", compress_level=0)
    assert data != path.read_bytes() and stat.st_size == path.stat().st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_an_edit_is_seen_by_its_hash_or_its_time(own: Copy) -> None:
    task, folder, _ = own("streams")
    for name in ("a.png", "b.png", "sub/d.png"):
        Image.open(task.src / name).save(task.src / name, format="PNG", compress_level=0)
    task.do(folder)
    edit(task.src / "b.png")
    assert made_again(task, folder, BY_TIME) == set()  # it was asked not to look
    assert made_again(task, folder) == FIRST_UNIT
    os.utime(task.src / "sub/d.png", ns=(1, 1))
    for resume in (RESUME, BY_TIME):
        assert made_again(task, folder, resume) == set()  # touched, but the same, as the hash has shown
    os.utime(task.src / "sub/d.png", ns=(2, 2))
    assert made_again(task, folder, BY_TIME) == SECOND_UNIT
    (task.src / "a.png").write_bytes((task.src / "a.png").read_bytes() + b"longer")
    os.utime(task.src / "a.png", ns=(3, 3))
    assert made_again(task, folder, BY_TIME) == FIRST_UNIT and made_again(task, folder) == set()


DAMAGE: tuple[Callable[[Path], object], ...] = (
    lambda path: path.unlink(),
    lambda path: path.write_bytes(path.read_bytes()[:-3]),
    lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"),
    lambda path: path.write_bytes(path.read_bytes() + b"?"),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_only_units_with_an_output_that_is_not_whole_are_made_again_and_so_is_the_index(made: Copy, kind: Kind) -> None:
    task, folder, expected = made(kind)
    outputs = [name for name in expected if name not in (FAILURES, INDEX)]  # shards, or files
    damaged = next((name for name in outputs if name.startswith("sub/d.png")), outputs[0])
    for damage in DAMAGE:
        before = stamps(folder)
        damage(folder / damaged)
        done = task.do(folder).done
        changed = dict(stamps(folder).items() - before.items()).keys() & set(outputs)
        assert done in (2, 3) and len(changed) == (2 if damaged.startswith("sub/") else 1) and damaged in changed
        assert files_of(folder) == expected
        if kind == "latents":
            damage(folder / INDEX)
            assert task.do(folder).skipped == 5 and files_of(folder) == expected


def test_a_unit_with_an_image_that_cannot_be_coded_is_made_to_the_same_bytes(places: Places, tmp_path: Path) -> None:
    task, folder = places["streams"].task, tmp_path / "z"
    first = task.do(folder, bpp=2.0)  # less than the header of the smallest image's file
    expected = files_of(folder)
    assert first.failures.keys() == {"sub/d.png", "zbad.png"}
    again = task.do(folder, bpp=2.0)
    assert (again.failures, again.done, again.skipped) == (first.failures, 1, 3)
    assert files_of(folder) == expected


OTHER: dict[Kind, list[dict[str, Any]]] = {
    "streams": [{"sample": 6}, {"step": 0.5}, {"prior": "factorized"}, {"background": "#102030"}],
    "latents": [{"store": "float32"}, {"background": "#102030"}, {"flips": True}],
    "images of streams": [{"image_format": "webp"}],
    "images of latents": [{"image_format": "webp"}, {"sample": 1}],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHER)
def test_other_settings_make_all_again_and_the_old_ones_too(made: Copy, tmp_path: Path, kind: Kind) -> None:
    task, folder, expected = made(kind)
    for i, options in enumerate([*OTHER[kind], {"compute": dataclasses.replace(COMPUTE, dtype="bfloat16")}]):
        assert task.do(folder, **options).done == 5
        task.do(tmp_path / f"{i}", **options)
        assert files_of(tmp_path / f"{i}").items() <= files_of(folder).items()
    assert task.do(folder).done == 5 and expected.items() <= files_of(folder).items()


@pytest.mark.parametrize("change", ["weights", "priors", "statistics"])
def test_another_model_makes_all_again(made: Copy, tmp_path: Path, codec: Codec, change: str) -> None:
    assert codec.priors is not None and codec.statistics is not None
    if change == "weights":
        codec.state_dict()["backbone.linear.encoder.bias"][0] += 1
    elif change == "priors":
        codec.priors = codec.priors._replace(context=None)
    else:
        codec.statistics = dataclasses.replace(codec.statistics, mean=(0.0,) * 4)
    codec.save(tmp_path / "other.safetensors")
    for kind in ENCODED:
        task, folder, _ = made(kind)
        summary = task._replace(model=tmp_path / "other.safetensors").do(folder)
        depends = change == "weights" or change == {"streams": "priors", "latents": "statistics"}[kind]
        assert (summary.done, summary.skipped) == ((5, 0) if depends else (0, 5))
        if kind == "latents" and depends:
            assert Latents(folder).header.statistics == codec.statistics


def test_new_sources_are_made_with_their_unit_and_all_other_streams_stay(own: Copy, draw: Draw) -> None:
    task, folder, before = own("streams")
    (task.src / "zbad.png").unlink()
    draw(task.src / "sub" / "zz.png", 8, 8)
    assert made_again(task, folder) == {"sub/zz.png.lc"} | SECOND_UNIT
    draw(task.src / "aa.png", 8, 8)  # which moves all others to other units
    assert "aa.png.lc" in made_again(task, folder)
    (task.src / "a.png").unlink()
    assert not task.do(folder).failures
    assert before.items() - {(FAILURES, before[FAILURES])} < files_of(folder).items()


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["a.png", "sub/é.png"])
@pytest.mark.parametrize("kind", ["latents", "tars of streams"])
def test_shards_are_those_of_sources_there_are(own: Copy, tmp_path: Path, draw: Draw, kind: Kind, gone: str) -> None:
    task, folder, _ = own(kind)
    stranger = folder / "streams-holiday.tar"
    stranger.write_text("a stranger's")
    (task.src / gone).unlink()
    for name in ("b.png", "sub/f.png"):
        draw(task.src / name, 8, 8)
    task.do(folder)
    assert stranger.read_text() == "a stranger's"
    stranger.unlink()
    task.do(tmp_path / "fresh")
    assert files_of(folder) == files_of(tmp_path / "fresh") and task.do(folder).skipped == 5


def test_two_folders_of_sources_share_one_of_streams(made: Copy, tmp_path: Path, draw: Draw) -> None:
    task, folder, one = made("streams")
    for name in ("a.png", "q.png", "r.png"):
        draw(tmp_path / "other" / name, 8, 8, seed=9)
    task._replace(src=tmp_path / "other").do(folder)
    two = files_of(folder)
    assert {name for name in one if one[name] != two.get(name)} == {"a.png.lc", FAILURES}  # of one name: the last
    assert two.keys() == one.keys() - {FAILURES} | {"q.png.lc", "r.png.lc"}
    assert made_again(task, folder) == FIRST_UNIT and one.items() < files_of(folder).items()


def test_commands_of_two_kinds_in_one_folder_leave_each_other_alone(places: Places, made: Copy) -> None:
    encode, folder, files = made("streams")
    decode = places["images of streams"].task._replace(src=folder)
    assert (folder / FAILURES).exists() and decode.do(folder).done == 5
    assert [task.do(folder).skipped for task in (encode, decode, encode)] == [5, 5, 5]
    assert files_of(folder) == files | places["images of streams"].files


def test_latents_of_other_sources_are_not_mixed_with_these(own: Copy, tmp_path: Path, draw: Draw) -> None:
    task, folder, before = own("latents")
    draw(tmp_path / "other" / "q.png", 8, 8)
    other = task._replace(src=tmp_path / "other")
    for _ in range(2):
        refused(r"holds latents of other images, such as a\.png; .*--overwrite", other.do, folder)
        assert files_of(folder) == before
        (folder / INDEX).unlink(missing_ok=True)  # as a first run leaves it that was killed
        before = {name: data for name, data in before.items() if name != INDEX}
    shutil.copy(task.src / "a.png", tmp_path / "other")
    other.do(folder)
    assert [entry.path for entry in Latents(folder).entries] == ["a.png", "q.png"]


@pytest.mark.parametrize("kind", ENCODED)
def test_a_unit_of_bad_images_alone_is_no_obstacle(own: Copy, kind: Kind) -> None:
    task, folder, _ = own(kind)
    good = {name: (task.src / name).read_bytes() for name in ("a.png", "b.png", "c.jpg")}
    for name in good:
        (task.src / name).write_text("no image any more")
    for _ in range(2):
        summary = task.do(folder)
        assert summary.failures.keys() == {*good, "zbad.png"} and summary.skipped == 2
        failures = [json.loads(line) for line in (folder / FAILURES).read_text().splitlines()]
        assert {f["path"]: f["reason"] for f in failures} == summary.failures
    if kind == "latents":
        entries = Latents(folder).entries  # what was good before stays
        assert [entry.path for entry in entries] == [*sorted(good), "sub/d.png", "sub/é.png"]
        assert {path.name for path in stored_shards(folder)} == {e.shard for e in Latents(folder).entries}
    for name, data in good.items():
        (task.src / name).write_bytes(data)
    (task.src / "zbad.png").unlink()
    assert not task.do(folder).failures and not (folder / FAILURES).exists()
    for path in task.src.rglob("*.*"):
        path.write_text("no image any more")
    assert len(task.do(folder).failures) == 5
    assert kind == "streams" or Latents(folder).entries == entries


def test_two_names_of_a_place_fail(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draw: Draw) -> None:
    for name in ("a.png", "A.png"):
        draw(tmp_path / "src" / name, 8, 8)
    ignore_case(monkeypatch)
    with pytest.raises(UserError, match=r"A\.png\.lc and a\.png\.lc are one name"):
        places["streams"].task._replace(src=tmp_path / "src").do(tmp_path / "z")
    assert files_of(tmp_path / "z") == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_it_ends_with_the_same_bytes(places: Places, tmp_path: Path, kind: Kind) -> None:
    task, _, expected = places[kind]
    step = {"streams": 9, "latents": 6, "tars of streams": 6}.get(kind, 17)  # all stages of each writer
    for round_, at in enumerate(itertools.count(1 + KINDS.index(kind), step)):
        folder = tmp_path / f"{at}"
        killed, beside = start(die, task, folder, at), round_ % 4 == 3 and start(work, task, folder)
        code = finish(killed)
        assert not beside or finish(beside) == 0
        for name, data in files_of(folder).items():
            assert expected.get(name, data) == data or name == INDEX
        summary = task.do(folder)
        assert summary.skipped == 5 if beside else summary.found - len(summary.failures) == 5
        assert files_of(folder) == expected and temporary_files(folder) == []
        assert list((folder / ".latent_codec" / "processes").iterdir()) == []
        if code == 0 and not beside:
            break
        assert code in (-signal.SIGKILL, 0)
    assert at > 20


@pytest.mark.slow
def test_killed_while_sources_changed_it_leaves_an_old_or_a_new_index(own: Copy, tmp_path: Path, draw: Draw) -> None:
    task, old, _ = own("latents")
    for name in ("b.png", "aa.png"):
        draw(task.src / name, 24, 16, seed=77)
    (task.src / "sub" / "é.png").unlink()
    shutil.copytree(old, tmp_path / "new")
    task.do(tmp_path / "new")
    expected, known = files_of(tmp_path / "new"), [posteriors(folder) for folder in (old, tmp_path / "new")]
    for at in itertools.count(3, 6):
        folder = tmp_path / f"{at}"
        shutil.copytree(old, folder)
        code = finish(start(die, task, folder, at))
        assert posteriors(folder) in known
        task.do(folder)
        assert files_of(folder) == expected
        if code == 0:
            break
    assert at > 20


def stop(place: Place, folder: Path, error: BaseException, numbers: range, what: str = "") -> tuple[int, object]:
    """Raise an error at events of these numbers, and require no half files, and that the same task makes the rest.

    Returns the number of events, and the summary of the task that was to be stopped, or what it raised.
    """
    count, threads = itertools.count(1), set(threading.enumerate())

    def event(name: str) -> None:
        if what in ("", name) and next(count) in numbers:
            raise error

    found: object
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, event)
        try:
            found = place.task.do(folder)
        except (KeyboardInterrupt, UserError) as raised:
            found = raised
    assert not set(threading.enumerate()) - threads and temporary_files(folder) == []
    made = {name: data for name, data in files_of(folder).items() if name not in (INDEX, FAILURES)}
    assert made.items() <= place.files.items()
    place.task.do(folder)
    assert files_of(folder) == place.files
    return next(count) - 1, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_interrupted_anywhere_it_leaves_no_half_files_and_goes_on(places: Places, tmp_path: Path, kind: Kind) -> None:
    for at in itertools.count(1 + WRITERS.index(kind), 5):
        number, found = stop(places[kind], tmp_path / f"{at}", KeyboardInterrupt(), range(at, at + 1))
        if isinstance(found, Summary) and number < at:
            break
    assert at > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("what", ["open", "write", "fsync", "rename", "journal"])
def test_trouble_with_the_disk_is_a_clear_error_alone(places: Places, tmp_path: Path, kind: Kind, what: str) -> None:
    for error, first in ((errno.ENOSPC, 5 if kind == "streams" else 2), (errno.EACCES, 1)):
        trouble = OSError(error, os.strerror(error))
        number, found = stop(places[kind], tmp_path / f"{error}", trouble, range(first, 999), what)
        if isinstance(found, Summary):
            assert (len(found.failures) > 1 and error == errno.EACCES) or number < first
        else:
            assert re.search(rf"cannot be written.*{os.strerror(error)}", str(found))


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRITERS)
def test_as_many_processes_as_you_like_make_the_same_files(places: Places, tmp_path: Path, kind: Kind) -> None:
    task, _, expected = places[kind]
    size = 2 + WRITERS.index(kind) % 2
    ranks = [{"RANK": f"{rank}", "WORLD_SIZE": f"{size}"} for rank in range(size)]
    for resume in (RESUME, OVERWRITE):
        processes = [start(work, task, tmp_path / "z", environment, resume) for environment in ranks]
        assert [finish(process) for process in processes] == [0] * size and files_of(tmp_path / "z") == expected
    assert task.do(tmp_path / "z").skipped == 5
