"""The linear backbone takes the closed form of probabilistic PCA, which is the optimum of the linear VAE."""

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import unfold

from latent_codec.model.config import LinearConfig
from latent_codec.model.networks import LinearBackbone
from latent_codec.model.networks.linear import PatchMoments
from tests.support.networks import photograph_moments, seeded, shape, support


def patches_with(moments: PatchMoments, patch: int) -> torch.Tensor:
    """Return (2d, c, patch, patch) images of one patch each whose moments are exactly these."""
    c, d = len(moments.mean), len(moments.covariance)
    root = torch.linalg.cholesky(moments.covariance) * math.sqrt(d)  # (d, d), one deviation per column
    deviations = torch.cat([root.T, -root.T])  # (2d, d)
    return (deviations + moments.mean.repeat_interleave(patch * patch)).reshape(2 * d, c, patch, patch)


def expected_elbo(network: LinearBackbone, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Return nats per image of one patch, exact: the expectation over z of a linear decoder's squared error."""
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
    network = LinearBackbone(LinearConfig(patch=patch), shape(c, z)).double()
    network.start_from_closed_form(PatchMoments(mean, centred.T @ centred / len(centred)), sigma=1e-7)
    with torch.no_grad():
        found = network.decode(network.encode(x)[:, :z])
    u, s, vh = torch.linalg.svd(centred, full_matrices=False)
    rank_z = (u[:, :z] * s[:z]) @ vh[:z] + mean.repeat_interleave(patch * patch)
    found = unfold(found, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(found, rank_z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("c", "patch", "z", "sigma"), [(3, 2, 4, 0.1), (1, 4, 16, 0.05), (3, 2, 12, 0.2), (2, 3, 1, 1.0)]
)
def test_the_elbo_of_the_closed_form_is_the_largest_there_is(c: int, patch: int, z: int, sigma: float) -> None:
    """It is the likelihood of probabilistic PCA at its maximum (Tipping & Bishop 1999, eqs. 4 and 7)."""
    network, moments = LinearBackbone(LinearConfig(patch=patch), shape(c, z)).double(), photograph_moments(c, patch)
    network.start_from_closed_form(moments, sigma)
    variance = torch.linalg.eigvalsh(moments.covariance).flip(0)
    kept, dropped, d = variance[:z], variance[z:], len(variance)
    assert kept[-1] > 1.05 * sigma**2
    log_determinant = kept.log().sum() + (d - z) * math.log(sigma**2)
    largest = -0.5 * (d * math.log(2 * math.pi) + log_determinant + z + dropped.sum() / sigma**2)
    x = patches_with(moments, patch)
    with torch.no_grad():
        torch.testing.assert_close(expected_elbo(network, x, sigma), largest, rtol=1e-9, atol=1e-9)
        for parameter in network.parameters():  # any change is noticed
            start = parameter.clone()
            parameter.add_(1e-3 * torch.randn(start.shape, generator=seeded(0), dtype=torch.float64))
            assert expected_elbo(network, x, sigma) < largest
            parameter.copy_(start)


def test_a_component_weaker_than_the_noise_keeps_a_small_weight_that_gradients_can_grow() -> None:
    sigma = 0.5
    moments = photograph_moments(1, 2)
    moments = PatchMoments(moments.mean, moments.covariance * 1e-3)  # all far below sigma^2
    network = LinearBackbone(LinearConfig(patch=2), shape(c=1, z=4))
    network.start_from_closed_form(moments, sigma)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    norms = network.decoder.weight.detach().flatten(1).norm(dim=1)
    assert (norms > 0.01 * sigma).all() and (norms < sigma).all()


@pytest.mark.parametrize(
    ("patch", "c", "z", "message"),
    [(2, 1, 5, r"5 latent channels.*4 dimensions"), (4, 3, 4, r"moments of 4 values.*3x4x4")],
    ids=["more latents than dimensions", "moments of another patch"],
)
def test_moments_that_give_no_closed_form_are_an_error(patch: int, c: int, z: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearBackbone(LinearConfig(patch=patch), shape(c, z)).start_from_closed_form(photograph_moments(1, 2), 0.1)


def test_the_closed_form_fits_every_count_of_features_and_parameters_and_gives_the_overlap_no_weight() -> None:
    plain, deterministic, per_pixel, overlapping = (
        LinearBackbone(LinearConfig(patch=4, overlap=overlap), shape(z=6, features=features, params=params))
        for features, params, overlap in [(2, 1, 0), (1, 1, 0), (2, 2, 0), (2, 1, 3)]
    )
    for network in (plain, deterministic, per_pixel, overlapping):
        network.start_from_closed_form(photograph_moments(3, 4), 0.1)
    x, z = torch.randn((1, 3, 8, 12), generator=seeded(0)), torch.randn((1, 6, 2, 3), generator=seeded(1))
    torch.testing.assert_close(deterministic.encode(x), plain.encode(x)[:, :6])
    torch.testing.assert_close(overlapping.encode(x), plain.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(overlapping.decode(z), plain.decode(z), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(per_pixel.decode(z)[:, :3], plain.decode(z))
    assert torch.equal(per_pixel.decode(z)[:, 3:], torch.zeros(1, 3, 8, 12))  # sigma stays at its starting point


@pytest.mark.parametrize(
    ("overlap", "seen", "made"), [(0, (8, 11, 12, 15), (2, 2, 3, 3)), (2, (6, 13, 10, 17), (1, 3, 2, 4))]
)
def test_a_latent_sees_and_makes_its_patch_and_overlap(overlap: int, seen: Any, made: Any) -> None:
    network = LinearBackbone(LinearConfig(patch=4, overlap=overlap), shape(z=2))
    x = torch.rand((1, 3, 20, 24), generator=seeded(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(network.encode(x)[0, :, 2, 3].sum(), x)
    assert support(gradient) == seen and (gradient[..., 8:12, 12:16] != 0).all()
    z = torch.rand((1, 2, 5, 6), generator=seeded(1)).requires_grad_()
    assert network.decode(z).shape == (1, 3, 20, 24)
    (gradient,) = torch.autograd.grad(network.decode(z)[0, :, 8:12, 12:16].sum(), z)
    assert support(gradient) == made and network.encoder_margin == network.decoder_margin == bool(overlap)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_a_linear_path_in_float32(dtype: torch.dtype) -> None:
    network = LinearBackbone(LinearConfig(patch=4), shape(z=6))
    network.start_from_closed_form(photograph_moments(3, 4), 0.05)
    x, z = torch.randn((1, 3, 8, 8), generator=seeded(0)), torch.randn((1, 6, 2, 2), generator=seeded(1))
    with torch.no_grad():
        features, pixels = network.encode(x), network.decode(z)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(network.encode(x), features) and torch.equal(network.decode(z), pixels)
