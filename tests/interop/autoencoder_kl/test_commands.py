"""Check the commands export --to diffusers and import, and that every other command works on an imported model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from latent_codec.model.codec import Codec
from latent_codec.model.config import GaussianConfig
from tests.conftest import Draw, files_of
from tests.support import kl
from tests.support.errors import refused
from tests.test_cli import Run, refuse
from tests.test_cli import run as run  # the fixture
from train.init.from_model import start_from_model


@pytest.fixture
def photos(tmp_path: Path, draw: Draw) -> Path:
    for i, (name, size) in enumerate((("a.png", (24, 16)), ("b.png", (32, 33)), ("c.png", (20, 40)))):
        draw(tmp_path / "photos" / name, *size, seed=i)
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    kl.codec().save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.slow
def test_an_export_is_imported_with_the_same_id(run: Run, model: Path, tmp_path: Path) -> None:
    result = run("export", model, tmp_path / "vae", "--to", "diffusers")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"wrote {tmp_path / 'vae'}, an AutoencoderKL; activations reach ")
    assert "on 6 images, so float16 holds them (force_upcast false)" in result.out
    result = run("import", tmp_path / "vae", tmp_path / "back.safetensors")
    assert (result.code, result.err) == (0, "")
    codec = Codec.load(model)
    assert codec.model_id in result.out and "latent statistics: made up" in result.out
    assert Codec.load(tmp_path / "back.safetensors").model_id == codec.model_id


@pytest.mark.slow
def test_options_of_export_reach_the_work(run: Run, model: Path, photos: Path, tmp_path: Path) -> None:
    options = ("--to", "diffusers", "--data", photos, "--images", 2, "--half", "--no-fold")
    result = run("export", model, tmp_path / "vae", *options)
    assert result.code == 0 and "on 8 images" in result.out
    vae: Any = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.config.scaling_factor != 1 and vae.config.latents_std is not None
    stored = Codec.load(model).state_dict()["backbone.quant_conv.weight"]
    assert torch.equal(vae.quant_conv.weight, stored.half().float())
    run("import", tmp_path / "vae", tmp_path / "back.safetensors")
    statistics = Codec.load(tmp_path / "back.safetensors").statistics
    assert statistics is not None and statistics.source == "first 2 images of photos"


def test_options_of_import_reach_the_work(run: Run, tmp_path: Path) -> None:
    kl.autoencoder().save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "config.json").unlink()
    weights, out = tmp_path / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "out.safetensors"
    result = run("import", weights, out)
    assert result.code == 0 and "latent statistics: none; measure them with export --data" in result.out
    size = out.stat().st_size
    result = run("import", weights, out, "--scaling-factor", 0.13025, "--half")
    assert result.code == 0 and "latent statistics: the scale of the command line" in result.out
    assert out.stat().st_size < 0.6 * size


@pytest.mark.slow
def test_every_command_works_on_an_imported_model(run: Run, photos: Path, tmp_path: Path) -> None:
    kl.autoencoder(scaling_factor=0.18215).save_pretrained(tmp_path / "vae")
    imported, measured = tmp_path / "imported.safetensors", tmp_path / "measured.safetensors"
    assert run("import", tmp_path / "vae", imported).code == 0
    result = run("info", imported)
    assert result.code == 0 and "posterior_std unknown" in result.out
    latents = ("--format", "safetensors", "--model", imported)
    assert run("encode", photos, tmp_path / "latents", *latents).code == 0
    assert run("decode", tmp_path / "latents", tmp_path / "decoded", "--model", imported).code == 0
    assert set(files_of(tmp_path / "decoded")) == {"a.png.png", "b.png.png", "c.png.png"}
    assert run("evaluate", imported, photos, "--lpips-net", "none").code == 0
    refuse(run("encode", photos, tmp_path / "lc", "--model", imported), "--data")
    assert run("export", imported, measured, "--data", photos).code == 0
    assert Codec.load(measured).model_id == Codec.load(imported).model_id
    assert run("encode", photos, tmp_path / "lc", "--model", measured).code == 0
    assert run("decode", tmp_path / "lc", tmp_path / "out", "--model", measured).code == 0
    assert set(files_of(tmp_path / "out")) == {"a.png.png", "b.png.png", "c.png.png"}


def test_training_can_start_from_an_imported_model(run: Run, tmp_path: Path) -> None:
    kl.autoencoder().save_pretrained(tmp_path / "vae")
    imported = tmp_path / "imported.safetensors"
    assert run("import", tmp_path / "vae", imported).code == 0
    codec = kl.codec(likelihood=GaussianConfig(scale="fixed", sigma=0.2))  # as a preset: sigma and clamp of its own
    start_from_model(codec, str(imported), ())
    state = Codec.load(imported).state_dict()
    assert all(torch.equal(codec.state_dict()[name], state[name]) for name in state)
    refused("its backbone or channels", start_from_model, kl.codec(kl.NO_QUANT), str(imported), ())


def test_mistakes_are_one_line(run: Run, model: Path, model_file: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    refuse(run("export", model_file, folder, "--to", "diffusers"), "a lite backbone is no AutoencoderKL")
    refuse(run("export", model, folder, "--no-fold"), "--no-fold is for --to diffusers")
    refuse(run("export", model, photos, "--to", "diffusers"), "holds files that are no export")
    refuse(run("export", model, folder, "--to", "diffusers", "--images", 0, "--data", photos), "at least 1")
    codec = kl.codec()
    codec.statistics = None
    codec.save(tmp_path / "bare.safetensors")
    refuse(run("export", tmp_path / "bare.safetensors", folder, "--to", "diffusers"), "--data")
    torch.save({}, tmp_path / "a.ckpt")
    refuse(run("import", tmp_path / "a.ckpt", tmp_path / "out.safetensors"), "a pickle")
    assert not folder.exists() and not (tmp_path / "out.safetensors").exists()
