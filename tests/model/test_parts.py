"""Add a backbone, a bottleneck and a likelihood as their registries say: a config, a class and a line each."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

from latent_codec.model.bottlenecks import BOTTLENECKS
from latent_codec.model.config import CodecConfig
from latent_codec.model.likelihoods import LIKELIHOODS, Likelihood
from latent_codec.model.networks import BACKBONES, Backbone, BackboneShape
from latent_codec.model.posteriors import Identity
from tests.support.networks import make_codec


@dataclasses.dataclass(frozen=True, kw_only=True)
class MineConfig:
    kind: ClassVar[str] = "mine"
    side: int = 4


class MeanBackbone(Backbone):
    encoder_margin = decoder_margin = 0

    def __init__(self, config: MineConfig, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self.factor = config.side

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return avg_pool2d(x, self.factor)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return interpolate(z, scale_factor=float(self.factor))


class SignBottleneck(nn.Module):
    features_per_latent = 1

    def __init__(self, config: MineConfig, latent_channels: int) -> None:
        super().__init__()

    def forward(self, features: torch.Tensor) -> Identity:
        return Identity(features.sign())


class Laplace(Likelihood):
    params_per_channel = 1

    def check(self, x: torch.Tensor) -> None:
        assert x.abs().amax() <= 1

    def _log_prob(self, params: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Laplace(params[0], 1.0).log_prob(x)

    def _mean(self, params: torch.Tensor) -> torch.Tensor:
        return params[0]

    def _sample(self, params: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        raise NotImplementedError


def test_a_codec_is_made_of_registered_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry, part in ((BACKBONES, MeanBackbone), (BOTTLENECKS, SignBottleneck), (LIKELIHOODS, Laplace)):
        monkeypatch.setitem(registry, "mine", part)
    mine: Any = MineConfig()
    codec = make_codec(
        CodecConfig(image_channels=3, latent_channels=3, backbone=mine, bottleneck=mine, likelihood=mine)
    )
    x = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 12)
    posterior = codec.encode(x)
    assert posterior.mode().shape == (2, 3, 2, 3)
    assert torch.equal(codec.decode_uint8(posterior.mode()), x)
    assert codec.likelihood.log_prob(
        codec.likelihood_params(posterior.mode()), codec.likelihood.from_uint8(x)
    ).shape == (2,)
