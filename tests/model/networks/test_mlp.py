"""The MLP backbone, drawn binary pixels and grey models: what they compute and that the folder tools take them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from latent_codec.errors import UserError
from latent_codec.folders.decode_latents import decode_folder
from latent_codec.folders.encode_latents import encode_folder
from latent_codec.images.geometry import in_channels, in_rgb
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.model.config import (
    BernoulliConfig,
    CodecConfig,
    ConvConfig,
    DiagonalGaussianConfig,
    GaussianConfig,
    LikelihoodConfig,
    LinearConfig,
    LiteConfig,
    MLPConfig,
)
from latent_codec.model.likelihoods import Bernoulli
from latent_codec.model.networks import MLPBackbone
from latent_codec.storage.json_config import to_json
from tests.conftest import Draw
from train.init.closed_form import start_from_mean

SIDE, Z = 6, 3
MLP = MLPConfig(side=SIDE, encoder_widths=(8, 7), decoder_widths=(9,), activation="tanh")


def make(
    channels: int = 1, likelihood: LikelihoodConfig | None = None, backbone: Any = MLP, classes: tuple[str, ...] = ()
) -> Codec:
    config = CodecConfig(
        image_channels=channels,
        latent_channels=Z,
        backbone=backbone,
        bottleneck=DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0),
        likelihood=likelihood or BernoulliConfig(pixels="drawn"),
        classes=classes,
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


CONDITIONAL = [
    MLPConfig(side=8, encoder_widths=(8,), decoder_widths=(9,), activation="relu"),
    LiteConfig(
        patch=8, stem=4, encoder_widths=(8, 8), encoder_depths=(1, 1), decoder_widths=(8, 8), decoder_depths=(1, 1)
    ),
    ConvConfig(widths=(4, 8), layers_per_block=1, groups=2, mid_attention=True, quant_conv=True, post_quant_conv=True),
]


@pytest.mark.parametrize("backbone", CONDITIONAL, ids=lambda b: b.kind)
def test_a_class_changes_what_its_image_gives_and_no_other(backbone: Any) -> None:
    codec = make(channels=3, likelihood=GaussianConfig(scale="fixed", sigma=0.1), backbone=backbone, classes=("a", "b"))
    x, z = torch.rand(2, 3, 16, 16), torch.rand(2, Z, 16 // codec.factor, 16 // codec.factor)
    same, other = torch.tensor([1, 0]), torch.tensor([1, 1])
    for call, value in ((lambda v, y: codec.encode(v, y).mean, x), (codec.decode, z)):
        before, after = call(value, same), call(value, other)
        torch.testing.assert_close(before[0], after[0])
        assert not torch.allclose(before[1], after[1])
    for labels in (None, torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.tensor([0])):
        with pytest.raises(ValueError, match="are not one of 2 classes"):
            codec.encode(x, labels)


@pytest.mark.parametrize("backbone", CONDITIONAL, ids=lambda b: b.kind)
def test_without_classes_labels_change_nothing_and_the_model_is_the_one_it_was(backbone: Any) -> None:
    codec = make(channels=3, likelihood=GaussianConfig(scale="fixed", sigma=0.1), backbone=backbone)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(codec.encode(x).mean, codec.encode(x, torch.tensor([5, -1])).mean)
    assert "classes" not in to_json(codec.config)
    assert codec.class_numbers([None, "a"]).tolist() == [0, 0]


def test_the_linear_backbone_takes_no_classes() -> None:
    with pytest.raises(ValueError, match="linear: principal components have no place for 2 classes"):
        make(backbone=LinearConfig(patch=4), classes=("a", "b"))


def test_classes_are_numbered_by_name_and_strangers_refused() -> None:
    codec = make(classes=("b", "a"))
    assert codec.class_numbers(["a", "b", "a"]).tolist() == [1, 0, 1]
    for stranger in ("c", None):
        with pytest.raises(UserError, match="the model knows b, a"):
            codec.class_numbers(["a", stranger])


def test_drawn_pixels_are_one_as_often_as_they_are_bright_and_follow_the_key() -> None:
    likelihood = Bernoulli(BernoulliConfig(pixels="drawn"))
    pixels = torch.tensor([0, 51, 128, 255], dtype=torch.uint8).expand(4000, 1, 1, 4)
    keys = torch.arange(4000)
    x = likelihood.observe(pixels, keys)
    likelihood.check(x)
    mean = x.mean((0, 1, 2))
    assert mean[0] == 0 and mean[3] == 1
    assert mean[1:3].tolist() == pytest.approx([0.2, 128 / 255], abs=5 * 0.5 / 4000**0.5)
    assert torch.equal(likelihood.observe(pixels[:3], keys[[7, 2, 9]]), x[[7, 2, 9]])
    assert not torch.equal(likelihood.observe(pixels, keys + 4000), x)


def test_pixels_under_the_threshold_do_not_depend_on_keys() -> None:
    likelihood = Bernoulli(BernoulliConfig(pixels="threshold"))
    pixels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).reshape(1, 1, 1, 4)
    assert likelihood.observe(pixels, torch.tensor([5])).flatten().tolist() == [0, 0, 1, 1]


def test_grey_is_any_of_three_equal_planes_and_colour_its_luma() -> None:
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(in_channels(in_rgb(grey), 1), grey)
    assert in_rgb(grey).shape == (3, 16, 16) and in_channels(in_rgb(grey), 3).shape == (3, 16, 16)
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    luma = np.asarray(Image.fromarray(colour).convert("L"), np.int16)
    found = in_channels(torch.from_numpy(colour).permute(2, 0, 1), 1)[0].numpy()
    assert np.abs(found - luma).max() <= 1  # Pillow truncates


@pytest.mark.parametrize(("width", "height"), [(1, 1), (6, 6), (13, 5)])
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
