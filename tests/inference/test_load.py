"""The networks as the command line runs them agree with float64, on inputs that lose precision easily."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from latent_codec.images.read import read_image
from latent_codec.inference import tiling
from latent_codec.inference.load import in_fastest_layout, load
from latent_codec.inference.options import ComputeOptions
from latent_codec.inference.runner import Runner
from latent_codec.model.codec import Codec
from latent_codec.model.config import ConvConfig, LinearConfig
from latent_codec.model.networks import LinearBackbone
from latent_codec.model.networks.conv import GroupNorm
from latent_codec.model.posteriors import DiagonalGaussian
from tests.support.networks import CONV, MLP, SMALL_LITE, TINY_LITE, config_of, make_codec, randomise, seeded

SD = ConvConfig(
    widths=(8, 16, 16, 16), layers_per_block=1, groups=4, mid_attention=True, quant_conv=True, post_quant_conv=True
)
BACKBONES: dict[str, Any] = {
    "linear": LinearConfig(patch=8, overlap=4),
    "lite": TINY_LITE,
    "lite, deeper": SMALL_LITE,
    "conv": CONV,
    "conv, Stable Diffusion's shape": SD,
    "mlp": MLP,
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIDE = 96


def inputs() -> torch.Tensor:
    """Return plain white, a faint disc on grey, a line on white and a photograph, (4, 3, h, w) uint8."""
    white, faint, line = torch.full((3, 3, SIDE, SIDE), 255, dtype=torch.uint8)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    faint = torch.full_like(faint, 128)
    faint[0, (rows - 50) ** 2 + (columns - 40) ** 2 < 60] = 135
    line[:, (rows - columns - 10).abs() < 2] = 0
    photo, _ = read_image(Path(__file__).parents[2] / "examples/photos/coffee.jpg")
    return torch.stack([white, faint, line, photo[:, 100 : 100 + SIDE, 150 : 150 + SIDE]])


def model(backbone: Any, folder: Path) -> Path:
    """Write a model whose weights have the size of trained ones; of a lite one the residual part counts too."""
    codec = make_codec(config_of(backbone, z=4))
    for part in (codec.backbone, *codec.backbone.modules()):
        if not isinstance(part, GroupNorm) and not list(part.children()):
            randomise(part)
    codec.save(folder / "m.safetensors")
    return folder / "m.safetensors"


def layers(backbone: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that autocast runs in the chosen type: all but those of a linear path."""
    for child in backbone.children():
        if list(child.children()):
            yield from () if isinstance(child, LinearBackbone) else layers(child)
        elif not isinstance(backbone, LinearBackbone):
            yield child


def rounding(codec: Codec, dtype: torch.dtype) -> Codec:
    """Return a copy in float64 whose layers round weights, inputs and outputs to a type: what the type allows."""
    copied = copy.deepcopy(codec).double()
    for layer in layers(copied.backbone):
        for p in layer.parameters():
            p.data = p.data.to(dtype).double()
        layer.register_forward_pre_hook(lambda _, x: (x[0].to(dtype).double(),))
        layer.register_forward_hook(lambda _, x, y: y.to(dtype).double())
    return copied


def moments(codec: Codec, pixels: torch.Tensor, tile: int | None) -> torch.Tensor:
    posterior = tiling.encode(codec, pixels, tile)
    assert isinstance(posterior, DiagonalGaussian)
    return torch.cat([posterior.mean, posterior.logvar], 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("backbone", BACKBONES)
@torch.inference_mode()
def test_the_command_line_agrees_with_float64(
    backbone: str, dtype: Literal["float32", "bfloat16", "float16"], device: str, tmp_path: Path
) -> None:
    path = model(BACKBONES[backbone], tmp_path)
    exact = Codec.load(path)
    kind = getattr(torch, dtype)
    coarse = rounding(exact, kind)
    exact = exact.double()
    tiles = 64 if tiling.least_tile(exact) <= 64 else tiling.least_tile(exact) + exact.factor
    pixels = inputs()
    for tile in (None, tiles):
        runner = load(str(path), ComputeOptions(device=device, dtype=dtype, tile=tile))
        for one in pixels:
            wanted = moments(exact, one[None], tile)
            found = runner.encode([one])
            assert isinstance(found, DiagonalGaussian)
            bound = 1e-5 * max(wanted.abs().max().item(), 1.0)
            if kind != torch.float32:
                bound += 4 * (moments(coarse, one[None], tile) - wanted).abs().max().item()
            assert (torch.cat([found.mean, found.logvar], 1) - wanted).abs().max().item() <= bound
            z = wanted[:, :4]
            levels = (tiling.decode(exact, z, tile) + 1) * 127.5
            bound = 0.5 + 1e-4 * max(levels.abs().max().item(), 255) / 255
            if kind != torch.float32:
                bound += 4 * ((tiling.decode(coarse, z, tile) + 1) * 127.5 - levels).abs().max().item()
            decoded = runner.decode_uint8([z[0]])
            assert (decoded.float() - levels.clamp(0, 255)).abs().max().item() <= bound


@torch.inference_mode()
def test_group_norm_is_accurate_in_every_layout() -> None:
    x = 30 + 1e-3 * torch.randn(2, 16, 40, 40, generator=seeded(1))
    norm = GroupNorm(4, 16, eps=1e-6)
    wanted = nn.GroupNorm(4, 16, eps=1e-6).double()(x.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        assert (norm(x.contiguous(memory_format=layout)) - wanted).abs().max().item() < 1e-2
    assert (
        not list(nn.GroupNorm(4, 16).buffers()) and norm.state_dict().keys() == nn.GroupNorm(4, 16).state_dict().keys()
    )


def test_conv_weights_are_contiguous_on_a_cpu_and_others_channels_last() -> None:
    conv, lite = (in_fastest_layout(make_codec(config_of(backbone))) for backbone in (CONV, TINY_LITE))
    weights = [
        next(p for p in codec.backbone.parameters() if p.ndim == 4 and min(p.shape) > 1) for codec in (conv, lite)
    ]
    assert [weight.is_contiguous() for weight in weights] == [True, False]
    assert Runner(conv).options.device == "cpu"
