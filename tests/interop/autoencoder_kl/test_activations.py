"""Check that the peak covers every module's output, on images that are always the same."""

import math

import pytest
import torch
from torch import nn

from latent_codec.interop.autoencoder_kl.activations import made_up_images, middles, overflows, watched


def test_the_peak_is_the_largest_magnitude_of_any_module() -> None:
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        network[0].weight.fill_(-100.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
        network[2].weight.fill_(1.0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with watched(network) as peak:
        network(torch.ones(3, 1))
    assert peak.value == 100
    network(torch.full((1, 1), 9.0))
    assert peak.value == 100  # it is watched no more


def test_float16_overflows_above_a_quarter_of_its_range_and_at_infinity_and_nan() -> None:
    assert not overflows(65504 / 4) and overflows(65504 / 4 + 1)
    for value in (math.inf, math.nan):
        with watched(identity := nn.Identity()) as peak:
            for v in (1.0, value, 2.0):
                identity(torch.tensor([v]))
        assert overflows(peak.value)


@pytest.mark.parametrize(("channels", "factor"), [(3, 8), (1, 1), (4, 48)])
def test_made_up_images_are_various_and_fit(channels: int, factor: int) -> None:
    images = list(made_up_images(channels, factor))
    assert all(torch.equal(a, b) for a, b in zip(images, made_up_images(channels, factor), strict=True))
    for image in images:
        assert image.dtype == torch.uint8 and image.shape[:2] == (1, channels)
        assert image.shape[2] == image.shape[3] and image.shape[2] % factor == 0
    spreads = [image.float().std().item() for image in images]
    assert spreads[:2] == [0, 0] and min(spreads[2:]) > 50  # flat ones, then all others
    assert images[0].unique().tolist() == [0] and images[1].unique().tolist() == [255]
    assert len(images[-1].unique()) == 256


def test_large_images_are_cropped_to_their_middle() -> None:
    marked = torch.zeros(1, 1, 480, 16, dtype=torch.uint8)
    marked[:, :, 230:250] = 7
    (crop,) = middles([marked], 16)
    assert crop.shape == (1, 1, 256, 16) and (crop == 7).any(3).sum() == 20 and (crop[0, 0, 118:138] == 7).all()
