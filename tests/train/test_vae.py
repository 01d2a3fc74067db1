"""Test whole runs of train.vae: the same weights on any number of processes and through any interruption."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from latent_codec.export import export
from latent_codec.images.buckets import ResizeOptions
from latent_codec.images.read import ReadOptions
from latent_codec.images.sources import find_images
from latent_codec.model.codec import Codec
from tests.support import faults
from tests.support.checkpoints import assert_close_runs, assert_same_tensors, checkpoint, log_lines, tensors
from tests.support.data import ROOT
from tests.support.run import ONE_STEP, TINY, flags, run, run_ranks, start, start_ranks, write_images
from train import vae
from train.data.crops import ImageSet, centre_crops
from train.loop.accelerate_state import accelerate_as
from train.loop.interrupts import Interrupts

STEPS = 8
STREAMED = flags("--data-mode stream --workers 2")
FIELDS = flags(
    "loss nll kl beta kl_bpp psnr active_channels clamped nll_mode grad_norm learning_rate skipped images_per_s minutes"
)


@pytest.fixture(scope="module")
def argv(data: Path) -> list[str]:
    return [*TINY, "--data", str(data)]


@pytest.fixture(scope="module")
def two_ranks(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "run"
    assert "2 process(es) on cpu" in run_ranks(argv, out, 2, patch=partial(faults.search_on, 0))
    return out


@pytest.fixture
def finished(straight: Path, tmp_path: Path) -> Path:
    return shutil.copytree(straight, tmp_path / "run")


def assert_finished_like(out: Path, straight: Path, step: int = STEPS) -> None:
    """Compare the last checkpoints to the bit, and the lines of the logs."""
    assert_same_tensors(tensors(out, step), tensors(straight, step))
    for kind in ("train", "eval"):
        lines = [[line for line in log_lines(o, kind) if line["step"] <= step] for o in (out, straight)]
        for line in (line for lines_ in lines for line in lines_):
            for clock in ("images_per_s", "minutes"):
                line.pop(clock, None)
        assert lines[0] == lines[1]


def refused(argv: list[str], out: Path) -> str:
    """Return the sentence with which the program ends in this process."""
    command = mock.patch.object(sys, "argv", ["train.vae", *argv, "--out", str(out)])
    with command, accelerate_as("no", cpu=True), pytest.raises(SystemExit) as ended:
        vae.main()
    assert isinstance(ended.value.code, str) and len(ended.value.code.splitlines()) == 1
    return ended.value.code


def logged(out: Path, step: int) -> bool:
    return (out / "log.jsonl").exists() and any(line["step"] >= step for line in log_lines(out, "train"))


def state(out: Path, step: int) -> dict[str, Any]:
    return json.loads((checkpoint(out, step) / "state.json").read_text())


def test_a_run_logs_every_step_and_evaluation_and_lowers_the_loss(straight: Path) -> None:
    first = (straight.parent / "text").read_text().splitlines()[0]
    assert "6 images (memory); 1 process(es) on cpu, precision no" in first
    assert "4 crops of 32 per step = 1 x 1 x 4" in first and "from step 0 to 8" in first
    lines = log_lines(straight, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(list(line) == ["kind", "step", *FIELDS] for line in lines)
    assert all(math.isfinite(value) for line in lines for key, value in line.items() if key != "kind")
    last = lines[-1]
    assert last["loss"] == pytest.approx(last["nll"] + last["beta"] * last["kl"] + last["nll_mode"], rel=1e-4)
    assert last["skipped"] == 0 and last["clamped"] == 0 and 0 <= last["active_channels"] <= 4
    assert 5 < last["psnr"] < 60 and last["grad_norm"] > 0 and last["images_per_s"] > 0
    earlier, later = evaluations = log_lines(straight, "eval")
    assert [line["step"] for line in evaluations] == [4, 8] and later["nelbo"] < 0.99 * earlier["nelbo"]
    for line in evaluations:
        assert line["nelbo"] == pytest.approx(line["nll"] + line["kl"], rel=1e-4)
    for line in (last, later):
        assert line["kl_bpp"] == pytest.approx(line["kl"] / math.log(2) / 32**2, rel=1e-4)


@pytest.mark.slow
def test_a_run_sees_resized_images(argv: list[str], data: Path, tmp_path: Path) -> None:
    run([*argv, *flags("--resize 40 --steps 1 --eval-every 1")], tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["resize"] == 40
    shown = np.array(Image.open(tmp_path / "run" / "grids" / "step-00000001.png"))[:32, :32]
    sources, read = find_images(data), ReadOptions(resize=ResizeOptions(size=(40, 40)))
    images = ImageSet(sources=sources, labels=torch.zeros(len(sources)), channels=3, read=read)
    crops = centre_crops(images, 32).pixels.permute(0, 2, 3, 1).numpy()  # (n, h, w, c)
    assert any(np.array_equal(shown, crop) for crop in crops)


def test_the_grid_has_the_images_and_three_decodings_of_them(straight: Path, data: Path) -> None:
    picture = np.array(Image.open(straight / "grids" / "step-00000008.png"))
    assert picture.shape == (4 * 32, 2 * 32, 3)
    rows = picture.reshape(4, 32, 2, 32, 3).transpose(0, 2, 4, 1, 3)  # (row, image, c, h, w)
    sources = find_images(data)
    images = ImageSet(sources=sources, labels=torch.zeros(len(sources)), channels=3)
    crops = centre_crops(images, 32).pixels.numpy()
    held_out = [next(i for i, crop in enumerate(crops) if np.array_equal(crop, image)) for image in rows[0]]
    assert len(set(held_out)) == 2
    codec = Codec.load(checkpoint(straight, STEPS) / "ema.safetensors")
    with torch.no_grad():
        mode = codec.decode_uint8(codec.encode(torch.from_numpy(rows[0])).mode()).numpy()
    assert np.abs(rows[1].astype(int) - mode).max() <= 1
    assert not any(np.array_equal(rows[i], rows[j]) for i in range(4) for j in range(i))


def test_without_ema_decay_the_averaged_weights_are_the_raw_ones(argv: list[str], tmp_path: Path) -> None:
    """The time limit ends the run with a checkpoint, and it resumes without a limit of the gradient's norm, too."""
    argv = [*argv, *flags("--steps 2 --ema-decay 0 --max-grad-norm None")]
    stopped = "stopped by --max-minutes at step 1 of 2; a checkpoint is saved, the same command goes on from here"
    assert stopped in run([*argv, *ONE_STEP], tmp_path / "run")
    assert "from step 1 to 2" in run(argv, tmp_path / "run")
    found = tensors(tmp_path / "run", 2)
    codec, ema = ({k.partition("/")[2]: t for k, t in found.items() if k.startswith(n)} for n in ("codec/", "ema/"))
    assert_same_tensors(codec, ema)


@pytest.mark.slow
def test_the_closed_form_alone_is_a_run_that_can_be_exported(data: Path, tmp_path: Path) -> None:
    argv = [*flags("pca --crop 32 --eval-crop 32 --batch-size 64 --val-images 2"), "--data", str(data)]
    out = tmp_path / "run"
    run(argv, out)
    before = tensors(out, 0), log_lines(out, "eval")
    run_ranks(argv, tmp_path / "ranks", 2)
    run(argv, out)  # the same run, done again
    for again in (tmp_path / "ranks", out):
        assert_same_tensors(tensors(again, 0), before[0])
    assert log_lines(out, "eval") == before[1] and len(before[1]) == 1
    assert before[1][0]["psnr_mode"] > 25  # a random start is below 15 dB
    codec = export(out, tmp_path / "pca.safetensors", data=(data,), images=4, half=False)
    assert codec.statistics is not None and codec.statistics.images == 4


def test_broken_images_are_reported_and_left_out_of_training_and_validation(argv: list[str], tmp_path: Path) -> None:
    broken = write_images(tmp_path / "broken", count=4, seed=1)
    for file in broken.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    good = write_images(tmp_path / "good", count=4, seed=2)
    argv = [*argv[: argv.index("--data")], "--data", str(good), str(broken), *flags("--steps 2 --val-images 4")]
    assert run(argv, tmp_path / "run").count("skipping") == 4
    assert math.isfinite(log_lines(tmp_path / "run", "eval")[-1]["nll"])


@pytest.mark.slow
def test_two_processes_compute_what_one_does(straight: Path, two_ranks: Path) -> None:
    assert_close_runs(two_ranks, straight, 3, 2e-5)
    for kind in ("train", "eval"):
        for a, b in zip(log_lines(two_ranks, kind), log_lines(straight, kind), strict=True):
            for key in set(a) - {"kind", "images_per_s", "minutes"}:
                assert a[key] == pytest.approx(b[key], rel=1e-3), key


@pytest.mark.slow
def test_two_processes_of_torchrun_resume_a_run_of_micro_batches(
    argv: list[str], straight: Path, tmp_path: Path
) -> None:
    out, argv = tmp_path / "run", [*argv, *flags("--accumulation 2")]
    run([*argv, *ONE_STEP], out)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "train.vae"]
    result = subprocess.run(
        [*launch, *argv, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert all(text in result.stdout for text in ("2 process(es) on cpu", "per step = 2 x 2 x 1", "from step 1 to 8"))
    assert_close_runs(out, straight, 3, 2e-5)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_the_same(argv: list[str], straight: Path, tmp_path: Path) -> None:
    """Images are in memory and streamed by turns, which makes no difference either; workers end with their run."""
    out = tmp_path / "run"
    workers: list[psutil.Process] = []
    for turn, (saved, delay) in enumerate(((0, 0.1), (2, 0.0), (4, 0.05), (4, 0.3))):
        # It waits before the seventh step, so that it cannot end before it is killed.
        process = start([*argv, *STREAMED[: 4 * (turn % 2)]], out, patch=partial(faults.stall, 7))
        process.wait_for(lambda saved=saved: saved == 0 or checkpoint(out, saved).exists())
        time.sleep(delay)
        workers += psutil.Process(process.pid).children()
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert workers and not psutil.wait_procs(workers, timeout=30)[1]
    text = run([*argv, *STREAMED], out)
    assert "6 images (stream)" in text and re.search("from step [456] to 8", text)
    assert_finished_like(out, straight)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_program_and_workers_ends_the_run_after_its_step_with_a_checkpoint(
    argv: list[str], straight: Path, tmp_path: Path, number: int, code: int
) -> None:
    """Ctrl-C and the signals of many schedulers reach the whole process group."""
    out, argv = tmp_path / "run", [*argv, *STREAMED]
    process = start(argv, out, patch=partial(faults.stall, 5))
    process.wait_for(lambda: logged(out, 4))
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(number)
    time.sleep(0.1)
    process.signal(number)
    process.signal(number)  # a launcher passes on what its children got themselves
    assert process.wait() == code
    assert "interrupted at step 5 of 8; a checkpoint is saved, the same command goes on from here" in process.text
    assert "Traceback" not in process.text and "from step 5 to 8" in run(argv, out)
    assert_finished_like(out, straight)


def test_a_second_signal_kills_at_once(argv: list[str], tmp_path: Path) -> None:
    process = start(argv, tmp_path / "run", patch=partial(faults.hang, 3))
    process.wait_for(lambda: logged(tmp_path / "run", 2))
    process.signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.running
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


def test_handlers_are_restored_and_only_a_late_second_signal_kills() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interrupts(None) as interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
            assert interrupts.signal == number
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_with_one_checkpoint(argv: list[str], two_ranks: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start_ranks(argv, out, 2, patch=partial(faults.stall, 5, rank=1))
    processes[1].wait_for(lambda: logged(out, 4))
    processes[1].signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143]
    assert "interrupted at step 5 of 8" in processes[0].text and "from step 5 to 8" in run_ranks(argv, out, 2)
    assert_finished_like(out, two_ranks)


def skipped_steps(out: Path) -> list[int]:
    """Return the steps whose logged count of skipped ones is higher than before."""
    counts = [0] + [int(line["skipped"]) for line in log_lines(out, "train")]
    return [step for step in range(1, len(counts)) if counts[step] > counts[step - 1]]


def assert_only_skipped_changed_nothing(out: Path, steps: list[int]) -> None:
    assert skipped_steps(out) == steps
    for step in range(2, STEPS + 1):
        before, after = tensors(out, step - 1), tensors(out, step)
        same = {name: torch.equal(before[name], after[name]) for name in before}
        assert all(same.values()) if step in steps else not any(same.values()), step


@pytest.mark.slow
def test_steps_with_a_loss_that_is_not_finite_are_skipped_and_counted(argv: list[str], tmp_path: Path) -> None:
    """It makes no difference that a host hears of a GPU's bad steps later."""
    out, later = tmp_path / "run", tmp_path / "later"
    run(argv, out, patch=partial(faults.nan_loss, 3, 5, 6))
    assert_only_skipped_changed_nothing(out, [3, 5, 6])
    assert [line["step"] for line in log_lines(out, "train") if line["loss"] is None] == [3, 5, 6]
    assert (state(out, 6)["skipped"], state(out, 6)["skipped_in_a_row"]) == (3, 2)
    run([*argv, *flags("--save-every 4 --log-every 8")], later, patch=partial(faults.hear_rarely_nan_loss, 3, 5, 6))
    for step in (4, 8):
        assert_same_tensors(tensors(out, step), tensors(later, step))
    for found in (out, later):
        assert (state(found, 8)["skipped"], state(found, 8)["skipped_in_a_row"]) == (3, 0)


@pytest.mark.slow
def test_all_processes_skip_what_is_not_finite_on_one(argv: list[str], tmp_path: Path) -> None:
    patch = partial(faults.nan_loss, 5, 12, rank=1)  # a first and a second micro-batch
    run_ranks([*argv, *flags("--accumulation 2")], tmp_path / "run", 2, patch=patch)
    assert_only_skipped_changed_nothing(tmp_path / "run", [3, 6])


@pytest.mark.slow
def test_a_run_that_stays_not_finite_stops_and_its_checkpoint_stays(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [*argv, *flags("--max-skipped 3")]
    text = run(argv, out, code=1, patch=partial(faults.nan_loss, 3, 4, 5))
    assert "not finite 3 steps in a row (limit max_skipped 3) at step 5" in text
    assert "from step 4 to 8" in run(argv, out)
    processes = start_ranks(argv, tmp_path / "ranks", 2, patch=partial(faults.nan_loss, rank=1))
    assert [process.wait() for process in processes] == [1, 1]
    assert all("limit max_skipped 3" in process.text for process in processes)


@pytest.mark.slow
def test_a_scaled_run_lowers_its_scale_and_resumes_exactly(argv: list[str], straight: Path, tmp_path: Path) -> None:
    """The first scale of 2^16 is far too high here."""
    fp16: dict[str, Any] = {"env": {"ACCELERATE_MIXED_PRECISION": "fp16"}, "patch": faults.scaled_fp16}
    argv = [*argv, *flags("--steps 16")]
    out, stopped = tmp_path / "run", tmp_path / "stopped"
    run(argv, out, **fp16)
    skipped = skipped_steps(out)
    assert 5 <= len(skipped) <= 13
    for found in (state(out, step) for step in range(1, 17)):
        assert found["scaler"]["scale"] == 2.0 ** (16 - found["skipped"])
        assert found["scaler"]["_growth_tracker"] == found["step"] - max(s for s in skipped if s <= found["step"])
    for step in range(2, 17):
        before, after = tensors(out, step - 1), tensors(out, step)
        assert (step in skipped) == all(torch.equal(before[n], after[n]) for n in after if n in before)
    # The norm is that of the gradient, not of the scaled one: the first step taken shows the start's.
    taken = next(line["grad_norm"] for line in log_lines(out, "train") if line["step"] not in skipped)
    assert taken == pytest.approx(log_lines(straight, "train")[0]["grad_norm"], rel=0.5)
    for limit in (ONE_STEP, flags("--max-minutes 0.0002"), []):
        run([*argv, *limit], stopped, **fp16)
    assert_same_tensors(tensors(stopped, 16), tensors(out, 16))
    assert state(stopped, 16)["scaler"] == state(out, 16)["scaler"]


def test_bfloat16_trains_float32_weights_to_a_close_loss(argv: list[str], straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "precision bf16" in run(argv, out, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    found, exact = tensors(out, STEPS), tensors(straight, STEPS)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert not all(torch.equal(value, exact[name]) for name, value in found.items())
    for ours, theirs in zip(log_lines(out, "train"), log_lines(straight, "train"), strict=True):
        assert ours["skipped"] == 0 and ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)


def test_runs_of_other_settings_or_images_are_refused_by_name(argv: list[str], finished: Path, tmp_path: Path) -> None:
    config = (finished / "config.json").read_text()
    change = flags("--learning-rate 0.1 --latent-channels 5 --sigma 0.5 --beta 2 --seed 1 --no-flip --resize 40")
    names = "codec.latent_channels, codec.likelihood.sigma, flip, learning_rate, max_grad_norm, objective.beta, "
    names += "resize, seed"
    text = run([*argv, *change, "--max-grad-norm", "None"], finished, code=1)
    assert f"is a run with other settings ({names})" in text
    for other in ([str(write_images(tmp_path / "more", count=1))], flags("--val-images 3")):
        assert "was trained on other data" in refused([*argv, *other], finished)
    assert (finished / "config.json").read_text() == config
    for text in ("{", "[]", '{"config": {}}'):
        (finished / "config.json").write_text(text)
        assert "not a run of this version" in refused(argv, finished)


def test_a_finished_run_is_left_as_it_is_until_steps_or_intervals_change(argv: list[str], finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != "config.json"}
    assert "from step 8 to 8" in run([*argv, *flags("--save-every 2")], finished)
    assert {path: path.read_bytes() for path in before} == before
    text = run([*argv, *flags("--steps 10 --save-every 5 --log-every 3 --eval-every 7 --keep-checkpoints 1")], finished)
    assert "from step 8 to 10" in text
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["step-00000010"]
    assert [line["step"] for line in log_lines(finished, "train")] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert json.loads((finished / "config.json").read_text())["config"]["steps"] == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--accumulation 3", "cannot be split over 1 processes x 3 micro-batches; make it a multiple of 3"),
        ("--crop 36", "crop 36 is no multiple of 8, the model's factor"),
        ("--eval-crop 20", "eval_crop 20 is no multiple of 8, the model's factor"),
        ("--resize 24", "resize 24 is below 32, the larger of crop and eval_crop"),
        ("--log-every 0", "log_every is 0; it must be at least 1"),
        ("--steps -1", "steps is -1; it must be at least 0"),
        ("--max-grad-norm inf", "config.max_grad_norm: expected a finite number, found inf"),
        ("--image-channels 2", "image_channels is 2; set it to 1 (grey) or 3 (RGB)"),
        ("--val-images 0", "val_images is 0; it must be at least 1"),
        ("--val-images 8", "all 8 images are held out"),
        ("--lpips-weight 1 --lpips-backbone nowhere.safetensors", "nowhere.safetensors: no such file"),
        ("--log-with aim", "of these trackers none can be imported"),
        ("--data nowhere", "no such image, folder or tar file"),
    ],
)
def test_wrong_values_are_refused_in_a_sentence(argv: list[str], tmp_path: Path, change: str, message: str) -> None:
    if "aim" in change and importlib.util.find_spec("aim"):
        pytest.skip("aim is installed here")
    assert message in refused([*argv, *flags(change)], tmp_path / "run")
    assert "nowhere.safetensors" in change or not (tmp_path / "run").exists()


def test_float16_without_a_gpu_unknown_flags_and_a_file_as_folder_are_refused(argv: list[str], tmp_path: Path) -> None:
    assert "fp16 needs a GPU" in run(argv, tmp_path / "run", code=1, env={"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert "--sigmaa" in run([*argv, "--sigmaa", "1"], tmp_path / "flag", code=2)
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: cannot be written into as a folder" in refused(argv, tmp_path / "file")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "patch", "message"),
    [
        ("--batch-size 5", None, "batch_size 5 cannot be split over 2 processes x 1 micro-batches"),
        ("--seed 1", None, "is a run with other settings (seed)"),
        ("--val nowhere", partial(faults.search_on, 0), "nowhere"),
        ("--steps 9", partial(faults.no_checkpoints, rank=1), "found checkpoints of steps [8, 0]"),
    ],
)
def test_mistakes_end_all_processes(argv: list[str], finished: Path, change: str, patch: Any, message: str) -> None:
    processes = start_ranks([*argv, *flags(change)], finished, 2, patch=patch)
    assert [process.wait() for process in processes] == [1, 1]
    assert all(message in process.text and "Traceback" not in process.text for process in processes)


def test_a_tracker_gets_the_logged_values(argv: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator  # pyright: ignore[reportMissingImports]

    run([*argv, *flags("--log-with tensorboard")], tmp_path / "run")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/nll")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("eval/nelbo")] == [4, 8]


def test_a_run_may_start_from_a_model(argv: list[str], straight: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing, the last weights of a run are its first."""
    model = checkpoint(straight, STEPS) / "ema.safetensors"
    run([*argv, *flags("--steps 1 --learning-rate 1e-12"), "--start-from", str(model)], tmp_path / "run")
    started, wanted = Codec.load(checkpoint(tmp_path / "run", 1) / "codec.safetensors"), Codec.load(model)
    torch.testing.assert_close(dict(started.state_dict()), dict(wanted.state_dict()), rtol=0, atol=1e-9)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start_from"] == wanted.model_id
