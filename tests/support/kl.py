"""Make small autoencoders with the shapes of known ones: random codecs, diffusers' own, and the original layout."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from latent_codec.interop.autoencoder_kl.exporting import Float16Check, export_folder
from latent_codec.model.codec import Codec
from latent_codec.model.config import ConvConfig
from latent_codec.model.file import LatentStatistics
from latent_codec.model.networks.conv import ConvBackbone
from tests.support.networks import config_of, make_codec, randomise

SD = ConvConfig(
    widths=(32, 32, 64), layers_per_block=2, groups=32, mid_attention=True, quant_conv=True, post_quant_conv=True
)
NO_QUANT = dataclasses.replace(SD, quant_conv=False, post_quant_conv=False)
SMALL = dataclasses.replace(SD, widths=(32, 32), layers_per_block=1, mid_attention=False)
"""The cheapest, for whatever does not depend on the shape."""
_ODD = dataclasses.replace(SD, mid_attention=False, layers_per_block=1, post_quant_conv=False, widths=(32, 64))
SHAPES: dict[str, tuple[ConvConfig, int]] = {
    "SD and SDXL": (SD, 4),
    "FLUX and SD3": (NO_QUANT, 16),
    "no attention, one block, half of the quant convs": (_ODD, 3),
}
"""Backbone and latent channels of known models, but with smaller widths and fewer resolutions."""


def codec(backbone: ConvConfig = SMALL, channels: int = 4, **options: Any) -> Codec:
    """Make a codec with random weights, also of norms, and made-up statistics far from 0 and 1."""
    made = make_codec(config_of(backbone, z=channels, **options))
    randomise(made)
    generator = torch.Generator().manual_seed(channels)
    mean, std = torch.randn(channels, generator=generator), 0.2 + 4 * torch.rand(channels, generator=generator)
    moments: Any = {"mean": tuple(mean.tolist()), "std": tuple(std.tolist()), "posterior_std": (0.5,) * channels}
    made.statistics = LatentStatistics(source="made up", images=3, **moments)
    made.provenance = {"note": "random weights"}
    return made


def autoencoder(backbone: ConvConfig = SMALL, channels: int = 4, **settings: Any) -> AutoencoderKL:
    """Make diffusers' own, with random weights."""
    stages = len(backbone.widths)
    settings |= {"block_out_channels": backbone.widths, "layers_per_block": backbone.layers_per_block}
    settings |= {"down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages}
    settings |= {"norm_num_groups": backbone.groups, "mid_block_add_attention": backbone.mid_attention}
    settings |= {"use_quant_conv": backbone.quant_conv, "use_post_quant_conv": backbone.post_quant_conv}
    made = AutoencoderKL(latent_channels=channels, **settings)
    randomise(made)
    return made.eval()


_LDM_NAMES = {
    "down_blocks.": "down.",
    "up_blocks.": "up.",
    ".resnets.": ".block.",
    "samplers.0.": "sample.",
    "mid_block.block.0": "mid.block_1",
    "mid_block.block.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_": "",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
}
"""The original code's words for AutoencoderKL's, replaced one after the other."""


def to_ldm(tensors: dict[str, torch.Tensor], *, linear_attention: bool = False) -> dict[str, torch.Tensor]:
    """Name and shape AutoencoderKL's tensors as the original code of latent diffusion does."""
    stages, found = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.down_blocks.")), {}
    for name, tensor in tensors.items():
        for ours, theirs in _LDM_NAMES.items():
            name = name.replace(ours, theirs)
        # Theirs are numbered by resolution, the finest first.
        name = re.sub(r"(?<=decoder\.up\.)\d+", lambda m: str(stages - 1 - int(m[0])), name)
        is_matrix = ".attn_1." in name and tensor.ndim == 2 and not linear_attention
        found[name] = tensor[:, :, None, None] if is_matrix else tensor
    return found


def export(made: Codec, folder: Path, **options: Any) -> Float16Check:
    """Export a codec, measured on small images."""
    return export_folder(made, folder, probe_side=16, **options)


def tensors_of(made: Codec) -> dict[str, torch.Tensor]:
    """Return the tensors of a codec's backbone by AutoencoderKL's names."""
    assert isinstance(made.backbone, ConvBackbone)
    return {name: tensor.detach().clone() for name, tensor in made.backbone.state_dict().items()}


def pixels(count: int = 2, side: int = 32) -> torch.Tensor:
    """Make images (count, 3, side, side) in [-1, 1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def moments(made: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of a codec's statistics, (z, 1, 1) each."""
    assert made.statistics is not None
    mean, std = (torch.tensor(v)[:, None, None] for v in (made.statistics.mean, made.statistics.std))
    return mean, std


def assert_close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Compare to float32's rounding error on values of about 1 after some twenty layers."""
    assert one.shape == other.shape
    assert (one.float() - other.float()).abs().max().item() <= tolerance * max(other.abs().max().item(), 1)


def assert_same_model(made: Codec, model: Any, mean: Any = 0.0, std: Any = 1.0, tolerance: float = 2e-5) -> None:
    """Check that diffusers' model has the codec's posterior and pixels, in latents (z - mean) / std."""
    x, mean, std = pixels(), torch.as_tensor(mean), torch.as_tensor(std)
    with torch.inference_mode():
        ours, theirs = made.encode(x), model.encode(x).latent_dist
        assert_close(theirs.mean * std + mean, ours.mean, tolerance)
        assert_close(theirs.std * std, ours.std, tolerance)
        assert_close(theirs.logvar + 2 * std.log(), ours.logvar, tolerance)
        assert_close(model.decode((ours.mean - mean) / std).sample, made.decode(ours.mean), tolerance)
