"""Test that a full disk ends every command with 2 and one sentence that says so, whatever writes the file."""

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from latent_codec.interop.caches.options import CacheOptions
from latent_codec.interop.caches.read import read_cache
from latent_codec.interop.caches.registry import CacheName
from latent_codec.interop.caches.write import write_cache
from latent_codec.model.codec import Codec
from latent_codec.storage import files
from latent_codec.storage.files import DiskError
from latent_codec.storage.tensors import save_tensors
from tests.commands.test_destinations import EVALUATE, SAMPLE
from tests.commands.test_destinations import drawer as drawer  # the fixtures
from tests.conftest import files_of
from tests.support import kl
from tests.support.caches import EVERY, store
from tests.support.errors import refused
from tests.support.folder import temporary_files
from tests.test_cli import LATENTS, Do, Run, refuse
from tests.test_cli import do as do
from tests.test_cli import run as run

FULL = "No space left on device"


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let no file reach the disk but records in `.latent_codec` and drawn images."""
    fsync = files.fsync

    def fail(path: Path) -> None:
        if path.is_file() and not {".latent_codec", "drawn"} & set(path.parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync", fail)
        yield patch


BEFORE = {"decode streams": "encode photos streams", "decode latents": f"encode photos latents {LATENTS}"}
"""Commands that make what others read."""


@pytest.mark.parametrize(
    "line",
    [
        "encode photos out",
        "encode photos out --tar",
        f"encode photos out {LATENTS}",
        *(f"{command} out{flag}" for command in BEFORE for flag in ("", " --tar")),
        "export tiny out",
        f"{EVALUATE} --out out",
        f"{EVALUATE} --rd --steps 1 --out out",
        SAMPLE.replace("drawn", "out"),
        f"{SAMPLE} --grid out",
    ],
)
@pytest.mark.usefixtures("drawer")
def test_commands_end_with_one_sentence(line: str, do: Do, full: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fsync", lambda _: None)
        for begin, before in BEFORE.items():
            assert not line.startswith(begin) or do(before).code == 0
    result = do(line)
    assert result.code == 2 and result.err.startswith("latent-codec: ") and len(result.err.splitlines()) == 1
    assert FULL in result.err and "Errno" not in result.err and "out" in result.err
    assert temporary_files(Path()) == [] and not files_of(Path("out"))
    full.undo()
    assert do(line).code == 0


@pytest.mark.slow
def test_exports_and_imports_end_with_one_sentence(run: Run, tmp_path: Path, full: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fsync", lambda _: None)
        kl.codec().save(tmp_path / "model")
        assert run("export", tmp_path / "model", tmp_path / "vae", "--to", "diffusers").code == 0
    before = files_of(tmp_path)
    refuse(run("import", tmp_path / "vae", tmp_path / "out.safetensors"), FULL)
    refuse(run("export", tmp_path / "model", tmp_path / "vae", "--to", "diffusers"), FULL)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", EVERY)
def test_caches_end_in_a_sentence(
    name: CacheName, codec: Codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, out = store(tmp_path / "z", codec, ("c/a.jpg", "c/b.png")), tmp_path / "out"
    options = CacheOptions(**EVERY[name])
    write_cache(latents.folder, tmp_path / "cache", name, options)
    monkeypatch.setattr(files, "fsync", lambda path: _raise(path))
    with pytest.raises(DiskError, match=f"out.* cannot be written: {FULL}"):
        write_cache(latents.folder, out, name, options)
    with pytest.raises(DiskError, match=f"back.* cannot be written: {FULL}"):
        read_cache(tmp_path / "cache", tmp_path / "back", name, codec, options)
    assert not files_of(out) and not files_of(tmp_path / "back")


def _raise(path: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_the_number_of_a_failed_write_of_tensors_is_the_systems(tmp_path: Path) -> None:
    """The library that writes them leaves the number in words."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(10_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    refused("cannot be written: File too large", _as_disk_error, caught.value)


def _as_disk_error(error: OSError) -> None:
    with files.disk_errors(Path("a")):
        raise error
