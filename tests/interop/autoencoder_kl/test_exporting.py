"""Check that diffusers computes from an export what the codec does, and that nothing is half written or lost."""

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from safetensors.torch import load_file

from latent_codec.errors import UserError
from latent_codec.interop.autoencoder_kl import activations
from latent_codec.interop.autoencoder_kl.exporting import CONFIG, KEY, WEIGHTS
from latent_codec.interop.autoencoder_kl.importing import import_model
from latent_codec.model.codec import Codec
from latent_codec.model.config import BernoulliConfig, DiagonalGaussianConfig, DiscretizedLogisticConfig, GaussianConfig
from latent_codec.model.file import LatentStatistics
from latent_codec.storage.json_config import from_json
from tests.conftest import files_of
from tests.support import kl
from tests.support.errors import refused


@pytest.fixture
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if diffusers logs a warning."""
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield
    diffusers_logging.disable_propagation()
    assert [record.getMessage() for record in caplog.get_records("call")] == []


def load(folder: Path) -> AutoencoderKL:
    """Load as a pipeline does; nothing may be missing, left over or of another shape, and nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert all(not found for found in info.values()), info
    return model


def assert_comes_back(codec: Codec, tmp_path: Path) -> None:
    back = import_model(tmp_path / "vae", tmp_path / "back.safetensors")
    assert back.model_id == codec.model_id
    assert (back.config, back.statistics, back.provenance) == (codec.config, codec.statistics, codec.provenance)


@pytest.mark.slow
@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("shape", kl.SHAPES)
def test_an_export_is_the_codec_in_normalised_units_or_unfolded_to_the_bit(tmp_path: Path, shape: str) -> None:
    codec = kl.codec(*kl.SHAPES[shape])
    kl.export(codec, tmp_path / "vae")
    model: Any = load(tmp_path / "vae")
    kl.assert_same_model(codec, model, *kl.moments(codec))
    scale = [model.config[key] for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
    assert scale == [1, 0, None, None]
    with safe_open(tmp_path / "vae" / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata[KEY])
    assert metadata["format"] == "pt" and header["model_id"] == codec.model_id
    assert from_json(LatentStatistics, header["statistics"]) == codec.statistics
    assert_comes_back(codec, tmp_path)
    kl.export(codec, tmp_path / "vae", normalize=False)
    model = load(tmp_path / "vae")
    kl.assert_same_model(codec, model)
    ours, theirs = kl.tensors_of(codec), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_comes_back(codec, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["per_pixel", "learned"])
def test_a_likelihoods_scale_is_left_out_and_comes_back(tmp_path: Path, scale: Any) -> None:
    codec = kl.codec(likelihood=GaussianConfig(scale=scale, sigma=0.2))
    assert codec.likelihood_params(torch.zeros(1, 4, 2, 2)).shape[1] == (6 if scale == "per_pixel" else 3)
    kl.export(codec, tmp_path / "vae", normalize=False)
    kl.assert_same_model(codec, load(tmp_path / "vae"))
    assert_comes_back(codec, tmp_path)


def test_half_is_stored_as_float16_and_what_that_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    codec = kl.codec()
    kl.export(codec, tmp_path / "vae", half=True)
    assert {t.dtype for t in load_file(tmp_path / "vae" / WEIGHTS).values()} == {torch.float16}
    codec.save(tmp_path / "half.safetensors", half=True)
    back = import_model(tmp_path / "vae", tmp_path / "back.safetensors")
    assert back.model_id == Codec.load(tmp_path / "half.safetensors").model_id
    kl.assert_same_model(codec, load(tmp_path / "vae"), *kl.moments(codec), tolerance=0.01)
    shutil.rmtree(tmp_path / "vae")
    codec.get_parameter("backbone.encoder.conv_in.bias").data[0] = 1e5
    with pytest.raises(UserError, match=r"encoder\.conv_in\.bias exceeds float16's 65504; leave out --half"):
        kl.export(codec, tmp_path / "vae", half=True)
    assert not (tmp_path / "vae").exists() and kl.export(codec, tmp_path / "vae").force_upcast


def test_clamps_that_differ_are_counted(tmp_path: Path) -> None:
    """Log-variances are about 0 here: a clamp at -16 never acts, one at 50 always does, and diffusers' never."""
    measured = kl.export(kl.codec(), tmp_path / "wide")
    assert measured.clamped == 0 and "log-variances" not in str(measured)
    narrow = kl.codec(bottleneck=DiagonalGaussianConfig(logvar_min=50.0, logvar_max=60.0))
    measured = kl.export(narrow, tmp_path / "narrow")
    assert measured.clamped == 1 and "diffusers clamps 100% of the log-variances otherwise" in str(measured)


def test_force_upcast_is_measured_on_made_up_and_given_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, image = kl.codec(), torch.full((1, 3, 16, 24), 255, dtype=torch.uint8)
    quiet = kl.export(codec, tmp_path / "vae")
    assert not quiet.force_upcast and json.loads((tmp_path / "vae" / CONFIG).read_text())["force_upcast"] is False
    assert kl.export(codec, tmp_path / "vae", images=[image]).images == quiet.images + 1
    with torch.no_grad():
        codec.get_parameter("backbone.encoder.conv_in.weight").mul_(1e4)
    loud = kl.export(codec, tmp_path / "vae")
    assert loud.peak > 65504 / 4 and loud.force_upcast
    assert json.loads((tmp_path / "vae" / CONFIG).read_text())["force_upcast"] is True
    monkeypatch.setattr(activations, "made_up_images", lambda *_: iter(()))
    measured = kl.export(codec, tmp_path / "vae", images=[image])
    assert (measured.images, measured.force_upcast) == (1, True)


def test_models_that_autoencoderkl_cannot_represent_are_refused_with_the_reason(codec: Codec, tmp_path: Path) -> None:
    cases = [(codec, "a lite backbone is no AutoencoderKL")]
    for likelihood in (DiscretizedLogisticConfig(components=1), BernoulliConfig()):
        cases.append((kl.codec(likelihood=likelihood), f"the mean of a {likelihood.kind} likelihood is computed"))
    bare, more = kl.codec(), kl.codec()
    bare.statistics = None
    cases.append((bare, "no latent statistics to normalise by; name images to measure them on with --data"))
    more.backbone.extra = torch.nn.Linear(2, 2)
    cases.append((more, "2 tensors are unknown: extra.bias, extra.weight"))
    for model, reason in cases:
        refused(reason, kl.export, model, tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    codec = kl.codec()
    folder = tmp_path / "a" / "vae"
    kl.export(codec, folder)
    shutil.copytree(folder, tmp_path / "theirs")
    codec.get_parameter("backbone.encoder.conv_in.bias").data[0] = 3
    kl.export(codec, folder)
    assert load_file(folder / WEIGHTS)["encoder.conv_in.bias"][0] == 3
    assert {f.name for f in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert [f.name for f in folder.parent.iterdir()] == ["vae"]
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    kl.autoencoder().save_pretrained(tmp_path / "theirs")
    refused("is a file", kl.export, codec, tmp_path / "file")
    for path in (folder, tmp_path / "theirs"):
        refused("holds files that are no export", kl.export, codec, path)
    (tmp_path / "empty").mkdir()
    kl.export(codec, tmp_path / "empty")
    load(tmp_path / "empty")


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_a_failure_leaves_the_earlier_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    codec, replace = kl.codec(), os.replace
    kl.export(codec, tmp_path / "old")
    before = files_of(tmp_path)

    def full(source: Path, target: Path) -> None:
        if target.name == file:
            raise OSError("the disk is full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    for folder in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(OSError, match="the disk is full"):
            kl.export(codec, folder, normalize=False)
    assert [f.name for f in tmp_path.iterdir()] == ["old"] and files_of(tmp_path) == before
