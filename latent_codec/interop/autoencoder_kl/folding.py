"""The normalisation of latents folded into the 1x1 convolutions on both sides of them.

Pipelines disagree on how to normalise (`settings.Scale`). A model whose latents are z' = (z - m) / s already is right
for all of them with scaling factor 1 and shift 0.
"""

import dataclasses

import torch

from latent_codec.model.config import ConvConfig
from latent_codec.model.file import LatentStatistics

Tensors = dict[str, torch.Tensor]


def fold(tensors: Tensors, config: ConvConfig, statistics: LatentStatistics) -> tuple[Tensors, ConvConfig]:
    """Tensors and configuration of a conv backbone whose latents are normalised by the statistics.

    Of the encoder's features the means become (mean - m) / s and the log-variances logvar - 2 ln s, and the decoder
    takes z = s z' + m. 1x1 convolutions that the backbone lacks are added. Computed in float64.
    """
    z = len(statistics.mean)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (statistics.mean, statistics.std))
    scale, shift = torch.cat([1 / std, torch.ones(z)]), torch.cat([-mean / std, -2 * std.log()])
    weight, bias = _convolution(tensors, "quant_conv", 2 * z)
    after, offset = _convolution(tensors, "post_quant_conv", z)
    folded = {
        "quant_conv.weight": scale[:, None] * weight,
        "quant_conv.bias": scale * bias + shift,
        "post_quant_conv.weight": after * std,
        "post_quant_conv.bias": offset + after @ mean,
    }
    folded = {name: t.float().reshape(*t.shape, *(1, 1) * (t.ndim - 1)) for name, t in folded.items()}
    return tensors | folded, dataclasses.replace(config, quant_conv=True, post_quant_conv=True)


def _convolution(tensors: Tensors, name: str, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A 1x1 convolution as a matrix and a bias, float64; the identity if there is none."""
    if f"{name}.weight" not in tensors:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    return tensors[f"{name}.weight"].double()[:, :, 0, 0], tensors[f"{name}.bias"].double()
