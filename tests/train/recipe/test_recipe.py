"""The recipe: a plan from a measured speed, calls that end within their minutes, and a model at the end."""

import dataclasses
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from latent_codec.errors import UserError
from latent_codec.images.geometry import pad
from latent_codec.images.sources import find_images
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, ConvConfig, LiteConfig
from tests.support.run import write_images
from train.config.presets import conv
from train.config.prior import PriorConfig
from train.config.vae import ELBOConfig, JointConfig
from train.recipe import config, stages
from train.recipe.config import Recipe, codec_config, preset_of
from train.recipe.stages import Clock, Plan, State, advance


def pack(folder: Path, tar: Path) -> Path:
    with tarfile.open(tar, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
    return tar


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    shards = tuple(pack(write_images(folder / f"{i}", 4, seed=i), folder / f"train-{i}.tar") for i in range(2))
    return Recipe(
        data=shards,
        val=pack(write_images(folder / "val", 4, seed=9), folder / "val.tar"),
        out=folder / "run",
        minutes=10.0,
        total_minutes=0.02,
        start_from=str(model_file),
        objective="elbo",
        latent_channels=6,
        batch_size=2,
        crop=32,
        prior=PriorConfig(groups=(1,), levels=(1,), width=8, batch_size=2, crop=2, count_images=4),
        probe_steps=8,
        finish_minutes=0.01,
        figure_images=2,
    )


def now(recipe: Recipe) -> int:
    return advance(recipe, time.monotonic())


def state(recipe: Recipe) -> dict[str, Any]:
    return json.loads((recipe.out / "recipe.json").read_text())


def test_a_call_cut_by_its_minutes_is_finished_by_the_next(
    tiny: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[bool] = []

    def minutes(of: Any) -> float:
        """Enough to measure the speed, and one step of the training."""
        measured.append("codec" in of.state.plans)
        return 1e-5 if measured[-1] else 10.0

    monkeypatch.setattr(stages._Stages, "_training_minutes", minutes)
    assert now(tiny) == 0 and measured == [False, True]
    plan = Plan(**state(tiny)["plans"]["codec"])
    assert plan.steps == round(0.02 * 60 * 0.8 * plan.images_per_s / 2) > 1
    assert [p.name for p in (tiny.out / "codec" / "checkpoints").iterdir()] == ["step-00000001"]
    assert "the same command goes on from here" in capsys.readouterr().out
    assert state(tiny)["done"] == [] and not (tiny.out / "codec-speed").exists()
    with pytest.raises(UserError, match=r"other flags \(total_minutes, prior.width\)"):
        now(dataclasses.replace(tiny, total_minutes=1.0, prior=dataclasses.replace(tiny.prior, width=9)))

    monkeypatch.undo()
    assert now(tiny) == 0
    assert Plan(**state(tiny)["plans"]["codec"]) == plan and len(state(tiny)["done"]) == 6
    assert f"from step 1 to {plan.steps}" in capsys.readouterr().out
    codec, start = Codec.load(tiny.out / "photo.safetensors"), Codec.load(tiny.start_from)
    assert codec.config == preset_of(start.config, "elbo", 6).codec and codec.model_id != start.model_id
    assert codec.config.backbone == dataclasses.replace(cast(LiteConfig, start.config.backbone), overlap=4)
    assert codec.priors is not None and codec.priors.context is not None
    pixels = find_images(tiny.val)[0].read().pixels
    assert torch.isfinite(codec.encode(pad(pixels, codec.factor)[None]).mean).all()
    for name in ("trained", "start"):
        found = json.loads((tiny.out / "figure" / name / "rd.json").read_text())
        assert found["about"]["images"] == 2

    assert now(tiny) == 0  # nothing is left to do
    assert capsys.readouterr().out.splitlines() == [f"done: {tiny.out / 'photo.safetensors'}"]


def test_latents_that_stayed_on_another_machine_are_made_again(
    tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.replace(tiny, out=tmp_path / "run", figure_images=0)
    assert now(recipe) == 0
    found = state(recipe)
    shutil.rmtree(recipe.out / "latents")
    shutil.rmtree(recipe.out / "prior")
    (recipe.out / "recipe.json").write_text(json.dumps(found | {"done": found["done"][:3]}))
    before = Codec.load(recipe.out / "photo.safetensors")
    (recipe.out / "photo.safetensors").unlink()
    capsys.readouterr()
    assert now(recipe) == 0
    text = capsys.readouterr().out
    assert "encode the images" in text and "train the codec" not in text
    after = Codec.load(recipe.out / "photo.safetensors")
    assert after.model_id == before.model_id and after.priors is not None and after.priors.context is not None


def test_the_joint_objectives_prior_goes_on_where_the_codecs_run_left_it(tiny: Recipe, tmp_path: Path) -> None:
    """From a model with a quantiser, which the recipe's own is."""
    assert now(dataclasses.replace(tiny, out=tmp_path / "first", figure_images=0)) == 0
    start = tmp_path / "first" / "photo.safetensors"
    joint = {"objective": "joint", "latent_channels": None, "start_from": str(start)}
    recipe = dataclasses.replace(tiny, out=tmp_path / "run", figure_images=0, **joint)
    assert now(recipe) == 0
    config = json.loads((recipe.out / "codec" / "config.json").read_text())["config"]["objective"]
    assert (config["kind"], config["prior_groups"], config["prior_levels"]) == ("joint", [1], [1])
    assert config["prior_width"] == 8
    codec = Codec.load(recipe.out / "photo.safetensors")
    assert codec.provenance["prior"]["start_from"] == "codec" and codec.config == Codec.load(start).config
    assert codec.priors is not None and codec.priors.context is not None
    with pytest.raises(UserError, match="other flags"):
        now(dataclasses.replace(recipe, objective="elbo"))


def test_no_stage_starts_with_too_little_time(tiny: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(tiny, out=tmp_path / "run", finish_minutes=11.0)
    assert now(recipe) == 0
    assert "and 11 are kept" in capsys.readouterr().out
    assert not (recipe.out / "codec").exists()


def test_a_call_too_short_to_measure_the_speed_fails(
    tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages._Stages, "_training_minutes", lambda _: 1e-5)
    assert now(dataclasses.replace(tiny, out=tmp_path / "run")) == 1
    assert "give more --minutes" in capsys.readouterr().out


def test_lpips_has_the_weights_it_is_given(tiny: Recipe, tmp_path: Path) -> None:
    missing = dataclasses.replace(
        tiny, out=tmp_path / "run", lpips_weight=2.0, lpips_backbone=tmp_path / "none.safetensors"
    )
    with pytest.raises(UserError, match=r"none\.safetensors"):
        now(missing)


def test_a_plan_keeps_its_lpips_weight_and_one_that_names_none_has_none(tiny: Recipe, tmp_path: Path) -> None:
    plain = dataclasses.replace(tiny, out=tmp_path)
    looking = dataclasses.replace(plain, lpips_weight=2.0)
    State(plain, "id").write()
    written = state(plain)
    assert written["flags"].pop("lpips_weight") == 0
    (tmp_path / "recipe.json").write_text(json.dumps(written))
    State(plain, "id").write()
    with pytest.raises(UserError, match=r"other flags \(lpips_weight\)"):
        State(looking, "id")
    (tmp_path / "recipe.json").unlink()
    State(looking, "id").write()
    with pytest.raises(UserError, match=r"other flags \(lpips_weight\)"):
        State(plain, "id")


def test_the_clock_runs_from_the_start_of_the_process() -> None:
    assert Clock(time.monotonic() - 60, 5.0).left == pytest.approx(4.0, abs=0.1)


def test_steps_and_learning_rate_follow_from_the_batch(tiny: Recipe, model_file: Path) -> None:
    preset = preset_of(Codec.load(model_file).config, "elbo")
    plain = dataclasses.replace(tiny, compile=None)
    rates = [codec_config(plain, preset, batch, 1000, True).learning_rate for batch in (8, 32, 256)]
    assert rates == pytest.approx([4e-4, 8e-4, 1e-3])
    joint = codec_config(plain, preset_of(Codec.load(model_file).config, "joint"), 32, 1000, True)
    assert isinstance(joint.objective, JointConfig)
    assert joint.learning_rate == pytest.approx(2e-4)
    assert joint.objective.prior_learning_rate == pytest.approx(1e-3)  # its lead over the codec's stays
    assert joint.objective.lpips_weight == 0
    for kind in ("elbo", "joint"):
        looks = dataclasses.replace(plain, lpips_weight=2.0)
        found = codec_config(looks, preset_of(Codec.load(model_file).config, kind), 32, 1000, True).objective
        assert isinstance(found, ELBOConfig | JointConfig) and found.lpips_weight == 2
    objective, prior = joint.objective, plain.prior
    assert (objective.prior_groups, objective.prior_levels) == (prior.groups, prior.levels)
    assert objective.prior_width == prior.width
    config = codec_config(plain, preset, 64, 1000, True)
    assert config.compile and config.channels_last and not config.closed_form and config.lr_warmup_steps == 100
    assert not codec_config(plain, preset, 64, 1000, False).compile
    assert Plan(steps=1000, batch_size=64, images_per_s=640.0).every(2.0) == 1200


def test_what_no_plan_can_be_made_of_is_refused(tiny: Recipe) -> None:
    for name, value in (("minutes", 0.1), ("total_minutes", 0.0), ("prior_share", 1.0), ("probe_steps", 3)):
        with pytest.raises(UserError, match=name):
            config.check(dataclasses.replace(tiny, **{name: value}))
    conv_codec: CodecConfig = conv().codec
    assert isinstance(conv_codec.backbone, ConvConfig)
    with pytest.raises(UserError, match="lite models with a gaussian posterior, not conv"):
        preset_of(conv_codec, "joint")
    with pytest.raises(UserError, match="--objective elbo"):
        config.check(dataclasses.replace(tiny, objective="joint"))
