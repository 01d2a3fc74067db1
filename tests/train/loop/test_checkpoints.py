"""Test that checkpoints are exact and verified, and that a usable one remains wherever a crash strikes."""

import itertools
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from latent_codec.model.codec import Codec
from latent_codec.model.config import GaussianConfig, LinearConfig
from latent_codec.storage.run_folder import newest_checkpoint
from tests.support.checkpoints import assert_same_tensors
from tests.support.errors import refused
from tests.support.folder import finish
from tests.support.folder import start as start_process
from tests.support.networks import config_of
from train.loop import checkpoints
from train.loop.checkpoints import Progress

FILES = ("codec.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")


class Training:
    """Train a small codec (one parameter is a scalar); weights, averages and moments change with every step."""

    def __init__(self, steps: int = 0, *, device: str = "cpu") -> None:
        config = config_of(LinearConfig(patch=2), z=2, likelihood=GaussianConfig(scale="learned", sigma=0.1))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.codec, self.ema = Codec(config).to(device), Codec(config).to(device)
        self.codec = self.codec.to(memory_format=torch.channels_last)
        self.ema.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.codec.parameters(), lr=0.01)
        self.progress = Progress()
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        sum((p**3).sum() + p.sum() for p in self.codec.parameters()).backward()  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad()
        for mine, theirs in zip(self.ema.parameters(), self.codec.parameters(), strict=True):
            mine.lerp_(theirs, 0.25)
        self.progress.step += 1
        self.progress.minutes += 0.1

    @property
    def modules(self) -> dict[str, Codec]:
        return {"codec": self.codec, "ema": self.ema}

    def save(self, folder: Path, keep: int = 2) -> Path:
        return checkpoints.save(folder, self.modules, self.optimizer, self.progress, keep=keep)

    def restore(self, folder: Path) -> "Training":
        self.progress = checkpoints.restore(folder, self.modules, self.optimizer)
        return self

    def tensors(self) -> dict[str, torch.Tensor]:
        moments = {
            f"optimizer/{name}/{key}": value
            for name, p in self.codec.named_parameters()
            for key, value in self.optimizer.state[p].items()
        }
        models = {"codec": self.codec.state_dict(), "ema": self.ema.state_dict()}
        return moments | {f"{m}/{name}": value for m, state in models.items() for name, value in state.items()}


def assert_equal(one: Training, other: Training) -> None:
    assert_same_tensors(one.tensors(), other.tensors())
    assert one.progress == other.progress


def saved(folder: Path, *steps: int) -> Path:
    """Fill a folder with checkpoints of these steps."""
    training = Training()
    for step in range(max(steps) + 1):
        if step in steps:
            training.save(folder, keep=99)
        training.step()
    return folder


def steps_in(folder: Path) -> list[int]:
    """Return the steps of all checkpoints; any other file is an error."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def flip(path: Path, byte: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= mask
    path.write_bytes(data)


def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    resumed, straight = Training().restore(tmp_path), Training(3)
    assert_equal(resumed, straight)
    for training in (resumed, straight):
        training.step()
    assert_equal(resumed, straight)


def test_all_of_progress_is_kept_and_moments_lie_in_memory_as_their_parameters_do(tmp_path: Path) -> None:
    training = Training(2)
    scaler = {"scale": 1 / 3, "growth_factor": 2.0, "_growth_tracker": 7}
    training.progress = Progress(step=2, skipped=5, skipped_in_a_row=3, minutes=0.1 + 0.2, scaler=scaler)
    training.save(tmp_path)
    restored = Training().restore(tmp_path)
    assert restored.progress == training.progress
    for p in restored.codec.parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert restored.optimizer.state[p][key].stride() == p.stride()
    assert not restored.codec.get_parameter("backbone.encoder.weight").is_contiguous()


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_moments_go_to_their_parameters_device_but_step_counts_stay(tmp_path: Path) -> None:
    """The meta device stands for a GPU, from which Adam would have to wait for each count."""
    training = Training(device="meta").restore(saved(tmp_path, 2))
    for p in training.codec.parameters():
        state = training.optimizer.state[p]
        assert (state["exp_avg"].device.type, state["step"].device.type) == ("meta", "cpu")
        assert state["step"].item() == 2.0


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    training = Training()
    for _ in range(4):
        training.step()
        training.save(tmp_path, keep=2)
    assert steps_in(tmp_path) == [3, 4]
    training.step()
    training.save(tmp_path, keep=1)
    assert steps_in(tmp_path) == [5]


def test_folders_that_only_look_like_checkpoints_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run" / "checkpoints", 1, 2)
    copies = ("step-00000002_keep", "step-00000009.bak", "step-9", "xstep-00000009", ".step-00000002.tmp.mine")
    for name in copies:
        shutil.copytree(folder / "step-00000002", folder / name)
    assert newest_checkpoint(folder.parent) == folder / "step-00000002"
    training = Training().restore(folder)
    training.step()
    training.save(folder, keep=1)
    assert {path.name for path in folder.iterdir()} == {*copies, "step-00000003"}
    (folder / "step-00000004").mkdir()
    (folder / "step-00000004" / "notes.txt").write_text("mine")
    for call in (lambda: Training().restore(folder), lambda: Training(4).save(folder)):
        refused("step-00000004: exists already and is not a checkpoint of latent-codec", call)
    assert (folder / "step-00000004" / "notes.txt").read_text() == "mine"


def test_no_flipped_byte_of_the_state_is_believed(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2)
    state = folder / "step-00000002" / "state.json"
    whole, training, older = state.read_bytes(), Training(), Training(1).progress
    for byte in range(0, len(whole), 3):
        flip(state, byte)
        assert training.restore(folder).progress == older, whole[byte : byte + 10]
        state.write_bytes(whole)
    assert training.restore(folder).progress == Training(2).progress


@pytest.mark.parametrize("name", FILES[:3])
def test_damaged_files_leave_the_older_checkpoint(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, 1, 2)
    file = folder / "step-00000002" / name
    whole = file.read_bytes()
    damages = [lambda b=b: flip(file, b, 0x80) for b in range(0, len(whole), len(whole) // 12)]
    damages += [lambda: file.write_bytes(whole[:-1]), lambda: file.write_bytes(whole + b"\0"), file.unlink]
    for damage in damages:
        damage()
        caplog.clear()
        assert_equal(Training().restore(folder), Training(1))
        assert caplog.records[0].levelno == logging.WARNING
        assert "passing over damaged checkpoint" in caplog.text and "step-00000002" in caplog.text
        file.write_bytes(whole)
    assert_equal(Training().restore(folder), Training(2))


def test_if_all_are_damaged_the_run_does_not_silently_start_again(tmp_path: Path) -> None:
    folder = saved(tmp_path, 1, 2)
    for step in (1, 2):
        flip(folder / f"step-{step:08d}" / "codec.safetensors", -1)
    refused("all 2 checkpoints are damaged", Training().restore, folder)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("damaged", [2, 4])
def test_a_damaged_checkpoint_of_that_step_or_later_makes_room_for_one(tmp_path: Path, keep: int, damaged: int) -> None:
    folder = saved(tmp_path, 1, damaged)
    flip(folder / f"step-{damaged:08d}" / "codec.safetensors", -1)
    training = Training().restore(folder)
    training.step()
    training.save(folder, keep=keep)
    assert steps_in(folder) == [1, 2][-keep:]
    assert_equal(Training().restore(folder), Training(2))


def test_a_file_that_reads_back_differently_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, 1)

    def lie(path: Path) -> dict[str, torch.Tensor]:
        return {name: value + 1 for name, value in load_file(path).items()}

    monkeypatch.setattr(checkpoints, "load_file", lie)
    with pytest.raises(OSError, match="check the disk"):
        Training(2).save(folder)
    monkeypatch.undo()
    assert_equal(Training().restore(folder), Training(1))


def test_weights_that_are_not_finite_are_not_committed(tmp_path: Path) -> None:
    folder, training = saved(tmp_path, 1), Training(2)
    with torch.no_grad():
        training.codec.get_parameter("backbone.encoder.bias")[0] = torch.nan
    refused(r"backbone\.encoder\.bias", training.save, folder)
    assert_equal(Training().restore(folder), Training(1))


def _die_before(operation: int) -> None:
    """From now on, kill this process in place of its `operation`-th change to the file system."""
    calls = itertools.count(1)

    def deadly(real: Any) -> Any:
        def change(*args: Any, **options: Any) -> Any:
            if next(calls) == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return change

    for name in ("mkdir", "fsync", "replace", "rename", "unlink", "rmdir", "chmod"):
        setattr(os, name, deadly(getattr(os, name)))


def die_at_every_operation(base: Path) -> None:
    """Copy base/start to base/<n> and kill a save there before its n-th operation, until one is not killed."""
    training = Training(3)
    for operation in itertools.count(1):
        folder = base / str(operation)
        shutil.copytree(base / "start", folder)
        child = os.fork()
        if child == 0:
            _die_before(operation)
            training.save(folder)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            os._exit(status)


@pytest.mark.slow
def test_a_kill_anywhere_within_a_save_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    start = saved(tmp_path / "start", 1, 2, 3)
    flip(start / "step-00000003" / "codec.safetensors", -1)  # what is saved replaces a damaged checkpoint
    assert finish(start_process(die_at_every_operation, tmp_path)) == 0
    shutil.rmtree(start)
    folders = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    training, expected, found = Training(), {step: Training(step) for step in (2, 3)}, []
    for folder in folders:
        step = training.restore(folder).progress.step
        assert_equal(training, expected[step])
        found.append(step)
        expected[3].save(folder)  # the resumed run comes to the same step again
        assert steps_in(folder) == [2, 3]
        assert_equal(training.restore(folder), expected[3])
    assert len(found) > 20 and found == sorted(found) and set(found) == {2, 3}
