"""Test TAEF2's structure, and what its published weights reach."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latent_codec.images.read import read_image
from latent_codec.metrics import distortion
from tests.support.data import DATA
from tests.support.errors import refused
from tools.benchmark.other_models import Taef2

WEIGHTS, PHOTO = DATA / "weights" / "taef2", DATA / "data" / "kodak" / "03.png"


@pytest.fixture(scope="module")
def model() -> Taef2:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Taef2()


def silence_pooling(model: Taef2) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("pool.3.weight"):
            parameter.zero_()


@pytest.mark.slow
@pytest.mark.skipif(not (WEIGHTS.is_dir() and PHOTO.is_file()), reason=f"no {WEIGHTS} or {PHOTO} here")
def test_published_weights_reconstruct_a_photograph_and_no_part_can_be_left_out() -> None:
    x = read_image(PHOTO).pixels[None, :, 192:320, 320:448]
    whole, without_clamp, without_pooling = (Taef2.load(WEIGHTS) for _ in range(3))
    without_clamp.decoder[0] = nn.Identity()
    silence_pooling(without_pooling)
    best, *others = (float(distortion.psnr(x, m.decode(m.encode(x)))) for m in (whole, without_clamp, without_pooling))
    assert best > max(27.5, *(other + 1 for other in others))  # the whole set has a mean of 30.19 dB


def test_latents_are_float32_an_eighth_as_large_and_decode_to_the_images_size(model: Taef2) -> None:
    x = torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8)
    z = model.encode(x)
    y = model.decode(z)
    assert (z.shape, z.dtype) == ((2, 32, 3, 5), torch.float32) and (y.shape, y.dtype) == (x.shape, torch.uint8)
    assert torch.equal(model.decode(z.sign() * 1e3), model.decode(z.sign() * 1e6))
    refused("divisible by 8, not 20x16", model.encode, torch.zeros(1, 3, 16, 20, dtype=torch.uint8))


def test_pixels_are_rounded_to_the_nearest_and_clamped() -> None:
    model = Taef2()
    last = model.decoder[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    last.weight.zero_()
    last.bias.copy_(torch.tensor([-0.5, 100.6 / 255, 1.5]))
    assert model.decode(torch.zeros(1, 32, 1, 1))[0, :, 0, 0].tolist() == [0, 101, 255]


def test_float16_weights_are_computed_with_in_float32(model: Taef2, tmp_path: Path) -> None:
    for name, network in (("encoder", model.encoder), ("decoder", model.decoder)):
        refused(rf"{name}\.safetensors: no such file.*TAEF2", Taef2.load, tmp_path)
        save_file({k: v.half() for k, v in network.state_dict().items()}, tmp_path / f"{name}.safetensors")
    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    z = Taef2.load(tmp_path).encode(x)
    assert z.dtype == torch.float32 and torch.allclose(z, model.encode(x), atol=1e-2)
