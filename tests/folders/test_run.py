"""Test what all commands over folders have in common: what they refuse, what fails alone, what waits in memory."""

import dataclasses
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.folders.batching import batches
from latent_codec.folders.resume.ledger import FAILURES
from latent_codec.folders.resume.units import units
from latent_codec.images.sources import find_images
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.latents.format import INDEX
from latent_codec.model.codec import Codec
from latent_codec.storage.files import DiskError
from tests.conftest import Draw, files_of
from tests.folders.conftest import SIZES, Copy, Places
from tests.support.errors import refused
from tests.support.folder import FILES, KINDS, OVERWRITE, SOURCES, WRITERS, Kind, Task, make, temporary_files


@given(st.lists(st.integers(0, 6)), st.integers(1, 4))
def test_batches_are_of_one_shape_hold_each_item_once_in_order_and_let_few_wait(shapes: list[int], size: int) -> None:
    items, taken, found = list(enumerate(shapes)), [], []
    read = (taken.append(item) or item for item in items)
    for batch in batches(read, size, lambda item: item[1], alone=lambda item: item[1] == 6):
        assert len(taken) - sum(map(len, found)) <= 4 * size
        found.append(batch)
    assert sorted(item for batch in found for item in batch) == items
    assert all(len({shape for _, shape in batch}) == 1 and len(batch) <= size for batch in found)
    assert all(len(batch) == 1 for batch in found if batch[0][1] == 6)
    for shape in set(shapes):
        own = [item for batch in found for item in batch if item[1] == shape]
        assert own == sorted(own)


@pytest.mark.slow
def test_images_of_a_unit_do_not_stay_in_memory_until_it_is_whole(
    codec: Codec, tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def watch(method: Callable[..., Any], tensors: Callable[[Any, Any], Iterable[torch.Tensor]]) -> None:
        def watched(self: Runner, images: Any, labels: Any = None) -> Any:
            nonlocal most
            result = method(self, images, labels)
            alive.update(tensors(images, result))
            most = max(most, len(alive))
            return result

        monkeypatch.setattr(Runner, method.__name__, watched)

    watch(Runner.encode, lambda images, _: images)
    watch(Runner.decode_uint8, lambda _, result: [result])
    for i in range(20):
        draw(tmp_path / "photos" / f"{i:02d}.png", 24, 16, seed=i)
    assert len(units(find_images(tmp_path / "photos"))) == 1
    for kind in KINDS:
        where = tmp_path / SOURCES.get(kind, "photos")
        assert make(kind, codec, where, tmp_path / kind, ComputeOptions(batch_size=1, workers=1)).done == 20
    assert 1 <= most <= 8


@pytest.mark.parametrize("kind", FILES)
def test_files_that_others_made_are_refused_unless_to_be_overwritten(made: Copy, kind: Kind) -> None:
    task, folder, expected = made(kind)
    own = folder / ".latent_codec"
    for forget in ((own / "names.jsonl").unlink, lambda: shutil.rmtree(own)):
        forget()
        before = sorted(folder.rglob("*.png*"))
        refused(r"exists already: .*png.* and [45] more.*--overwrite", task.do, folder)
        assert files_of(folder) == expected and sorted(folder.rglob("*.png*")) == before
    assert not own.exists()
    assert task.do(folder, OVERWRITE).done == 5 and files_of(folder) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_cannot_be_used_are_refused(places: Places, tmp_path: Path, codec: Codec, kind: Kind) -> None:
    task = places[kind].task
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        refused("cannot be written into as a folder", task.do, folder)
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / FAILURES).write_text("mine")
    refused(r"exists already: .*failures\.jsonl; ", task.do, tmp_path / "z")
    assert list((tmp_path / "z").iterdir()) == [tmp_path / "z" / FAILURES]
    two = Codec(dataclasses.replace(codec.config, image_channels=2))
    refused("images of 2 channels", make, kind, two, task.src, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", FILES)
def test_an_output_that_cannot_be_written_fails_alone(made: Copy, kind: Kind) -> None:
    task, folder, expected = made(kind)
    name = min(expected)
    (folder / name).unlink()
    (folder / name).mkdir()  # a folder where a file should go
    (failed,) = task.do(folder, OVERWRITE).failures.keys() - {"zbad.png"}
    assert failed.startswith("a.png")
    found = files_of(folder)
    assert found.keys() == expected.keys() - {name} | {FAILURES}
    assert all(data == expected[other] for other, data in found.items() if other != FAILURES)
    assert temporary_files(folder) == []


@pytest.mark.parametrize("kind", ["streams", "images of latents"])
def test_a_name_too_long_for_its_new_suffix_fails_alone(codec: Codec, tmp_path: Path, draw: Draw, kind: Kind) -> None:
    long = "x" * 251 + ".png"
    for name in (long, "a.png"):
        draw(tmp_path / "src" / name, 8, 8)
    if kind != "streams":
        assert not make("latents", codec, tmp_path / "src", tmp_path / "latents").failures
    summary = make(kind, codec, tmp_path / ("src" if kind == "streams" else "latents"), tmp_path / "z")
    assert summary.failures.keys() == {long} and summary.done == 1
    assert temporary_files(tmp_path / "z") == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_summary_counts_the_real_bytes_and_pixels(places: Places, tmp_path: Path, kind: Kind) -> None:
    summary = places[kind].task.do(tmp_path / "z")
    own = {kind: [d for name, d in p.files.items() if name not in (INDEX, FAILURES)] for kind, p in places.items()}
    size = {kind: sum(map(len, data)) for kind, data in own.items()}
    photos = sum((places["streams"].task.src / name).stat().st_size for name in SIZES)
    positions = sum(-(-width // 8) * -(-height // 8) for width, height in SIZES.values())
    sources = dict.fromkeys(("images of streams", "tars of images"), size["streams"])
    sources["images of latents"] = 2 * 4 * 4 * positions  # two tensors, bytes, channels
    assert (summary.bytes_in, summary.bytes_out) == (sources.get(kind, photos), size[kind])
    pixels = sum(width * height for width, height in SIZES.values())
    assert (f"{8 * size[kind] / pixels:.3f} bits per pixel" in str(summary)) == (kind in ("streams", "tars of streams"))


# Real disks that are full or read-only. Mounting them takes rights that not everyone has.


def mount(*args: str) -> bool:
    return subprocess.run(["mount", *args], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 80 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if not shutil.which("mount") or not mount("-t", "tmpfs", "-o", "size=80k", "tmpfs", str(path)):
        pytest.skip("cannot mount a file system here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture
def task(request: pytest.FixtureRequest, tmp_path: Path, model_file: Path, draw: Draw) -> Task:
    for i in range(40):
        draw(tmp_path / "photos" / f"{i:02d}.png", 96, 80, seed=i)
    return Task(request.param, model_file, tmp_path / "photos")


@pytest.mark.slow
@pytest.mark.parametrize("task", WRITERS, indirect=True)
def test_a_full_disk_is_one_error_and_with_room_the_command_goes_on(task: Task, disk: Path, tmp_path: Path) -> None:
    task.do(tmp_path / "expected")
    expected = files_of(tmp_path / "expected")
    with pytest.raises(DiskError, match="cannot be written: No space left on device"):
        task.do(disk)
    found = {name: data for name, data in files_of(disk).items() if name not in (INDEX, FAILURES)}
    assert found and found.items() < expected.items()
    assert temporary_files(disk) == [] and mount("-o", "remount,size=8m", str(disk))
    summary = task.do(disk)
    assert summary.skipped and summary.done
    assert files_of(disk) == expected


@pytest.mark.slow
@pytest.mark.parametrize("task", WRITERS[:2], indirect=True)
def test_a_read_only_disk_is_one_clear_error(task: Task, disk: Path) -> None:
    assert mount("-o", "remount,size=8m", str(disk))
    task.do(disk)
    (disk / ("00.png.lc" if task.kind == "streams" else INDEX)).unlink()
    before = files_of(disk)
    assert mount("-o", "remount,ro", str(disk))
    refused(r"cannot be written into .*Read-only file system", task.do, disk)
    assert files_of(disk) == before and mount("-o", "remount,rw", str(disk))
    assert task.do(disk).found == 40
