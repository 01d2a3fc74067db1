"""Check that the adapter has AutoencoderKL's interface and computes what its codec does, in normalised latents."""

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from latent_codec.inference import tiling
from latent_codec.interop.autoencoder_kl.adapter import CodecAutoencoder
from latent_codec.model.codec import Codec
from latent_codec.model.config import BernoulliConfig, DiscretizedLogisticConfig, LinearConfig
from tests.support import kl
from tests.support.data import ROOT
from tests.support.errors import refused, rejected
from tests.support.networks import randomise


@pytest.fixture
def vae(codec: Codec) -> Any:
    randomise(codec)
    return CodecAutoencoder.from_codec(codec)


@torch.inference_mode()
def test_posterior_and_pixels_are_the_codecs_in_normalised_units(vae: Any) -> None:
    codec, x, (mean, std) = vae.codec, kl.pixels(), kl.moments(vae.codec)
    ours, theirs = codec.encode(x), vae.encode(x).latent_dist
    kl.assert_same_model(codec, vae, mean, std)
    assert torch.equal(theirs.mode(), theirs.mean)
    noise = torch.randn(theirs.mean.shape, generator=torch.Generator().manual_seed(3))
    z = theirs.sample(torch.Generator().manual_seed(3))
    kl.assert_close(z, (ours.sample(noise) - mean) / std)
    expected = 0.5 * (theirs.mean**2 + theirs.std**2 - 1 - theirs.logvar).flatten(1).sum(1)
    kl.assert_close(theirs.kl(), expected, 1e-4)
    kl.assert_close(vae.decode(z).sample, codec.decode(ours.sample(noise)))
    kl.assert_close(vae(x).sample, codec.decode(ours.mode()))
    drawn = vae(x, sample_posterior=True, generator=torch.Generator().manual_seed(3), return_dict=False)
    kl.assert_close(drawn[0], vae.decode(z).sample)
    assert torch.equal(vae.encode(x, return_dict=False)[0].mean, theirs.mean)
    assert torch.equal(vae.decode(z, return_dict=False, generator=torch.Generator())[0], vae.decode(z).sample)


@torch.inference_mode()
def test_a_prefix_of_the_channels_is_a_latent_of_its_own(tmp_path: Path) -> None:
    """The first two of four channels, here and after it was saved."""
    codec = kl.codec(prefixes=(2, 4))
    randomise(codec)
    CodecAutoencoder.from_codec(codec, channels=2).save_pretrained(tmp_path)
    whole, x = CodecAutoencoder.from_codec(codec), kl.pixels()
    for vae in (CodecAutoencoder.from_codec(codec, channels=2), CodecAutoencoder.from_pretrained(tmp_path)):
        mode = vae.encode(x).latent_dist.mode()
        assert vae.config["latent_channels"] == 2
        kl.assert_close(mode, whole.encode(x).latent_dist.mode()[:, :2])
        mean, std = kl.moments(codec)
        kl.assert_close(vae.decode(mode).sample, codec.decode(mode * std[:2] + mean[:2]))
    refused("has latents of 2, 4", CodecAutoencoder.from_codec, codec, 3)


def test_methods_take_what_autoencoderkls_take() -> None:
    for name in ("encode", "decode", "forward", "enable_slicing", "disable_slicing", "disable_tiling"):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (CodecAutoencoder, AutoencoderKL))
        ours, theirs = ([(p.name, p.default) for p in one.parameters.values()] for one in (ours, theirs))
        assert ours == theirs


def test_the_configuration_is_what_pipelines_read(vae: Any, codec: Codec) -> None:
    config = vae.config
    assert (config.scaling_factor, config.shift_factor) == (1, 0)
    assert config["latents_mean"] is config["latents_std"] is None
    assert (config.latent_channels, config["in_channels"], config.out_channels) == (4, 3, 3)
    assert 2 ** (len(config.block_out_channels) - 1) == codec.factor == 8 and config.force_upcast is False
    codec.get_parameter("backbone.decoder.0.weight").data.mul_(1e6)
    assert CodecAutoencoder.from_codec(codec).config["force_upcast"] is True
    assert (vae.dtype, vae.device, vae.training) == (torch.float32, torch.device("cpu"), False)


@pytest.mark.parametrize("shape", ["lite", "conv"])
def test_the_adapter_is_saved_and_loaded_whole(codec: Codec, tmp_path: Path, shape: str) -> None:
    codec = codec if shape == "lite" else kl.codec()
    vae: Any = CodecAutoencoder.from_codec(codec)
    vae.save_pretrained(tmp_path / "vae")
    loaded: Any = CodecAutoencoder.from_pretrained(tmp_path / "vae", output_loading_info=True)
    again, info = loaded
    assert all(not found for found in info.values()) and not again.training and again.codec.model_id == codec.model_id
    assert (again.codec.config, again.codec.statistics) == (codec.config, codec.statistics)
    before, after = (json.loads(v.to_json_string()) for v in (vae, again))
    assert {k: v for k, v in before.items() if k[0] != "_"} == {k: v for k, v in after.items() if k[0] != "_"}
    with torch.inference_mode():
        kl.assert_close(again(kl.pixels()).sample, vae(kl.pixels()).sample)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
@torch.inference_mode()
def test_half_precision_in_and_out(vae: Any, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    x = kl.pixels()
    posterior, pixels = vae.encode(x).latent_dist, vae(x).sample
    vae.save_pretrained(tmp_path / "vae")
    halves = vae.to(dtype), CodecAutoencoder.from_pretrained(tmp_path / "vae", torch_dtype=dtype)
    for half in halves:
        assert half.dtype == dtype == next(half.post_quant_conv.parameters()).dtype
        found = half.encode(x.to(dtype)).latent_dist
        assert {found.mean.dtype, found.std.dtype, half.decode(found.mean).sample.dtype} == {dtype}
        kl.assert_close(found.mean, posterior.mean, tolerance)
        kl.assert_close(half.decode(posterior.mean.to(dtype)).sample, pixels, tolerance)


@pytest.mark.parametrize("tiled", [False, True])
@torch.inference_mode()
def test_numbers_beyond_float16_are_one_error(codec: Codec, tiled: bool) -> None:
    vae = CodecAutoencoder.from_codec(codec).to(torch.float16)
    side = tiling.least_tile(codec)
    if tiled:
        vae.enable_tiling(side)
    z = vae.encode(kl.pixels(1, 2 * side).half()).latent_dist.mean
    codec.state_dict()["backbone.decoder.0.weight"].fill_(6e4)
    refused("decoder's output is not finite; try --dtype float32 or bfloat16", vae.decode, 10 * torch.ones_like(z))
    codec.state_dict()["backbone.encoder.1.weight"].fill_(6e4)
    refused("latents are not finite", vae.encode, torch.full((1, 3, 2 * side, 2 * side), 1.0).half())


@torch.inference_mode()
def test_tiles_give_what_the_whole_gives_and_are_what_the_network_sees(vae: Any) -> None:
    """Exactly, to rounding, for lite."""
    least = tiling.least_tile(vae.codec)
    x, seen = kl.pixels(1, 2 * least), []
    whole, pixels = vae.encode(x).latent_dist, vae(x).sample
    handle = vae.codec.backbone.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    vae.enable_tiling(least)
    tiled = vae.encode(x).latent_dist
    assert len(seen) > 1 and max(seen) <= least
    kl.assert_close(tiled.mean, whole.mean)
    kl.assert_close(tiled.logvar, whole.logvar)
    kl.assert_close(vae.decode(whole.mean).sample, pixels)
    assert not torch.equal(vae.decode(whole.mean).sample.clamp(-1, 1), vae.decode(whole.mean).sample)  # nor clipped
    seen.clear()
    vae.disable_tiling()
    vae.encode(x)
    assert seen == [2 * least]
    handle.remove()
    vae.enable_tiling()
    assert vae._tile == tiling.default_tile(vae.codec)
    refused("--tile 8 is too small", vae.enable_tiling, 8)


@torch.inference_mode()
def test_slices_are_single_images(vae: Any) -> None:
    x, seen = kl.pixels(3), []
    whole, pixels = vae.encode(x).latent_dist, vae(x).sample
    vae.codec.backbone.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    vae.codec.backbone.decoder.register_forward_pre_hook(lambda _, args: seen.append(-len(args[0])))
    vae.enable_slicing()
    kl.assert_close(vae.encode(x).latent_dist.mean, whole.mean)
    kl.assert_close(vae.decode(whole.mean).sample, pixels)
    vae.disable_slicing()
    vae(x)
    assert seen == [1, 1, 1, -1, -1, -1, 3, -3]


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", [BernoulliConfig(), DiscretizedLogisticConfig(components=2)])
@torch.inference_mode()
def test_pixels_are_from_minus_1_to_1_whatever_the_likelihood(likelihood: Any) -> None:
    codec = kl.codec(likelihood=likelihood)
    eight_bits = ((kl.pixels(1) + 1) * 127.5).round().to(torch.uint8)
    vae, x, ours = CodecAutoencoder.from_codec(codec), eight_bits.float() / 127.5 - 1, codec.encode(eight_bits)
    mean, std = kl.moments(codec)
    kl.assert_close(vae.encode(x).latent_dist.mean, (ours.mean - mean) / std)
    found = vae(x).sample
    low, high = codec.likelihood.data_range
    kl.assert_close(found, (codec.decode(ours.mean) - low) / (high - low) * 2 - 1)
    assert -1 <= found.min() < found.max() <= 1


def test_gradients_reach_the_weights(vae: Any) -> None:
    vae(kl.pixels(1)).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.codec.backbone.linear.decoder.parameters())


def test_codecs_that_no_pipeline_can_take_and_odd_sides_are_refused(codec: Codec) -> None:
    rejected("multiples of 8", CodecAutoencoder.from_codec(codec).encode, torch.zeros(1, 3, 12, 16))
    odd = Codec(dataclasses.replace(codec.config, backbone=LinearConfig(patch=6)))
    odd.statistics = codec.statistics
    refused(r"latents of 1/2\^n of each side; this codec's are of 1/6", CodecAutoencoder.from_codec, odd)
    codec.statistics = None
    refused("no latent statistics", CodecAutoencoder.from_codec, codec)


def test_the_adapter_alone_needs_diffusers_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "latent_codec.interop.autoencoder_kl.adapter"
    paths = (ROOT / "latent_codec").rglob("*.py")
    needs = re.compile(r"^(try:\n    )?(from|import) (diffusers|latent_codec.interop.\S*adapter)", re.MULTILINE)
    users = [p.stem for p in paths if needs.search(p.read_text(encoding="utf-8"))]
    assert users == ["adapter"]
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", None)
    with pytest.raises(ImportError, match=r"pip install 'latent-codec\[diffusers\]'"):
        importlib.import_module(name)
