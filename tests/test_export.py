"""Check that an export has the latents' statistics and the run's newest averaged weights."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from latent_codec import export as export_module
from latent_codec.export import export, prepare
from latent_codec.images.geometry import pad
from latent_codec.images.sources import find_images
from latent_codec.inference.calibration import calibrate
from latent_codec.model.codec import Codec
from latent_codec.prior.passes import quantize
from latent_codec.prior.quantizer import channel_steps_from_std, scale, step_code
from tests.conftest import Draw
from tests.support.errors import refused


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    """Draw five images of several sizes."""
    for i, size in enumerate([(16, 16), (9, 7), (30, 8), (1, 1), (16, 24)]):
        draw(tmp_path / "photos" / f"{i}.png", *size, seed=i)
    return tmp_path / "photos"


def test_statistics_are_moments_over_images_and_positions(codec: Codec, photos: Path) -> None:
    calibrate(codec, find_images(photos), "five", quiet=True)
    found = codec.statistics
    assert found is not None
    with torch.inference_mode():
        posteriors = [codec.encode(pad(s.read().pixels, 8)[None]) for s in find_images(photos)]
    mean = torch.cat([p.mean[0].flatten(1) for p in posteriors], 1).double()  # (z, positions)
    variance = torch.cat([p.logvar[0].flatten(1) for p in posteriors], 1).double().exp()
    assert (found.source, found.images) == ("five", 5)
    std = (mean.var(1, correction=0) + variance.mean(1)).sqrt()
    moments = {"mean": mean.mean(1), "posterior_std": variance.mean(1).sqrt(), "std": std}
    for name, expected in moments.items():
        assert torch.allclose(torch.tensor(getattr(found, name)).double(), expected)


def test_statistics_are_of_the_first_images_asked_for(codec: Codec, model_file: Path, photos: Path) -> None:
    out = photos.parent / "out.safetensors"
    found = export(model_file, out, data=(photos,), images=2, half=False).statistics
    calibrate(codec, find_images(photos)[:2], "first 2 images of photos", quiet=True)
    assert found is not None and found == codec.statistics


@pytest.mark.parametrize("half", [False, True])
def test_a_model_without_new_data_keeps_all_it_has(codec: Codec, model_file: Path, tmp_path: Path, half: bool) -> None:
    exported = export(model_file, tmp_path / "m.safetensors", data=(), images=1, half=half)
    assert (exported.config, exported.statistics) == (codec.config, codec.statistics)
    assert exported.provenance == codec.provenance and (exported.model_id == codec.model_id) is not half
    assert exported.model_id == Codec.load(tmp_path / "m.safetensors").model_id


def test_a_model_without_statistics_needs_data(codec: Codec, tmp_path: Path, photos: Path) -> None:
    codec.statistics = None
    model, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    codec.save(model)
    refused("--data", export, model, out, data=(), images=1, half=False)
    assert not out.exists() and export(model, out, data=(photos,), images=9, half=False).statistics


@pytest.fixture
def run(codec: Codec, tmp_path: Path) -> Path:
    """Make a run with checkpoints at steps 20 and 100, and one that a crash left half written.

    The averaged weights' first bias is the step.
    """
    codec.statistics = None
    for step in (20, 100):
        weights = tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "ema.safetensors"
        codec.state_dict()["backbone.linear.encoder.bias"][0] = step
        codec.save(weights)
        sha256 = {"ema.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()}
        state = {"step": step, "skipped": 1, "minutes": 2.5, "skipped_in_a_row": 0, "scaler": {}, "sha256": sha256}
        weights.with_name("state.json").write_text(json.dumps(state))
    (tmp_path / "run" / "checkpoints" / ".step-00000200.tmp").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data_images": 3, "data": ["x.tar"]}))
    return tmp_path / "run"


def test_a_runs_newest_averaged_weights_are_exported_with_their_provenance(run: Path, photos: Path) -> None:
    exported = export(run, photos.parent / "m.safetensors", data=(photos,), images=9, half=False)
    assert exported.state_dict()["backbone.linear.encoder.bias"][0] == 100
    assert exported.provenance["progress"] == {"step": 100, "skipped": 1, "minutes": 2.5}
    assert exported.provenance["training"] == {"data_images": 3, "data": ["x.tar"]}
    assert exported.provenance["exported_by"].startswith("latent_codec ")
    assert exported.statistics is not None and exported.statistics.images == 5


DAMAGE = ["{", "[]", "{}", "3", None]


def damaged(file: Path) -> Iterator[None]:
    """Replace a file's content by each of `DAMAGE` in turn; the last time delete it."""
    for content in DAMAGE:
        file.unlink() if content is None else file.write_text(content)
        yield


def test_a_run_with_damaged_settings_is_refused(run: Path, photos: Path) -> None:
    for _ in damaged(run / "config.json"):
        refused(r"config\.json or state\.json cannot be read", prepare, run, data=(photos,), images=1)


@pytest.mark.parametrize("name", ["state.json", "ema.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one_and_without_any_other_the_run_is_refused(
    run: Path, tmp_path: Path, photos: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in damaged(run / "checkpoints" / "step-00000100" / name):
        exported = prepare(run, data=(photos,), images=1)
        assert exported.state_dict()["backbone.linear.encoder.bias"][0] == 20 and "step-00000100" in caplog.text
        caplog.clear()
    for _ in damaged(run / "checkpoints" / "step-00000020" / name):
        refused("all 2 checkpoints are damaged", prepare, run, data=(), images=1)
    (tmp_path / "new").mkdir()
    refused("no finished checkpoint", prepare, tmp_path / "new", data=(), images=1)


def test_mistakes_are_refused_before_any_work(model_file: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = photos.parent / "m.safetensors"
    (photos / "2.png").write_text("no picture")
    refused(r"^2\.png: not a readable image", export, model_file, out, data=(photos,), images=9, half=False)
    monkeypatch.setattr(export_module, "calibrate", mock.Mock(side_effect=AssertionError("worked")))
    (photos.parent / "file").write_text("mine")
    for model, destination, images, reason in (
        (model_file, photos, 1, "is a folder"),
        (model_file, photos.parent / "file" / "m.safetensors", 1, "cannot be written into"),
        (model_file, out, 0, "at least 1"),
        (Path("no such model"), out, 1, "neither a file nor a shipped model"),
    ):
        refused(reason, export, model, destination, data=(photos,), images=images, half=False)
    assert not out.exists()


def test_the_quantiser_follows_the_posterior_and_the_prior_covers_its_data(codec: Codec, photos: Path) -> None:
    two = Codec(dataclasses.replace(codec.config, image_channels=2))
    refused("images of 2 channels", calibrate, two, find_images(photos), "five", quiet=True)
    calibrate(codec, find_images(photos), "five", quiet=True)
    statistics, priors = codec.statistics, codec.priors
    assert statistics is not None and priors is not None and priors.context is None
    assert np.allclose(priors.channel_steps, np.sqrt(12) * np.array(statistics.posterior_std))
    step = step_code(0.25)
    for source in find_images(photos):
        mean = codec.encode(pad(source.read().pixels, 8)[None]).mean[0]
        (coding,) = quantize(priors.factorized, [scale(mean, priors.channel_steps, step, None)], "cpu")
        ((values, tables),) = coding.passes
        _, escaped = priors.factorized.tables.symbols(values, tables)
        assert not escaped.any()


def test_a_model_with_hardly_any_noise_gets_steps_that_its_latents_fit() -> None:
    std, posterior_std = np.array([5.0, 5.0]), np.array([1e-6, 1.0])
    assert np.allclose(channel_steps_from_std(std, posterior_std), np.sqrt(12) * np.array([5 / 1024, 1.0]))


def test_new_statistics_drop_a_context_prior(photos: Path, model_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = photos.parent / "out.safetensors"
    kept = export(model_file, out, data=(), images=1, half=False).priors
    assert kept is not None and kept.context is not None and not caplog.text
    found = export(model_file, out, data=(photos,), images=2, half=False).priors
    assert found is not None and found.context is None
    assert "context prior is dropped" in caplog.text
