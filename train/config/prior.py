"""Configure the training of a context prior."""

import dataclasses

from latent_codec.errors import UserError

MAX_LEVELS = 6  # `latent_codec.prior.context.MAX_LEVELS`, without torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """How `train.prior` fits a context prior."""

    groups: tuple[int, ...] = (1, 3, 8)
    """Latent channels of each group but the last, those with most bits first; the last takes the rest."""
    levels: tuple[int, ...] = (3, 1, 1)
    """How often each group's grid is coarsened before its first pass: with 2, every fourth row and column comes first
    and what lies between follows in four passes. Groups without a number: not at all; numbers without a group: none."""
    width: int = 96
    """Features of the networks' layers; at most 112, or their integer sums would not be exact."""
    step_range: tuple[float, float] = (0.5, 8.0)
    """Quantiser steps that the prior learns, drawn evenly in their logarithm."""
    dithered: float = 0.2
    """Share of the images that are quantised with dither."""
    feedback: bool = True
    """Measure the decoder's error feedback, round by it here, and leave it to encoders in the model file."""
    steps: int = 8_000
    """Optimizer steps in all; the cosine learning rate ends here."""
    batch_size: int = 8
    """Images per optimizer step, over all processes."""
    crop: int = 32
    """Side of the square crops, in latent positions; even, and a multiple of the coarsest grid's spacing."""
    learning_rate: float = 2e-3
    lr_warmup_steps: int = 200
    count_images: int = 1_024
    """Images whose quantised latents give the frozen tables their frequencies."""
    seed: int = 0
    log_every: int = 100
    save_every: int = 500


def context_groups(sizes: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Channels of every group of a context prior, given those of all but the last; raises `UserError` if none are left
    for that one."""
    if min(sizes, default=1) < 1 or sum(sizes) >= channels:
        raise UserError(f"groups {sizes} must be positive and leave some of the {channels} channels for the last group")
    return (*sizes, channels - sum(sizes))


def context_levels(levels: tuple[int, ...], groups: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the groups; raises `UserError` if one is out of range."""
    if not all(0 <= level <= MAX_LEVELS for level in levels):
        raise UserError(f"levels {levels} must be from 0 to {MAX_LEVELS}")
    return levels[: len(groups)]


def context_spacing(levels: tuple[int, ...]) -> int:
    """Latent positions that the side of what a context prior trains on must be a multiple of."""
    return 2 ** max([1, *levels])
