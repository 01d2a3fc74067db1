"""The MLP backbone encodes squares, and a grey model of it takes files of any size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latent_codec.folders.decode_latents import decode_folder
from latent_codec.folders.encode_latents import encode_folder
from latent_codec.images.geometry import in_channels, in_rgb
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.model.config import (
    BernoulliConfig,
    CodecConfig,
    DiagonalGaussianConfig,
    GaussianConfig,
    LikelihoodConfig,
    MLPConfig,
)
from latent_codec.model.networks import MLPBackbone
from tests.conftest import Draw
from train.init.closed_form import start_from_mean

SIDE, Z = 6, 3
BINARY = BernoulliConfig(pixels="drawn")


def make(channels: int = 1, likelihood: LikelihoodConfig = BINARY) -> Codec:
    config = CodecConfig(
        image_channels=channels,
        latent_channels=Z,
        backbone=MLPConfig(side=SIDE, encoder_widths=(8, 7), decoder_widths=(9,), activation="tanh"),
        bottleneck=DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0),
        likelihood=likelihood,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Codec(config).eval()


def test_a_vector_passes_through_the_layers_that_the_config_names() -> None:
    codec = make()
    kinds = [type(m) for m in codec.backbone.encoder]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    x = torch.rand(2, 1, SIDE, SIDE).round()
    expected = x.flatten(1)
    for layer in codec.backbone.encoder:
        expected = layer(expected)
    torch.testing.assert_close(codec.encode(x).mean[..., 0, 0], expected[:, :Z])


def test_a_larger_image_is_its_squares_each_on_its_own() -> None:
    codec = make(channels=3, likelihood=GaussianConfig(scale="per_pixel", sigma=0.1))
    x = torch.rand(2, 3, 2 * SIDE, 3 * SIDE)
    posterior = codec.encode(x)
    params = codec.likelihood_params(posterior.mean)
    for row in range(2):
        for column in range(3):
            square = (..., slice(row * SIDE, (row + 1) * SIDE), slice(column * SIDE, (column + 1) * SIDE))
            alone = codec.encode(x[square])
            torch.testing.assert_close(alone.mean[..., 0, 0], posterior.mean[..., row, column])
            torch.testing.assert_close(codec.likelihood_params(alone.mean), params[square])


def test_the_decoder_starts_from_the_mean_image() -> None:
    codec, mean = make(), torch.linspace(0, 1, SIDE * SIDE, dtype=torch.float64).reshape(1, SIDE, SIDE)
    start_from_mean(codec, mean)
    decoded = codec.decode(torch.zeros(1, Z, 1, 1))[0]
    torch.testing.assert_close(decoded.double(), mean.clamp(1e-3, 1 - 1e-3), rtol=1e-4, atol=1e-6)
    assert isinstance(codec.backbone, MLPBackbone)
    for layer in (*codec.backbone.encoder, *codec.backbone.decoder):
        if isinstance(layer, nn.Linear):
            assert layer.weight.abs().max() <= (6 / (layer.in_features + layer.out_features)) ** 0.5


def test_grey_is_any_of_three_equal_planes_and_colour_its_luma() -> None:
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(in_channels(in_rgb(grey), 1), grey)
    assert in_rgb(grey).shape == (3, 16, 16) and in_channels(in_rgb(grey), 3).shape == (3, 16, 16)
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    luma = np.asarray(Image.fromarray(colour).convert("L"), np.int16)
    found = in_channels(torch.from_numpy(colour).permute(2, 0, 1), 1)[0].numpy()
    assert np.abs(found - luma).max() <= 1  # Pillow truncates


@pytest.mark.parametrize(("width", "height"), [(1, 1), (13, 5)])
def test_a_grey_model_encodes_and_decodes_files_of_any_size(
    draw: Draw, tmp_path: Path, width: int, height: int
) -> None:
    codec = make()
    compute = ComputeOptions(batch_size=2, workers=1)
    draw(tmp_path / "src" / "a.png", width, height, "L")
    draw(tmp_path / "src" / "b.png", width, height)
    assert encode_folder(Runner(codec, compute), tmp_path / "src", tmp_path / "z", quiet=True).done == 2
    assert decode_folder(Runner(codec, compute), tmp_path / "z", tmp_path / "back", quiet=True).done == 2
    for name, mode in (("a", "L"), ("b", "RGB")):
        with Image.open(tmp_path / "back" / f"{name}.png.png") as image:
            assert (image.size, image.mode) == ((width, height), mode)
