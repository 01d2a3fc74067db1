"""Codebooks: the nearest code, gradients straight through it, and how evenly codes are used."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.model.codebooks import FiniteScalarQuantizer, VectorQuantizer, perplexity
from latent_codec.model.config import FiniteScalarConfig, VectorQuantizerConfig
from tests.support.networks import seeded

K, Z = 11, 3


def vector_quantizer() -> VectorQuantizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VectorQuantizer(VectorQuantizerConfig(codes=K), Z)


def scalar_quantizer(*levels: int) -> FiniteScalarQuantizer:
    return FiniteScalarQuantizer(FiniteScalarConfig(levels=levels), len(levels))


def features(channels: int, *, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(2, channels, 4, 5, generator=seeded(seed))


def every_index(codes: int) -> torch.Tensor:
    return torch.arange(codes)[None, :, None]


def test_vectors_are_the_nearest_of_the_codebook() -> None:
    quantizer, x = vector_quantizer(), features(Z)
    posterior = quantizer(x)
    apart = x.double()[:, None] - quantizer.codebook.detach().double()[None, :, :, None, None]  # (b, K, z, h, w)
    assert torch.equal(posterior.indices, apart.square().sum(2).argmin(1))
    assert torch.equal(posterior.mode(), quantizer.look_up(posterior.indices))  # to the bit, as a decoder has them


def test_many_positions_are_the_same_as_a_few() -> None:
    quantizer = vector_quantizer()
    x = torch.randn(1, Z, 100, 120, generator=seeded(1))  # more than are compared at once
    assert torch.equal(quantizer(x).indices[:, :, 60:], quantizer(x[..., 60:]).indices)


@pytest.mark.parametrize("quantizer", [vector_quantizer(), scalar_quantizer(4, 3, 5)], ids=["vq", "fsq"])
def test_a_value_that_is_not_finite_has_no_code(quantizer: VectorQuantizer | FiniteScalarQuantizer) -> None:
    x = features(Z)
    x[1, 2, 3, 4] = math.nan
    posterior = quantizer(x)
    coded = posterior.coded
    assert coded.shape == (2, 1, 4, 5) and coded[1, 0, 3, 4] == -1
    coded[1, 0, 3, 4] = 0
    assert (coded >= 0).all()


def test_gradients_go_straight_through_to_the_encoder_and_not_to_the_codes() -> None:
    quantizer, x, weight = vector_quantizer(), features(Z).requires_grad_(), features(Z, seed=1)
    (weight * quantizer(x).mode()).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight) and quantizer.codebook.grad is None
    levels = torch.tensor((8, 5, 2))[:, None, None]
    x.grad = None
    (weight * scalar_quantizer(8, 5, 2)(x).mode()).sum().backward()
    slope = levels / (levels - 1) * (1 - torch.tanh(x.detach()).square())
    torch.testing.assert_close(x.grad, weight * slope)


def test_the_commitment_moves_the_encoder_and_the_codebook_loss_the_codes() -> None:
    quantizer, x = vector_quantizer(), features(Z).requires_grad_()
    posterior = quantizer(x)
    distance = (x - posterior.vectors).square().flatten(1).sum(1)
    assert torch.equal(posterior.commitment(), distance) and torch.equal(posterior.codebook_loss(), distance)
    posterior.commitment().sum().backward()
    assert quantizer.codebook.grad is None and x.grad is not None
    torch.testing.assert_close(x.grad, 2 * (x - posterior.vectors).detach())
    x.grad = None
    quantizer(x).codebook_loss().sum().backward()
    assert x.grad is None and quantizer.codebook.grad is not None
    use = posterior.use() * posterior.indices.numel()
    torch.testing.assert_close(quantizer.codebook.grad, 2 * (use[:, :1] * quantizer.codebook.detach() - use[:, 1:]))


def test_use_is_the_share_of_each_code_and_what_it_stands_for() -> None:
    quantizer, x = vector_quantizer(), features(Z)
    posterior = quantizer(x)
    use = posterior.use()
    assert use.shape == (K, 1 + Z) and use[:, 0].sum().item() == pytest.approx(1)
    flat, index = x.movedim(1, -1).reshape(-1, Z), posterior.indices.flatten()
    for code in range(K):
        own = flat[index == code]
        assert use[code, 0].item() == pytest.approx(len(own) / len(flat))
        torch.testing.assert_close(use[code, 1:], own.sum(0) / len(flat))


def test_the_kl_is_that_against_a_uniform_choice() -> None:
    assert vector_quantizer()(features(Z)).kl().tolist() == pytest.approx([20 * math.log(K)] * 2)
    assert scalar_quantizer(4, 3, 5)(features(Z)).kl().tolist() == pytest.approx([20 * math.log(60)] * 2)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=20).filter(any))
def test_perplexity_counts_codes(counts: list[int]) -> None:
    use = torch.tensor(counts, dtype=torch.float32)
    value = perplexity(use)
    assert 1 - 1e-9 <= value <= sum(c > 0 for c in counts) + 1e-6
    assert perplexity(torch.cat([use, use])) == pytest.approx(2 * value)  # each code in two of equal use


@pytest.mark.parametrize("levels", [(2,), (3,), (8, 5, 5, 5), (7, 2), (4, 3, 2)])
def test_every_index_is_a_vector_of_levels_and_back(levels: tuple[int, ...]) -> None:
    quantizer, codes = scalar_quantizer(*levels), math.prod(levels)
    vectors = quantizer.look_up(every_index(codes))  # (1, z, codes, 1)
    for channel, n in zip(vectors[0], levels, strict=True):
        torch.testing.assert_close(channel.unique(), torch.linspace(-1, 1, n))
    assert len(vectors[0, :, :, 0].T.unique(dim=0)) == codes
    # The middle of a level's part of the range of tanh.
    per_channel = torch.tensor(levels)[:, None, None]
    middle = ((vectors + 1) * (per_channel - 1) / 2 + 0.5) / per_channel * 2 - 1
    posterior = quantizer(torch.atanh(middle))
    assert torch.equal(posterior.indices, every_index(codes)) and torch.equal(posterior.mode(), vectors)


def test_levels_divide_the_range_of_tanh_evenly_and_reach_to_infinity() -> None:
    bounded = torch.linspace(-0.9999, 0.9999, 4001).reshape(1, 1, 1, -1)
    for n in (2, 3, 8):
        counts = torch.bincount(scalar_quantizer(n)(torch.atanh(bounded)).indices.flatten())
        assert len(counts) == n and counts.max() - counts.min() <= 2
    for value in (-math.inf, -40.0, 40.0, math.inf):
        posterior = scalar_quantizer(8, 5)(torch.full((1, 2, 1, 1), value))
        assert posterior.mode().flatten().tolist() == [math.copysign(1, value)] * 2
