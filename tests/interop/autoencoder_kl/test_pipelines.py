"""Check that pipelines of every family, with an export or with the adapter, paint what the codec decodes."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image

from latent_codec.interop.autoencoder_kl.adapter import CodecAutoencoder
from latent_codec.model.codec import Codec
from tests.support import kl, pipelines
from tests.support.data import ROOT
from tests.support.networks import randomise

EXAMPLE = ROOT / "examples" / "diffusers_pipeline.py"


def exported(codec: Codec, folder: Path, *, normalize: bool = True) -> Any:
    kl.export(codec, folder, normalize=normalize)
    return AutoencoderKL.from_pretrained(folder)


@torch.inference_mode()
def assert_normalized(family: str, vae: Any, codec: Codec, shift: torch.Tensor, scale: torch.Tensor) -> None:
    """Check that the diffusion model sees latents (z - shift) / scale when a pipeline decodes and when it encodes."""
    painted, x = pipelines.paint(family, vae), kl.pixels(1)
    assert painted.picture.std() > 0.05  # it is not all clipped
    kl.assert_close(painted.picture, (codec.decode(painted.latents * scale + shift) / 2 + 0.5).clamp(0, 1))
    noise = torch.randn(painted.latents.shape, generator=torch.Generator().manual_seed(5))
    kl.assert_close(pipelines.encode(family, vae, x, seed=5), (codec.encode(x).sample(noise) - shift) / scale)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "shape"),
    [("SD", "SD and SDXL"), ("SDXL", "SD and SDXL"), ("SD3", "FLUX and SD3"), ("FLUX", "FLUX and SD3")],
)
def test_an_export_is_right_in_every_family(tmp_path: Path, family: str, shape: str) -> None:
    codec = kl.codec(*kl.SHAPES[shape])
    assert_normalized(family, exported(codec, tmp_path / "vae"), codec, *kl.moments(codec))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [*((family, "lite") for family in pipelines.FAMILIES), ("FLUX", "conv")])
def test_a_codec_in_the_adapter_is_right_in_every_family(codec: Codec, family: str, kind: str) -> None:
    codec = codec if kind == "lite" else kl.codec(kl.NO_QUANT, 16)
    if kind == "lite":  # as trained: its random weights make no contrast
        randomise(codec)
    assert_normalized(family, CodecAutoencoder.from_codec(codec), codec, *kl.moments(codec))


@pytest.mark.slow
@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_raw_weights_are_right_by_each_familys_own_formula(tmp_path: Path, family: str) -> None:
    """SDXL normalises each channel; the others have one factor and one shift for all, and SD1.x has no shift."""
    codec = kl.codec(kl.SD)
    mean, std = kl.moments(codec)
    overall = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
    one_shift = mean.mean() * (family != "SD")
    moments = (mean, std) if family == "SDXL" else (one_shift, overall)
    assert_normalized(family, exported(codec, tmp_path / "vae", normalize=False), codec, *moments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["export", "adapter"])
def test_a_pipeline_is_saved_and_loaded_with_its_autoencoder(codec: Codec, tmp_path: Path, kind: str) -> None:
    vae = CodecAutoencoder.from_codec(codec) if kind == "adapter" else exported(kl.codec(), tmp_path / "vae")
    made = pipelines.pipeline("DiT", vae)
    made.save_pretrained(tmp_path / "pipeline")
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert type(loaded.vae) is type(vae)
    loaded.set_progress_bar_config(disable=True)
    pictures = [
        pipe(
            class_labels=[3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        for pipe in (made, loaded)
    ]
    assert abs(pictures[0] - pictures[1]).max() < 1e-4  # loaded weights lie elsewhere, and are summed in another order


def test_the_example_paints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_file: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(model_file)])
    done = runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert done["codec"].model_id == Codec.load(model_file).model_id
    assert done["pipeline"].vae is done["vae"] and done["vae"].codec is done["codec"]
    with Image.open("picture.png") as image:
        assert image.size == (128, 128) and len(image.convert("L").getcolors()) > 10
