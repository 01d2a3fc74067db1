"""Check config.json there and back, and the statistics that a scale stands for."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_codec.interop.autoencoder_kl import settings
from latent_codec.interop.autoencoder_kl.settings import PipelineScale, scale_of, statistics_of
from latent_codec.model.config import ConvConfig
from latent_codec.model.file import LatentStatistics
from tests.support import kl
from tests.support.errors import refused


def statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> LatentStatistics:
    return LatentStatistics(source="made up", images=1, mean=mean, std=std, posterior_std=None)


numbers = st.floats(-10, 10).filter(lambda v: v == 0 or abs(v) > 1e-3)
positive = st.floats(0.01, 100)


@given(st.lists(st.tuples(numbers, positive), min_size=4, max_size=4))
def test_statistics_of_four_channels_come_back_to_all_digits_of_float32(values: list[tuple[float, float]]) -> None:
    mean, std = (tuple(v) for v in zip(*values, strict=True))
    found = statistics_of(scale_of(statistics(mean, std)), 4, "x")
    assert found is not None and found.posterior_std is None
    assert found.mean == pytest.approx(mean, rel=1e-7) and found.std == pytest.approx(std, rel=1e-7)


@pytest.mark.parametrize("known", [(0.18215, 0.0), (0.13025, 0.0), (0.3611, 0.1159), (1.5305, 0.0609), (1.0, 0.0)])
@pytest.mark.parametrize("channels", [4, 16])
def test_the_known_factors_come_back_to_the_bit(known: tuple[float, float], channels: int) -> None:
    scale = PipelineScale(*known, None, None)
    found = statistics_of(scale, channels, "x")
    assert found is not None
    assert found.mean == (known[1],) * channels and found.std == pytest.approx((1 / known[0],) * channels, rel=1e-9)
    assert scale_of(found) == scale
    assert scale_of(statistics((1.0, 2.0), (1.0, 2.0)))[2:] == (None, None)  # numbers per channel are for 4 channels


def test_an_impossible_scale_gives_a_warning_and_no_statistics(caplog: pytest.LogCaptureFixture) -> None:
    plain = [(0.0, 0.0, None, None), (-1.0, 0.0, None, None), (math.nan, 0.0, None, None), (1.0, math.inf, None, None)]
    for scale in (*plain, (1.0, 0.0, (0.0,), (1.0,) * 4), (1.0, 0.0, None, (1.0, 0.0, 1.0, 1.0))):
        assert statistics_of(PipelineScale(*scale), 4, "vae") is None
        assert "vae: " in caplog.text and "no latent statistics" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("shape", kl.SHAPES)
def test_config_json_comes_back(shape: str) -> None:
    config = settings.codec_config(kl.SHAPES[shape][0], 3, kl.SHAPES[shape][1])
    scale = PipelineScale(0.5, 0.25, (1.0, 2.0, 3.0, 4.0), (0.5, 0.5, 1.0, 1.0))
    value = json.loads(json.dumps(settings.to_json(config, scale, force_upcast=True)))
    assert settings.from_json(value, "x") == (config, scale) and value["force_upcast"] is True


def test_missing_settings_get_diffusers_defaults() -> None:
    """So is None where diffusers has a default; a missing shift is 0."""
    model: Any = kl.AutoencoderKL()
    full, _ = settings.from_json(json.loads(model.to_json_string()), "x")
    short, scale = settings.from_json({"_class_name": "AutoencoderKL", "shift_factor": None}, "x")
    assert short == full and scale == PipelineScale(0.18215, 0.0, None, None)
    assert isinstance(short.backbone, ConvConfig) and short.backbone.widths == (64,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_class_name": "AutoencoderTiny"}, "describes a AutoencoderTiny; only AutoencoderKL"),
        ({"_class_name": None}, "only AutoencoderKL"),
        ({"act_fn": "relu"}, "the activation relu"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D blocks"),
        (
            {"up_block_types": ["AttnUpDecoderBlock2D"], "act_fn": "gelu"},
            "AttnUpDecoderBlock2D blocks, the activation g",
        ),
        ({"out_channels": 4}, "3 channels in and 4 out"),
        ({"block_out_channels": [32, "64"]}, "damaged configuration: expected a positive integer, found '64'"),
        ({"block_out_channels": 32}, "damaged configuration"),
        ({"latent_channels": 0}, "damaged configuration: expected a positive integer, found 0"),
        ({"scaling_factor": "much"}, "damaged configuration"),
        ({"latents_mean": 3}, "damaged configuration"),
    ],
)
def test_missing_features_and_damaged_values_are_named(change: dict[str, Any], reason: str) -> None:
    config = settings.codec_config(kl.SD, 3, 4)
    value = settings.to_json(config, settings.NORMALIZED, force_upcast=False) | change
    refused(f"^vae/config.json: .*{reason}", settings.from_json, value, "vae/config.json")


def test_unknown_settings_are_named_and_ignored_and_other_json_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    config = settings.codec_config(kl.SD, 3, 4)
    value = settings.to_json(config, settings.NORMALIZED, force_upcast=False) | {"new": 1, "_private": 2}
    assert settings.from_json(value, "x")[0] == config and "settings new are unknown and ignored" in caplog.text
    for other in (None, [], "AutoencoderKL", 3):
        refused("not the configuration of a model", settings.from_json, other, "x")
