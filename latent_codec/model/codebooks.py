"""Features -> one code of a codebook at each position: vector quantisation, and finite scalar quantisation.

Gradients go straight through: the encoder gets those of the latents as if nothing had been chosen (Bengio et al. 2013).
"""

import math

import torch
from einops import rearrange
from torch import nn

from latent_codec.model.config import FiniteScalarConfig, VectorQuantizerConfig
from latent_codec.precision import float32_island

MOST_CODES = 2**14
"""A bitstream's integers reach this far."""

_POSITIONS = 2**13  # whose distances to all codes are in memory at once


class Codes:
    """All mass on one of K codes at each position (van den Oord et al. 2017, eq. 1).

    outputs: (b, z, h, w) float32, the encoder's; vectors: the chosen codes in their place; indices: (b, h, w) int64.
    """

    def __init__(self, outputs: torch.Tensor, vectors: torch.Tensor, indices: torch.Tensor, codes: int) -> None:
        self.outputs, self.vectors, self.indices, self.codes = outputs, vectors, indices, codes
        self.clamped = torch.zeros((), device=outputs.device)

    @property
    def mean(self) -> torch.Tensor:
        # The values are the vectors' to the bit: what is added is 0.
        return self.vectors.detach() + (self.outputs - self.outputs.detach())

    @property
    def coded(self) -> torch.Tensor:
        """Indices (b, 1, h, w) int64; -1 where the encoder's output is not finite, which is nearest to nothing."""
        sound = torch.isfinite(self.outputs).all(1)
        return torch.where(sound, self.indices, -1)[:, None]

    def sample(self, noise: torch.Generator | torch.Tensor) -> torch.Tensor:
        """The mode: there is nothing to draw."""
        return self.mean

    def mode(self) -> torch.Tensor:
        return self.mean

    def kl_map(self) -> torch.Tensor:
        """log K, (b, 1, h, w): the KL against a uniform prior over the codes, a constant (the same, section 3.1)."""
        return torch.full_like(self.outputs[:, :1], math.log(self.codes))

    def kl(self) -> torch.Tensor:
        return self.kl_map().flatten(1).sum(1)

    def commitment(self) -> torch.Tensor:
        """Squared distance of the outputs to their codes, whose gradient is the encoder's alone, (b,)."""
        return (self.outputs - self.vectors.detach()).square().flatten(1).sum(1)

    def codebook_loss(self) -> torch.Tensor:
        """The same with the gradient of the codes alone, (b,)."""
        return (self.outputs.detach() - self.vectors).square().flatten(1).sum(1)

    @torch.no_grad()
    def use(self) -> torch.Tensor:
        """(K, 1 + z): of all positions the share that took each code, and the sum of its outputs over their number."""
        outputs = rearrange(self.outputs, "b z h w -> (b h w) z")
        rows = torch.cat([torch.ones_like(outputs[:, :1]), outputs], 1) / len(outputs)  # (n, 1 + z)
        return rows.new_zeros(self.codes, rows.shape[1]).index_add_(0, self.indices.flatten(), rows)

    def cpu(self) -> "Codes":
        return Codes(self.outputs.cpu(), self.vectors.cpu(), self.indices.cpu(), self.codes)


def perplexity(use: torch.Tensor) -> float:
    """exp(entropy) of the codes' shares (K,), 1 to K: how many codes, evenly used, would be as hard to guess."""
    share = use.double() / use.double().sum()
    return math.exp(-torch.xlogy(share, share).sum().item())


class VectorQuantizer(nn.Module):
    """The nearest of K vectors, by Euclidean distance over the channels (van den Oord et al. 2017)."""

    features_per_latent = 1

    def __init__(self, config: VectorQuantizerConfig, latent_channels: int) -> None:
        super().__init__()
        _check_codes(config.codes, f"vq: codes {config.codes}")
        self.codebook = nn.Parameter(torch.randn(config.codes, latent_channels))  # (K, z)

    def forward(self, features: torch.Tensor) -> Codes:
        """features: (b, z, h, w)."""
        with float32_island(features):
            outputs = features.float()
            codebook = self.codebook.float().to(outputs.device)  # tiles are put together on the CPU
            flat = rearrange(outputs.detach(), "b z h w -> (b h w) z")
            indices = torch.cat([_nearest(part, codebook.detach()) for part in flat.split(_POSITIONS)])
            indices = rearrange(indices, "(b h w) -> b h w", b=len(outputs), h=outputs.shape[2])
            return Codes(outputs, _look_up(codebook, indices), indices, len(codebook))

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Latents (b, z, h, w) float32 of codes (b, h, w) int64, wherever these are."""
        return _look_up(self.codebook.float().to(indices.device), indices)


def _nearest(outputs: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """(n, z) -> (n,) int64."""
    return (codebook.square().sum(1) - 2 * outputs @ codebook.T).argmin(1)


def _look_up(codebook: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return rearrange(nn.functional.embedding(indices, codebook), "b h w z -> b z h w")


class FiniteScalarQuantizer(nn.Module):
    """Each channel in one of L levels evenly spaced from -1 to 1 (Mentzer et al. 2024, section 3).

    A channel is bounded by tanh, whose range is divided into L parts of one width. The code's index has the channels'
    levels for digits, the first channel's the least.
    """

    features_per_latent = 1

    def __init__(self, config: FiniteScalarConfig, latent_channels: int) -> None:
        super().__init__()
        self.levels, self.codes = config.levels, math.prod(config.levels)
        if len(self.levels) != latent_channels or min(self.levels, default=0) < 2:
            raise ValueError(
                f"fsq: levels {self.levels} must be {latent_channels} numbers, one a channel, of at least 2"
            )
        _check_codes(self.codes, f"fsq: levels {self.levels}, {self.codes} codes")

    def forward(self, features: torch.Tensor) -> Codes:
        """features: (b, z, h, w)."""
        with float32_island(features):
            levels = self._per_channel(self.levels, features)
            bounded = levels / 2 * (1 + torch.tanh(features.float())) - 0.5  # -1/2 to L - 1/2
            digits = torch.minimum(bounded.detach().round().clamp(min=0), levels - 1)
            indices = (digits.nan_to_num().long() * self._per_channel(self._places, features).long()).sum(1)
            outputs = bounded * (2 / (levels - 1)) - 1  # (b, z, h, w)
            return Codes(outputs, self.look_up(indices), indices, self.codes)

    def look_up(self, indices: torch.Tensor) -> torch.Tensor:
        """Latents (b, z, h, w) float32 of codes (b, h, w) int64."""
        levels, places = (torch.tensor(t, device=indices.device)[:, None, None] for t in (self.levels, self._places))
        digits = indices[:, None] // places % levels
        # Whole numbers and one division in float64: the same everywhere.
        return ((2 * digits - (levels - 1)).double() / (levels - 1)).float()

    @property
    def _places(self) -> tuple[int, ...]:
        """What each channel's digit counts."""
        return tuple(math.prod(self.levels[:c]) for c in range(len(self.levels)))

    @staticmethod
    def _per_channel(values: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """(z, 1, 1) float32."""
        return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None, None]


def _check_codes(codes: int, what: str) -> None:
    if not 2 <= codes <= MOST_CODES:
        raise ValueError(f"{what}: a codebook has 2 to {MOST_CODES} codes")
