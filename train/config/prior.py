"""Configure the training of a context prior."""

import dataclasses

from latent_codec.errors import UserError

MAX_LEVELS = 6  # equals `latent_codec.prior.context.MAX_LEVELS`, whose module imports torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """Configure `train.prior`, which fits a context prior to stored latents."""

    groups: tuple[int, ...] = (1, 3, 8)
    """Latent channels of all groups but the last, which takes the rest; channels with most bits come first."""
    levels: tuple[int, ...] = (3, 1, 1)
    """Times that each group's grid is halved before its first pass; 0 for groups without a number.
    With 2, every fourth row and column comes first, and the positions in between follow in four passes."""
    width: int = 96
    """Features of the networks' layers, at most 112: integer sums would not be exact above."""
    step_range: tuple[float, float] = (0.5, 8.0)
    """Range of the quantiser steps to learn; they are drawn evenly in their logarithm."""
    dithered: float = 0.2
    """Share of the images that are quantised with dither."""
    feedback: bool = True
    """Measure the decoder's error feedback, use it in rounding, and store it in the model file for encoders."""
    steps: int = 8_000
    """Total optimizer steps. The cosine of the learning rate ends with the last one."""
    batch_size: int = 8
    """Images per optimizer step, over all processes."""
    crop: int = 32
    """Side of the square crops in latent positions: even, and a multiple of the coarsest grid's spacing."""
    learning_rate: float = 2e-3
    """Peak learning rate of Adam."""
    lr_warmup_steps: int = 200
    """Steps over which the learning rate rises linearly from 0."""
    count_images: int = 1_024
    """Images whose quantised latents are counted for the frequencies in the frozen tables."""
    seed: int = 0
    """Seed of the initial weights and of everything drawn in training."""
    log_every: int = 100
    """Steps between two lines of training losses in the log."""
    save_every: int = 500
    """Steps between two checkpoints."""


def context_layout(
    sizes: tuple[int, ...], levels: tuple[int, ...], channels: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the channels and the level of each group, given the channels of all but the last.
    Raises `UserError` if no channel is left for the last group, or a level is out of range."""
    if min(sizes, default=1) < 1 or sum(sizes) >= channels:
        raise UserError(f"groups {sizes} must be positive and leave some of the {channels} channels for the last group")
    if not all(0 <= level <= MAX_LEVELS for level in levels):
        raise UserError(f"levels {levels} must be from 0 to {MAX_LEVELS}")
    return (*sizes, channels - sum(sizes)), levels[: len(sizes) + 1]


def context_spacing(levels: tuple[int, ...]) -> int:
    """Return the latent positions of which a training crop's side must be a multiple."""
    return 2 ** max([1, *levels])
