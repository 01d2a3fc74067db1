"""The lite backbone sees a finite neighbourhood, stays cheap, and starts as nearly its linear path."""

import pytest
import torch
from torch import nn

from latent_codec.model.config import LinearConfig, LiteConfig
from latent_codec.model.describe import count_flops
from latent_codec.model.networks import LinearBackbone, LiteBackbone
from latent_codec.model.networks.lite import ResidualBlock
from tests.support.networks import (
    LITE,
    ONE_RESOLUTION,
    SMALL_LITE,
    config_of,
    photograph_moments,
    randomise,
    seeded,
    shape,
    support,
)

shapes_of_lite = pytest.mark.parametrize("config", [LITE, SMALL_LITE, ONE_RESOLUTION], ids=["lite", "small", "one"])


@pytest.mark.parametrize("z", [4, 16])
def test_it_stays_within_its_budget_of_operations(z: int) -> None:
    """An SD-VAE encoder needs 270e9."""
    flops = count_flops(config_of(LITE, z=z))
    assert 0 < flops.encoder <= 5.4e9 and 0 < flops.decoder <= 12.4e9


@shapes_of_lite
def test_it_convolves_on_no_grid_finer_than_half(config: LiteConfig) -> None:
    side, grids = 64, {}

    def record(conv: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        # A kernel as wide as its stride sees each pixel once: it works on its coarse side alone, as a rearrangement
        # and a 1x1 convolution do.
        patchwise = conv.kernel_size == conv.stride and conv.padding == (0, 0)
        sizes = [inputs[0].shape[-1], output.shape[-1]]
        grids[conv] = min(sizes) if patchwise else max(sizes)

    network = LiteBackbone(config, shape())
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    for conv in convolutions:
        conv.register_forward_hook(record)
    with torch.no_grad():
        network.encode(torch.zeros(1, 3, side, side))
        network.decode(torch.zeros(1, 4, side // config.patch, side // config.patch))
    assert set(grids) == set(convolutions) and max(grids.values()) <= side // 2


@shapes_of_lite
def test_a_latent_sees_its_whole_patch_and_what_lies_within_the_margin(config: LiteConfig) -> None:
    network, f = LiteBackbone(config, shape(c=1, z=2)), config.patch
    randomise(network)
    row, column, cells = 14, 12, 26  # a latent element in a grid of 26x26
    x = torch.rand((1, 1, cells * f, cells * f), generator=seeded(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(network.encode(x)[0, :, row, column].sum(), x)
    top, bottom, left, right = support(gradient)
    for place, first, last in ((row, top, bottom), (column, left, right)):
        assert (place - network.encoder_margin) * f <= first <= place * f - 2
        assert (place + 1) * f + 1 <= last < (place + 1 + network.encoder_margin) * f
    assert (gradient[..., row * f : (row + 1) * f, column * f : (column + 1) * f] != 0).all()

    z = torch.rand((1, 2, cells, cells), generator=seeded(0)).requires_grad_()
    pixel = network.decode(z)[0, 0, row * f + 1, column * f + f - 1]
    (gradient,) = torch.autograd.grad(pixel, z)
    top, bottom, left, right = support(gradient)
    for place, first, last in ((row, top, bottom), (column, left, right)):
        assert place - network.decoder_margin <= first < place < last <= place + network.decoder_margin
    assert (gradient[..., row, column] != 0).all()


@shapes_of_lite
def test_it_starts_as_nearly_its_linear_path_and_not_exactly(config: LiteConfig) -> None:
    """Zero would leave the last layer's inputs without a gradient."""
    torch.manual_seed(0)
    network, f = LiteBackbone(config, shape()), config.patch
    x = 2 * torch.rand((2, 3, 6 * f, 6 * f), generator=seeded(0)) - 1
    z = torch.randn((2, 4, 6, 6), generator=seeded(1))
    with torch.no_grad():
        for whole, linear in (
            (network.encode(x), network.linear.encode(x)),
            (network.decode(z), network.linear.decode(z)),
        ):
            assert 1e-5 < ((whole - linear).std() / linear.std()).item() < 0.05
        h = torch.randn((1, 8, 9, 9), generator=seeded(0))
        assert 1e-5 < (ResidualBlock(8)(h) - h).std().item() < 0.05


def test_it_takes_the_closed_form_into_its_linear_path() -> None:
    network, linear = LiteBackbone(LITE, shape()), LinearBackbone(LinearConfig(patch=8), shape())
    for backbone in (network.linear, linear):
        backbone.start_from_closed_form(photograph_moments(3, 8), 0.1)
    assert all(torch.equal(network.linear.state_dict()[name], tensor) for name, tensor in linear.state_dict().items())
