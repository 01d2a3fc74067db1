"""Build a codec of its parts: of new ones, added as their registries say, and of none where a config makes no part."""

import dataclasses
import math
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool2d, interpolate

from latent_codec.model import config as configs
from latent_codec.model.bottlenecks import BOTTLENECKS
from latent_codec.model.codebooks import MOST_CODES
from latent_codec.model.likelihoods import LIKELIHOODS, Likelihood
from latent_codec.model.networks import BACKBONES, Backbone, BackboneShape
from latent_codec.model.parts import build
from latent_codec.model.posteriors import Identity
from tests.support.errors import rejected
from tests.support.networks import CONV, LITE, MLP, config_of, make_codec


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
    def __init__(self, config: MineConfig, latent_channels: int) -> None:
        super().__init__()
        self.features = latent_channels

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
    parts = {"backbone": mine, "bottleneck": mine, "likelihood": mine}
    codec = make_codec(configs.CodecConfig(image_channels=3, latent_channels=3, **parts))
    x = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 12)
    posterior = codec.encode(x)
    assert posterior.mode().shape == (2, 3, 2, 3) and torch.equal(codec.decode_uint8(posterior.mode()), x)
    params = codec.likelihood_params(posterior.mode())
    assert codec.likelihood.log_prob(params, codec.likelihood.from_uint8(x)).shape == (2,)


WRONG: list[tuple[str, Any, str]] = [
    ("backbone", configs.LinearConfig(patch=4, overlap=-1), "overlap -1 must be from 0 to the patch of 4 pixels"),
    ("backbone", configs.LinearConfig(patch=4, overlap=5), "overlap 5 must be from 0 to the patch of 4 pixels"),
    ("classes", ("a", "b"), "linear: principal components have no place for 2 classes"),
    *(
        ("backbone", dataclasses.replace(LITE, **change), message)
        for change, message in (
            ({"stem": 1, "patch": 2}, r"stem 1 .*at least 2"),
            ({"encoder_widths": (), "encoder_depths": ()}, "encoder_widths"),
            ({"encoder_depths": (1,)}, r"encoder_widths.*encoder_depths"),
            ({"decoder_depths": (1, 1, 1)}, r"decoder_widths.*decoder_depths"),
            ({"patch": 16}, r"patch of 16.*encoder_widths"),
            ({"patch": 12}, "patch of 12"),  # no power of two times the stem
            ({"decoder_widths": (8, 8, 8), "decoder_depths": (1, 1, 1)}, "decoder_widths"),
        )
    ),
    ("backbone", dataclasses.replace(CONV, widths=(8, 12), groups=8), "groups 8"),
    ("backbone", dataclasses.replace(CONV, widths=(12, 8), groups=12), "groups 12"),
    ("backbone", dataclasses.replace(MLP, side=0), "side 0"),
    ("backbone", dataclasses.replace(MLP, decoder_widths=(8, 0)), "decoder_widths"),
    *(
        ("bottleneck", configs.DiagonalGaussianConfig(logvar_min=low, logvar_max=high), r"logvar_min.*logvar_max")
        for low, high in ((1.0, 1.0), (2.0, -2.0), (math.nan, 1.0), (0.0, math.nan))
    ),
    *(("bottleneck", configs.VectorQuantizerConfig(codes=n), f"codes {n}") for n in (-1, 1, MOST_CODES + 1)),
    *(
        ("bottleneck", configs.FiniteScalarConfig(levels=levels), "fsq: levels")
        for levels in ((), (4, 4, 4), (1, 4, 4, 4), (-2, -2, 2, 2), (16, 16, 16, 8))
    ),
    *(("likelihood", configs.GaussianConfig(scale="fixed", sigma=sigma), "sigma") for sigma in (0.0, -0.1, math.nan)),
    *(("likelihood", configs.DiscretizedLogisticConfig(components=n), "components") for n in (0, -1)),
    *(("prefixes", prefixes, r"prefixes \(") for prefixes in ((0, 4), (2, 2, 4), (4, 2), (2, 3))),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG)
def test_a_config_that_makes_no_model_is_an_error_that_names_the_field(field: str, value: Any, message: str) -> None:
    rejected(message, build, dataclasses.replace(config_of(configs.LinearConfig(patch=4)), **{field: value}))
