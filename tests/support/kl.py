"""Make small autoencoders with the shapes of known ones: random codecs, diffusers' own, and the original layout."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from latent_codec.interop.autoencoder_kl.exporting import Float16Check, export_folder
from latent_codec.model.codec import Codec
from latent_codec.model.config import CodecConfig, ConvConfig, DiagonalGaussianConfig, GaussianConfig, LikelihoodConfig
from latent_codec.model.file import LatentStatistics
from latent_codec.model.networks.conv import ConvBackbone

SD = ConvConfig(
    widths=(32, 32, 64),
    layers_per_block=2,
    groups=32,
    mid_attention=True,
    quant_conv=True,
    post_quant_conv=True,
)
NO_QUANT = dataclasses.replace(SD, quant_conv=False, post_quant_conv=False)
SMALL = dataclasses.replace(SD, widths=(32, 32), layers_per_block=1, mid_attention=False)
"""The cheapest, for whatever does not depend on the shape."""
SHAPES: dict[str, tuple[ConvConfig, int]] = {
    "SD and SDXL": (SD, 4),
    "FLUX and SD3": (NO_QUANT, 16),
    "no attention, one block, half of the quant convs": (
        dataclasses.replace(SD, mid_attention=False, layers_per_block=1, post_quant_conv=False, widths=(32, 64)),
        3,
    ),
}
"""Backbone and latent channels of known models, but with smaller widths and fewer resolutions."""

CLAMP = DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0)
FIXED = GaussianConfig(scale="fixed", sigma=0.1)


def codec(
    backbone: ConvConfig = SMALL,
    channels: int = 4,
    likelihood: LikelihoodConfig = FIXED,
    bottleneck: DiagonalGaussianConfig = CLAMP,
) -> Codec:
    """Make a codec with random weights, also of norms, and made-up statistics far from 0 and 1."""
    config = CodecConfig(
        image_channels=3, latent_channels=channels, backbone=backbone, bottleneck=bottleneck, likelihood=likelihood
    )
    made = Codec(config).eval()
    randomize(made)
    generator = torch.Generator().manual_seed(channels)
    mean, std = torch.randn(channels, generator=generator), 0.2 + 4 * torch.rand(channels, generator=generator)
    made.statistics = LatentStatistics(
        source="made up",
        images=3,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        posterior_std=(0.5,) * channels,
    )
    made.provenance = {"note": "random weights"}
    return made


def randomize(module: torch.nn.Module) -> None:
    """Draw weights as large as at the start of training, but also norms and biases, which would be 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 10
            parameter.copy_(noise / fan_in**0.5 + (1.0 if parameter.ndim == 1 else 0.0))


def autoencoder(backbone: ConvConfig = SMALL, channels: int = 4, **settings: Any) -> AutoencoderKL:
    """Make diffusers' own, with random weights."""
    stages = len(backbone.widths)
    made = AutoencoderKL(
        block_out_channels=backbone.widths,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=backbone.layers_per_block,
        norm_num_groups=backbone.groups,
        latent_channels=channels,
        mid_block_add_attention=backbone.mid_attention,
        use_quant_conv=backbone.quant_conv,
        use_post_quant_conv=backbone.post_quant_conv,
        **settings,
    )
    randomize(made)
    return made.eval()


def to_ldm(tensors: dict[str, torch.Tensor], *, linear_attention: bool = False) -> dict[str, torch.Tensor]:
    """Name and shape AutoencoderKL's tensors as the original code of latent diffusion does, by walking its modules."""
    left, found = dict(tensors), {}

    def move(theirs: str, ours: str, square: bool = False) -> None:
        for kind in ("weight", "bias"):
            tensor = left.pop(f"{ours}.{kind}")
            found[f"{theirs}.{kind}"] = tensor[:, :, None, None] if square and tensor.ndim == 2 else tensor

    def move_block(theirs: str, ours: str) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            move(f"{theirs}.{name}", f"{ours}.{name}")
        if f"{ours}.conv_shortcut.weight" in left:
            move(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut")

    def move_middle(side: str) -> None:
        move_block(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        move_block(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        attention = f"{side}.mid_block.attentions.0"
        if f"{attention}.to_q.weight" in left:
            move(f"{side}.mid.attn_1.norm", f"{attention}.group_norm")
            for theirs, ours in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
                move(f"{side}.mid.attn_1.{theirs}", f"{attention}.{ours}", square=not linear_attention)

    stages = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down_blocks."))
    blocks = len({name.split(".")[4] for name in tensors if name.startswith("encoder.down_blocks.0.resnets.")})
    for level in range(stages):
        ours = f"decoder.up_blocks.{stages - 1 - level}"  # theirs are numbered by resolution, the finest first
        for j in range(blocks):
            move_block(f"encoder.down.{level}.block.{j}", f"encoder.down_blocks.{level}.resnets.{j}")
        for j in range(blocks + 1):
            move_block(f"decoder.up.{level}.block.{j}", f"{ours}.resnets.{j}")
        if level != stages - 1:
            move(f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")
        if level != 0:
            move(f"decoder.up.{level}.upsample.conv", f"{ours}.upsamplers.0.conv")
    for side in ("encoder", "decoder"):
        move_middle(side)
        move(f"{side}.conv_in", f"{side}.conv_in")
        move(f"{side}.norm_out", f"{side}.conv_norm_out")
        move(f"{side}.conv_out", f"{side}.conv_out")
    for name in ("quant_conv", "post_quant_conv"):
        if f"{name}.weight" in left:
            move(name, name)
    assert not left, sorted(left)
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
