"""Export to AutoencoderKL: diffusers says the same of an image as the codec, and nothing is half written or lost."""

import dataclasses
import json
import logging
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
from latent_codec.interop.autoencoder_kl import activations, exporting
from latent_codec.interop.autoencoder_kl.exporting import CONFIG, KEY, WEIGHTS, export_folder
from latent_codec.interop.autoencoder_kl.importing import import_model
from latent_codec.model import file as model_file
from latent_codec.model.codec import Codec
from latent_codec.model.config import BernoulliConfig, DiagonalGaussianConfig, DiscretizedLogisticConfig, GaussianConfig
from tests.support import kl as support_kl

ROUNDING = 2e-5
"""Of float32, on values of about 1 after some twenty layers."""


@pytest.fixture
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that diffusers logs is a warning."""
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield
    diffusers_logging.disable_propagation()
    assert [record.getMessage() for record in caplog.get_records("call")] == []


def load(folder: Path) -> AutoencoderKL:
    """As a pipeline loads it; nothing may be missing, left over or of another shape, and nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded: Any = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    model, info = loaded
    assert all(not found for found in info.values()), info
    return model


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    scale = max(other.abs().max().item(), 1.0)
    assert (one - other).abs().max().item() <= ROUNDING * scale


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("shape", support_kl.SHAPES)
def test_posterior_and_reconstruction_are_the_codecs_in_normalised_units(tmp_path: Path, shape: str) -> None:
    codec, x = support_kl.codec(*support_kl.SHAPES[shape]), support_kl.pixels()
    export_folder(codec, tmp_path / "vae")
    model, (mean, std) = load(tmp_path / "vae"), support_kl.moments(codec)
    with torch.inference_mode():
        ours, theirs = codec.encode(x), model.encode(x).latent_dist
        assert_close(theirs.mean * std + mean, ours.mean)
        assert_close(theirs.logvar + 2 * std.log(), ours.logvar)
        assert_close(model.decode((ours.mean - mean) / std).sample, codec.decode(ours.mean))
        assert_close(model.decode(theirs.mode()).sample, codec.decode(ours.mode()))
    config: Any = model.config
    assert (config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std) == (1, 0, None, None)


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("shape", support_kl.SHAPES)
def test_without_folding_weights_and_latents_are_the_codecs(tmp_path: Path, shape: str) -> None:
    codec, x = support_kl.codec(*support_kl.SHAPES[shape]), support_kl.pixels()
    export_folder(codec, tmp_path / "vae", normalize=False)
    model = load(tmp_path / "vae")
    ours, theirs = support_kl.tensors_of(codec), model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.inference_mode():
        assert_close(model.encode(x).latent_dist.mean, codec.encode(x).mean)
        assert_close(model.encode(x).latent_dist.logvar, codec.encode(x).logvar)
        assert_close(model.decode(codec.encode(x).mean).sample, codec.decode(codec.encode(x).mean))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", support_kl.SHAPES)
def test_an_export_comes_back_as_the_model_that_it_was(tmp_path: Path, shape: str, normalize: bool) -> None:
    codec = support_kl.codec(*support_kl.SHAPES[shape])
    export_folder(codec, tmp_path / "vae", normalize=normalize)
    back = import_model(tmp_path / "vae", tmp_path / "back.safetensors")
    assert back.model_id == codec.model_id
    assert (back.config, back.statistics, back.provenance) == (codec.config, codec.statistics, codec.provenance)


@pytest.mark.parametrize("scale", ["per_pixel", "learned"])
def test_what_a_likelihood_has_beside_the_mean_is_left_out_and_comes_back(tmp_path: Path, scale: Any) -> None:
    codec, x = support_kl.codec(likelihood=GaussianConfig(scale=scale, sigma=0.2)), support_kl.pixels()
    export_folder(codec, tmp_path / "vae", normalize=False)
    model = load(tmp_path / "vae")
    with torch.inference_mode():
        posterior = codec.encode(x)
        assert codec.likelihood_params(posterior.mean).shape[1] == (6 if scale == "per_pixel" else 3)
        assert_close(model.decode(posterior.mean).sample, codec.decode(posterior.mean))
    back = import_model(tmp_path / "vae", tmp_path / "back.safetensors")
    assert (back.model_id, back.config) == (codec.model_id, codec.config)


def test_half_is_stored_as_float16_and_comes_back_as_that(tmp_path: Path) -> None:
    codec = support_kl.codec()
    export_folder(codec, tmp_path / "vae", half=True)
    assert {t.dtype for t in load_file(tmp_path / "vae" / WEIGHTS).values()} == {torch.float16}
    codec.save(tmp_path / "half.safetensors", half=True)
    assert (
        import_model(tmp_path / "vae", tmp_path / "back.safetensors").model_id
        == Codec.load(tmp_path / "half.safetensors").model_id
    )
    x, (mean, std) = support_kl.pixels(), support_kl.moments(codec)
    with torch.inference_mode():
        assert (
            load(tmp_path / "vae").encode(x).latent_dist.mean * std + mean - codec.encode(x).mean
        ).abs().max() < 0.05


def test_half_refuses_what_float16_cannot_hold_by_name(tmp_path: Path) -> None:
    codec = support_kl.codec()
    codec.get_parameter("backbone.encoder.conv_in.bias").data[0] = 1e5
    with pytest.raises(UserError, match=r"encoder\.conv_in\.bias exceeds float16's 65504; leave out --half"):
        export_folder(codec, tmp_path / "vae", half=True)
    assert list(tmp_path.iterdir()) == []
    assert export_folder(codec, tmp_path / "vae").force_upcast


def test_the_metadata_says_what_pickles_would_and_what_the_statistics_were(tmp_path: Path) -> None:
    codec = support_kl.codec()
    export_folder(codec, tmp_path / "vae")
    with safe_open(tmp_path / "vae" / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    header = json.loads(metadata[KEY])
    assert metadata["format"] == "pt"
    assert codec.statistics is not None
    assert tuple(header["statistics"]["mean"]) == codec.statistics.mean
    assert tuple(header["statistics"]["std"]) == codec.statistics.std
    assert header["model_id"] == codec.model_id


def test_clamps_that_differ_are_counted(tmp_path: Path) -> None:
    """Log-variances are about 0 here: a clamp at -16 never acts, one at 5 always does, and diffusers' never."""
    wide = support_kl.codec()
    assert export_folder(wide, tmp_path / "wide").clamped == 0
    narrow = support_kl.codec(bottleneck=DiagonalGaussianConfig(logvar_min=50.0, logvar_max=60.0))
    measured = export_folder(narrow, tmp_path / "narrow")
    assert measured.clamped == 1
    assert "100% of the log-variances are clamped otherwise by diffusers" in str(measured)
    assert "log-variances" not in str(export_folder(wide, tmp_path / "wide"))


def test_force_upcast_is_measured(tmp_path: Path) -> None:
    codec = support_kl.codec(dataclasses.replace(support_kl.SD, widths=(32, 32)))
    quiet = export_folder(codec, tmp_path / "vae")
    assert not quiet.force_upcast and json.loads((tmp_path / "vae" / CONFIG).read_text())["force_upcast"] is False
    with torch.no_grad():
        codec.get_parameter("backbone.encoder.conv_in.weight").mul_(1e4)
    loud = export_folder(codec, tmp_path / "vae")
    assert loud.peak > 65504 / 4 and loud.force_upcast
    assert json.loads((tmp_path / "vae" / CONFIG).read_text())["force_upcast"] is True


def test_force_upcast_is_measured_on_the_images_given_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, image = support_kl.codec(), torch.full((1, 3, 16, 24), 255, dtype=torch.uint8)
    made_up = export_folder(codec, tmp_path / "vae")
    assert export_folder(codec, tmp_path / "vae", images=[image]).images == made_up.images + 1
    monkeypatch.setattr(activations, "made_up_images", lambda *_: iter(()))
    with torch.no_grad():
        codec.get_parameter("backbone.encoder.conv_in.weight").mul_(1e4)
    measured = export_folder(codec, tmp_path / "vae", images=[image])
    assert (measured.images, measured.force_upcast) == (1, True)


def test_models_that_autoencoderkl_cannot_be_are_refused_with_the_reason(codec: Codec, tmp_path: Path) -> None:
    cases = [(codec, "a lite backbone is no AutoencoderKL")]
    for likelihood in (DiscretizedLogisticConfig(components=1), BernoulliConfig()):
        cases.append(
            (support_kl.codec(likelihood=likelihood), f"the mean of a {likelihood.kind} likelihood is computed")
        )
    bare = support_kl.codec()
    bare.statistics = None
    cases.append((bare, "no latent statistics to normalise by; name images to measure them on with --data"))
    more = support_kl.codec()
    more.backbone.extra = torch.nn.Linear(2, 2)
    cases.append((more, "2 tensors are unknown: extra.bias, extra.weight"))
    for model, reason in cases:
        with pytest.raises(UserError, match=reason):
            export_folder(model, tmp_path / "vae")
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    codec = support_kl.codec()
    folder = tmp_path / "a" / "vae"
    export_folder(codec, folder)
    codec.get_parameter("backbone.encoder.conv_in.bias").data[0] = 3
    export_folder(codec, folder)
    assert load_file(folder / WEIGHTS)["encoder.conv_in.bias"][0] == 3
    assert {f.name for f in folder.iterdir()} == {CONFIG, WEIGHTS} and [f.name for f in folder.parent.iterdir()] == [
        "vae"
    ]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are no export"):
        export_folder(codec, folder)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        export_folder(codec, tmp_path / "file")
    support_kl.autoencoder().save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="holds files that are no export"):
        export_folder(codec, tmp_path / "theirs")
    (tmp_path / "empty").mkdir()
    export_folder(codec, tmp_path / "empty")
    load(tmp_path / "empty")


@pytest.mark.parametrize("what", ["save_tensors", "write_text"])
def test_a_failure_leaves_no_file_or_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    codec = support_kl.codec()
    export_folder(codec, tmp_path / "old")
    before = {f.name: f.read_bytes() for f in (tmp_path / "old").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(model_file if what == "save_tensors" else exporting, what, full)
    for folder in (tmp_path / "new", tmp_path / "old"):
        with pytest.raises(OSError, match="the disk is full"):
            export_folder(codec, folder, normalize=False)
    assert [f.name for f in tmp_path.iterdir()] == ["old"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "old").iterdir()} == before


def test_files_have_the_umasks_permissions(tmp_path: Path, umask_027: None) -> None:
    export_folder(support_kl.codec(), tmp_path / "vae")
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "vae").iterdir()} == {0o640}
    assert (tmp_path / "vae").stat().st_mode & 0o777 == 0o750
