"""Draw the prefix of a model's channels that an image keeps in training."""

import torch

from latent_codec.noise import fold, uniform
from train.objectives.losses import PREFIX


def drawn_prefixes(prefixes: tuple[int, ...], share: float, keys: torch.Tensor, channels: int) -> torch.Tensor:
    """Return how many of its first channels each image keeps, (b,) int64: all of them or, for a `share` of the images,
    one of the shorter prefixes, each as often as any other. `keys` (b,) int64 decide."""
    kept = torch.full_like(keys, channels)
    drawn = uniform(fold(keys, PREFIX))  # (b,)
    for i, prefix in enumerate(prefixes[:-1], 1):
        kept = torch.where((drawn < share * i / (len(prefixes) - 1)) & (kept == channels), prefix, kept)
    return kept


def within(kept: torch.Tensor, channels: int) -> torch.Tensor:
    """Return which of the channels images keep, (b, channels) bool, given their numbers (b,)."""
    return torch.arange(channels, device=kept.device) < kept[:, None]
