"""Test real disks that are full or read-only. Mounting them takes rights that not everyone has."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from latent_codec.errors import UserError
from latent_codec.folders.resume.ledger import FAILURES
from latent_codec.latents.format import INDEX
from latent_codec.storage.files import DiskError
from tests.conftest import Draw, files_of
from tests.support.folder import WRITERS, Task, temporary_files


def mount(*args: str) -> bool:
    return subprocess.run(["mount", *args], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 80 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mounted = mount("-t", "tmpfs", "-o", "size=80k", "tmpfs", str(path))
    except FileNotFoundError:
        mounted = False
    if not mounted:
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
def test_a_full_disk_is_one_clear_error_and_with_room_the_command_goes_on(
    task: Task, disk: Path, tmp_path: Path
) -> None:
    task.do(tmp_path / "expected")
    expected = files_of(tmp_path / "expected")
    with pytest.raises(DiskError, match="cannot be written: No space left on device"):
        task.do(disk)
    found = {name: data for name, data in files_of(disk).items() if name not in (INDEX, FAILURES)}
    assert found and found.items() < expected.items()
    assert temporary_files(disk) == []
    assert mount("-o", "remount,size=8m", str(disk))
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
    with pytest.raises(UserError, match=r"cannot be written into .*Read-only file system"):
        task.do(disk)
    assert files_of(disk) == before
    assert mount("-o", "remount,rw", str(disk))
    assert task.do(disk).found == 40
