"""The MLP backbone encodes squares, and a grey model of it takes files of any size."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latent_codec.folders.decode_latents import decode_latents
from latent_codec.folders.encode_latents import encode_latents
from latent_codec.images.geometry import in_channels, in_rgb
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.config import BernoulliConfig, MLPConfig
from latent_codec.model.networks import MLPBackbone
from tests.conftest import Draw
from tests.support.networks import config_of, make_codec, shape
from train.init.closed_form import start_from_mean

SIDE, Z = 6, 3
MLP = MLPConfig(side=SIDE, encoder_widths=(8, 7), decoder_widths=(9,), activation="tanh")
BINARY = config_of(MLP, c=1, z=Z, likelihood=BernoulliConfig(pixels="drawn"))


def test_a_vector_passes_through_the_layers_that_the_config_names() -> None:
    network = MLPBackbone(MLP, shape(1, Z))
    assert [type(m) for m in network.encoder] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    x = torch.rand(2, 1, SIDE, SIDE).round()
    torch.testing.assert_close(network.encode(x)[..., 0, 0], network.encoder(x.flatten(1)))


def test_a_larger_image_is_its_squares_each_on_its_own() -> None:
    network = MLPBackbone(MLP, shape(3, Z, params=2))
    x = torch.rand(2, 3, 2 * SIDE, 3 * SIDE)
    features = network.encode(x)
    params = network.decode(features[:, :Z])
    for row, column in itertools.product(range(2), range(3)):
        square = (..., slice(row * SIDE, (row + 1) * SIDE), slice(column * SIDE, (column + 1) * SIDE))
        alone = network.encode(x[square])
        torch.testing.assert_close(alone[..., 0, 0], features[..., row, column])
        torch.testing.assert_close(network.decode(alone[:, :Z]), params[square])


def test_the_decoder_starts_from_the_mean_image() -> None:
    codec, mean = make_codec(BINARY), torch.linspace(0, 1, SIDE * SIDE, dtype=torch.float64).reshape(1, SIDE, SIDE)
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
def test_a_grey_model_codes_files_of_any_size(draw: Draw, tmp_path: Path, width: int, height: int) -> None:
    runner = Runner(make_codec(BINARY), ComputeOptions(batch_size=2, workers=1))
    draw(tmp_path / "src" / "a.png", width, height, "L")
    draw(tmp_path / "src" / "b.png", width, height)
    assert encode_latents(runner, tmp_path / "src", tmp_path / "z", quiet=True).done == 2
    assert decode_latents(runner, tmp_path / "z", tmp_path / "back", quiet=True).done == 2
    for name, mode in (("a", "L"), ("b", "RGB")):
        with Image.open(tmp_path / "back" / f"{name}.png.png") as image:
            assert (image.size, image.mode) == ((width, height), mode)
