"""Whole training runs: the same weights on any number of processes and through any interruption."""

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from latent_codec.export import export
from latent_codec.images.sources import find_images
from latent_codec.model.codec import Codec
from tests.support import faults as support_faults
from tests.support.run import (
    ROOT,
    TINY,
    assert_same_tensors,
    checkpoint,
    flags,
    log_lines,
    run,
    run_ranks,
    start,
    start_ranks,
    tensors,
    write_images,
)
from train.data.crops import ImageSet, centre_crops
from train.loop.interrupts import Interrupts

STEPS = 8
EVERY_STEP = flags("--save-every 1 --keep-checkpoints 99")
FIELDS = flags(
    "loss nll kl beta kl_bpp psnr active_channels clamped nll_mode grad_norm learning_rate skipped images_per_s minutes"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def argv(data: Path) -> list[str]:
    return [*TINY, "--data", str(data)]


class Straight:
    """One process from the first step to the last; every step's checkpoint is kept."""

    def __init__(self, out: Path, text: str) -> None:
        self.out, self.text = out, text


@pytest.fixture(scope="module")
def straight(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Straight:
    out = tmp_path_factory.mktemp("straight") / "run"
    return Straight(out, run([*argv, *EVERY_STEP], out))


def assert_finished_like(out: Path, straight: Straight, step: int = STEPS) -> None:
    """Equal tensors, to the bit, and each logged step once."""
    assert_same_tensors(tensors(out, step), tensors(straight.out, step))
    for kind in ("train", "eval"):
        lines = [[line for line in log_lines(o, kind) if line["step"] <= step] for o in (out, straight.out)]
        for line in (line for lines_ in lines for line in lines_):
            for clock in ("images_per_s", "minutes"):
                line.pop(clock, None)
        assert lines[0] == lines[1]


def refused(argv: list[str], out: Path, code: int = 1, **options: Any) -> str:
    """What the program says when it ends with this exit code, and without a traceback."""
    process = start(argv, out, **options)
    assert process.wait() == code, process.text
    assert "Traceback" not in process.text
    return process.text


def logged(out: Path, step: int) -> bool:
    return (out / "log.jsonl").exists() and any(line["step"] >= step for line in log_lines(out, "train"))


# --- what a run leaves behind


def test_a_run_says_what_it_runs_on(straight: Straight) -> None:
    first = straight.text.splitlines()[0]
    assert "6 images (memory); 1 process(es) on cpu, precision no" in first
    assert "4 crops of 32 per step = 1 x 1 x 4" in first and "from step 0 to 8" in first


def test_the_log_holds_every_step_and_evaluation_with_the_promised_fields(straight: Straight) -> None:
    lines = log_lines(straight.out, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(list(line) == ["kind", "step", *FIELDS] for line in lines)
    assert all(math.isfinite(value) for line in lines for key, value in line.items() if key != "kind")
    last = lines[-1]
    assert last["loss"] == pytest.approx(last["nll"] + last["beta"] * last["kl"] + last["nll_mode"], rel=1e-4)
    assert last["kl_bpp"] == pytest.approx(last["kl"] / math.log(2) / 32**2, rel=1e-4)
    assert last["skipped"] == 0 and last["clamped"] == 0 and 0 <= last["active_channels"] <= 4
    assert 5 < last["psnr"] < 60 and last["grad_norm"] > 0 and last["images_per_s"] > 0
    evaluations = log_lines(straight.out, "eval")
    assert [line["step"] for line in evaluations] == [4, 8]
    for line in evaluations:
        assert line["nelbo"] == pytest.approx(line["nll"] + line["kl"], rel=1e-4)
        assert line["kl_bpp"] == pytest.approx(line["kl"] / math.log(2) / 32**2, rel=1e-4)


def test_training_lowers_the_loss(straight: Straight) -> None:
    earlier, later = log_lines(straight.out, "eval")
    assert later["nelbo"] < 0.99 * earlier["nelbo"]


def test_the_grid_has_the_images_and_three_decodings_of_them(straight: Straight, data: Path) -> None:
    picture = np.array(Image.open(straight.out / "grids" / "step-00000008.png"))
    assert picture.shape == (4 * 32, 2 * 32, 3)
    rows = picture.reshape(4, 32, 2, 32, 3).transpose(0, 2, 4, 1, 3)  # (row, image, c, h, w)
    sources = {s.name: s for s in find_images(data)}
    crops = centre_crops(
        ImageSet(sources=list(sources.values()), labels=torch.zeros(len(sources)), channels=3), 32
    ).pixels.numpy()
    held_out = [next(i for i, crop in enumerate(crops) if np.array_equal(crop, image)) for image in rows[0]]
    assert len(set(held_out)) == 2
    codec = Codec.load(checkpoint(straight.out, STEPS) / "ema.safetensors")
    with torch.no_grad():
        mode = codec.decode_uint8(codec.encode(torch.from_numpy(rows[0])).mode()).numpy()
    assert np.abs(rows[1].astype(int) - mode).max() <= 1
    assert not any(np.array_equal(rows[i], rows[j]) for i in range(4) for j in range(i))


def test_without_ema_decay_the_averaged_weights_are_the_raw_ones(argv: list[str], tmp_path: Path) -> None:
    run([*argv, *flags("--steps 2 --ema-decay 0")], tmp_path / "run")
    found = tensors(tmp_path / "run", 2)
    for name, value in found.items():
        if name.startswith("codec/"):
            assert torch.equal(value, found[name.replace("codec/", "ema/")])


def test_the_closed_form_alone_is_a_run_that_can_be_exported(data: Path, tmp_path: Path) -> None:
    argv = [*flags("pca --crop 32 --eval-crop 32 --batch-size 64 --val-images 2"), "--data", str(data)]
    out = tmp_path / "run"
    run(argv, out)
    run_ranks(argv, tmp_path / "ranks", 2)
    assert_same_tensors(tensors(tmp_path / "ranks", 0), tensors(out, 0))
    codec = export(out, tmp_path / "pca.safetensors", data=(data,), images=4, half=False)
    assert codec.statistics is not None and codec.statistics.images == 4
    before = tensors(out, 0), log_lines(out, "eval")
    run(argv, out)  # done again, it is the same run
    assert_same_tensors(tensors(out, 0), before[0])
    assert log_lines(out, "eval") == before[1] and len(before[1]) == 1
    # 32 of 192 dimensions hold smooth images nearly whole; a random start is below 15 dB.
    assert before[1][0]["psnr_mode"] > 25


def test_streamed_images_train_the_same_weights(argv: list[str], straight: Straight, tmp_path: Path) -> None:
    text = run([*argv, *flags("--data-mode stream --workers 2")], tmp_path / "run")
    assert "6 images (stream)" in text
    assert_finished_like(tmp_path / "run", straight)


def test_broken_images_are_reported_and_left_out_of_training_and_validation(argv: list[str], tmp_path: Path) -> None:
    broken = write_images(tmp_path / "broken", count=4, seed=1)
    for file in broken.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    good = write_images(tmp_path / "good", count=4, seed=2)
    argv = [*argv[: argv.index("--data")], "--data", str(good), str(broken), *flags("--steps 2 --val-images 4")]
    text = run(argv, tmp_path / "run")
    assert text.count("skipping") == 4
    assert math.isfinite(log_lines(tmp_path / "run", "eval")[-1]["nll"])


# --- many processes (law 5)


@pytest.fixture(scope="module")
def two_ranks(argv: list[str], tmp_path_factory: pytest.TempPathFactory) -> Straight:
    out = tmp_path_factory.mktemp("ranks") / "run"
    return Straight(out, run_ranks([*argv, *EVERY_STEP], out, 2))


def assert_close_runs(one: Path, other: Path, steps: int) -> None:
    """In weights to a hundredth of one step of Adam, and in Adam's moments, for Adam itself forgives a wrong scale."""
    for step in range(1, steps + 1):
        a, b = tensors(one, step), tensors(other, step)
        assert a.keys() == b.keys()
        for name in a:
            scale = float(a[name].abs().max()) if name.startswith("optimizer/") else 1.0
            assert float((a[name] - b[name]).abs().max()) <= 2e-5 * scale, (step, name)


def test_two_processes_compute_what_one_does(straight: Straight, two_ranks: Straight) -> None:
    assert "2 process(es) on cpu" in two_ranks.text and "per step = 2 x 1 x 2" in two_ranks.text
    assert_close_runs(two_ranks.out, straight.out, 3)
    for kind, tolerance in (("train", 1e-3), ("eval", 1e-3)):
        ours, theirs = log_lines(two_ranks.out, kind), log_lines(straight.out, kind)
        for a, b in zip(ours, theirs, strict=True):
            for key in set(a) - {"kind", "images_per_s", "minutes"}:
                assert a[key] == pytest.approx(b[key], rel=tolerance), key


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_compute_what_whole_ones_do(
    argv: list[str], straight: Straight, tmp_path: Path, ranks: int
) -> None:
    out = tmp_path / "run"
    text = run_ranks([*argv, *EVERY_STEP, *flags("--accumulation 2")], out, ranks)
    assert f"{ranks} process(es) on cpu" in text and f"per step = {ranks} x 2 x {2 // ranks}" in text
    assert_close_runs(out, straight.out, 3)


def test_torchrun_starts_two_processes_that_go_on_with_a_run_of_one(
    argv: list[str], straight: Straight, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run([*argv, *flags("--max-minutes 0.00001")], out)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "train.vae"]
    result = subprocess.run(
        [*launch, *argv, *EVERY_STEP, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "2 process(es) on cpu" in result.stdout and "from step 1 to 8" in result.stdout
    assert_close_runs(out, straight.out, 3)


# --- interruptions (law 6)


@pytest.mark.parametrize("mode", ["memory", "stream"])
def test_a_run_killed_again_and_again_ends_with_the_same_weights(
    argv: list[str], straight: Straight, tmp_path: Path, mode: str
) -> None:
    out, argv = tmp_path / "run", [*argv, *flags(f"--data-mode {mode} --workers 1")]
    for saved, delay in ((0, 0.1), (2, 0.0), (4, 0.05), (4, 0.3)):
        # It waits before the seventh step, so that it cannot come to its end before it is killed.
        process = start(argv, out, patch=partial(support_faults.stall, 7))
        process.wait_for(lambda saved=saved: saved == 0 or checkpoint(out, saved).exists())
        time.sleep(delay)
        process.signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    text = run(argv, out)
    assert "from step 4 to 8" in text or "from step 6 to 8" in text
    assert_finished_like(out, straight)


@pytest.mark.parametrize("where", ["between files", "before rename", "before prune"])
def test_a_kill_in_the_middle_of_a_save_costs_no_more_than_that_save(
    argv: list[str], straight: Straight, tmp_path: Path, where: Any
) -> None:
    out = tmp_path / "run"
    process = start(argv, out, patch=partial(support_faults.die_in_save, 6, where))
    assert process.wait() == -signal.SIGKILL
    text = run(argv, out)
    assert f"from step {6 if where == 'before prune' else 4} to 8" in text
    assert_finished_like(out, straight)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000006", "step-00000008"]


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    argv: list[str], straight: Straight, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run(argv, out)
    file = checkpoint(out, STEPS) / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    text = run(argv, out)
    assert "passing over damaged checkpoint" in text and "step-00000008" in text and "from step 6 to 8" in text
    assert_finished_like(out, straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    argv: list[str], straight: Straight, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "run"
    process = start(argv, out, patch=partial(support_faults.stall, 5))
    process.wait_for(lambda: logged(out, 4))
    process.signal(number)
    process.signal(number)  # a launcher passes on what its children got themselves
    assert process.wait() == code
    assert "interrupted at step 5 of 8; a checkpoint is saved, the same command goes on from here" in process.text
    assert "Traceback" not in process.text
    assert "from step 5 to 8" in run(argv, out)
    assert_finished_like(out, straight)


def test_a_second_signal_kills_at_once(argv: list[str], tmp_path: Path) -> None:
    process = start(argv, tmp_path / "run", patch=partial(support_faults.hang, 3))
    process.wait_for(lambda: logged(tmp_path / "run", 2))
    process.signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.running
    process.signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


def test_handlers_are_put_back_and_only_a_late_second_signal_is_deadly() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interrupts(None) as interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            signal.raise_signal(number)
            assert interrupts.signal == number
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_data_workers_too_is_no_accident(
    argv: list[str], straight: Straight, tmp_path: Path, number: int
) -> None:
    """Ctrl-C reaches the whole process group, and so do the signals of many schedulers."""
    out, argv = tmp_path / "run", [*argv, *flags("--data-mode stream --workers 2")]
    process = start(argv, out, patch=partial(support_faults.stall, 2))
    process.wait_for(lambda: logged(out, 1))
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    for worker in workers:
        worker.send_signal(number)
    time.sleep(0.2)
    process.signal(number)
    assert process.wait() == 128 + number, process.text
    assert "interrupted at step 2 of 8" in process.text
    run(argv, out)
    assert_finished_like(out, straight)


def test_the_workers_end_with_a_run_that_is_killed(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start([*argv, *flags("--data-mode stream --workers 2")], out, patch=partial(support_faults.stall, 2))
    process.wait_for(lambda: logged(out, 1))
    workers = psutil.Process(process.pid).children()
    process.signal(signal.SIGKILL)
    process.wait()
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=30)[1]


def test_the_time_limit_ends_the_run_well_with_a_checkpoint(
    argv: list[str], straight: Straight, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for step in (1, 2):
        text = run([*argv, *flags("--max-minutes 0.00001")], out)
        assert "stopped by --max-minutes" in text and f"at step {step} of 8; a checkpoint is saved" in text
    run(argv, out)
    assert_finished_like(out, straight)


def test_a_signal_to_one_process_ends_all_with_one_checkpoint(
    argv: list[str], two_ranks: Straight, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    processes = start_ranks(argv, out, 2, patch=partial(support_faults.stall, 5, rank=1))
    processes[1].wait_for(lambda: logged(out, 4))
    processes[1].signal(signal.SIGTERM)
    assert [process.wait() for process in processes] == [143, 143]
    assert "interrupted at step 5 of 8" in processes[0].text
    assert "from step 5 to 8" in run_ranks(argv, out, 2)
    assert_finished_like(out, two_ranks)


# --- steps that are not finite


def skipped_steps(out: Path) -> list[int]:
    """Steps whose logged count of skipped ones is higher than before."""
    counts = [0] + [int(line["skipped"]) for line in log_lines(out, "train")]
    return [step for step in range(1, len(counts)) if counts[step] > counts[step - 1]]


def assert_skipped_changed_nothing(out: Path, steps: list[int]) -> None:
    """And all other steps did."""
    assert skipped_steps(out) == steps
    for step in range(2, STEPS + 1):
        before, after = tensors(out, step - 1), tensors(out, step)
        same = {name: torch.equal(before[name], after[name]) for name in before}
        assert all(same.values()) if step in steps else not any(same.values()), step


def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run([*argv, *EVERY_STEP], out, patch=partial(support_faults.nan_loss, 3, 5, 6))
    assert_skipped_changed_nothing(out, [3, 5, 6])
    lines = log_lines(out, "train")
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 5, 6]
    state = json.loads((checkpoint(out, 6) / "state.json").read_text())
    assert (state["skipped"], state["skipped_in_a_row"]) == (3, 2)
    assert json.loads((checkpoint(out, 8) / "state.json").read_text())["skipped_in_a_row"] == 0


def test_bad_steps_that_the_host_hears_of_later_are_skipped_alike(argv: list[str], tmp_path: Path) -> None:
    one, other = tmp_path / "at once", tmp_path / "later"
    argv = [*argv, *flags("--save-every 4 --log-every 8")]
    run(argv, one, patch=partial(support_faults.nan_loss, 3, 5, 6))
    run(argv, other, patch=partial(support_faults.hear_rarely_nan_loss, 3, 5, 6))
    for step in (4, 8):
        assert_same_tensors(tensors(one, step), tensors(other, step))
    found = [json.loads((checkpoint(out, 8) / "state.json").read_text()) for out in (one, other)]
    assert [(state["skipped"], state["skipped_in_a_row"]) for state in found] == [(3, 0)] * 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_all_processes_skip_what_is_not_finite_on_one(argv: list[str], tmp_path: Path, accumulation: int) -> None:
    out = tmp_path / "run"
    calls = (3, 6) if accumulation == 1 else (5, 12)  # a first and a second micro-batch
    patch = partial(support_faults.nan_loss, *calls, rank=1)
    run_ranks([*argv, *EVERY_STEP, *flags(f"--accumulation {accumulation}")], out, 2, patch=patch)
    assert_skipped_changed_nothing(out, [3, 6])


def test_a_run_that_stays_not_finite_stops_and_its_checkpoint_stays(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = [*argv, *flags("--max-skipped 3 --save-every 1")]
    text = refused(argv, out, patch=partial(support_faults.nan_loss, 3, 4, 5))
    assert "not finite 3 steps in a row (limit max_skipped 3) at step 5" in text
    assert "from step 4 to 8" in run(argv, out)
    processes = start_ranks(argv, tmp_path / "ranks", 2, patch=partial(support_faults.nan_loss, rank=1))
    assert [process.wait() for process in processes] == [1, 1]
    assert all("limit max_skipped 3" in process.text for process in processes)


def test_a_scaled_run_lowers_its_scale_until_steps_are_finite_and_resumes_exactly(
    argv: list[str], straight: Straight, tmp_path: Path
) -> None:
    """Float16 with a gradient scaler, whose first scale of 2^16 is far too high here."""
    fp16: dict[str, Any] = {"env": {"ACCELERATE_MIXED_PRECISION": "fp16"}, "patch": support_faults.scaled_fp16}
    argv = [*argv, *EVERY_STEP, *flags("--steps 20")]
    out, killed = tmp_path / "run", tmp_path / "killed"
    run(argv, out, **fp16)
    skipped = skipped_steps(out)
    states = [json.loads((checkpoint(out, step) / "state.json").read_text()) for step in range(1, 21)]
    assert 5 <= len(skipped) <= 15
    for state in states:
        assert state["scaler"]["scale"] == 2.0 ** (16 - state["skipped"])
        assert state["scaler"]["_growth_tracker"] == state["step"] - max(s for s in skipped if s <= state["step"])
    for step in range(2, 21):
        before, after = tensors(out, step - 1), tensors(out, step)
        assert (step in skipped) == all(torch.equal(before[n], after[n]) for n in after if n in before)
    # The norm is that of the gradient, not of the scaled one: the first step taken shows the start's.
    taken = next(line["grad_norm"] for line in log_lines(out, "train") if line["step"] not in skipped)
    assert taken == pytest.approx(log_lines(straight.out, "train")[0]["grad_norm"], rel=0.5)
    for limit in ([*flags("--max-minutes 0.00001")], [*flags("--max-minutes 0.0002")], []):
        run([*argv, *limit], killed, **fp16)
    assert_same_tensors(tensors(killed, 20), tensors(out, 20))
    assert json.loads((checkpoint(killed, 20) / "state.json").read_text())["scaler"] == states[-1]["scaler"]


def test_bfloat16_trains_float32_weights_to_nearly_the_same_loss(
    argv: list[str], straight: Straight, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    text = run(argv, out, env={"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert "precision bf16" in text
    found = tensors(out, STEPS)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert not all(torch.equal(value, tensors(straight.out, STEPS)[name]) for name, value in found.items())
    for ours, theirs in zip(log_lines(out, "train"), log_lines(straight.out, "train"), strict=True):
        assert ours["skipped"] == 0
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)


# --- what is refused


@pytest.fixture
def finished(argv: list[str], straight: Straight, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    out = tmp_path / "run"
    shutil.copytree(straight.out, out)
    return out


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("--learning-rate 0.1", "learning_rate"),
        ("--latent-channels 5", "codec.latent_channels"),
        ("--sigma 0.5", "codec.likelihood.sigma"),
        ("--beta 2 --seed 1", "objective.beta, seed"),
        ("--no-flip", "flip"),
        ("--max-grad-norm None", "max_grad_norm"),
    ],
)
def test_a_run_with_other_settings_is_refused_by_their_names(
    argv: list[str], finished: Path, change: str, name: str
) -> None:
    config = (finished / "config.json").read_text()
    assert f"is a run with other settings ({name})" in refused([*argv, *flags(change)], finished)
    assert (finished / "config.json").read_text() == config


def test_steps_and_intervals_may_change(argv: list[str], finished: Path) -> None:
    text = run([*argv, *flags("--steps 10 --save-every 5 --log-every 3 --eval-every 7 --keep-checkpoints 1")], finished)
    assert "from step 8 to 10" in text
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["step-00000010"]
    assert [line["step"] for line in log_lines(finished, "train")] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert json.loads((finished / "config.json").read_text())["config"]["steps"] == 10


def test_a_finished_run_is_left_as_it_is(argv: list[str], finished: Path, straight: Straight) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != "config.json"}
    assert "from step 8 to 8" in run([*argv, *EVERY_STEP], finished)
    assert {path: path.read_bytes() for path in before} == before
    assert_finished_like(finished, straight)


def test_a_run_without_clipping_can_be_resumed(argv: list[str], tmp_path: Path) -> None:
    argv = [*argv, *flags("--max-grad-norm None")]
    run([*argv, *flags("--max-minutes 0.00001")], tmp_path / "run")
    assert "from step 1 to 8" in run(argv, tmp_path / "run")


@pytest.mark.parametrize("other", ["more images", "other hold-out"])
def test_a_run_on_other_images_is_refused(argv: list[str], finished: Path, tmp_path: Path, other: str) -> None:
    if other == "more images":
        argv = [*argv, str(write_images(tmp_path / "more", count=1))]
    else:
        argv = [*argv, *flags("--val-images 3")]
    assert "was trained on other data" in refused(argv, finished)


def test_a_folder_that_holds_something_else_is_refused(argv: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    for text in ("{", "[]", '{"config": {}}'):
        (out / "config.json").write_text(text)
        assert "not a run of this version" in refused(argv, out)
    file = tmp_path / "file"
    file.touch()
    assert f"{file}: cannot be written into as a folder" in refused(argv, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "--accumulation 3",
            "batch_size 4 cannot be split over 1 processes x 3 micro-batches; make it a multiple of 3",
        ),
        ("--crop 36", "crop 36 is no multiple of 8, the model's factor"),
        ("--eval-crop 20", "eval_crop 20 is no multiple of 8, the model's factor"),
        ("--log-every 0", "log_every is 0; it must be at least 1"),
        ("--keep-checkpoints 0", "keep_checkpoints is 0; it must be at least 1"),
        ("--steps -1", "steps is -1; it must be at least 0"),
        ("--max-grad-norm inf", "config.max_grad_norm: expected a finite number, found inf"),
        ("--learning-rate nan", "config.learning_rate: expected a finite number, found nan"),
        ("--image-channels 2", "image_channels is 2; set it to 1 (grey) or 3 (RGB)"),
        ("--val-images 0", "val_images is 0; it must be at least 1"),
        ("--val-images 8", "all 8 images are held out"),
        ("--lpips-weight 1 --lpips-backbone nowhere.safetensors", "nowhere.safetensors: no such file"),
    ],
)
def test_wrong_values_are_refused_in_one_sentence(argv: list[str], tmp_path: Path, change: str, message: str) -> None:
    text = refused([*argv, *flags(change)], tmp_path / "run")
    assert f"train.vae: {message}" in text or message in text
    assert len(text.splitlines()) == 1


def test_a_batch_that_two_processes_cannot_share_is_refused_on_both(argv: list[str], tmp_path: Path) -> None:
    processes = start_ranks([*argv, *flags("--batch-size 5")], tmp_path / "run", 2)
    assert [process.wait() for process in processes] == [1, 1]
    for process in processes:
        assert "batch_size 5 cannot be split over 2 processes x 1 micro-batches" in process.text
        assert "Traceback" not in process.text


def test_processes_that_find_different_checkpoints_do_not_wait_for_ever(argv: list[str], finished: Path) -> None:
    argv = [*argv, *flags("--steps 9")]
    processes = start_ranks(argv, finished, 2, patch=partial(support_faults.no_checkpoints, rank=1))
    assert [process.wait() for process in processes] == [1, 1]
    assert all("found checkpoints of steps [8, 0]" in process.text for process in processes)


def test_other_settings_are_refused_on_every_process(argv: list[str], finished: Path) -> None:
    processes = start_ranks([*argv, *flags("--seed 1")], finished, 2)
    assert [process.wait() for process in processes] == [1, 1]
    assert all("is a run with other settings (seed)" in process.text for process in processes)


def test_a_tracker_that_is_not_installed_is_refused(argv: list[str], tmp_path: Path) -> None:
    if importlib.util.find_spec("aim"):
        pytest.skip("aim is installed here")
    text = refused([*argv, *flags("--log-with aim")], tmp_path / "run")
    assert "of these trackers none can be imported" in text


def test_float16_without_a_gpu_is_refused(argv: list[str], tmp_path: Path) -> None:
    text = refused(argv, tmp_path / "run", env={"ACCELERATE_MIXED_PRECISION": "fp16"})
    assert "fp16 needs a GPU" in text


def test_a_closed_form_where_there_is_none_is_refused_before_images_are_read(data: Path, tmp_path: Path) -> None:
    small = flags("conv --widths 8 8 --groups 4 --layers-per-block 1 --lpips-weight 0 --closed-form")
    text = refused([*small, "--data", str(data)], tmp_path / "run")
    assert "closed_form needs a backbone with a linear path, not conv" in text
    assert not (tmp_path / "run").exists()


def test_the_command_line_explains_itself(tmp_path: Path) -> None:
    for words in (["--help"], ["photo", "--help"]):
        process = start(words, tmp_path / "run")
        assert process.wait() == 0
    assert "--encoder-widths" in process.text and "Side of the square training crops" in process.text
    unknown = refused(["vqgan"], tmp_path / "preset", code=2)
    assert "vqgan" in unknown and "photo" in unknown
    assert "--sigmaa" in refused([*TINY, "--data", "x", "--sigmaa", "1"], tmp_path / "flag", code=2)
    assert "no such image, folder or tar file" in refused([*TINY, "--data", "nowhere"], tmp_path / "data")


def test_a_tracker_gets_the_logged_values(argv: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    out = tmp_path / "run"
    run([*argv, *flags("--log-with tensorboard")], out)
    events = EventAccumulator(str(out / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/nll")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("eval/nelbo")] == [4, 8]


def test_a_run_may_start_from_a_model(argv: list[str], straight: Straight, tmp_path: Path) -> None:
    """With a learning rate of next to nothing, a run's first weights are seen in its last."""
    model = checkpoint(straight.out, STEPS) / "ema.safetensors"
    run([*argv, *flags("--steps 1 --learning-rate 1e-12"), "--start-from", str(model)], tmp_path / "run")
    started, wanted = Codec.load(checkpoint(tmp_path / "run", 1) / "codec.safetensors"), Codec.load(model)
    for name, tensor in started.state_dict().items():
        torch.testing.assert_close(tensor, wanted.state_dict()[name], rtol=0, atol=1e-9)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["start_from"] == wanted.model_id
