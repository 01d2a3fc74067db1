"""Quantise features to one code of a codebook at each position: vector and finite scalar quantisation.
The encoder gets the latents' gradients straight through, as if nothing were quantised (Bengio et al. 2013)."""

import dataclasses
import math

import torch
from einops import rearrange
from torch import nn

from latent_codec.model.config import FiniteScalarConfig, VectorQuantizerConfig
from latent_codec.model.posteriors import Posterior
from latent_codec.precision import float32_island, in_float64

MOST_CODES = 2**14
"""The largest codebook: a bitstream's integers reach this far."""

_POSITIONS = 2**13  # whose distances to all codes are in memory at once


@dataclasses.dataclass(init=False, eq=False, repr=False)
class Codes(Posterior):
    """Puts all mass on one of K codes at each position (van den Oord et al. 2017, eq. 1). outputs: (b, z, h, w)
    float32, the encoder's; vectors: the chosen codes in their place; indices: (b, h, w) int64."""

    outputs: torch.Tensor
    vectors: torch.Tensor
    indices: torch.Tensor
    codes: int

    def __init__(self, outputs: torch.Tensor, vectors: torch.Tensor, indices: torch.Tensor, codes: int) -> None:
        # The added difference is 0, so the values are the vectors' to the bit; the gradient is the outputs'.
        super().__init__(vectors.detach() + (outputs - outputs.detach()))
        self.outputs, self.vectors, self.indices, self.codes = outputs, vectors, indices, codes

    @property
    def coded(self) -> torch.Tensor:
        """Return the indices (b, 1, h, w) int64; -1 where the encoder's output is not finite."""
        sound = torch.isfinite(self.outputs).all(1)
        return torch.where(sound, self.indices, -1)[:, None]

    def kl_map(self) -> torch.Tensor:
        """Return log K, (b, 1, h, w): the KL from a uniform prior over the codes, a constant (section 3.1)."""
        return torch.full_like(self.outputs[:, :1], math.log(self.codes), dtype=torch.float32)

    def commitment(self) -> torch.Tensor:
        """Return the squared distance of the outputs to their codes, (b,); its gradient reaches the encoder alone."""
        return (self.outputs - self.vectors.detach()).square().flatten(1).sum(1)

    def codebook_loss(self) -> torch.Tensor:
        """Return the same distance, (b,), with a gradient that reaches the codes alone."""
        return (self.outputs.detach() - self.vectors).square().flatten(1).sum(1)

    def use(self) -> torch.Tensor:
        """Return (K, 1 + z): each code's share of all positions, and the sum of its outputs over their number."""
        outputs = rearrange(self.outputs.detach(), "b z h w -> (b h w) z")
        rows = torch.cat([torch.ones_like(outputs[:, :1]), outputs], 1) / len(outputs)  # (n, 1 + z)
        return rows.new_zeros(self.codes, rows.shape[1]).index_add_(0, self.indices.flatten(), rows)


def perplexity(use: torch.Tensor) -> float:
    """Return exp(entropy) of the codes' shares (K,): the number of equally used codes that would be as uncertain."""
    use = in_float64(use)
    share = use / use.sum()
    return math.exp(-torch.xlogy(share, share).sum().item())


class VectorQuantizer(nn.Module):
    """Takes the nearest of K learned vectors, by Euclidean distance over the channels (van den Oord et al. 2017)."""

    def __init__(self, config: VectorQuantizerConfig, latent_channels: int) -> None:
        super().__init__()
        self.features = latent_channels
        _check_codes(config.codes, f"vq: codes {config.codes}")
        self.codebook = nn.Parameter(torch.randn(config.codes, latent_channels))  # (K, z)

    def forward(self, features: torch.Tensor) -> Codes:
        """Return the codes nearest to features (b, z, h, w)."""
        with float32_island(features):
            outputs = features.float()
            codebook = self.codebook.float().to(outputs.device)  # tiles are put together on the CPU
            flat = rearrange(outputs.detach(), "b z h w -> (b h w) z")
            indices = torch.cat([_nearest(part, codebook.detach()) for part in flat.split(_POSITIONS)])
            indices = rearrange(indices, "(b h w) -> b h w", b=len(outputs), h=outputs.shape[2])
            return Codes(outputs, _look_up(codebook, indices), indices, len(codebook))

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Return latents (b, z, h, w) float32 of codes (b, h, w) int64, on the device of the codes."""
        return _look_up(self.codebook.float().to(indices.device), indices)


def _nearest(outputs: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return the indices (n,) int64 of the vectors nearest to outputs (n, z)."""
    return (codebook.square().sum(1) - 2 * outputs @ codebook.T).argmin(1)


def _look_up(codebook: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return rearrange(nn.functional.embedding(indices, codebook), "b h w z -> b z h w")


class FiniteScalarQuantizer(nn.Module):
    """Rounds each channel, bounded by tanh, to one of L levels evenly spaced from -1 to 1 (Mentzer et al. 2024, section
    3). A code's index has the channels' levels as digits, the first channel's the least significant."""

    _digits: torch.Tensor  # (2, z, 1, 1) int64: levels, and values of the digits

    def __init__(self, config: FiniteScalarConfig, latent_channels: int) -> None:
        super().__init__()
        self.features = latent_channels
        self.levels, self.codes = config.levels, math.prod(config.levels)
        if len(self.levels) != latent_channels or min(self.levels, default=0) < 2:
            raise ValueError(
                f"fsq: levels {self.levels} must be {latent_channels} numbers of at least 2, one a channel"
            )
        _check_codes(self.codes, f"fsq: levels {self.levels}, {self.codes} codes")
        places = [math.prod(self.levels[:c]) for c in range(latent_channels)]
        digits = torch.tensor([self.levels, places])[..., None, None]
        self.register_buffer("_digits", digits, persistent=False)  # on the device: a step copies nothing there

    def forward(self, features: torch.Tensor) -> Codes:
        """Return the codes of features (b, z, h, w)."""
        with float32_island(features):
            levels, places = self._digits.to(features.device)  # tiles are put together on the CPU
            bounded = levels / 2 * (1 + torch.tanh(features.float())) - 0.5  # -1/2 to L - 1/2
            digits = torch.minimum(bounded.detach().round().clamp(min=0), levels - 1)
            indices = (digits.nan_to_num().long() * places).sum(1)
            outputs = bounded * (2 / (levels - 1)) - 1  # (b, z, h, w)
            return Codes(outputs, self.look_up(indices), indices, self.codes)

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Return latents (b, z, h, w) float32 of codes (b, h, w) int64."""
        levels, places = self._digits.to(indices.device)
        digits = indices[:, None] // places % levels
        # Whole numbers below 2^24 and one division, correctly rounded: the same everywhere.
        return (2 * digits - (levels - 1)).float() / (levels - 1).float()


def _check_codes(codes: int, what: str) -> None:
    if not 2 <= codes <= MOST_CODES:
        raise ValueError(f"{what}: a codebook has 2 to {MOST_CODES} codes")
