"""Whole configurations by name. The command line overrides single fields."""

from collections.abc import Callable

from latent_codec.config import (
    CodecConfig,
    ConvConfig,
    DiagonalGaussianConfig,
    GaussianConfig,
    LinearConfig,
    LiteConfig,
)
from train.config import ELBOConfig, TrainConfig


def photo() -> TrainConfig:
    """The shipped codec: lite, f8, 32 channels, a fixed rate-distortion trade-off, closed-form start."""
    return TrainConfig(
        codec=CodecConfig(
            image_channels=3,
            latent_channels=32,
            backbone=LiteConfig(
                patch=8,
                stem=4,
                encoder_widths=(64, 192),
                encoder_depths=(1, 2),
                decoder_widths=(64, 192),
                decoder_depths=(2, 3),
            ),
            bottleneck=DiagonalGaussianConfig(logvar_min=-16.0, logvar_max=11.0),
            likelihood=GaussianConfig(scale="fixed", sigma=0.1),
        ),
        objective=ELBOConfig(
            beta=1.0, warmup="none", warmup_steps=0, free_bits=0.0, lpips_weight=0.0, lpips_net="alex"
        ),
        closed_form=True,
        steps=16_000,
        batch_size=8,
        accumulation=1,
        crop=128,
        flip=True,
        learning_rate=4e-4,
        lr_warmup_steps=200,
        weight_decay=0.0,
        max_grad_norm=30_000.0,
        ema_decay=0.999,
        channels_last=True,
        compile=False,
        seed=0,
        log_every=100,
        eval_every=2_000,
        eval_crop=256,
        save_every=1_000,
        keep_checkpoints=2,
        max_skipped=25,
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {"photo": photo}
