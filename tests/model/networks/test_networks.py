"""Backbones: diffusers' AutoencoderKL tensor for tensor, linear paths from the closed form, and lite's budget."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn
from torch.nn.functional import unfold
from torch.utils.flop_counter import FlopCounterMode

from latent_codec.model.bottlenecks import DiagonalGaussianBottleneck
from latent_codec.model.config import ConvConfig, DiagonalGaussianConfig, LinearConfig, LiteConfig, MLPConfig
from latent_codec.model.networks import BACKBONES, ConvBackbone, LinearBackbone, LiteBackbone
from latent_codec.model.networks.linear import PatchMoments
from latent_codec.model.networks.lite import ResidualBlock

LITE = LiteConfig(
    patch=8, stem=4, encoder_widths=(64, 128), encoder_depths=(1, 2), decoder_widths=(64, 128), decoder_depths=(3, 2)
)
SMALL_LITE = LiteConfig(
    patch=8,
    stem=2,
    encoder_widths=(8, 8, 12),
    encoder_depths=(1, 0, 1),
    decoder_widths=(8, 12, 8),
    decoder_depths=(1, 1, 0),
)
ONE_RESOLUTION = LiteConfig(
    patch=4, stem=4, encoder_widths=(8,), encoder_depths=(2,), decoder_widths=(8,), decoder_depths=(1,)
)
CONV = ConvConfig(
    widths=(8, 16, 16), layers_per_block=1, groups=4, mid_attention=True, quant_conv=True, post_quant_conv=True
)
MLP = MLPConfig(side=4, encoder_widths=(12, 8), decoder_widths=(10,), activation="tanh")
EVERY_KIND = {
    "linear": LinearConfig(patch=4),
    "lite": LITE,
    "small lite": SMALL_LITE,
    "one resolution": ONE_RESOLUTION,
    "conv": CONV,
    "mlp": MLP,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Weights that hide no mistake: scales and shifts away from 1 and 0, nothing near zero, all of a sound size."""
    generator = seeded(seed)
    with torch.no_grad():
        for tensor in network.parameters():
            start = 1.0 if tensor.ndim == 1 else 0.0
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 4
            tensor.copy_(start + torch.randn(tensor.shape, generator=generator) / math.sqrt(fan_in))


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(("c", "z", "features", "params"), [(3, 4, 2, 1), (1, 5, 1, 2), (3, 3, 2, 6)])
def test_four_integers_and_the_factor_set_every_shape(kind: str, c: int, z: int, features: int, params: int) -> None:
    config = EVERY_KIND[kind]
    network = BACKBONES[config.kind](config, c, z, features, params, 0)
    f = network.factor
    with torch.no_grad():
        assert network.encode(torch.zeros(2, c, 3 * f, 2 * f)).shape == (2, features * z, 3, 2)
        assert network.decode(torch.zeros(2, z, 3, 2)).shape == (2, params * c, 3 * f, 2 * f)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_weight_takes_part(kind: str) -> None:
    config = EVERY_KIND[kind]
    network = BACKBONES[config.kind](config, 3, 4, 2, 1, 0)
    x, z = torch.rand(1, 3, 16, 16, generator=seeded(0)), torch.rand(1, 4, 4, 4, generator=seeded(1))
    (network.encode(x).square().sum() + network.decode(z).square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


# conv


def reference(config: ConvConfig, z: int, c: int = 3) -> AutoencoderKL:
    widths: Any = config.widths
    down: Any = ("DownEncoderBlock2D",) * len(widths)
    up: Any = ("UpDecoderBlock2D",) * len(widths)
    return AutoencoderKL(
        in_channels=c,
        out_channels=c,
        latent_channels=z,
        block_out_channels=widths,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.groups,
        down_block_types=down,
        up_block_types=up,
        mid_block_add_attention=config.mid_attention,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.post_quant_conv,
    ).eval()


def conv_config(widths: tuple[int, ...], groups: int, layers: int = 1, **flags: bool) -> ConvConfig:
    every = {"mid_attention": True, "quant_conv": True, "post_quant_conv": True} | flags
    return ConvConfig(widths=widths, layers_per_block=layers, groups=groups, **every)


SAME_AS_DIFFUSERS = {
    "the SD shape, narrow": (conv_config((32, 64, 128, 128), 8, layers=2), 4),
    "the FLUX and SD3 shape, narrow": (conv_config((16, 32, 32, 32), 8, quant_conv=False, post_quant_conv=False), 16),
    "no attention": (conv_config((8, 16, 16), 4, mid_attention=False), 4),
    "quant conv alone": (conv_config((8, 16), 4, post_quant_conv=False), 3),
    "post quant conv alone": (conv_config((8, 16), 8, quant_conv=False), 5),
    "one resolution": (conv_config((8,), 2), 4),
    "three layers, shrinking widths": (conv_config((16, 8, 12), 4, layers=3), 1),
}


@pytest.mark.parametrize("case", SAME_AS_DIFFUSERS)
def test_conv_is_diffusers_autoencoder_kl_with_the_same_weights(case: str) -> None:
    config, z = SAME_AS_DIFFUSERS[case]
    theirs = reference(config, z)
    randomise(theirs)
    ours = ConvBackbone(config, 3, z, 2, 1, 0)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    bottleneck = DiagonalGaussianBottleneck(DiagonalGaussianConfig(logvar_min=-30.0, logvar_max=20.0), 4)
    x = 2 * torch.rand((2, 3, 32, 48), generator=seeded(1)) - 1
    with torch.no_grad():
        expected: Any = theirs.encode(x).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
        posterior = bottleneck(ours.encode(x))
        expected_x = theirs.decode(expected.mean).sample  # pyright: ignore[reportAttributeAccessIssue]
        found_x = ours.decode(expected.mean)
    assert expected.logvar.std() > 0.01 and expected_x.std() > 0.01  # something to compare
    for found, wanted in [
        (posterior.mean, expected.mean),
        (posterior.logvar, expected.logvar),
        (found_x, expected_x),
        (posterior.kl(), expected.kl()),
    ]:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().amax().item())


@pytest.mark.parametrize("flags", itertools.product([False, True], repeat=3), ids=str)
def test_conv_has_the_tensors_of_autoencoder_kl_under_every_flag(flags: tuple[bool, bool, bool]) -> None:
    attention, quant, post_quant = flags
    config = conv_config((8, 16), 4, mid_attention=attention, quant_conv=quant, post_quant_conv=post_quant)
    with torch.device("meta"):
        ours, theirs = ConvBackbone(config, 3, 4, 2, 1, 0), reference(config, 4)
    assert shapes(ours) == shapes(theirs)


def test_conv_has_the_248_tensors_of_the_true_sd_shape() -> None:
    config = conv_config((128, 256, 512, 512), 32, layers=2)
    with torch.device("meta"):
        ours, theirs = ConvBackbone(config, 3, 4, 2, 1, 0), reference(config, 4)
    assert len(shapes(ours)) == 248
    assert shapes(ours) == shapes(theirs)
    assert ours.factor == 8
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863  # the published size


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(("widths", "groups"), [((8, 12), 8), ((8, 16), 3), ((12, 8), 12)])
def test_conv_groups_that_do_not_divide_every_width_are_an_error(widths: tuple[int, ...], groups: int) -> None:
    with pytest.raises(ValueError, match=rf"groups {groups}"):
        ConvBackbone(conv_config(widths, groups), 3, 4, 2, 1, 0)


# lite


@pytest.mark.parametrize("z", [4, 16])
def test_lite_stays_within_its_budget_of_operations(z: int) -> None:
    """2 per multiply-add for one 256x256 image; an SD-VAE encoder needs 270e9."""
    with torch.device("meta"):
        network = LiteBackbone(LITE, 3, z, 2, 1, 0)
        x, latent = torch.empty(1, 3, 256, 256), torch.empty(1, z, 32, 32)
    with FlopCounterMode(display=False) as encoder:
        network.encode(x)
    with FlopCounterMode(display=False) as decoder:
        network.decode(latent)
    assert 0 < encoder.get_total_flops() <= 5.4e9
    assert 0 < decoder.get_total_flops() <= 12.4e9


@pytest.mark.parametrize("config", [LITE, SMALL_LITE, ONE_RESOLUTION], ids=["lite", "small", "one resolution"])
def test_lite_convolves_on_no_grid_finer_than_half(config: LiteConfig) -> None:
    side, grids = 64, {}

    def record(conv: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        # A kernel as wide as its stride sees each pixel once: it works on its coarse side alone, as a rearrangement
        # and a 1x1 convolution do.
        patchwise = conv.kernel_size == conv.stride and conv.padding == (0, 0)
        sizes = [inputs[0].shape[-1], output.shape[-1]]
        grids[conv] = min(sizes) if patchwise else max(sizes)

    network = LiteBackbone(config, 3, 4, 2, 1, 0)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    for conv in convolutions:
        conv.register_forward_hook(record)
    with torch.no_grad():
        network.encode(torch.zeros(1, 3, side, side))
        network.decode(torch.zeros(1, 4, side // config.patch, side // config.patch))
    assert set(grids) == set(convolutions)
    assert max(grids.values()) <= side // 2


def encoder_reach(config: LiteConfig) -> int:
    """Pixels beyond its own patch, on any side, that a latent element can see."""
    cell, reach = config.stem, config.stem  # the first 3x3 convolution
    for i, depth in enumerate(config.encoder_depths):
        cell = config.stem * 2**i
        reach += 2 * depth * cell  # two 3x3 convolutions per block
    return reach + cell  # the last


def decoder_reach(config: LiteConfig) -> int:
    """Pixels beyond its own patch, on any side, that a latent element can change."""
    cell, reach = config.patch, config.patch
    for i, depth in reversed(list(enumerate(config.decoder_depths))):
        cell = config.stem * 2**i
        reach += 2 * depth * cell
    return reach + cell


def support(gradient: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of what is not zero in (1, c, h, w)."""
    rows, columns = (gradient[0].abs().sum((0, d)).nonzero().flatten() for d in (2, 1))
    return rows[0].item(), rows[-1].item(), columns[0].item(), columns[-1].item()  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("config", [LITE, SMALL_LITE, ONE_RESOLUTION], ids=["lite", "small", "one resolution"])
def test_lite_latents_see_a_bounded_neighbourhood_and_all_of_their_patch(config: LiteConfig) -> None:
    network, f = LiteBackbone(config, 1, 2, 2, 1, 0), config.patch
    randomise(network)
    row, column, cells = 14, 12, 26  # a latent element in a grid of 26x26
    x = torch.rand((1, 1, cells * f, cells * f), generator=seeded(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(network.encode(x)[0, :, row, column].sum(), x)
    reach = encoder_reach(config)
    assert reach < row * f  # the bound is inside the image
    top, bottom, left, right = support(gradient)
    assert row * f - reach <= top <= row * f - 2 and (row + 1) * f + 1 <= bottom < (row + 1) * f + reach
    assert column * f - reach <= left <= column * f - 2 and (column + 1) * f + 1 <= right < (column + 1) * f + reach
    assert (gradient[..., row * f : (row + 1) * f, column * f : (column + 1) * f] != 0).all()


@pytest.mark.parametrize("config", [LITE, SMALL_LITE, ONE_RESOLUTION], ids=["lite", "small", "one resolution"])
def test_lite_pixels_come_from_a_bounded_neighbourhood_of_latents(config: LiteConfig) -> None:
    network, f = LiteBackbone(config, 1, 2, 2, 1, 0), config.patch
    randomise(network)
    row, column, cells = 14, 12, 26
    z = torch.rand((1, 2, cells, cells), generator=seeded(0)).requires_grad_()
    pixel = network.decode(z)[0, 0, row * f + 1, column * f + f - 1]
    (gradient,) = torch.autograd.grad(pixel, z)
    reach = math.ceil(decoder_reach(config) / f)
    assert reach < 12
    top, bottom, left, right = support(gradient)
    assert row - reach <= top < row < bottom <= row + reach
    assert column - reach <= left < column < right <= column + reach
    assert (gradient[..., row, column] != 0).all()


def test_lite_on_a_crop_with_margins_gives_the_latents_and_pixels_of_the_whole() -> None:
    network, f = LiteBackbone(SMALL_LITE, 3, 4, 2, 1, 0), SMALL_LITE.patch
    randomise(network)
    x = torch.rand((1, 3, 20 * f, 18 * f), generator=seeded(0))
    z = torch.randn((1, 4, 20, 18), generator=seeded(1))
    with torch.no_grad():
        margin = math.ceil(encoder_reach(SMALL_LITE) / f)
        crop = network.encode(x[..., (8 - margin) * f : (11 + margin) * f, (7 - margin) * f : (9 + margin) * f])
        whole = network.encode(x)[..., 8:11, 7:9]
        torch.testing.assert_close(crop[..., margin:-margin, margin:-margin], whole, rtol=1e-4, atol=1e-4)

        margin = math.ceil(decoder_reach(SMALL_LITE) / f)
        pixels = network.decode(z[..., 8 - margin : 11 + margin, 7 - margin : 9 + margin])
        whole = network.decode(z)[..., 8 * f : 11 * f, 7 * f : 9 * f]
        m = margin * f
        torch.testing.assert_close(pixels[..., m:-m, m:-m], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [LITE, SMALL_LITE, ONE_RESOLUTION], ids=["lite", "small", "one resolution"])
def test_lite_starts_as_nearly_its_linear_path_and_not_exactly(config: LiteConfig) -> None:
    torch.manual_seed(0)
    network, f = LiteBackbone(config, 3, 4, 2, 1, 0), config.patch
    x = 2 * torch.rand((2, 3, 6 * f, 6 * f), generator=seeded(0)) - 1
    z = torch.randn((2, 4, 6, 6), generator=seeded(1))
    with torch.no_grad():
        for whole, linear in [
            (network.encode(x), network.linear.encode(x)),
            (network.decode(z), network.linear.decode(z)),
        ]:
            share = (whole - linear).std() / linear.std()
            assert 1e-5 < share.item() < 0.05  # zero would leave the last layer's inputs without a gradient


def test_a_residual_block_starts_as_nearly_the_identity_and_not_exactly() -> None:
    torch.manual_seed(0)
    x = torch.randn((1, 8, 9, 9), generator=seeded(0))
    with torch.no_grad():
        assert 1e-5 < (ResidualBlock(8)(x) - x).std().item() < 0.05


def test_lite_takes_the_closed_form_into_its_linear_path() -> None:
    moments, sigma = photograph_moments(3, 8), 0.1
    network, linear = LiteBackbone(LITE, 3, 4, 2, 1, 0), LinearBackbone(LinearConfig(patch=8), 3, 4, 2, 1, 0)
    network.start_from_closed_form(moments, sigma)
    linear.start_from_closed_form(moments, sigma)
    for name, tensor in linear.state_dict().items():
        assert torch.equal(network.linear.state_dict()[name], tensor)


WRONG_LITE = {
    "full resolution": ({"stem": 1, "patch": 2}, r"stem 1 .*at least 2"),
    "no resolution": ({"encoder_widths": (), "encoder_depths": ()}, "encoder_widths"),
    "encoder depths too few": ({"encoder_depths": (1,)}, r"encoder_widths.*encoder_depths"),
    "decoder depths too many": ({"decoder_depths": (1, 1, 1)}, r"decoder_widths.*decoder_depths"),
    "patch too large for the encoder": ({"patch": 16}, r"patch of 16.*encoder_widths"),
    "patch no power of two times stem": ({"patch": 12}, "patch of 12"),
    "decoder of other factor": ({"decoder_widths": (8, 8, 8), "decoder_depths": (1, 1, 1)}, "decoder_widths"),
}


@pytest.mark.parametrize("case", WRONG_LITE)
def test_a_lite_config_that_does_not_fit_is_an_error_that_names_the_field(case: str) -> None:
    change, message = WRONG_LITE[case]
    with pytest.raises(ValueError, match=message):
        LiteBackbone(dataclasses.replace(LITE, **change), 3, 4, 2, 1, 0)


# linear


def photograph_moments(c: int, patch: int, seed: int = 0) -> PatchMoments:
    """Moments with a spectrum that falls as that of photographs does, and no two eigenvalues alike."""
    d = c * patch * patch
    basis, _ = torch.linalg.qr(torch.randn((d, d), generator=seeded(seed), dtype=torch.float64))
    variance = d / (1 + torch.arange(d, dtype=torch.float64)) ** 2
    mean = torch.linspace(-0.3, 0.4, c, dtype=torch.float64)
    return PatchMoments(mean, (basis * variance) @ basis.T)


def patches_with(moments: PatchMoments, patch: int) -> torch.Tensor:
    """(2d, c, patch, patch) images of one patch each whose moments are exactly these."""
    c, d = len(moments.mean), len(moments.covariance)
    root = torch.linalg.cholesky(moments.covariance) * math.sqrt(d)  # (d, d), one deviation per column
    deviations = torch.cat([root.T, -root.T])  # (2d, d)
    return (deviations + moments.mean.repeat_interleave(patch * patch)).reshape(2 * d, c, patch, patch)


def closed_form(c: int, patch: int, z: int, sigma: float, params: int = 1) -> tuple[LinearBackbone, PatchMoments]:
    moments = photograph_moments(c, patch)
    network = LinearBackbone(LinearConfig(patch=patch), c, z, 2, params, 0).double()
    network.start_from_closed_form(moments, sigma)
    return network, moments


def expected_elbo(network: LinearBackbone, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Nats per image of one patch, exact: the expectation over z of a linear decoder's squared error."""
    mean, logvar = network.encode(x).flatten(1).chunk(2, dim=1)  # (n, z) each
    error = (x - network.decode(mean[..., None, None])).flatten(1).square().sum(1)  # (n,)
    spread = (logvar.exp() * network.decoder.weight.flatten(1).square().sum(1)).sum(1)  # (n,)
    d = x[0].numel()
    log_prob = -0.5 * (error + spread) / sigma**2 - 0.5 * d * math.log(2 * math.pi * sigma**2)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(1)
    return (log_prob - kl).mean()


@pytest.mark.parametrize(("c", "patch", "z"), [(3, 4, 5), (1, 8, 16), (2, 2, 8), (3, 1, 2)])
def test_at_vanishing_sigma_the_linear_pair_is_the_svd_projection_of_patches(c: int, patch: int, z: int) -> None:
    x = torch.randn((2, c, 12 * patch, 15 * patch), generator=seeded(0), dtype=torch.float64)
    x = x.cumsum(2).cumsum(3)
    x = x / x.std() + torch.arange(c, dtype=torch.float64)[:, None, None]
    patches = unfold(x, patch, stride=patch).transpose(1, 2).flatten(0, 1)  # (n, d)
    mean = x.mean((0, 2, 3))
    centred = patches - mean.repeat_interleave(patch * patch)
    network = LinearBackbone(LinearConfig(patch=patch), c, z, 2, 1, 0).double()
    network.start_from_closed_form(PatchMoments(mean, centred.T @ centred / len(centred)), sigma=1e-7)
    with torch.no_grad():
        found = network.decode(network.encode(x)[:, :z])
    u, s, vh = torch.linalg.svd(centred, full_matrices=False)
    rank_z = (u[:, :z] * s[:z]) @ vh[:z] + mean.repeat_interleave(patch * patch)
    torch.testing.assert_close(
        unfold(found, patch, stride=patch).transpose(1, 2).flatten(0, 1), rank_z, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("c", "patch", "z", "sigma"), [(3, 2, 4, 0.1), (1, 4, 16, 0.05), (3, 2, 12, 0.2), (2, 3, 1, 1.0)]
)
def test_the_closed_form_is_a_stationary_point_of_the_expected_elbo(c: int, patch: int, z: int, sigma: float) -> None:
    network, moments = closed_form(c, patch, z, sigma)
    assert torch.linalg.eigvalsh(moments.covariance)[-z] > 1.05 * sigma**2
    expected_elbo(network, patches_with(moments, patch), sigma).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().amax().item() < 1e-8, name

    with torch.no_grad():  # the same measure notices a weight that is wrong by a thousandth
        network.decoder.weight.mul_(1.001)
    network.zero_grad()
    expected_elbo(network, patches_with(moments, patch), sigma).backward()
    assert network.decoder.weight.grad is not None
    assert network.decoder.weight.grad.abs().amax().item() > 1e-4


@pytest.mark.parametrize("seed", range(5))
def test_no_change_of_the_closed_form_raises_the_expected_elbo(seed: int) -> None:
    sigma = 0.2
    network, moments = closed_form(2, 2, 3, sigma)
    x, generator = patches_with(moments, 2), seeded(seed)
    with torch.no_grad():
        best = expected_elbo(network, x, sigma).item()
        start = [p.clone() for p in network.parameters()]
        for size in (1e-3, 1e-2, 0.1, 1.0):
            for parameter, value in zip(network.parameters(), start, strict=True):
                step = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(value + size * step)
            assert expected_elbo(network, x, sigma).item() < best


def test_the_closed_form_elbo_is_the_log_likelihood_of_probabilistic_pca() -> None:
    sigma, c, patch, z = 0.3, 3, 2, 4
    network, moments = closed_form(c, patch, z, sigma)
    variance = torch.linalg.eigvalsh(moments.covariance).flip(0)
    kept, dropped = variance[:z], variance[z:]
    d = len(variance)
    # Tipping & Bishop (1999), eq. 4, with the covariance of the model in its own basis.
    log_determinant = kept.log().sum() + (d - z) * math.log(sigma**2)
    expected = -0.5 * (d * math.log(2 * math.pi) + log_determinant + z + dropped.sum() / sigma**2)
    with torch.no_grad():
        found = expected_elbo(network, patches_with(moments, patch), sigma)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_closed_form_posterior_variance_is_that_of_noise_over_that_of_the_component() -> None:
    sigma, z = 0.1, 4
    network, moments = closed_form(3, 2, z, sigma)
    variance = torch.linalg.eigvalsh(moments.covariance).flip(0)[:z]  # strongest first
    x = torch.randn((1, 3, 6, 6), generator=seeded(0), dtype=torch.float64)
    with torch.no_grad():
        logvar = network.encode(x)[:, z:]
    expected = (sigma**2 / variance)[None, :, None, None].expand(1, z, 3, 3)
    torch.testing.assert_close(logvar.exp(), expected)


def test_closed_form_latents_are_uncorrelated_with_unit_variance_in_all() -> None:
    """The aggregate posterior has the prior's moments: variance of the mean plus posterior variance is 1."""
    sigma, z = 0.1, 4
    network, moments = closed_form(3, 2, z, sigma)
    with torch.no_grad():
        mean, logvar = network.encode(patches_with(moments, 2)).flatten(1).chunk(2, dim=1)
    aggregate = mean.T @ mean / len(mean) + torch.diag(logvar.exp().mean(0))
    torch.testing.assert_close(aggregate, torch.eye(z, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(mean.mean(0), torch.zeros(z, dtype=torch.float64), rtol=0, atol=1e-9)


def test_a_component_weaker_than_the_noise_keeps_a_small_weight_that_gradients_can_grow() -> None:
    sigma = 0.5
    moments = photograph_moments(1, 2)
    moments = PatchMoments(moments.mean, moments.covariance * 1e-3)  # all far below sigma^2
    network = LinearBackbone(LinearConfig(patch=2), 1, 4, 2, 1, 0)
    network.start_from_closed_form(moments, sigma)
    for tensor in network.state_dict().values():
        assert tensor.isfinite().all()
    norms = network.decoder.weight.detach().flatten(1).norm(dim=1)
    assert (norms > 0.01 * sigma).all() and (norms < sigma).all()


def test_more_latents_than_dimensions_of_a_patch_are_an_error() -> None:
    network = LinearBackbone(LinearConfig(patch=2), 1, 5, 2, 1, 0)
    with pytest.raises(ValueError, match=r"5 latent channels.*4 dimensions"):
        network.start_from_closed_form(photograph_moments(1, 2), 0.1)
    LinearBackbone(LinearConfig(patch=2), 1, 4, 2, 1, 0).start_from_closed_form(photograph_moments(1, 2), 0.1)


def test_moments_of_another_patch_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"moments of 16 values.*3x4x4"):
        LinearBackbone(LinearConfig(patch=4), 3, 4, 2, 1, 0).start_from_closed_form(photograph_moments(1, 4), 0.1)


def test_the_closed_form_fits_every_count_of_features_and_parameters() -> None:
    moments, sigma = photograph_moments(3, 4), 0.1
    plain = LinearBackbone(LinearConfig(patch=4), 3, 6, 2, 1, 0)
    deterministic, per_pixel = (LinearBackbone(LinearConfig(patch=4), 3, 6, f, p, 0) for f, p in [(1, 1), (2, 2)])
    for network in (plain, deterministic, per_pixel):
        network.start_from_closed_form(moments, sigma)
    x, z = torch.randn((1, 3, 8, 8), generator=seeded(0)), torch.randn((1, 6, 2, 2), generator=seeded(1))
    torch.testing.assert_close(deterministic.encode(x), plain.encode(x)[:, :6])
    torch.testing.assert_close(per_pixel.decode(z)[:, :3], plain.decode(z))
    assert torch.equal(per_pixel.decode(z)[:, 3:], torch.zeros(1, 3, 8, 8))  # sigma stays at its starting point


def test_a_linear_latent_sees_exactly_its_patch() -> None:
    network = LinearBackbone(LinearConfig(patch=4), 3, 2, 2, 1, 0)
    x = torch.rand((1, 3, 20, 24), generator=seeded(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(network.encode(x)[0, :, 2, 3].sum(), x)
    assert support(gradient) == (8, 11, 12, 15)
    assert (gradient[..., 8:12, 12:16] != 0).all()


def test_an_overlapping_latent_sees_and_makes_pixels_around_its_patch() -> None:
    network = LinearBackbone(LinearConfig(patch=4, overlap=2), 3, 2, 2, 1, 0)
    x = torch.rand((1, 3, 20, 24), generator=seeded(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(network.encode(x)[0, :, 2, 3].sum(), x)
    assert support(gradient) == (6, 13, 10, 17)
    z = torch.rand((1, 2, 5, 6), generator=seeded(1)).requires_grad_()
    assert network.decode(z).shape == (1, 3, 20, 24)
    (gradient,) = torch.autograd.grad(network.decode(z)[0, :, 8:12, 12:16].sum(), z)
    assert support(gradient) == (1, 3, 2, 4)
    assert network.encoder_margin == network.decoder_margin == 1


def test_the_overlap_weighs_nothing_in_the_closed_form() -> None:
    moments = photograph_moments(3, 4)
    plain, overlapping = (LinearBackbone(LinearConfig(patch=4, overlap=overlap), 3, 6, 2, 1, 0) for overlap in (0, 3))
    for network in (plain, overlapping):
        network.start_from_closed_form(moments, 0.1)
    x = torch.rand((2, 3, 12, 16), generator=seeded(2))
    torch.testing.assert_close(overlapping.encode(x), plain.encode(x), rtol=1e-4, atol=1e-4)
    z = plain.encode(x).chunk(2, 1)[0]
    torch.testing.assert_close(overlapping.decode(z), plain.decode(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overlap", [-1, 5])
def test_an_overlap_beyond_the_next_patch_is_refused(overlap: int) -> None:
    with pytest.raises(ValueError, match=f"overlap {overlap} must be from 0 to the patch of 4 pixels"):
        LinearBackbone(LinearConfig(patch=4, overlap=overlap), 3, 2, 2, 1, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_a_linear_path_in_float32(dtype: torch.dtype) -> None:
    network = LinearBackbone(LinearConfig(patch=4), 3, 6, 2, 1, 0)
    network.start_from_closed_form(photograph_moments(3, 4), 0.05)
    x, z = torch.randn((1, 3, 8, 8), generator=seeded(0)), torch.randn((1, 6, 2, 2), generator=seeded(1))
    with torch.no_grad():
        features, pixels = network.encode(x), network.decode(z)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(network.encode(x), features)
            assert torch.equal(network.decode(z), pixels)


@pytest.mark.parametrize("kind", ["linear", "lite"])
def test_a_backbone_of_coarse_weights_takes_float32_images_under_autocast(kind: str) -> None:
    config = EVERY_KIND[kind]
    network = BACKBONES[config.kind](config, 3, 4, 2, 1, 0).to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network.encode(torch.zeros(1, 3, 16, 16)).isfinite().all()
        assert network.decode(torch.zeros(1, 4, 2, 2)).isfinite().all()
