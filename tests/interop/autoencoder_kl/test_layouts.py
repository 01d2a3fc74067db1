"""Check the names of tensors against the original layout, written from its side, and diffusers' own conversion."""

import re
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from latent_codec.errors import UserError
from latent_codec.interop.autoencoder_kl import layouts
from tests.support import kl
from tests.support.errors import refused

LATER_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def before_renaming(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name tensors as diffusers did until 2023, and every SD1.x folder does."""
    return {re.sub(r"to_q|to_k|to_v|to_out\.0", lambda m: LATER_NAMES[m[0]], n): t for n, t in tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", kl.SHAPES)
def test_every_layout_gets_todays_names_as_in_diffusers_own_conversion(shape: str) -> None:
    backbone, channels = kl.SHAPES[shape]
    tensors = kl.tensors_of(kl.codec(backbone, channels))
    for linear in (False, True):
        original = kl.to_ldm(tensors, linear_attention=linear)
        assert backbone.mid_attention is ("encoder.mid.attn_1.q.weight" in original)
        assert_same(layouts.canonical(original, "x"), tensors)
    assert_same(layouts.canonical(tensors, "x"), tensors)
    assert_same(layouts.canonical(before_renaming(tensors), "x"), tensors)
    blocks: Any = {"down_block_types": [0] * len(backbone.widths), "up_block_types": [0] * len(backbone.widths)}
    assert_same(convert_ldm_vae_checkpoint(kl.to_ldm(tensors), blocks), tensors)
    assert layouts.infer_config(tensors, "x") == (backbone, 3, channels)


@pytest.mark.parametrize(
    ("prefixes", "found"),
    [
        ([""], ""),
        (["first_stage_model."], "first_stage_model."),
        (["vae.", "text."], "vae."),
        (["model.first_stage."], "model.first_stage."),
        (["first_stage_model_ema.", "first_stage_model."], "first_stage_model."),
    ],
)
def test_the_autoencoder_is_found_in_a_checkpoint(prefixes: list[str], found: str) -> None:
    names = [f"{p}encoder.conv_in.weight" for p in prefixes] + ["model.diffusion_model.time_embed.0.weight"]
    assert layouts.prefix_of(names, "x") == found


def test_none_or_several_autoencoders_are_refused() -> None:
    refused(r"^x: no tensor encoder\.conv_in\.weight", layouts.prefix_of, ["myencoder.conv_in.weight"], "x")
    with pytest.raises(UserError, match=r"^x: holds several autoencoders, a\., b\."):
        layouts.prefix_of(["a.encoder.conv_in.weight", "b.encoder.conv_in.weight"], "x")


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("encoder.down.2.attn.0.q.weight", "attention outside the middle block"),
        ("decoder.up_blocks.1.attentions.0.to_q.weight", "attention outside the middle block"),
        ("quantize.embedding.weight", "codebook"),
        ("bn.running_mean", "AutoencoderKLFlux2"),
        ("decoder.mid_block.temporal_attentions.0.weight", "over time"),
    ],
)
def test_features_that_codecs_lack_are_named(name: str, feature: str) -> None:
    with pytest.raises(UserError, match=f"^x: this autoencoder has .*{feature}.*: tensor {re.escape(name)}$"):
        layouts.canonical({name: torch.zeros(1)}, "x")


def test_one_tensor_under_two_names_is_refused() -> None:
    names = ("encoder.norm_out.weight", "encoder.conv_norm_out.weight")
    refused("there under two names", layouts.canonical, {name: torch.zeros(1) for name in names}, "x")


def test_tensors_that_tell_the_configuration_are_required() -> None:
    tensors, infer = kl.tensors_of(kl.codec(kl.SD)), layouts.infer_config
    for name in ("encoder.conv_in.weight", "decoder.conv_in.weight", "encoder.down_blocks.1.resnets.0.conv1.weight"):
        for found in ({n: t for n, t in tensors.items() if n != name}, tensors | {name: torch.zeros(3)}):
            refused(f"tensor {re.escape(name)} is missing or no convolution", infer, found, "x")
    refused("encoder has no blocks", infer, {n: t for n, t in tensors.items() if "down_blocks" not in n}, "x")
    wide = {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(33, 32, 3, 3)}
    refused(r"widths \(33, 32, 64\) are no multiples of 32", infer, tensors | wide, "x")
