"""Whole configurations of latent diffusion models by name. The command line overrides single fields."""

import dataclasses
from collections.abc import Callable

from latent_codec.diffusion.config import TransformerConfig
from train.config.diffusion import DiffusionConfig, FlowConfig


def photo() -> DiffusionConfig:
    """256x256 photographs by the shipped codec: latents of 32x32, tokens of 2x2, DiT-S; for a GPU."""
    return DiffusionConfig(
        transformer=TransformerConfig(size=32, patch=2, depth=12, heads=6, head_width=64),
        objective=FlowConfig(time_mean=0.0, time_std=1.0, label_dropout=0.1),
        flip=False,
        steps=100_000,
        batch_size=256,
        accumulation=1,
        learning_rate=2e-4,
        lr_warmup_steps=1_000,
        weight_decay=0.0,
        max_grad_norm=1.0,
        ema_decay=0.9995,
        compile=False,
        seed=0,
        log_every=100,
        eval_every=5_000,
        save_every=1_000,
        keep_checkpoints=2,
        max_skipped=25,
    )


def mnist() -> DiffusionConfig:
    """MNIST in latents of 8x8, tokens of 2x2: minutes on two CPU cores."""
    return dataclasses.replace(
        photo(),
        transformer=TransformerConfig(size=8, patch=2, depth=6, heads=4, head_width=32),
        steps=2_000,
        batch_size=128,
        learning_rate=1e-3,
        lr_warmup_steps=100,
        ema_decay=0.998,
        eval_every=1_000,
        save_every=500,
    )


PRESETS: dict[str, Callable[[], DiffusionConfig]] = {"photo": photo, "mnist": mnist}
