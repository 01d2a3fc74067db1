"""Test the recipe: steps planned from a measured speed, calls that end within their minutes, and a model at the end."""

import json
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from latent_codec.errors import UserError
from latent_codec.images.geometry import pad
from latent_codec.images.sources import find_images
from latent_codec.model.codec import Codec
from latent_codec.model.config import LiteConfig
from tests.support.data import ROOT
from tests.support.errors import refused
from tests.support.run import write_images
from train.config.presets import conv
from train.config.prior import PriorConfig
from train.config.vae import JointConfig
from train.recipe.config import Recipe, check, codec_config, gpu_batch, preset_of
from train.recipe.stages import Clock, State, TrainingPlan, advance


@pytest.mark.parametrize(
    ("gib", "crop", "batch"),
    [
        (7.6, 128, 128),  # what cards of 8, 16, 24, 40, 80 and 141 GB have
        (14.6, 128, 256),
        (15.7, 128, 256),
        (23.5, 128, 256),
        (39.4, 128, 512),
        (79.1, 128, 1024),
        (139.8, 128, 1024),
        (15.7, 256, 64),
        (139.8, 256, 512),
        (0.5, 512, 8),
    ],
)
def test_the_batch_fits_the_memory_of_a_gpu(gib: float, crop: int, batch: int) -> None:
    assert gpu_batch(round(gib * 2**30), crop) == batch


def pack(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
    return tar


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    shards = tuple(pack(write_images(folder / f"{i}", 2, seed=i), folder / f"train-{i}.tar") for i in range(2))
    return Recipe(
        data=shards,
        val=pack(write_images(folder / "val", 2, seed=9), folder / "val.tar"),
        out=folder / "run",
        minutes=10.0,
        total_minutes=0.02,
        start_from=str(model_file),
        objective="elbo",
        latent_channels=6,
        batch_size=8,
        crop=32,
        prior=PriorConfig(groups=(1,), levels=(1,), width=8, batch_size=2, crop=2, count_images=4),
        probe_steps=4,
        finish_minutes=0.0,
        figure_images=2,
    )


class OutOfTime(Clock):
    """Have time left only until the codec's speed is measured, or never."""

    def __init__(self, plan: Path | None = None) -> None:
        self.plan = plan

    @property
    def left(self) -> float:
        return 10.0 if self.plan is not None and not self.plan.exists() else 0.0


def state(recipe: Recipe) -> dict[str, Any]:
    return json.loads((recipe.out / "recipe.json").read_text())


def run(recipe: Recipe) -> Codec:
    """Run a recipe to its end in one call."""
    assert advance(recipe, Clock(time.monotonic(), 10.0)) == 0
    return Codec.load(recipe.out / "photo.safetensors")


@pytest.fixture(scope="module")
def cut(tiny: Recipe) -> TrainingPlan:
    """Cut the recipe after one step of the codec's training; returns the codec's plan."""
    assert advance(tiny, OutOfTime(tiny.out / "recipe.json")) == 0
    return TrainingPlan(**state(tiny)["plans"]["codec"])


@pytest.fixture(scope="module")
def finished(tiny: Recipe, cut: TrainingPlan) -> Codec:
    """Finish the recipe that was cut."""
    assert [p.name for p in (tiny.out / "codec" / "checkpoints").iterdir()] == ["step-00000001"]
    assert state(tiny)["done"] == [] and not (tiny.out / "codec-speed").exists()
    return run(tiny)


@pytest.mark.slow
def test_a_call_out_of_time_is_continued_by_the_next(
    tiny: Recipe, cut: TrainingPlan, finished: Codec, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cut.steps == round(0.02 * 60 * 0.8 * cut.images_per_s / 8) > 1
    assert TrainingPlan(**state(tiny)["plans"]["codec"]) == cut and len(state(tiny)["done"]) == 6
    assert (tiny.out / "codec" / "checkpoints" / f"step-{cut.steps:08d}").exists()
    start = Codec.load(tiny.start_from)
    assert finished.config == preset_of(start.config, "elbo", 6).codec and finished.model_id != start.model_id
    assert finished.config.backbone == replace(cast(LiteConfig, start.config.backbone), overlap=4)
    assert finished.priors is not None and finished.priors.context is not None
    pixels = find_images(tiny.val)[0].read().pixels
    assert torch.isfinite(finished.encode(pad(pixels, finished.factor)[None]).mean).all()
    for name in ("trained", "start"):
        assert json.loads((tiny.out / "figure" / name / "rd.json").read_text())["about"]["images"] == 2
    assert run(tiny).model_id == finished.model_id  # nothing is left to do
    assert capsys.readouterr().out.splitlines() == [f"done: {tiny.out / 'photo.safetensors'}"]


def test_other_flags_than_the_plans_are_refused(tiny: Recipe, cut: object) -> None:
    for change, names in (
        ({"total_minutes": 1.0, "prior": replace(tiny.prior, width=9)}, r"\(total_minutes, prior.width\)"),
        ({"objective": "joint"}, "objective"),
        ({"lpips_weight": 2.0}, r"\(lpips_weight\)"),
    ):
        refused(f"other flags .*{names}", run, replace(tiny, **change))


def test_lost_latents_are_redone(
    tiny: Recipe, finished: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe may move to another machine without its latents."""
    recipe = replace(tiny, out=tmp_path / "run", figure_images=0)
    shutil.copytree(tiny.out, recipe.out, ignore=shutil.ignore_patterns("latents", "prior", "photo.safetensors"))
    found = state(recipe)
    (recipe.out / "recipe.json").write_text(json.dumps(found | {"done": found["done"][:3]}))
    codec, text = run(recipe), capsys.readouterr().out
    assert "encode the images" in text and "train the codec" not in text
    assert codec.model_id == finished.model_id and codec.priors is not None and codec.priors.context is not None


@pytest.mark.slow
def test_the_joint_objectives_prior_is_trained_further(tiny: Recipe, finished: Codec, tmp_path: Path) -> None:
    start = str(tiny.out / "photo.safetensors")
    joint: dict[str, Any] = {"objective": "joint", "latent_channels": None, "start_from": start, "figure_images": 0}
    recipe = replace(tiny, out=tmp_path / "run", **joint)
    codec = run(recipe)
    objective = json.loads((recipe.out / "codec" / "config.json").read_text())["config"]["objective"]
    assert (objective["kind"], objective["prior_groups"], objective["prior_levels"]) == ("joint", [1], [1])
    assert objective["prior_width"] == 8
    assert codec.provenance["prior"]["start_from"] == "codec" and codec.config == finished.config
    assert codec.priors is not None and codec.priors.context is not None


def test_no_stage_starts_with_too_little_time(tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(tiny, out=tmp_path / "run", finish_minutes=11.0)
    assert advance(recipe, Clock(time.monotonic(), 10.0)) == 0 and "and 11 are kept" in capsys.readouterr().out
    assert not (recipe.out / "codec").exists()


@pytest.mark.slow
def test_a_call_too_short_for_a_speed_fails(tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert advance(replace(tiny, out=tmp_path / "run"), OutOfTime()) == 1
    assert "give more --minutes" in capsys.readouterr().out


def test_lpips_takes_the_weights_it_is_given(tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.safetensors"):
        run(replace(tiny, out=tmp_path / "run", lpips_weight=2.0, lpips_backbone=tmp_path / "none.safetensors"))


def test_a_plan_without_an_lpips_weight_has_none(tiny: Recipe, tmp_path: Path) -> None:
    """The first recipes had no such flag."""
    plain = replace(tiny, out=tmp_path)
    State(plain, "id").write()
    written = state(plain)
    assert written["flags"].pop("lpips_weight") == 0
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    State(plain, "id")
    refused(r"other flags \(lpips_weight\)", State, replace(plain, lpips_weight=2.0), "id")


def test_the_clock_starts_before_torch_is_imported() -> None:
    code = "import sys, train.recipe.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_training_configuration_follows_from_the_batch_and_the_recipe(tiny: Recipe, model_file: Path) -> None:
    recipe, model = replace(tiny, lpips_weight=2.0), Codec.load(model_file).config
    elbo = [codec_config(recipe, preset_of(model, "elbo"), batch, 1000, True) for batch in (8, 32, 256)]
    assert [config.learning_rate for config in elbo] == pytest.approx([4e-4, 8e-4, 1e-3])
    joint = codec_config(recipe, preset_of(model, "joint"), 32, 1000, False)
    objective, prior = joint.objective, tiny.prior
    assert isinstance(objective, JointConfig) and joint.learning_rate == pytest.approx(2e-4)
    assert objective.prior_learning_rate == pytest.approx(1e-3)  # the same ratio to the codec's as in the preset
    found = (objective.prior_groups, objective.prior_levels, objective.prior_width, objective.lpips_weight)
    assert found == (prior.groups, prior.levels, prior.width, 2.0)
    assert elbo[0].compile and not joint.compile and not elbo[0].closed_form and elbo[0].lr_warmup_steps == 100
    assert TrainingPlan(steps=1000, batch_size=64, images_per_s=640.0).every(2.0) == 1200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minutes": 0.1}, "minutes"),
        ({"total_minutes": 0.0}, "total_minutes"),
        ({"prior_share": 1.0}, "prior_share"),
        ({"probe_steps": 3}, "probe_steps"),
        ({"objective": "joint"}, "--objective elbo"),
    ],
)
def test_wrong_values_are_refused(tiny: Recipe, change: dict[str, Any], message: str) -> None:
    refused(message, check, replace(tiny, **change))


def test_models_other_than_lite_are_refused() -> None:
    refused("lite models with a gaussian posterior, not conv", preset_of, conv().codec, "joint")
