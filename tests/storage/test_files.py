"""Check that writing leaves the old file or the whole new one, with the user's permissions, whatever happens."""

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from latent_codec.bitstream import container
from latent_codec.errors import UserError
from latent_codec.images.read import read_image
from latent_codec.images.tar_files import list_members
from latent_codec.info import describe
from latent_codec.interop.autoencoder_kl.importing import import_model
from latent_codec.interop.caches import numpy_files
from latent_codec.latents.shard_reader import ShardReader
from latent_codec.model.codec import Codec
from latent_codec.storage import files
from latent_codec.storage.tensors import save_tensors
from tests.conftest import files_of
from tests.support.errors import refused


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask_027")
def test_the_users_umask_is_respected_even_if_a_writer_replaces_the_file_by_its_own(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "new")
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
    with files.atomic_path(tmp_path / "a") as temporary:
        private = tmp_path / "private"
        private.write_text("new")
        private.chmod(0o600)
        private.replace(temporary)
    assert {mode(path) for path in tmp_path.iterdir()} == {0o640}
    with files.atomic_folder(tmp_path / "folder"):
        pass
    assert mode(tmp_path / "folder") == 0o750


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_content_or_none(tmp_path: Path, error: type[BaseException]) -> None:
    for before in ({}, {"a.txt": b"old"}, {"a.txt": b"old", "folder/a.txt": b"old"}):
        for name, content in before.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        with pytest.raises(error), files.atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half of the ne")
            raise error
        with pytest.raises(error), files.atomic_folder(tmp_path / "folder") as temporary:
            files.write_text(temporary / "a.txt", "half of the new")
            raise error
        assert files_of(tmp_path) == before and len([*tmp_path.iterdir()]) == len(before)


def test_the_old_content_is_there_until_the_new_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.atomic_path(path) as temporary:
        assert temporary.parent == path.parent  # a rename between file systems would copy
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # the rename fails
        files.write_text(tmp_path / "folder", "text")
    assert {*tmp_path.iterdir()} == {path, tmp_path / "folder"}


def test_content_reaches_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    kinds = {True: "sync folder", False: "sync file"}
    monkeypatch.setattr(os, "fsync", lambda f: events.append(kinds[stat.S_ISDIR(os.fstat(f).st_mode)]) or fsync(f))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("rename") or replace(a, b))
    files.write_text(tmp_path / "a.txt", "new")
    assert events == ["sync file", "rename", "sync folder"]


def test_every_name_that_the_file_system_takes_can_be_written_in_a_new_folder(tmp_path: Path) -> None:
    names = ["a" * 255, "字" * 85, "é" * 127 + "x", "a" * 199 + "é" * 28, os.fsdecode(b"caf\xe9\xff" + b"\xff" * 250)]
    for name in names:
        assert len(os.fsencode(name)) == 255
        files.write_text(tmp_path / "a" / "b" / name, "ü")
        assert (tmp_path / "a" / "b" / name).read_bytes() == "ü".encode()
    assert {f.name for f in (tmp_path / "a" / "b").iterdir()} == set(names)


def test_make_folder_makes_parents_or_says_why_it_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        files.make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("content")
    for name in ("file", "file/below"):
        refused(r"cannot be written into as a folder \(.+\); give another", files.make_folder, tmp_path / name)
    assert (tmp_path / "file").read_text() == "content"
    monkeypatch.setattr(tempfile, "TemporaryFile", mock.Mock(side_effect=OSError(30, "Read-only file system")))
    refused("Read-only file system", files.make_folder, tmp_path)


def test_a_folder_appears_whole_and_replaces_the_old_one_which_a_failing_last_rename_restores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename = tmp_path / "new" / "folder", Path.replace

    def put(text: str) -> None:
        with files.atomic_folder(path) as temporary:
            for name in ("a.txt", "b.txt"):
                files.write_text(temporary / name, text)
            assert not path.exists() or (path / "a.txt").read_text() == "old"

    def failing(self: Path, target: Path) -> Path:
        if target == path and (self / "a.txt").read_text() == "new":
            raise OSError("no")
        return rename(self, target)

    put("old")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(Path, "replace", failing)
        put("new")
    assert files_of(path.parent) == {"folder/a.txt": b"old", "folder/b.txt": b"old"}
    put("new")
    assert files_of(path.parent) == {"folder/a.txt": b"new", "folder/b.txt": b"new"}
    assert [f.name for f in path.parent.iterdir()] == ["folder"]


def test_a_librarys_own_files_lie_in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt), files.temporary_folder(tmp_path / "sub" / "a.safetensors") as folder:
        (folder / ".tmpAbCdEf").write_text("half")
        assert files.temporary_of(folder.name) == files.process_name() and folder.parent == tmp_path / "sub"
        raise KeyboardInterrupt
    assert list((tmp_path / "sub").iterdir()) == []
    seen: list[list[Path]] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: seen.append(list((tmp_path / "sub").iterdir())) or fsync(f))
    save_tensors(tmp_path / "sub" / "a.safetensors", {"x": torch.zeros(2)}, {})
    assert [files.temporary_of(path.name) for path in seen[0]] == [files.process_name()]
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a.safetensors"]


def test_temporary_files_are_known_by_their_process_and_a_fork_has_a_name_of_its_own(tmp_path: Path) -> None:
    for name in ("a", "a" * 255, "é" * 127, ".hidden", "a\nb", "x.tmp"):
        with files.atomic_path(tmp_path / name) as temporary:
            assert files.temporary_of(temporary.name) == files.process_name()
        assert files.temporary_of(name) is None
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, files.process_name().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 100) not in (b"", files.process_name().encode())
    assert files.process_name() == files.process_name()


READERS: dict[str, Callable[[Path], object]] = {
    "image": read_image,
    "tar": list_members,
    "stream": container.read,
    "model": Codec.load,
    "weights": lambda path: import_model(path, path.with_name("model.safetensors")),
    "shard": lambda path: ShardReader(path.parent).locate(path.name, "mean"),
    "npy": numpy_files.load_npy,
    "npz": numpy_files.load_npz,
    "description": lambda path: describe(str(path)),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("suffix", [".jpg", ".lc", ".tar", ".safetensors"])
def test_a_pipe_is_refused_and_never_waited_for(tmp_path: Path, kind: str, suffix: str) -> None:
    """Links that lead to one are refused as well; whatever opens a pipe waits for a writer, deaf to Ctrl-C."""
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / f"link{suffix}"
    path.symlink_to("pipe")
    with pytest.raises((UserError, OSError, ValueError)):
        READERS[kind](path)
