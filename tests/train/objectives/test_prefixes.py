"""Test training of nested latents: which channels an image keeps, and that the others take no part."""

import dataclasses
from typing import Any

import pytest
import torch

from latent_codec.model.codec import Codec
from latent_codec.model.config import LinearConfig
from latent_codec.model.file import LatentStatistics
from latent_codec.prior import factorized
from latent_codec.prior.context import ContextConfig
from latent_codec.prior.priors import Priors
from latent_codec.prior.quantizer import channel_steps_from_std
from tests.support.networks import config_of, make_codec
from train.config.presets import photo, photo_joint
from train.context_prior.network import ContextNet
from train.data.crops import CentreCrops
from train.objectives.elbo import ELBO
from train.objectives.joint import Joint, measure
from train.objectives.prefixes import drawn_prefixes, within

Z, PREFIXES, KEYS = 6, (1, 3, 6), torch.arange(7)
STATISTICS = LatentStatistics(
    source="made up", images=1, mean=(0.0,) * Z, std=(1.0,) * Z, posterior_std=(0.01, 0.1, 0.1, 0.2, 0.4, 0.8)
)


def test_an_image_keeps_all_channels_or_one_of_the_shorter_prefixes() -> None:
    kept = drawn_prefixes(PREFIXES, 0.3, torch.arange(20_000), Z)
    counts = torch.bincount(kept, minlength=Z + 1)
    assert counts.nonzero().flatten().tolist() == list(PREFIXES)
    torch.testing.assert_close(counts[list(PREFIXES)] / 20_000, torch.tensor([0.15, 0.15, 0.7]), rtol=0, atol=0.01)
    assert within(torch.tensor([2, 0]), 3).tolist() == [[True, True, False], [False] * 3]
    assert (drawn_prefixes((), 0.3, KEYS, Z) == Z).all()


def codec(prefixes: tuple[int, ...] = PREFIXES) -> Codec:
    made = make_codec(dataclasses.replace(config_of(LinearConfig(patch=4), z=Z), prefixes=prefixes))
    steps = channel_steps_from_std(torch.ones(Z).numpy(), torch.tensor(STATISTICS.posterior_std).numpy())
    made.statistics, made.priors = STATISTICS, Priors(steps, factorized.fit(torch.randn(Z, 99), steps), None)
    return made


def objective(kind: str, made: Codec, share: float = 1.0, **fields: Any) -> ELBO | Joint:
    if kind == "elbo":
        return ELBO(dataclasses.replace(photo().objective, prefix_share=share, **fields), made, None)
    assert made.priors is not None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ContextConfig(groups=(1, 2, 3), width=8, centred=True)
        net = ContextNet(shape, made.priors.channel_steps, STATISTICS)
    return Joint(dataclasses.replace(photo_joint().objective, prefix_share=share, **fields), made, net)


def losses(trained: ELBO | Joint) -> torch.Tensor:
    pixels = torch.randint(0, 256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = pixels.expand(len(KEYS), -1, -1, -1), KEYS, torch.zeros_like(KEYS), torch.ones(()), False
    return trained(*batch).loss


@pytest.mark.parametrize("kind", ["elbo", "joint"])
def test_channels_beyond_an_images_prefix_neither_cost_nor_learn(kind: str) -> None:
    made = codec()
    assert drawn_prefixes(PREFIXES, 1.0, KEYS, Z).max() == 3
    losses(objective(kind, made)).backward()
    mean, _ = made.backbone.get_submodule("encoder").weight.grad.chunk(2)  # pyright: ignore
    learned = mean.flatten(1).any(1)
    assert learned[:3].all()
    if kind == "elbo":
        assert not learned[3:].any()
    back = made.backbone.get_submodule("decoder").weight.grad.flatten(1).any(1)  # pyright: ignore
    assert back.tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("kind", ["elbo", "joint"])
def test_without_shorter_prefixes_a_nested_model_trains_as_any_other(kind: str) -> None:
    fields = {"noise_steps": (0.5, 1.0)} if kind == "joint" else {}  # noise stays below what channels hold
    nested, plain = (losses(objective(kind, codec(prefixes), 0.0, **fields)) for prefixes in (PREFIXES, ()))
    torch.testing.assert_close(nested, plain)


def test_noise_far_above_what_a_channel_holds_leaves_it_out() -> None:
    """The last channel holds 0.6, and its noise is 0.8 at step 1, so 1.6 at step 2."""
    made = codec()
    losses(objective("joint", made, 0.0, noise_steps=(2.0, 2.0), mode_weight=0.0)).backward()
    back = made.backbone.get_submodule("decoder").weight.grad.flatten(1).any(1)  # pyright: ignore
    assert back.tolist() == [True] * 5 + [False]


def test_a_fine_weight_below_2_favours_fine_steps() -> None:
    """Half a step then weighs half, not a quarter."""
    found = [
        losses(objective("joint", codec(), 0.0, noise_steps=(0.5, 0.5), fine_weight=power)).item() for power in (1, 2)
    ]
    assert found[0] == pytest.approx(2 * found[1])


@pytest.mark.parametrize("channels", PREFIXES)
def test_the_decoder_takes_zeros_for_channels_that_a_prefix_lacks(channels: int) -> None:
    made, z = codec(), torch.randn(2, Z, 3, 4, generator=torch.Generator().manual_seed(0))
    filled = torch.where(torch.arange(Z)[:, None, None] < channels, z, 0)
    torch.testing.assert_close(made.decode(z[:, :channels]), made.decode(filled), rtol=0, atol=0)


def test_latents_of_no_prefix_are_refused() -> None:
    for prefixes, message in ((PREFIXES, "2 channels; the model takes 1, 3, 6"), ((), "the model takes 6")):
        with pytest.raises(ValueError, match=message):
            codec(prefixes).decode(torch.zeros(1, 2, 3, 3))


def test_evaluations_measure_the_modes_of_all_prefixes_and_fine_steps() -> None:
    made = codec()
    prior = objective("joint", made).prior  # pyright: ignore[reportAttributeAccessIssue]
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        found = measure(prior, made, CentreCrops(pixels, ["a", "b"], torch.zeros(2, dtype=torch.int64)), None)
        decoded = made.decode_uint8(made.encode(pixels).mode()[:, :3]).double()
    error = (decoded - pixels).square().mean((1, 2, 3))
    assert found["psnr_channels_3"] == pytest.approx((10 * torch.log10(255**2 / error)).mean().item())
    assert {"psnr_channels_1", "psnr_channels_6", "bpp_step_0.125", "psnr_step_0.25", "psnr_step_2"} < set(found)
