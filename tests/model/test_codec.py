"""The codec's interface: shapes, pixels as bytes and floats, files, and its id."""

from pathlib import Path

import pytest
import torch

from latent_codec.model.codec import Codec
from tests.support.errors import rejected


@pytest.fixture
def pixels() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def test_one_latent_element_stands_for_factor_squared_pixels(codec: Codec, pixels: torch.Tensor) -> None:
    posterior = codec.encode(pixels)
    assert codec.factor == 8 and posterior.mean.shape == posterior.logvar.shape == (2, 4, 2, 3)
    assert codec.decode(posterior.mode()).shape == codec.decode_uint8(posterior.mode()).shape == pixels.shape


@torch.inference_mode()
def test_uint8_pixels_are_the_likelihoods_floats(codec: Codec, pixels: torch.Tensor) -> None:
    a, b = codec.encode(pixels), codec.encode(codec.likelihood.from_uint8(pixels))
    assert torch.equal(a.mean, b.mean) and torch.equal(a.logvar, b.logvar)


@torch.inference_mode()
def test_decoded_bytes_are_the_decoded_floats_rounded_and_clipped(codec: Codec) -> None:
    z = 30 * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    levels = (codec.decode(z) + 1) * 127.5
    assert levels.min() < 0 and levels.max() > 255
    assert torch.equal(codec.decode_uint8(z), levels.round().clamp(0, 255).to(torch.uint8))


@torch.inference_mode()
def test_an_image_does_not_see_its_batch(codec: Codec, pixels: torch.Tensor) -> None:
    together, alone = codec.encode(pixels), codec.encode(pixels[1:])
    assert torch.allclose(together.mean[1:], alone.mean, atol=1e-6)
    assert torch.allclose(together.logvar[1:], alone.logvar, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 15, 16), (1, 3, 16, 17), (1, 4, 8, 8)])
def test_pixels_that_do_not_fit_are_refused_with_the_remedy(codec: Codec, shape: tuple[int, ...]) -> None:
    rejected("multiples of 8; pad them", codec.encode, torch.zeros(shape))


@torch.inference_mode()
def test_saving_and_loading_changes_nothing(codec: Codec, pixels: torch.Tensor, tmp_path: Path) -> None:
    codec.save(tmp_path / "m.safetensors")
    loaded = Codec.load(str(tmp_path / "m.safetensors"))
    assert not loaded.training and loaded.model_id == codec.model_id
    assert (loaded.config, loaded.statistics, loaded.provenance) == (codec.config, codec.statistics, codec.provenance)
    a, b = codec.encode(pixels), loaded.encode(pixels)
    assert torch.equal(a.mean, b.mean) and torch.equal(a.logvar, b.logvar)
    assert torch.equal(codec.decode(a.mean), loaded.decode(a.mean))
