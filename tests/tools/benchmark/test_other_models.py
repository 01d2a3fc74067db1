"""TAEF2: its structure, and what its published weights reach."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from latent_codec.errors import UserError
from latent_codec.metrics import distortion
from tests.support.data import DATA
from tools.benchmark.other_models import Taef2

needs_shared = pytest.mark.skipif(
    not ((DATA / "weights" / "taef2").is_dir() and (DATA / "data" / "kodak").is_dir()),
    reason="no ../shared/weights/taef2 or ../shared/data/kodak here",
)


@pytest.fixture(scope="module")
def model() -> Taef2:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Taef2()


def crop(name: str) -> torch.Tensor:
    """(1, 3, 128, 128) uint8 from the middle of a Kodak image."""
    pixels = torch.from_numpy(np.array(Image.open(DATA / "data" / "kodak" / name).convert("RGB"))).permute(2, 0, 1)
    top, left = (pixels.shape[1] - 128) // 2, (pixels.shape[2] - 128) // 2
    return pixels[None, :, top : top + 128, left : left + 128].contiguous()


def quality(model: Taef2, x: torch.Tensor) -> float:
    return float(distortion.psnr(x, model.decode(model.encode(x))))


def silence_pooling(model: Taef2) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("pool.3.weight"):
            parameter.zero_()


@needs_shared
@pytest.mark.parametrize("name", ["03.png", "07.png"])
def test_published_weights_reconstruct_kodak(name: str) -> None:
    # The whole set has a mean of 30.19 dB, these two crops 31.7 and 28.2; without the pooling it is 17.
    assert quality(Taef2.load(DATA / "weights" / "taef2"), crop(name)) > 27.5


@needs_shared
def test_no_part_can_be_left_out() -> None:
    x = crop("03.png")
    whole = Taef2.load(DATA / "weights" / "taef2")
    without_clamp = Taef2.load(DATA / "weights" / "taef2")
    without_clamp.decoder[0] = nn.Identity()
    without_pooling = Taef2.load(DATA / "weights" / "taef2")
    silence_pooling(without_pooling)
    assert quality(whole, x) > max(quality(without_clamp, x), quality(without_pooling, x)) + 1


def test_latents_are_float32_an_eighth_as_large_and_decode_to_the_image_s_size(model: Taef2) -> None:
    x = torch.randint(0, 256, (2, 3, 24, 40), dtype=torch.uint8)
    z = model.encode(x)
    assert (z.shape, z.dtype) == ((2, 32, 3, 5), torch.float32)
    y = model.decode(z)
    assert (y.shape, y.dtype) == (x.shape, torch.uint8)


def test_each_network_changes_scale_three_times_and_pools_in_three_blocks_of_ten(model: Taef2) -> None:
    for network in (model.encoder, model.decoder):
        state = network.state_dict()
        assert sum(name.endswith("pool.0.weight") for name in state) == 3
        assert sum(name.endswith("conv.0.weight") for name in state) == 10
        bare = [n for n in state if n.count(".") == 1 and n.endswith("weight") and n[:-6] + "bias" not in state]
        assert len(bare) == 3  # one convolution per change of scale


def test_pixels_far_away_reach_a_latent_only_through_the_pooling(model: Taef2) -> None:
    x = torch.full((1, 3, 16, 512), 128, dtype=torch.uint8)
    changed = x.clone()
    changed[..., 504:] = 255
    assert not torch.equal(model.encode(x)[..., 0], model.encode(changed)[..., 0])
    blind = Taef2()
    silence_pooling(blind)
    assert torch.equal(blind.encode(x)[..., 0], blind.encode(changed)[..., 0])


def test_latents_far_out_of_range_saturate(model: Taef2) -> None:
    z = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(0)).sign()
    assert torch.equal(model.decode(z * 1e3), model.decode(z * 1e6))


def test_pixels_are_rounded_to_the_nearest_and_clamped() -> None:
    model = Taef2()
    last = model.decoder[-1]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    last.weight.zero_()
    last.bias.copy_(torch.tensor([-0.5, 100.6 / 255, 1.5]))
    assert model.decode(torch.zeros(1, 32, 1, 1))[0, :, 0, 0].tolist() == [0, 101, 255]


def test_weights_are_frozen(model: Taef2) -> None:
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("half", [True, False])
def test_saved_weights_load_strictly_and_give_the_same_latents(model: Taef2, tmp_path: Path, half: bool) -> None:
    for name, network in (("encoder", model.encoder), ("decoder", model.decoder)):
        state = {k: v.half() if half else v for k, v in network.state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    loaded = Taef2.load(tmp_path)
    x = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    assert loaded.encode(x).dtype == torch.float32
    assert torch.allclose(loaded.encode(x), model.encode(x), atol=1e-2 if half else 0)


def test_a_folder_that_does_not_fit_is_refused_by_file_and_tensor(model: Taef2, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.safetensors: no such file"):
        Taef2.load(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"encoder\.safetensors: not a safetensors file"):
        Taef2.load(tmp_path)
    state = model.encoder.state_dict()
    del state["11.pool.3.weight"]
    save_file(state, tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match=r"11\.pool\.3\.weight"):
        Taef2.load(tmp_path)


def test_sides_not_divisible_by_8_and_floats_are_refused(model: Taef2) -> None:
    with pytest.raises(UserError, match="divisible by 8, not 20x16"):
        model.encode(torch.zeros(1, 3, 16, 20, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        model.encode(torch.zeros(1, 3, 16, 16))
