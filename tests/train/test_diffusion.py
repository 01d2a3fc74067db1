"""Test whole runs of train.diffusion: the same weights on any number of processes and through interruptions."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from latent_codec.cli import main
from latent_codec.diffusion.model import Diffusion
from latent_codec.latents.dataset import Latents
from latent_codec.model.codec import Codec
from tests.support.checkpoints import assert_same_tensors, checkpoint, log_lines, tensors
from tests.support.latents import store
from tests.support.run import flags, run, run_ranks, start
from train.data.crops import SamplePlan
from train.data.latents import PosteriorBatch, PosteriorCrops

TINY = flags(
    "mnist --size 2 --patch 1 --depth 1 --heads 1 --head-width 8 --steps 4 --batch-size 4 --save-every 1 --log-every 1 "
    "--eval-every 2 --val-images 3 --lr-warmup-steps 2 --workers 0"
)
PATHS = (*(f"{'bac'[i % 3]}/{i}.png" for i in range(24)), "top.png")
DIFFUSION: dict[str, Any] = {"program": "diffusion"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Path:
    """Write latents of two sizes, 2x2 and 2x3, in three classes."""
    folder = tmp_path_factory.mktemp("latents") / "latents"
    store(folder, Codec.load(model_file), PATHS, "float16")
    return folder


@pytest.fixture(scope="module")
def argv(folder: Path) -> list[str]:
    return [*TINY, "--latents", str(folder)]


@pytest.fixture(scope="module")
def straight(argv: list[str], model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run one process from the first step to the last."""
    out = tmp_path_factory.mktemp("straight") / "run"
    text = run([*argv, "--codec", str(model_file), "--keep-checkpoints", "99"], out, **DIFFUSION)
    assert "22 images of 3 classes; 1 process(es) on cpu" in text and "from step 0 to 4" in text
    return out


@pytest.mark.slow
def test_a_run_leaves_a_log_pictures_and_models_that_can_be_drawn_from(
    straight: Path, model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = log_lines(straight, "train")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["learning_rate"] >= 0 for line in lines)
    assert [line["step"] for line in log_lines(straight, "eval")] == [2, 4]
    assert all(line["loss"] > 0 for line in log_lines(straight, "eval"))
    assert sorted(p.name for p in (straight / "grids").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    model = Diffusion.load(checkpoint(straight, 4) / "ema.safetensors")
    assert model.latents.classes == ("a", "b", "c") and model.latents.codec_id == Codec.load(model_file).model_id
    assert model.provenance["training"]["data_images"] == 22
    grid = tmp_path / "grid.png"
    command = ["sample", str(straight), str(tmp_path / "drawn"), "--model", str(model_file), "--count", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--steps", "2", "--guidance", "2", "--label", "a", "c", "--grid", str(grid)])
    assert ended.value.code == 0 and "4 images drawn, 0 were there" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["a", "c", "samples.json"]
    assert grid.is_file()


@pytest.mark.slow
def test_workers_accumulation_and_a_kill_change_only_rounding(argv: list[str], straight: Path, tmp_path: Path) -> None:
    process = start([*argv, "--workers", "2"], tmp_path / "workers", **DIFFUSION)
    process.wait_for(lambda: checkpoint(tmp_path / "workers", 1).exists())
    process.signal(signal.SIGKILL)
    process.wait()
    run([*argv, "--workers", "2"], tmp_path / "workers", **DIFFUSION)
    assert_same_tensors(tensors(tmp_path / "workers", 4), tensors(straight, 4))
    run([*argv, "--accumulation", "2"], tmp_path / "accumulated", **DIFFUSION)
    assert_close(tensors(tmp_path / "accumulated", 4), tensors(straight, 4))


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Compare Adam's moments, which are gradients; a first step divides weights' changes by their size."""
    assert one.keys() == other.keys()
    for name in one:
        if "exp_avg" in name:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_two_processes_have_ones_gradients_and_resume_exactly(argv: list[str], tmp_path: Path, straight: Path) -> None:
    argv = [*argv, "--steps", "2"]
    run_ranks(argv, tmp_path / "two", 2, **DIFFUSION)
    assert_close(tensors(tmp_path / "two", 2), tensors(straight, 2))
    for limit in (["--max-minutes", "0.00001"], []):
        run_ranks([*argv, *limit], tmp_path / "stopped", 2, **DIFFUSION)
    assert_same_tensors(tensors(tmp_path / "stopped", 2), tensors(tmp_path / "two", 2))


def plan(batch_size: int, rank: int = 0, world: int = 1) -> SamplePlan:
    return SamplePlan(seed=3, crop=2, flip=False, batch_size=batch_size, micro_batches=1, rank=rank, world=world)


def test_two_processes_draw_disjoint_complete_and_reproducible_epochs_with_their_labels(folder: Path) -> None:
    latents = Latents(folder)
    rows = list(range(1, 25))  # the last one has no class
    whole = PosteriorCrops(latents, rows, 2, plan(8))
    drawn = [[PosteriorCrops(latents, rows, 2, plan(8, rank, 2)) for rank in (0, 1)] for _ in range(2)]
    orders: list[list[int]] = [[], [], []]
    for epoch in range(3):
        seen: list[int] = []
        for step in range(3 * epoch, 3 * epoch + 3):
            halves = [[next(iter(c.batches(step, step + 1, 0, torch.device("cpu")))) for c in cs] for cs in drawn]
            (expected,) = whole.batches(step, step + 1, 0, torch.device("cpu"))
            for pair in halves:
                joined = PosteriorBatch(*(torch.cat(parts) for parts in zip(*pair, strict=True)))
                for mine, theirs in zip(joined, expected, strict=True):
                    assert torch.equal(mine, theirs)
            seen += expected.keys.tolist()
            shown = _images(whole, whole.plan.samples(step, 0))
            assert expected.labels.tolist() == [int(latents.labels[i]) for i in shown]
            orders[epoch] += shown
        assert len(set(seen)) == 24
    assert all(sorted(order) == rows != order for order in orders) and orders[0] != orders[1]


def _images(crops: PosteriorCrops, samples: list[int]) -> list[int]:
    """Return the images that the samples show, recognised by their means."""
    means = [crops.latents.posterior(i).mean[0] for i in range(len(crops.latents))]
    found: list[int] = []
    for mean in crops[samples].mean.float():
        matches = [i for i, whole in enumerate(means) if _holds(whole, mean)]
        assert len(matches) == 1
        found += matches
    return found


def _holds(whole: torch.Tensor, crop: torch.Tensor) -> bool:
    return any(torch.equal(whole[..., left : left + 2], crop) for left in range(whole.shape[-1] - 1))


@pytest.mark.slow
def test_wrong_values_are_refused_in_a_sentence(argv: list[str], straight: Path, tmp_path: Path, codec: Codec) -> None:
    codec.statistics = None
    store(tmp_path / "bare", codec, PATHS, "float16")
    for words, out, message in (
        ("--label-dropout 2", "a", "label_dropout 2.0 must be from 0 to 1"),
        ("--size 4", "b", "--val-images or --size"),
        ("--batch-size 3 --accumulation 2", "c", "batch_size 3 cannot be split"),
        ("--flip", "d", "holds no latents of mirrored images"),
        ("--codec photo", "e", "latents of model"),
        (f"--latents {tmp_path / 'bare'}", "f", "no latent statistics"),
        ("--depth 2", straight, "run with other settings (transformer.depth)"),
        ("--val-images 4", straight, "trained on other data"),
    ):
        assert message in run([*argv, *flags(words)], tmp_path / out, code=1, **DIFFUSION)
