"""Fold the normalisation of latents into the 1x1 convolutions on both sides of them.

Pipelines disagree on how to normalise latents (`settings.PipelineScale`). A model whose latents are z' = (z - m) / s
already is right for all of them with scaling factor 1 and shift 0.
"""

import dataclasses

import torch

from latent_codec.model.config import ConvConfig
from latent_codec.model.file import LatentStatistics

Tensors = dict[str, torch.Tensor]


def fold(tensors: Tensors, config: ConvConfig, statistics: LatentStatistics) -> tuple[Tensors, ConvConfig]:
    """Return tensors and configuration of a conv backbone whose latents are normalised by the statistics.

    The encoder's means become (mean - m) / s and its log-variances logvar - 2 ln s; the decoder takes z = s z' + m.
    1x1 convolutions that the backbone lacks are added. Computed in float64.
    """
    z = len(statistics.mean)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (statistics.mean, statistics.std))
    scale, shift = torch.cat([1 / std, torch.ones(z)]), torch.cat([-mean / std, -2 * std.log()])
    weight, bias = _matrix_and_bias(tensors, "quant_conv", 2 * z)
    after, offset = _matrix_and_bias(tensors, "post_quant_conv", z)
    folded = {
        "quant_conv.weight": scale[:, None] * weight,
        "quant_conv.bias": scale * bias + shift,
        "post_quant_conv.weight": after * std,
        "post_quant_conv.bias": offset + after @ mean,
    }
    folded = {name: t.float().reshape(*t.shape, *(1, 1) * (t.ndim - 1)) for name, t in folded.items()}
    return tensors | folded, dataclasses.replace(config, quant_conv=True, post_quant_conv=True)


def _matrix_and_bias(tensors: Tensors, name: str, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a 1x1 convolution as a float64 matrix and bias; the identity if it is missing."""
    if f"{name}.weight" not in tensors:
        return torch.eye(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    return tensors[f"{name}.weight"].double()[:, :, 0, 0], tensors[f"{name}.bias"].double()
