"""The conv backbone is diffusers' AutoencoderKL, tensor for tensor."""

import itertools
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from latent_codec.model.bottlenecks import DiagonalGaussianBottleneck
from latent_codec.model.config import ConvConfig, DiagonalGaussianConfig
from latent_codec.model.networks import ConvBackbone
from tests.support import kl
from tests.support.networks import seeded, shape


def conv_config(widths: tuple[int, ...], groups: int, layers: int = 1, **flags: bool) -> ConvConfig:
    every = {"mid_attention": True, "quant_conv": True, "post_quant_conv": True} | flags
    return ConvConfig(widths=widths, layers_per_block=layers, groups=groups, **every)


NAMES = ("mid_attention", "quant_conv", "post_quant_conv")
FLAGS = [dict(zip(NAMES, on, strict=True)) for on in itertools.product([False, True], repeat=3)]
SAME_AS_DIFFUSERS = {
    **{str([name for name in flags if flags[name]]): (conv_config((8, 16), 4, **flags), 3) for flags in FLAGS},
    "the SD shape, narrow": (conv_config((16, 32, 64, 64), 8, layers=2), 4),
    "one resolution": (conv_config((8,), 2), 16),
    "three layers, shrinking widths": (conv_config((16, 8, 12), 4, layers=3), 1),
}


@pytest.mark.parametrize("case", SAME_AS_DIFFUSERS)
def test_conv_is_diffusers_autoencoder_kl_with_the_same_weights(case: str) -> None:
    config, z = SAME_AS_DIFFUSERS[case]
    theirs = kl.autoencoder(config, z)
    ours = ConvBackbone(config, shape(z=z))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    bottleneck = DiagonalGaussianBottleneck(DiagonalGaussianConfig(logvar_min=-30.0, logvar_max=20.0), 4)
    x = 2 * torch.rand((2, 3, 32, 48), generator=seeded(1)) - 1
    with torch.no_grad():
        expected: Any = theirs.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        posterior = bottleneck(ours.encode(x))
        expected_x = theirs.decode(expected.mean).sample  # pyright: ignore[reportAttributeAccessIssue]
        found_x = ours.decode(expected.mean)
    assert expected.logvar.std() > 0.01 and expected_x.std() > 0.01  # something to compare
    moments = [(posterior.mean, expected.mean), (posterior.logvar, expected.logvar), (posterior.kl(), expected.kl())]
    for found, wanted in [*moments, (found_x, expected_x)]:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().amax().item())


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def test_conv_has_the_248_tensors_of_the_true_sd_shape() -> None:
    config = conv_config((128, 256, 512, 512), 32, layers=2)
    with torch.device("meta"):
        blocks: Any = (("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, config.widths)
        ours, theirs = ConvBackbone(config, shape()), AutoencoderKL(3, 3, *blocks, layers_per_block=2)
    assert len(shapes(ours)) == 248 and shapes(ours) == shapes(theirs) and ours.factor == 8
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863  # the published size
